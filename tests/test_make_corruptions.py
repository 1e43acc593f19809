"""make_corruptions.py: layouts that read back, whole files or none, nothing lost, the sheet."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import make_corruptions
from datasets import corruptions
from datasets.corrupted import draws_of, generate, generate_chunks, load_published
from datasets.corruptions import corrupt, corrupt_chunks
from utils.errors import InputError

SIDE = 8
# More than one block of draws in train, so that a copy is made in several chunks.
PER_CLASS = {"train": 140, "test": 3}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A set of image files, 280 and 6 images of 8×8 in two classes."""
    root = tmp_path_factory.mktemp("clean")
    rng = np.random.default_rng(0)
    for part, count in PER_CLASS.items():
        for name in "ab":
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(60, 200, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{name}_{i}.png")
    return root


def run(*flags: object, data: Path, dataset: str = "folder") -> None:
    argv = ["--dataset", dataset, "--data", str(data), "--device", "cpu", *map(str, flags)]
    args = make_corruptions.parse_args(argv)
    make_corruptions.preview(args) if args.preview else make_corruptions.make(args)


def content(folder: Path) -> dict[str, bytes]:
    """Every file under `folder` but the records."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".made" not in path.parts
    }


def as_jpeg(images: torch.Tensor) -> torch.Tensor:
    """Each image (3, H, W) through a JPEG file of quality 85."""
    out = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=85)
        out.append(torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1))
    return torch.stack(out)


# ---- layouts --------------------------------------------------------------------------------


def test_chunks_are_corrupt_in_pieces(monkeypatch):
    images = torch.randint(0, 256, (600, 3, 8, 8), dtype=torch.uint8)
    for threads, blocks in ((1, 1), (2, 1), (1, 2)):
        torch.set_num_threads(threads)
        monkeypatch.setattr(corruptions, "_blocks_per_chunk", lambda images, blocks=blocks: blocks)
        for name in ("gaussian_noise", "fog", "contrast"):
            whole = corrupt(images, name, 3, torch.Generator().manual_seed(4))
            pieces = list(corrupt_chunks(images, name, 3, torch.Generator().manual_seed(4)))
            assert len(pieces) == -(-600 // (256 * threads * blocks))
            assert torch.equal(torch.cat([piece for _, piece in pieces]), whole)
            assert all(torch.equal(whole[rows], piece) for rows, piece in pieces)


def test_rws_arrays_read_back(data, tmp_path):
    flags = ("--corruption", "gaussian_noise", "contrast", "--severity", 3, "--seed", 2)
    run(*flags, "--out", tmp_path, data=data)
    arrays = ("contrast.npy", "gaussian_noise.npy", "labels.npy")
    assert list(content(tmp_path)) == [f"{part}/{a}" for part in ("test", "train") for a in arrays]
    for part, split in (("train", "all"), ("test", "test")):
        clean = datasets.load("folder", data, split)
        array = np.load(tmp_path / part / "gaussian_noise.npy")
        assert array.dtype == np.uint8 and array.shape == (len(clean), SIDE, SIDE, 3)
        assert np.array_equal(np.load(tmp_path / part / "labels.npy"), clean.labels)
        for name in ("gaussian_noise", "contrast"):
            made = generate(clean, name, 3, split, 2)
            found = load_published(clean, tmp_path, name, 3, split)
            assert torch.equal(found.images, made.images)
            assert torch.equal(found.labels, clean.labels)
    # Training and validation images of the copy are those of the clean split.
    whole = generate(datasets.load("folder", data, "all"), "gaussian_noise", 3, "all", 2)
    for split in ("train", "val"):
        clean = datasets.load("folder", data, split)
        found = load_published(clean, tmp_path, "gaussian_noise", 3, split)
        assert torch.equal(found.images, whole.images[clean.rows])


def test_cifar_c_array_reads_back(data, tmp_path):
    run("--layout", "cifar-c", "--corruption", "gaussian_noise", "--out", tmp_path, data=data)
    assert list(content(tmp_path)) == ["gaussian_noise.npy", "labels.npy"]
    clean = datasets.load("folder", data, "test")
    assert np.load(tmp_path / "gaussian_noise.npy").shape == (5 * len(clean), SIDE, SIDE, 3)
    assert np.array_equal(np.load(tmp_path / "labels.npy"), np.tile(clean.labels, 5))
    for severity in range(1, 6):
        found = load_published(clean, tmp_path, "gaussian_noise", severity, "test")
        made = generate(clean, "gaussian_noise", severity, "test", 0)
        assert torch.equal(found.images, made.images)


def test_folders_read_back(data, tmp_path):
    flags = ("--layout", "folders", "--corruption", "gaussian_noise", "--severity", 1, 4)
    run(*flags, "--out", tmp_path, data=data)
    files = list(content(tmp_path))
    assert len(files) == 2 * (280 + 6)
    assert {f.rsplit("/", 2)[0] for f in files} == {
        f"{part}/gaussian_noise/{severity}" for part in ("train", "val") for severity in (1, 4)
    }
    assert "val/gaussian_noise/4/b/b_2.JPEG" in files
    for split in ("all", "test"):
        clean = datasets.load("folder", data, split)
        for severity in (1, 4):
            made = generate(clean, "gaussian_noise", severity, split, 0)
            found = load_published(clean, tmp_path, "gaussian_noise", severity, split)
            assert torch.equal(found.images, as_jpeg(made.images))
            assert torch.equal(found.labels, clean.labels)


def test_folders_of_a_set_without_files_read_back(tmp_path, monkeypatch):
    monkeypatch.setitem(datasets.synthetic.SIZES, "test", 200)
    flags = ("--layout", "folders", "--split", "test", "--corruption", "contrast")
    run(*flags, "--severity", 5, "--out", tmp_path / "out", data=tmp_path, dataset="synthetic")
    clean = datasets.load("synthetic", split="test")
    found = load_published(clean, tmp_path / "out", "contrast", 5, "test")
    assert torch.equal(found.images, as_jpeg(generate(clean, "contrast", 5, "test", 0).images))
    assert torch.equal(found.labels, clean.labels)


def test_equal_stems_cannot_share_a_folder(data, tmp_path):
    for part in ("train", "test"):
        for suffix in ("png", "bmp"):
            path = tmp_path / part / "a" / f"x.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SIDE, SIDE)).save(path)
    with pytest.raises(InputError, match="a/x names 2 images"):
        run("--layout", "folders", "--out", tmp_path / "out", data=tmp_path)


# ---- whole or absent ------------------------------------------------------------------------

FLAGS = ("--corruption", "gaussian_noise", "contrast", "--severity", "2")
KILLED = """
import os, signal, sys, torch
import make_corruptions as script
torch.set_num_threads(1)
real = script.generate_chunks

def killing(clean, name, severity, split, *rest):
    for chunk in real(clean, name, severity, split, *rest):
        yield chunk
        if (name, split) == ("contrast", "all"):  # after the first of two chunks
            os.kill(os.getpid(), signal.SIGKILL)

script.generate_chunks = killing
for layout in ("rws", "folders"):
    child = os.fork()
    if not child:
        flags = [*sys.argv[2:], "--layout", layout, "--out", f"{sys.argv[1]}/{layout}"]
        script.make(script.parse_args(flags))
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print("signal", os.WTERMSIG(status))
"""


def test_a_killed_run_leaves_no_half_file_and_is_completed(data, tmp_path, capsys):
    flags = ["--dataset", "folder", "--data", str(data), "--device", "cpu", *FLAGS]
    shown = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "killed"), *flags],
        cwd=Path(make_corruptions.__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert shown.stdout.count(f"signal {int(signal.SIGKILL)}") == 2, shown.stderr
    assert "it/s" not in shown.stderr and "img/s" not in shown.stderr  # no bar in a log
    for layout, one in (("rws", "train/{}.npy"), ("folders", "train/{}/2")):
        out = tmp_path / "killed" / layout
        first, half = out / one.format("gaussian_noise"), out / one.format("contrast")
        left = [path for path in half.parent.iterdir() if path.name.startswith(".")]
        assert first.exists() and not half.exists() and len(left) == 1
        before = first.stat()
        capsys.readouterr()
        run(*FLAGS, "--layout", layout, "--out", out, data=data)
        shown = capsys.readouterr()
        assert "3 made, 1 finished before" in shown.out and not shown.err
        assert first.stat().st_mtime_ns == before.st_mtime_ns
        assert first.stat().st_ino == before.st_ino
        run(*FLAGS, "--layout", layout, "--out", tmp_path / "whole" / layout, data=data)
        assert content(out) == content(tmp_path / "whole" / layout)  # nothing left over either


@pytest.mark.parametrize("layout", ["rws", "folders"])
def test_an_error_leaves_the_old_output(data, tmp_path, monkeypatch, layout):
    flags = (*FLAGS, "--layout", layout, "--out", tmp_path, "--split", "test")
    run(*flags, data=data)
    before = content(tmp_path)

    def full(*args):
        yield from ()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(make_corruptions, "generate_chunks", full)
    with pytest.raises(InputError, match=r"cannot write .*No space left"):
        run(*flags, "--seed", 1, "--overwrite", data=data)
    assert content(tmp_path) == before


@pytest.mark.parametrize("layout", ["rws", "folders"])
def test_what_is_there_is_not_overwritten_unasked(data, tmp_path, layout, monkeypatch):
    flags = (*FLAGS, "--layout", layout, "--out", tmp_path, "--split", "test")
    name = "contrast.npy" if layout == "rws" else "contrast/2/a/a_0.JPEG"
    part = tmp_path / ("test" if layout == "rws" else "val")
    run(*flags, data=data)
    whole = content(tmp_path)

    with pytest.raises(InputError, match="there already, made with seed 0, not 1"):
        run(*flags, "--seed", 1, data=data)
    assert content(tmp_path) == whole
    run(*flags, "--seed", 1, "--overwrite", data=data)
    noise = next(key for key in whole if "gaussian_noise" in key)
    assert content(tmp_path).keys() == whole.keys() and content(tmp_path)[noise] != whole[noise]
    run(*flags, "--overwrite", data=data)
    assert content(tmp_path) == whole

    (part / name).write_bytes((part / name).read_bytes()[:-1])
    with pytest.raises(InputError, match=r"contrast.* there already, changed since"):
        run(*flags, data=data)
    for record in (tmp_path / ".made").rglob("contrast.npy.json" if layout == "rws" else "2.json"):
        record.write_text("[]")
    with pytest.raises(InputError, match="there already, not made by this script"):
        run(*flags, data=data)
    run(*flags, "--overwrite", data=data)
    assert content(tmp_path) == whole

    monkeypatch.setattr(make_corruptions, "generate_chunks", None)
    run(*flags, "--overwrite", data=data)  # these settings made it, so there is nothing to do


def test_other_labels_are_not_overwritten_unasked(data, tmp_path):
    flags = ("--corruption", "contrast", "--split", "test", "--out", tmp_path)
    labels = tmp_path / "test" / "labels.npy"
    labels.parent.mkdir()
    np.save(labels, np.zeros(6, np.int64))
    with pytest.raises(InputError, match=r"labels\.npy is there already and holds other labels"):
        run(*flags, data=data)
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
    assert f"photographs in {photographs}" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"frost texture .*, not procedural"):
        run(*flags, data=data)
    with pytest.raises(InputError, match="nowhere"):
        run(*flags, "--frost_dir", tmp_path / "nowhere", "--overwrite", data=data)


def test_the_clean_folder_is_not_written_into(data):
    with pytest.raises(InputError, match="holds the clean images"):
        run("--layout", "folders", "--out", data, data=data)


# ---- space and memory -----------------------------------------------------------------------


def test_space_is_checked_first(data, tmp_path, monkeypatch, capsys):
    usage = namedtuple("usage", "total used free")
    needed = 2 * (280 + 6) * SIDE * SIDE * 3 + 4 * 128
    monkeypatch.setattr(make_corruptions.shutil, "disk_usage", lambda _: usage(0, 0, needed - 1))
    flags = (*FLAGS, "--out", tmp_path / "new" / "out")
    with pytest.raises(InputError, match=r"--out .*: 110\.3 kB to write, 110\.3 kB free"):
        run(*flags, data=data)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(make_corruptions.shutil, "disk_usage", lambda _: usage(0, 0, needed))
    run(*flags, data=data)
    assert "110.3 kB, 110.3 kB free" in capsys.readouterr().out
    # What is finished needs no space, what is replaced only while both are there.
    monkeypatch.setattr(make_corruptions.shutil, "disk_usage", lambda _: usage(0, 0, 0))
    run(*flags, data=data)
    with pytest.raises(InputError, match=r"53\.9 kB to write, 0 bytes free"):
        run(*flags, "--seed", 1, "--overwrite", data=data)


def test_what_another_process_takes_away_has_no_size(tmp_path):
    (tmp_path / "a.JPEG").symlink_to(tmp_path / "gone")  # listed, and not there when looked at
    assert make_corruptions.bytes_in(tmp_path) == make_corruptions.bytes_in(tmp_path / "b") == 0


def test_folders_take_no_more_than_announced(data, tmp_path):
    flags = ("--layout", "folders", "--split", "test", "--severity", 5, "--out", tmp_path)
    run(*flags, "--corruption", "gaussian_noise", data=data)
    args = make_corruptions.parse_args([*map(str, flags), "--corruption", "gaussian_noise"])
    [output] = make_corruptions.outputs_of(args)
    announced = make_corruptions.bytes_for(output, datasets.load("folder", data, "test"))
    on_disk = sum(-(-len(file) // 4096) * 4096 for file in content(tmp_path).values())
    assert on_disk <= announced <= 2 * on_disk


def test_no_more_than_a_chunk_is_corrupted_at_once(data, tmp_path, monkeypatch):
    sizes = []

    def watched(*args):
        for rows, images in generate_chunks(*args):
            sizes.append(len(images))
            yield rows, images

    monkeypatch.setattr(make_corruptions, "generate_chunks", watched)
    run("--corruption", "contrast", "--split", "train", "--out", tmp_path, data=data)
    assert sizes == [256, 24]


# ---- preview --------------------------------------------------------------------------------


def test_preview_writes_the_sheet_only(data, tmp_path, capsys):
    path = tmp_path / "sheet.png"
    flags = ("--corruption", "contrast", "gaussian_noise", "--preview", path)
    run(*flags, "--out", tmp_path / "out", data=data)
    assert [p.name for p in tmp_path.iterdir()] == ["sheet.png"]
    first = path.read_bytes()
    page = np.asarray(Image.open(path))
    assert page.shape[0] > 2 * 128 and page.shape[1] > 6 * 128

    # Clean, then severities 1 to 5, row by row, each pixel a square of 16.
    clean = datasets.load("folder", data, "test")
    row = int(capsys.readouterr().out.partition("row ")[2].partition(",")[0])
    left = page.shape[1] - 6 * 132
    for r, name in enumerate(("contrast", "gaussian_noise")):
        for k in range(6):
            want = clean.images[row : row + 1]
            if k:
                want = corrupt(want, name, k, draws_of(0, name, k, "test"))
            top, at = 24 + 132 * r, left + 132 * k
            shown = page[top : top + 128 : 16, at : at + 128 : 16]
            assert np.array_equal(shown, want[0].permute(1, 2, 0))

    with pytest.raises(InputError, match="there already; --overwrite"):
        run(*flags, data=data)
    run(*flags, "--overwrite", data=data)
    assert path.read_bytes() == first
    run(*flags, "--overwrite", "--seed", 3, data=data)
    assert path.read_bytes() != first


# ---- the command line -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--out o --corruption fogg", "--corruption fogg: unknown .did you mean 'fog'"),
        ("--out o --corruption fog fog", "names fog twice"),
        ("--out o --severity 6", "--severity 6"),
        ("--out o --severity 1 2", "--layout rws holds one severity"),
        ("--out o --layout cifar-c --severity 5", "keeps severities 1 to 5 in one file"),
        ("--out o --layout cifar-c --split train", "has the test set only"),
        ("--out o --dataset cifar11", "unknown --dataset 'cifar11'"),
        ("--out o --seed -1", "--seed -1"),
        ("--corruption fog", "--out is missing"),
        ("--preview sheet", "--preview sheet: name an image file"),
        ("--preview a.png --split train test", "name one --split"),
    ],
)
def test_flags_are_judged_before_anything_is_read(flags, message):
    with pytest.raises(InputError, match=message):
        make_corruptions.parse_args(flags.split())


def test_all_means_all_and_layouts_have_defaults():
    args = make_corruptions.parse_args(["--corruption", "all", "--out", "o"])
    assert tuple(args.corruption) == corruptions.CORRUPTIONS
    assert (args.severity, args.split) == ([5], ["train", "test"])
    args = make_corruptions.parse_args(["--layout", "cifar-c", "--out", "o"])
    assert (args.severity, args.split) == ([1, 2, 3, 4, 5], ["test"])
    args = make_corruptions.parse_args(
        ["--layout", "folders", "--out", "o", "--severity", "3", "1"]
    )
    assert (args.severity, args.split) == ([1, 3], ["train", "test"])


def test_the_record_says_what_made_it(data, tmp_path):
    run("--corruption", "contrast", "--split", "test", "--out", tmp_path, data=data)
    record = json.loads((tmp_path / ".made" / "test" / "contrast.npy.json").read_text())
    clean = datasets.fingerprint(datasets.load("folder", data, "test"))
    assert record["settings"] == {
        "dataset": "folder",
        "clean images": clean,
        "corruption": "contrast",
        "severity": [5],
        "seed": 0,
    }
    assert {"command", "torch", "device"} <= record.keys()
