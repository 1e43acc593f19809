"""Files from strangers: nothing in them is run, whichever door they come through."""

import contextlib
import hashlib
import io
import pickle
import re
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from torchvision.datasets import CIFAR10

import datasets
import make_corruptions
import model_patching
import reproduce
import train_corruption
from datasets import cache
from models import build_model
from tests.folders import write_folders
from utils import checkpoint as ckpt
from utils import signature_file
from utils.errors import InputError
from utils.torch_file import SAVE_ANEW

pytestmark = [  # of torch.jit's age, and of sparse tensors
    pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Validating sparse"),
]


class Payload:
    """Pickles to a call that makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def torch_file(marker):
    return {"state_dict": {"a": torch.zeros(1)}, "epoch": Payload(marker)}


def signature(marker):
    form = {"format": signature_file.FORMAT, "version": signature_file.VERSION}
    return {**form, "meta": Payload(marker)}


FORMS = {
    "archive": lambda path, marker: torch.save(torch_file(marker), path),
    "legacy": lambda path, marker: torch.save(
        torch_file(marker), path, _use_new_zipfile_serialization=False
    ),
    "pickle": lambda path, marker: path.write_bytes(pickle.dumps(torch_file(marker))),
    "signature": lambda path, marker: torch.save(signature(marker), path),
    # TorchScript, which would run its methods
    "script": lambda path, _: torch.jit.save(torch.jit.script(torch.nn.ReLU()), path),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes, 16 images of 8×8."""
    root = tmp_path_factory.mktemp("data")
    write_folders(root, {"train": 4, "test": 4}, size=(8, 8))
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A ResNet-18 of two classes."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.manual_seed(0)
    torch.save(build_model("resnet18", 2).state_dict(), path)
    return path


