"""Files are whole or absent."""

import os

import pytest

from utils.atomic import check_writable, replacing, write_text
from utils.errors import InputError


def test_replaces_only_on_success(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one"
    with replacing(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one" and temporary.suffix == ".txt"
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_permissions_are_the_usual_ones(tmp_path):
    write_text(tmp_path / "a", "")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_unwritable_folders_are_found_before_work(tmp_path):
    check_writable(tmp_path / "not" / "yet" / "there")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot write"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(InputError, match="cannot write"):
        write_text(tmp_path / "file" / "below", "")
