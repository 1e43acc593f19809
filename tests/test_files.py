"""Files are whole or absent, and one process at a time writes them."""

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from tests.forkserver import Server
from utils import files
from utils.errors import InputError
from utils.files import check_writable, hold, replacing, write_text


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


# ---- what other processes do ----------------------------------------------------------------


def write_often(path, letter, times):
    for _ in range(times):
        write_text(path, letter * 50_000)


def pause(go_on):
    Path(f"{go_on}.started").touch()
    until(Path(go_on).exists)


def write_slowly(path, go_on):
    with replacing(path) as temporary:
        temporary.write_text("half")
        pause(go_on)
        temporary.write_text("slow")


def hold_until(path, go_on):
    with hold(path):
        pause(go_on)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server("tests.test_files", tmp_path_factory.mktemp("logs")) as server:
        yield server


# ---- replacing ------------------------------------------------------------------------------


def test_replaces_only_on_success(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "one")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "one"
    with replacing(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one" and temporary.name == ".a.txt.tmp.txt"
    assert path.read_text() == "two"
    assert names(tmp_path) == ["deep", "deep/a.txt"]


def test_a_device_is_not_replaced(tmp_path, monkeypatch):
    path = tmp_path / "null"  # a real one would be lost where this fails
    monkeypatch.setattr(Path, "is_char_device", lambda self: self == path)
    with pytest.raises(InputError, match="null: a device, name a file"):
        write_text(path, "")
    assert not names(tmp_path)


def test_permissions_are_the_usual_ones(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("leftover", ["", "longer than what comes now"])
def test_what_a_killed_process_left_is_reused(tmp_path, leftover):
    path = tmp_path / "a.json"
    (tmp_path / ".a.json.tmp.json").write_text(leftover)
    with replacing(path) as temporary:
        assert temporary.read_text() == ""
        temporary.write_text("whole")
    assert path.read_text() == "whole" and names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize(
    ("owner", "function"),
    [(Path, "mkdir"), (files.io, "FileIO"), (Path, "write_text"), (os, "fsync"), (Path, "replace")],
)
def test_a_refusal_names_the_file_and_leaves_the_old_one(
    owner, function, code, tmp_path, monkeypatch
):
    path = tmp_path / "a"
    write_text(path, "old")

    def refuse(*_args, **_kwargs):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patches:
        patches.setattr(owner, function, refuse)
        with pytest.raises(InputError, match=f"cannot write {path}: {os.strerror(code)}"):
            write_text(path, "new")
        if function in ("mkdir", "FileIO"):
            with pytest.raises(InputError, match=f"cannot write .*lock: {os.strerror(code)}"):
                hold(tmp_path / "lock").__enter__()
    assert path.read_text() == "old" and names(tmp_path) == ["a"]


@pytest.mark.parametrize("place", ["folder", "file/below", "/proc/none/a", "."])
def test_places_where_no_file_can_be(tmp_path, place, monkeypatch):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=f"cannot write {place}: "):
        write_text(place, "")
    if place != ".":
        with pytest.raises(InputError, match="cannot write"):
            hold(place).__enter__()
    assert names(tmp_path) == ["file", "folder"]


def test_unwritable_folders_are_found_before_work(tmp_path):
    check_writable(tmp_path / "not" / "yet" / "there")
    assert not names(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write to .*below: Not a directory"):
        check_writable(tmp_path / "file" / "below")


def test_two_processes_replace_one_file_at_once(server, tmp_path):
    path = tmp_path / "a.txt"
    jobs = [server.start("write_often", str(path), letter, 60) for letter in "abc"]
    seen = set()
    while any(job.status() is None for job in jobs):
        if path.exists():
            text = path.read_text()
            assert len(text) == 50_000 and len(set(text)) == 1
            seen.add(text[0])
    assert [job.wait() for job in jobs] == [0, 0, 0], [job.printed for job in jobs]
    assert seen <= set("abc") and names(tmp_path) == ["a.txt"]


def test_a_writer_waits_for_the_one_before(server, tmp_path):
    path, go_on = tmp_path / "a", tmp_path / "go"
    slow = server.start("write_slowly", str(path), str(go_on))
    until((tmp_path / "go.started").exists)
    quick = server.start("write_often", str(path), "q", 1)
    assert quick.status() is None and not path.exists()
    go_on.touch()
    assert (slow.wait(), quick.wait()) == (0, 0)
    assert path.read_text() == "q" * 50_000 and names(tmp_path) == ["a", "go", "go.started"]


def test_a_name_is_given_up_with_the_rename(tmp_path, monkeypatch):
    """Another process may begin to write between the rename and the end of `replacing`."""
    path, rename = tmp_path / "a", Path.replace

    def rename_and_begin(self, target):
        rename(self, target)
        self.write_text("another process's")

    monkeypatch.setattr(Path, "replace", rename_and_begin)
    write_text(path, "ours")
    assert (tmp_path / ".a.tmp").read_text() == "another process's"


@pytest.mark.parametrize("missing", ["module", "support"])
def test_without_locks_files_are_still_written(missing, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    if missing == "module":
        monkeypatch.setattr(files, "fcntl", None)
    else:
        monkeypatch.setattr(fcntl, "flock", refuse)
    with hold(tmp_path / "x" / "lock", refusal="no"):
        write_text(tmp_path / "a", "text")
        with pytest.raises(RuntimeError), replacing(tmp_path / "a"):
            raise RuntimeError
    assert (tmp_path / "a").read_text() == "text" and names(tmp_path) == ["a"]


# ---- hold -----------------------------------------------------------------------------------


def test_hold_leaves_nothing_but_what_was_written(tmp_path):
    with hold(tmp_path / "a" / "b" / "lock"), hold(tmp_path / "a" / "c" / "lock"):
        assert names(tmp_path) == ["a", "a/b", "a/b/lock", "a/c", "a/c/lock"]
        assert f"process {os.getpid()} on " in (tmp_path / "a/b/lock").read_text()
        (tmp_path / "a" / "c" / "result").touch()
    assert names(tmp_path) == ["a", "a/c", "a/c/result"]
    with hold(tmp_path / "gone" / "lock"):
        (tmp_path / "gone" / "lock").unlink()
    assert names(tmp_path) == ["a", "a/c", "a/c/result"]


def test_a_held_lock_is_refused_or_waited_for(server, tmp_path):
    lock, go_on = tmp_path / "runs" / "lock", tmp_path / "go"
    job = server.start("hold_until", str(lock), str(go_on))
    until((tmp_path / "go.started").exists)
    said = rf"can't train here: process {job.pid} on .* is already using it; wait or end it"
    with pytest.raises(InputError, match=said), hold(lock, "can't train here"):
        pass
    waiting = server.start("hold_until", str(lock), str(go_on))
    until(lambda: f"waiting for process {job.pid} on " in waiting.printed)
    os.kill(job.pid, signal.SIGKILL)  # leaves its file, with its name in it
    assert job.wait() == -signal.SIGKILL
    until(lambda: lock.read_text().startswith(f"process {waiting.pid} on "))
    go_on.touch()
    assert waiting.wait() == 0 and not lock.exists()
    with hold(lock, "can't train here"):
        pass
    assert waiting.printed.count("\n") == 1