def refused(main, argv, capsys):
    """The line of the error with which `main` ends, and with nothing else."""
    with pytest.raises(SystemExit) as stopped:
        main([str(a) for a in argv])
    shown = capsys.readouterr().err
    assert stopped.value.code == 2, shown
    (line,) = [line for line in shown.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in shown
    return line


# ---- checkpoints, signatures, logs ----------------------------------------------------------

TRAIN = ("--dataset", "folder", "--arch", "resnet18", "--epochs", 1, "--device", "cpu", "--no-amp")
PATCH = ("--dataset", "folder", "--arch", "resnet18", "--device", "cpu", "--no-amp")
PATCH += ("--corruption", "fog", "--keep_num", 1)


def at(door, path, weights, tmp_path):
    """The script, its flags, and where the file at `path` now lies: where the door's name says."""
    run = ("--save_dir", tmp_path / "run")
    robust, last = tmp_path / "robust" / "fog" / ckpt.BEST_RA, tmp_path / "run" / ckpt.LAST
    hostile = {"--corruption_model_root": robust, "train --resume": last}.get(door, path)
    for place in (robust, last):
        place.parent.mkdir(parents=True)
    robust.write_bytes(weights.read_bytes())
    hostile.write_bytes(path.read_bytes())

    files = {"--base_model": weights, "--pretrained": weights}
    files["--corruption_model_root"] = robust.parents[1]
    if door.startswith("train"):
        named = () if door == "train --resume" else (path,)
        return train_corruption.main, (*TRAIN, *run, door.split()[1], *named), hostile
    if door.startswith("reproduce"):
        argv = ("keep-num", "--dataset", "folder", "--arch", "resnet18", "--pretrained", path)
        return reproduce.main, (*argv, "--runs", tmp_path / "runs", "--out", tmp_path / "o"), path
    if door == "--signature":
        argv = ("--dataset", "folder", "--arch", "resnet18", "--base_model", weights)
        return model_patching.main, (*argv, "--signature", path), path
    if hostile is path:
        files[door] = path
    return model_patching.main, (*PATCH, *(x for pair in files.items() for x in pair)), hostile


DOORS = (
    *("train --resume FILE", "train --resume", "train --pretrained", "train --pretrained_path"),
    *("--base_model", "--patched_model", "--pretrained", "--corruption_model_root", "--save_log"),
    *("--signature", "reproduce --pretrained"),
)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("form", FORMS)
def test_no_code_in_a_torch_file_runs(door, form, data, weights, tmp_path, capsys):
    marker, path = tmp_path / "ran", tmp_path / "hostile"
    FORMS[form](path, marker)
    main, argv, place = at(door, path, weights, tmp_path)
    line = refused(main, (*argv, "--data", data), capsys)
    assert str(place) in line and not marker.exists()


def test_show_runs_no_code(tmp_path, capsys, monkeypatch):
    marker, path = tmp_path / "ran", tmp_path / "hostile.rws"
    FORMS["signature"](path, marker)
    monkeypatch.setattr(sys, "argv", ["signature_file", "show", str(path)])
    assert str(path) in refused(lambda _: signature_file.main(), (), capsys)
    assert not marker.exists()


def test_packed_damaged_and_odd_archives_are_refused(tmp_path):
    good, path = io.BytesIO(), tmp_path / "m.pth"
    torch.save({"a": torch.arange(1000)}, good)

    def rewrite(change, compression=zipfile.ZIP_STORED):
        with zipfile.ZipFile(good) as old, zipfile.ZipFile(path, "w", compression) as new:
            for member in old.infolist():
                new.writestr(member.filename, change(old.read(member)))

    rewrite(lambda data: data)
    assert ckpt.read(path)["a"][-1] == 999
    rewrite(lambda data: data, zipfile.ZIP_DEFLATED)  # could unpack to any size
    with pytest.raises(InputError, match=r"m\.pth: damaged"):
        ckpt.read(path)
    data = bytearray(good.getvalue())
    data[data.find(torch.arange(1000).numpy().tobytes()) + 800] ^= 1  # torch itself reads on
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"m\.pth: damaged.*checksum"):
        ckpt.read(path)
    for odd in (torch.zeros(1).expand(1 << 40), torch.zeros(4, 4).to_sparse()):
        torch.save({"a": odd}, path)
        with pytest.raises(InputError, match=r"m\.pth: a is no plain tensor"):
            ckpt.read_state_dict(path)


