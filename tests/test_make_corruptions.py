"""make_corruptions.py: layouts that read back, whole files or none, nothing lost, the sheet."""

from __future__ import annotations

import io
import json
import os
import re
import signal
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import make_corruptions as script
from datasets import corruptions
from datasets.corrupted import Copies, corrupted_set, generate_chunks, load_published
from datasets.corruptions import corrupt, corrupt_chunks
from tests.folders import write_folders
from tests.forkserver import Server
from utils.errors import InputError

SIDE = 8


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch):
    monkeypatch.setattr(os, "sync", lambda: None)  # all disks, which may be busy otherwise
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server("tests.test_make_corruptions", tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A set of image files, 280 and 6 images of 8×8 in two classes."""
    root = tmp_path_factory.mktemp("clean")
    # More than one block of draws in train, so that a copy is made in several chunks.
    write_folders(root, {"train": 140, "test": 3}, size=(SIDE, SIDE))
    return root


def run(*flags: object, data: Path, dataset: str = "folder") -> None:
    argv = ["--dataset", dataset, "--data", str(data), "--device", "cpu", *map(str, flags)]
    args = script.parse_args(argv)
    script.preview(args) if args.preview else script.make(args)


def refused(message: str, *flags: object, data: Path) -> None:
    with pytest.raises(InputError, match=message):
        run(*flags, data=data)


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` but the list of what was made."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {str(path.relative_to(folder)): path.read_bytes() for path in files}
    return {name: file for name, file in files.items() if name != ".made.json"}


def reads_back(out: Path, clean: datasets.ImageSet, name: str, severity: int, split: str, **how):
    """The copy under `out` is the one generated in memory, by way of JPEG files where it is so."""
    made = corrupted_set(clean, name, split, Copies(severity, **how))
    found = load_published(clean, out, name, severity, split)
    made = made if found.source.endswith(".npy") else as_jpeg(made)
    assert torch.equal(found.images, made.images) and torch.equal(found.labels, clean.labels)


def as_jpeg(made: datasets.ImageSet) -> datasets.ImageSet:
    """Each image through a JPEG file of quality 85."""
    images = []
    for image in made.images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
        images.append(torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1))
    return replace(made, images=torch.stack(images))


# ---- layouts --------------------------------------------------------------------------------


def test_chunks_are_corrupt_in_pieces(monkeypatch):
    images = torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8)
    for threads, blocks in ((1, 1), (2, 1), (1, 2)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(corruptions, "_blocks_per_chunk", lambda *_, n=blocks: n)
        for name in ("gaussian_noise", "fog", "contrast"):
            whole = corrupt(images, name, 3, torch.Generator().manual_seed(4))
            pieces = list(corrupt_chunks(images, name, 3, torch.Generator().manual_seed(4)))
            assert len(pieces) == -(-600 // (256 * threads * blocks))
            assert torch.equal(torch.cat(pieces), whole)


def test_rws_arrays_read_back(data, tmp_path):
    flags = ("--corruption", "gaussian_noise", "contrast", "--severity", 3, "--seed", 2)
    run(*flags, "--out", tmp_path, data=data)
    arrays = ("contrast.npy", "gaussian_noise.npy", "labels.npy")
    assert list(content(tmp_path)) == [f"{part}/{a}" for part in ("test", "train") for a in arrays]
    for part, split in (("train", "all"), ("test", "test")):
        clean = datasets.load("folder", data, split)
        array = np.load(tmp_path / part / "gaussian_noise.npy")
        assert array.dtype == np.uint8 and array.shape == (len(clean), SIDE, SIDE, 3)
        for name in ("gaussian_noise", "contrast"):
            reads_back(tmp_path, clean, name, 3, split, seed=2)
    # Training and validation images of the copy are those of the clean split.
    whole = load_published(datasets.load("folder", data, "all"), tmp_path, "contrast", 3, "all")
    for split in ("train", "val"):
        clean = datasets.load("folder", data, split)
        found = load_published(clean, tmp_path, "contrast", 3, split)
        assert torch.equal(found.images, whole.images[clean.rows])
        assert torch.equal(found.labels, clean.labels)
    with pytest.raises(InputError, match=r"holds severity \[3\], --severity is 5"):
        load_published(clean, tmp_path, "gaussian_noise", 5, "val")


def test_cifar_c_array_reads_back(data, tmp_path):
    run("--layout", "cifar-c", "--corruption", "gaussian_noise", "--out", tmp_path, data=data)
    assert list(content(tmp_path)) == ["gaussian_noise.npy", "labels.npy"]
    clean = datasets.load("folder", data, "test")
    assert np.load(tmp_path / "gaussian_noise.npy").shape == (5 * len(clean), SIDE, SIDE, 3)
    assert np.array_equal(np.load(tmp_path / "labels.npy"), np.tile(clean.labels, 5))
    for severity in range(1, 6):
        reads_back(tmp_path, clean, "gaussian_noise", severity, "test")


def test_folders_read_back(data, tmp_path):
    flags = ("--layout", "folders", "--corruption", "gaussian_noise", "--severity", 1, 4)
    run(*flags, "--out", tmp_path, data=data)
    files = list(content(tmp_path))
    assert len(files) == 2 * (280 + 6) and "val/gaussian_noise/4/b/2.JPEG" in files
    folders = {f"{part}/gaussian_noise/{s}" for part in ("train", "val") for s in (1, 4)}
    assert {file.rsplit("/", 2)[0] for file in files} == folders
    for split, severity in (("all", 1), ("all", 4), ("test", 1), ("test", 4)):
        clean = datasets.load("folder", data, split)
        reads_back(tmp_path, clean, "gaussian_noise", severity, split)


def test_folders_of_a_set_without_files_read_back(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.synthetic.SIZES, "test", 200)
    flags = ("--layout", "folders", "--split", "test", "--corruption", "contrast")
    run(*flags, "--severity", 5, "--out", tmp_path / "out", data=tmp_path, dataset="synthetic")
    clean = datasets.load("synthetic", split="test")
    reads_back(tmp_path / "out", clean, "contrast", 5, "test")


def test_folders_that_can_not_be_written_to(data, tmp_path):
    refused("holds the clean images", "--layout", "folders", "--out", data, data=data)
    write_folders(tmp_path, {"train": 1, "test": 1}, size=(SIDE, SIDE))
    Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "test" / "a" / "0.bmp")
    flags = ("--layout", "folders", "--out", tmp_path / "out")
    refused("a/0 names 2 images", *flags, data=tmp_path)


# ---- whole or absent ------------------------------------------------------------------------

FLAGS = ("--corruption", "gaussian_noise", "contrast", "--severity", "2")


def make_until(moment: int, argv: list[str]) -> None:
    """Make what `argv` says; killed in its second training output (0), or before a move (1, …)."""
    real, moves = generate_chunks, []

    def kill() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def chunks(clean, name, split, how):
        for chunk in real(clean, name, split, how):
            yield chunk
            if (name, split) == ("contrast", "all"):  # after the first of two chunks
                kill()

    def killing(move):
        def counted(path, target):
            moves.append(path)
            return kill() if len(moves) == moment else move(path, target)

        return counted

    torch.set_num_threads(1)
    os.sync = lambda: None
    script.generate_chunks = chunks
    Path.rename, Path.replace = killing(Path.rename), killing(Path.replace)
    script.main(argv)


@pytest.mark.parametrize(("layout", "one"), [("rws", "{}.npy"), ("folders", "{}/2")])
def test_a_killed_run_leaves_no_half_file_and_is_completed(
    server, data, tmp_path, capsys, layout, one
):
    """Killed within an output, and before each of the six moves that replace two outputs."""
    flags = (*FLAGS, "--layout", layout, "--out")
    run(*flags, tmp_path / "whole", data=data)
    whole = content(tmp_path / "whole")
    test_only = {name: file for name, file in whole.items() if not name.startswith("train/")}
    for moment in range(7):
        argv, out = [], tmp_path / str(moment)
        if moment:
            argv = ["--split", "test", "--overwrite"]
            run(*flags, out, *argv, "--seed", 1, data=data)
        argv += ["--dataset", "folder", "--data", data, "--device", "cpu", *flags, out]
        job = server.start("make_until", moment, list(map(str, argv)))
        assert job.wait() == -signal.SIGKILL, job.printed
        assert "img/s" not in job.printed  # no bar in a log
    for moment in range(1, 7):
        out = tmp_path / str(moment)
        run(*flags, out, "--split", "test", "--overwrite", data=data)
        assert content(out) == test_only  # nothing left over either

    out = tmp_path / "0"
    first, half = (out / "train" / one.format(name) for name in ("gaussian_noise", "contrast"))
    left = {path.name for path in half.parent.iterdir() if path.name[0] == "."}
    assert first.exists() and not half.exists()
    assert left == {f".{half.name}.tmp", f".{half.name}.lock"}
    before = first.stat()
    capsys.readouterr()
    run(*flags, out, data=data)
    shown = capsys.readouterr()
    assert "3 made, 1 finished before" in shown.out and not shown.err
    assert content(out) == whole and first.stat().st_ino == before.st_ino
    assert first.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("layout", ["rws", "folders"])
def test_what_is_there_is_not_overwritten_unasked(data, tmp_path, layout, monkeypatch):
    flags = (*FLAGS, "--layout", layout, "--out", tmp_path, "--split", "test")
    run(*flags, data=data)
    whole = content(tmp_path)

    def full(*args):
        yield from ()
        raise OSError(28, "No space left on device")

    refused("there already, made with seed 0, not 1", *flags, "--seed", 1, data=data)
    with monkeypatch.context() as patched:
        patched.setattr(script, "generate_chunks", full)
        message = r"cannot write .*No space left"
        refused(message, *flags, "--seed", 1, "--overwrite", data=data)
    assert content(tmp_path) == whole

    run(*flags, "--seed", 1, "--overwrite", data=data)
    noise = next(key for key in whole if "gaussian_noise" in key)
    assert content(tmp_path).keys() == whole.keys() and content(tmp_path)[noise] != whole[noise]
    for damage in ("[]", '{"a', '{"test/contrast.npy": 3, "val/contrast/2": 3}'):
        (tmp_path / ".made.json").write_text(damage)
        refused("there already, not made by this script", *flags, data=data)
    run(*flags, "--overwrite", data=data)
    assert content(tmp_path) == whole

    monkeypatch.setattr(script, "generate_chunks", None)
    run(*flags, "--overwrite", data=data)  # these settings made it, so there is nothing to do
    made = json.loads((tmp_path / ".made.json").read_text())
    clean = datasets.fingerprint(datasets.load("folder", data, "test"))
    settings = {"dataset": "folder", "part": "test", "clean images": clean, "seed": 0}
    settings |= {"corruption": "contrast", "severity": [2]}
    assert len(made) == 2 and settings in made.values()


def test_other_labels_are_not_overwritten_unasked(data, tmp_path):
    flags = ("--corruption", "contrast", "--split", "test", "--out", tmp_path)
    labels = tmp_path / "test" / "labels.npy"
    labels.parent.mkdir()
    np.save(labels, np.zeros(6, np.int64))
    refused(r"labels\.npy is there already and holds other labels", *flags, data=data)
    assert not (tmp_path / "test" / "contrast.npy").exists()
    run(*flags, "--overwrite", data=data)
    assert np.load(labels).tolist() == [0, 0, 0, 1, 1, 1]


def test_frost_textures_are_told_apart(data, tmp_path, capsys):
    photographs = tmp_path / "frost"
    photographs.mkdir()
    for name in ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg"):
        Image.new("RGB", (320, 320), (0, 90, 200)).save(photographs / name)
    flags = ("--corruption", "frost", "--split", "test", "--out", tmp_path / "out")
    run(*flags, "--frost_dir", photographs, data=data)
    printed = capsys.readouterr().out
    assert f"photographs in {photographs}" in printed
    assert "constants    CIFAR-10-C (32×32)" in printed
    refused("frost texture .*, not procedural", *flags, data=data)
    (photographs / "frost1.png").write_bytes((photographs / "frost4.jpg").read_bytes())
    refused("frost texture", *flags, "--frost_dir", photographs, data=data)


# ---- space and memory -----------------------------------------------------------------------


def test_space_is_checked_first(data, tmp_path, monkeypatch, capsys):
    def leave(free):
        usage = namedtuple("usage", "total used free")(0, 0, free)
        monkeypatch.setattr(script.shutil, "disk_usage", lambda _: usage)

    needed = 2 * (280 + 6) * SIDE * SIDE * 3 + 4 * 128
    flags = (*FLAGS, "--out", tmp_path / "new" / "out")
    leave(needed - 1)
    refused(r"--out .*: 0\.11 MB to write, 0\.11 MB free there", *flags, data=data)
    assert not list(tmp_path.iterdir())
    leave(needed)
    run(*flags, data=data)
    assert "0.11 MB to write, 0.11 MB free" in capsys.readouterr().out
    # What is finished needs no space, what is replaced only while both are there.
    leave(0)
    run(*flags, data=data)
    refused(r": 0\.05 MB to write, 0\.00 MB free", *flags, "--seed", 1, "--overwrite", data=data)


def test_folders_take_no_more_than_announced(data, tmp_path):
    flags = ("--layout", "folders", "--split", "test", "--severity", 5, "--out", tmp_path)
    run(*flags, "--corruption", "gaussian_noise", data=data)
    clean = datasets.load("folder", data, "test")
    announced = script.bytes_for("val/gaussian_noise/5", {}, clean)
    on_disk = sum(-(-len(file) // 4096) * 4096 for file in content(tmp_path).values())
    assert on_disk <= announced <= 2 * on_disk


def test_no_more_than_a_chunk_is_corrupted_at_once(data, tmp_path, monkeypatch):
    sizes = []

    def watched(*args):
        for images in generate_chunks(*args):
            sizes.append(len(images))
            yield images

    monkeypatch.setattr(script, "generate_chunks", watched)
    run("--corruption", "contrast", "--split", "train", "--out", tmp_path, data=data)
    assert sizes == [256, 24]


# ---- preview and flags ----------------------------------------------------------------------


def test_preview_writes_the_sheet_only(data, tmp_path, capsys, monkeypatch):
    drawn, real = [], script.sheet
    monkeypatch.setattr(script, "sheet", lambda *args: drawn.append(args) or real(*args))
    path, names = tmp_path / "sheet.png", ["contrast", "gaussian_noise"]
    flags = ("--corruption", *names, "--preview", path)
    run(*flags, "--out", tmp_path / "out", data=data)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    row = int(re.search(r"row (\d+)", capsys.readouterr().out)[1])
    sample = datasets.load("folder", data, "test").subset([row])
    ((pictures, rows, columns),) = drawn
    assert rows == names and columns == ["clean", *(f"severity {s}" for s in range(1, 6))]
    for r, name in enumerate(names):
        made = [corrupted_set(sample, name, "test", Copies(s, 0)) for s in range(1, 6)]
        expected = torch.cat([shown.images for shown in (sample, *made)])
        assert torch.equal(pictures[6 * r : 6 * r + 6], expected)

    # On the page each pixel is a square of 14, and the clean picture stands first in both rows.
    page = np.asarray(Image.open(path).convert("RGB"))
    clean = sample.images[0].permute(1, 2, 0).numpy().repeat(14, 0).repeat(14, 1)
    places = [
        (top, left)
        for top in range(page.shape[0] - len(clean))
        for left in np.flatnonzero((page[top] == clean[0, 0]).all(-1)).tolist()
        if np.array_equal(page[top : top + len(clean), left : left + len(clean)], clean)
    ]
    (top, left), second = places
    assert second == (top + 14 * (SIDE + 1), left) and left < page.shape[1] / 3

    first = path.read_bytes()
    refused("there already; --overwrite", *flags, data=data)
    run(*flags, "--overwrite", data=data)
    assert path.read_bytes() == first
    run(*flags, "--overwrite", "--seed", 3, data=data)
    assert path.read_bytes() != first


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out o --corruption fog fog", "names fog twice"),
        ("--out o --corruption all fogg", "--corruption fogg: unknown .* .did you mean 'fog'"),
        ("--out o --dataset cifar11", "unknown --dataset 'cifar11'"),
        ("--preview a.png --split train test", "name one --split"),
    ],
)
def test_flags_are_judged_before_anything_is_read(flags, message):
    with pytest.raises(InputError, match=message):
        script.parse_args(flags.split())


@pytest.mark.parametrize(
    ("flags", "severity", "split"),
    [
        ("--out o --corruption all", [5], ["train", "test"]),
        ("--out o --layout cifar-c", [1, 2, 3, 4, 5], ["test"]),
        ("--out o --layout folders --severity 3 1", [1, 3], ["train", "test"]),
        ("--preview a.png", [1, 2, 3, 4, 5], ["test"]),
    ],
)
def test_all_means_all_and_layouts_have_defaults(flags, severity, split):
    args = script.parse_args(flags.split())
    assert tuple(args.corruption) == corruptions.CORRUPTIONS
    assert (args.severity, args.split) == (severity, split)