# ---- arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["fog.npy", "labels.npy"])
@pytest.mark.parametrize("form", ["object", "pickle", "archive"])
def test_no_code_in_a_published_array_runs(which, form, data, tmp_path, capsys):
    marker = tmp_path / "ran"
    for part, count in (("train", 8), ("test", 8)):
        (tmp_path / part).mkdir()
        np.save(tmp_path / part / "fog.npy", np.zeros((count, 8, 8, 3), np.uint8))
        np.save(tmp_path / part / "labels.npy", np.repeat([0, 1], count // 2))
    path = tmp_path / "test" / which
    if form == "object":
        np.save(path, np.array([Payload(marker)], object), allow_pickle=True)
    elif form == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        with path.open("wb") as file:
            np.savez(file, array=np.array([Payload(marker)], object))
    argv = (*TRAIN, "--std_data", data, "--data", tmp_path, "--corruption", "fog")
    line = refused(train_corruption.main, (*argv, "--save_dir", tmp_path / "run"), capsys)
    assert str(path) in line and not marker.exists()
    if which == "labels.npy":
        argv = ("--dataset", "folder", "--data", data, "--split", "test", "--corruption", "snow")
        line = refused(make_corruptions.main, (*argv, "--out", tmp_path), capsys)
        assert str(path) in line and not marker.exists()


@pytest.mark.parametrize("form", ["object", "pickle"])
def test_no_code_in_a_cache_runs(form, data, tmp_path):
    marker, root = tmp_path / "ran", tmp_path / "root"
    root.mkdir()
    for part in ("train", "test"):
        (root / part).symlink_to(data / part)
    expected = datasets.load("folder", root, "all").images
    (path,) = (root / ".rws_cache").iterdir()
    path.write_bytes(pickle.dumps(Payload(marker)))
    if form == "object":
        np.save(path, np.array([Payload(marker)], object), allow_pickle=True)
    assert torch.equal(datasets.load("folder", root, "all").images, expected)
    assert not marker.exists()


# ---- CIFAR pickles --------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder of published files, two images each."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batches(names):
        pixels = (rng.integers(0, 256, (2, 3072), dtype=np.uint8) for _ in names)
        return [
            write(name, {"data": p, "labels": [3, 7]})
            for name, p in zip(names, pixels, strict=True)
        ]

    name, md5 = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(CIFAR10, "train_list", batches([f"data_batch_{i}" for i in range(1, 6)]))
    monkeypatch.setattr(CIFAR10, "test_list", batches(["test_batch"]))
    monkeypatch.setattr(CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def test_published_pickles_are_read(published):
    images = datasets.load("cifar10", published, "all")
    first = pickle.loads((published / "data_batch_1").read_bytes())["data"][0]
    assert np.array_equal(images.images[0].numpy(), first.reshape(3, 32, 32))
    assert images.labels.tolist() == [3, 7] * 5 and images.classes[3] == "d"


@pytest.mark.parametrize("name", ["data_batch_1", "data_batch_5", "test_batch", "batches.meta"])
def test_no_code_in_a_cifar_pickle_runs(name, published, tmp_path):
    marker = tmp_path / "ran"
    (published / name).write_bytes(pickle.dumps({"data": Payload(marker), "labels": [1]}))
    for split in ("train", "test"):
        with contextlib.suppress(InputError):  # a part that is whole may be read
            datasets.load("cifar10", published, split)
    with pytest.raises(InputError, match=f"{name}: MD5"):
        datasets.load("cifar10", published, "test" if name == "test_batch" else "train")
    assert not marker.exists()


# ---- images ---------------------------------------------------------------------------------


def png(width, height):
    """A PNG of so many pixels by its header, a few bytes long."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8_000, 10_000, 60_000])  # Pillow: fine, a warning, no
def test_image_bombs_are_refused(side, data, tmp_path, capsys):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "bomb.png").write_bytes(png(side, side))
    argv = (*TRAIN, "--data", tmp_path, "--save_dir", tmp_path / "run", "--image_size", 8)
    line = refused(train_corruption.main, argv, capsys)
    assert "bomb.png" in line and re.search("limit|exceeds", line)


def test_no_interpreter_is_started_for_an_image(tmp_path, monkeypatch):
    """Pillow opens by content, and Encapsulated PostScript with a program on this machine."""
    path, marker = tmp_path / "image.png", tmp_path / "ran"
    path.write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: marker.touch())
    with pytest.raises(Exception), Image.open(path) as image:  # noqa: B017
        image.load()
    assert marker.exists()  # so it would have
    marker.unlink()
    with pytest.raises(InputError, match=r"image\.png: not a readable image"):
        cache.read_image(path)
    assert not marker.exists()


def test_nothing_here_unpickles():
    """pickle.load, and loaders with their locks off, stand nowhere in the code."""
    root = Path(train_corruption.__file__).parent
    folders = ("utils", "models", "datasets", "experiments")
    files = [*root.glob("*.py"), *(f for name in folders for f in (root / name).rglob("*.py"))]
    assert len(files) > 40
    for path in files:
        text = path.read_text(encoding="utf-8")
        if path.name == "torch_file.py":  # what it tells people, in a message
            text = text.replace(SAVE_ANEW[0], "", 1)
        assert not re.search(r"pickle\.loads?\(|weights_only=False|allow_pickle=True", text), path
        assert len(re.findall(r"torch\.load\(", text)) == text.count("weights_only=True)"), path
        assert len(re.findall(r"np\.load\(", text)) == text.count("allow_pickle=False)"), path
        if path.name != "cache.py":
            assert "Image.open(" not in text, path
