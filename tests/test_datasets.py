"""Loading clean sets: splits, published layouts, the cache, and errors that name the file."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import re
import shutil
import struct
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import cache, cifar, image_folder, tiny_imagenet
from datasets.images import ImageSet, every_other_class, split_rows, stable_seed
from utils.errors import InputError


@pytest.fixture(autouse=True)
def _own_cache_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("xdg")))


def write_image(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> None:
    """A PNG, whatever the suffix, whose red is `value` and whose first pixel is blue."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    pixels[..., 0] = value
    pixels[0, 0] = (0, 0, 255)
    Image.fromarray(pixels).save(path, "PNG")


def red(images: torch.Tensor) -> list[int]:
    return images[:, 0, 1, 1].tolist()


def folder_set(root: Path, classes: int = 2, train: int = 20, test: int = 3) -> Path:
    for label in range(classes):
        for i in range(train):
            write_image(root / "train" / f"c{label:02}" / f"{i:03}.png", 100 * (label % 2) + i)
        for i in range(test):
            write_image(root / "test" / f"c{label:02}" / f"{i:03}.png", 50 + i)
    return root


def tiny_set(root: Path, per_class: int = 12) -> Path:
    base = root / "tiny-imagenet-200"
    lines = []
    for label, wnid in enumerate(["n03", "n01", "n02"]):
        for i in range(per_class):
            write_image(base / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 20 * label + i)
        for i in (label, label + 10):
            write_image(base / "val" / "images" / f"val_{i}.JPEG", 100 + i)
            lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t7\t7\n")
    (base / "val" / "val_annotations.txt").write_text("".join(lines))
    (base / "wnids.txt").write_text("n03\nn01\nn02\n")
    return root


# ---------------------------------------------------------------------------------------------
# ImageSet


def test_image_set_checks_dtype_and_shape():
    good = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    labels = torch.zeros(2, dtype=torch.int64)
    for images, wrong in ((good.float(), labels), (good[:, :1], labels), (good, labels[:1])):
        with pytest.raises(InputError):
            ImageSet(images, wrong, ["a"], "t")
    with pytest.raises(InputError):
        ImageSet(good, labels.int(), ["a"], "t")


def test_subset_keeps_rows_files_and_total():
    images = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 4, 4)
    whole = ImageSet(images, torch.arange(5), list("abcde"), "t", files=list("vwxyz"))
    part = whole.subset([1, 3, 4]).subset(torch.tensor([2, 0]))
    assert part.images[:, 0, 0, 0].tolist() == [4, 1]
    assert part.labels.tolist() == part.rows.tolist() == [4, 1]
    assert part.files == ["z", "w"]
    assert part.total == 5


def test_fingerprint_sees_pixels_labels_and_shape():
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    changed = images.clone()
    changed[1, 2, 3, 3] = 1
    pairs = [(images, labels), (changed, labels), (images, labels.flip(0))]
    pairs.append((images.view(2, 3, 2, 8), labels))
    prints = [datasets.fingerprint(ImageSet(*pair, ["a", "b"], "t")) for pair in pairs]
    assert len(set(prints)) == 4
    assert prints[0] == datasets.fingerprint(ImageSet(images.clone(), labels, ["a", "b"], "u"))
    digest = hashlib.sha256(b"(2, 3, 4, 4)" + bytes(96) + labels.numpy().tobytes())
    assert prints[0] == digest.hexdigest()[:16]  # it is in results and checkpoints


def test_every_other_class_is_counted_anew():
    images = torch.arange(6, dtype=torch.uint8)[:, None, None, None].expand(6, 3, 4, 4)
    whole = ImageSet(images, torch.tensor([0, 1, 2, 3, 4, 1]), list("abcde"), "t")
    even, odd = (every_other_class(whole, parity) for parity in ("even", "odd"))
    assert (even.classes, even.labels.tolist(), even.rows.tolist()) == (
        ["a", "c", "e"],
        [0, 1, 2],
        [0, 2, 4],
    )
    assert (odd.classes, odd.labels.tolist(), odd.rows.tolist()) == (
        ["b", "d"],
        [0, 1, 0],
        [1, 3, 5],
    )
    assert (odd.class_parity, whole.class_parity, odd.total) == ("odd", None, 6)


def test_stable_seed_is_pinned():
    # Published figures depend on it: a change would regenerate every corrupted set.
    digest = hashlib.sha256(b"(0, 'fog', 5, 'test')").digest()
    assert stable_seed(0, "fog", 5, "test") == int.from_bytes(digest[:8], "big") // 2


# ---------------------------------------------------------------------------------------------
# Names


def test_base_name():
    assert datasets.base_name("cifar10-c") == datasets.base_name("cifar10") == "cifar10"
    with pytest.raises(InputError, match="did you mean 'tinyimagenet'"):
        datasets.base_name("tinyimagnet")


def test_load_checks_its_arguments(tmp_path):
    for arguments, said in (
        (("folder", tmp_path, "vla"), "unknown split 'vla'.* 'val'"),
        (("cifar10",), "--data"),
        (("folder", tmp_path, "train", 0), "--image_size 0"),
    ):
        with pytest.raises(InputError, match=said):
            datasets.load(*arguments)


# ---------------------------------------------------------------------------------------------
# Folders


def test_folder_splits_are_stratified_disjoint_and_cover(tmp_path):
    folder_set(tmp_path)
    sets = {split: datasets.load("folder", tmp_path, split) for split in datasets.SPLITS}
    whole, train, val, test = (sets[s] for s in ("all", "train", "val", "test"))
    assert red(whole.images) == [*range(20), *range(100, 120)]
    assert whole.labels.tolist() == [0] * 20 + [1] * 20
    assert val.labels.tolist() == [0, 0, 1, 1]
    assert sorted([*train.rows.tolist(), *val.rows.tolist()]) == list(range(40))
    for part in (train, val):
        assert torch.equal(part.images, whole.images[part.rows])
        assert part.files == [whole.files[row] for row in part.rows.tolist()]
        assert part.total == 40
    assert len(test) == test.total == 6
    assert test.classes == train.classes == ["c00", "c01"]
    # Channels in order RGB.
    assert whole.images[3, :, 0, 0].tolist() == [0, 0, 255]


def test_folder_split_follows_names_only():
    names = [f"{c}/{i:04}.png" for c in "ab" for i in range(300)]
    rows = image_folder.validation_rows(names).tolist()
    chosen = {names[row] for row in rows}
    assert len(chosen) == 60 and sum(name[0] == "a" for name in chosen) == 30
    # By the definition, independently: the 30 lowest hashes of a class.
    ranked = sorted(range(300), key=lambda i: hashlib.sha256(f"0/a/{i:04}".encode()).digest())
    assert {f"a/{i:04}.png" for i in ranked[:30]} == {name for name in chosen if name[0] == "a"}
    # Another format or order of listing keeps it, one more image moves at most one.
    other = [name.replace(".png", ".jpg") for name in reversed(names)]
    again = {other[row][:-4] for row in image_folder.validation_rows(other).tolist()}
    assert again == {name[:-4] for name in chosen}
    more = [*names, "a/9999.png"]
    assert len(chosen ^ {more[r] for r in image_folder.validation_rows(more).tolist()}) <= 2
    assert image_folder.validation_rows(["a/1.png"]).tolist() == []


def test_folder_val_is_the_test_set_where_there_is_no_test(tmp_path):
    folder_set(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    assert len(datasets.load("folder", tmp_path, "test")) == 6
    assert len(datasets.load("folder", tmp_path, "val")) == 4


def test_folder_reads_nested_folders_and_passes_over_other_files(tmp_path):
    folder_set(tmp_path)
    write_image(tmp_path / "train/c00/deeper/x.JPG", 77)
    (tmp_path / "train/c00/notes.txt").write_text("no image")
    write_image(tmp_path / "train/c00/.hidden.png", 78)
    whole = datasets.load("folder", tmp_path, "all")
    assert 77 in red(whole.images) and 78 not in red(whole.images)
    assert len(whole) == 41


DEBRIS = ("__MACOSX", "@eaDir", ".ipynb_checkpoints", "__pycache__", "$RECYCLE.BIN", "lost+found")


@pytest.mark.parametrize("name", ["folder", "tinyimagenet"])
def test_debris_of_systems_and_programs_is_passed_over(tmp_path, name):
    root = folder_set(tmp_path) if name == "folder" else tiny_set(tmp_path) / "tiny-imagenet-200"
    expected = {split: datasets.load(name, root, split) for split in ("all", "test")}
    for place in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        for debris in (d for d in DEBRIS if not place.name.startswith(".")):
            write_image(place / debris / "c00" / "000.png", 99)
            write_image(place / debris / "000.png", 99)
    for split, images in expected.items():
        found = datasets.load(name, root, split)
        assert found.classes == images.classes and found.files == images.files
        assert torch.equal(found.images, images.images)
        assert torch.equal(found.labels, images.labels)


def test_folder_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(InputError, match="--data"):
        datasets.load("folder", tmp_path / "nowhere")
    folder_set(tmp_path)
    (tmp_path / "train" / "c77").mkdir()
    with pytest.raises(InputError, match="c77 holds no images"):
        datasets.load("folder", tmp_path)
    (tmp_path / "train" / "c77").rmdir()
    write_image(tmp_path / "test" / "c1" / "x.png", 0)
    with pytest.raises(InputError, match=r"test/c1 is not one of the training classes"):
        datasets.load("folder", tmp_path, "test")
    write_image(tmp_path / "train" / "loose.png", 0)
    with pytest.raises(InputError, match=r"loose.png lies in no class folder"):
        datasets.load("folder", tmp_path)
    for file in (tmp_path / "test").rglob("*.png"):
        file.unlink()
    with pytest.raises(InputError, match=r"test holds no images"):
        datasets.load("folder", tmp_path, "test")


def test_differing_sizes_need_image_size(tmp_path):
    folder_set(tmp_path)
    write_image(tmp_path / "train/c01/999.png", 7, size=(12, 8))
    with pytest.raises(InputError, match=r"999.png is 12×8, .*000.png is 8×8: give --image_size"):
        datasets.load("folder", tmp_path, "all")
    assert datasets.load("folder", tmp_path, "all", 8).images.shape == (41, 3, 8, 8)
    write_image(tmp_path / "train/c00/000.png", 7, size=(12, 8))
    with pytest.raises(InputError, match=r"000.png is 12×8, not square: give --image_size"):
        datasets.load("folder", tmp_path, "all")


def test_resizing_is_box_on_the_central_square():
    pixels = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    small = np.asarray(cache.resized(Image.fromarray(pixels), 4))
    means = pixels[:, 2:10].reshape(4, 2, 4, 2, 3).mean((1, 3))
    assert np.abs(small - means).max() <= 1
    large = np.asarray(cache.resized(Image.fromarray(pixels[:, 2:10]), 16))
    assert large.shape == (16, 16, 3)
    assert len(np.unique(large[..., 0])) > 64  # interpolated, not repeated


# ---------------------------------------------------------------------------------------------
# Image files


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "bomb"])
def test_unreadable_image_is_named(tmp_path, monkeypatch, damage):
    folder_set(tmp_path)
    bad = tmp_path / "train" / "c01" / "005.png"
    contents = {"empty": b"", "truncated": bad.read_bytes()[:60], "text": b"not an image"}
    if damage == "bomb":
        write_image(bad, 1, size=(200, 200))
        monkeypatch.setattr(cache, "MAX_PIXELS", 10_000)
    else:
        bad.write_bytes(contents[damage])
    said = {"empty": "empty file", "bomb": "200×200 pixels, the limit is 10,000"}.get(damage, "")
    with pytest.raises(InputError, match=rf"c01/005\.png: not a readable image \({said}"):
        datasets.load("folder", tmp_path, "all", 8)
    # Nothing half-made stays behind.
    assert not list(tmp_path.rglob("*.npy")) and not list(tmp_path.rglob("*train-8*"))


def test_grey_palette_and_alpha_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        path = tmp_path / f"{mode}.{'jpg' if mode == 'CMYK' else 'png'}"
        Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
        image = cache.read_image(path)
        assert image.mode == "RGB" and image.getpixel((4, 4)) == (255, 255, 255)


def tiff(values: np.ndarray, bits: int, kind: int = 1, black: int = 1) -> bytes:
    """A TIFF by its tags: SampleFormat `kind` (1 unsigned, 2 signed, 3 float), 0 is `black`."""
    tags = {256: values.shape[1], 257: values.shape[0], 258: bits, 259: 1, 262: black}
    tags |= {273: 122, 277: 1, 279: values.nbytes, 339: kind}
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, 9) + entries + bytes(4) + values.tobytes()


RAMP = np.arange(256, dtype=np.uint64).reshape(16, 16)  # what is seen, of 8 bits
PGM = b"P5 16 16 %d\n"
DEEP = {
    "png": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path),
    "tif": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path),
    "big.tif": lambda path: path.write_bytes(tiff((RAMP * 257).astype(">u2").byteswap(), 16)),
    "32.tif": lambda path: path.write_bytes(tiff((RAMP << 24).astype("<u4"), 32)),
    "pgm": lambda path: path.write_bytes(PGM % 65535 + (RAMP * 257).astype(">u2").tobytes()),
    "10.pgm": lambda path: path.write_bytes(PGM % 1023 + (RAMP * 4 + 3).astype(">u2").tobytes()),
    "ppm": lambda path: path.write_bytes(
        b"P6 16 16 65535\n" + (RAMP * 257).repeat(3).astype(">u2").tobytes()
    ),
}


@pytest.mark.parametrize("form", DEEP)
def test_more_than_8_bits_are_scaled_by_their_range(tmp_path, form):
    path = tmp_path / f"image.{form}"
    DEEP[form](path)
    pixels = np.asarray(cache.read_image(path)).astype(int)
    assert pixels.shape == (16, 16, 3) and np.abs(pixels - RAMP[..., None].astype(int)).max() <= 1
    assert pixels.min() == 0 and pixels.max() == 255


@pytest.mark.parametrize(
    ("content", "mode"),
    [
        (tiff((RAMP / 255).astype("<f4"), 32, kind=3), "F"),
        (tiff(RAMP.astype("<i2"), 16, kind=2), "I"),
        (tiff(RAMP.astype("<i4"), 32, kind=2), "I"),
        (tiff(RAMP.astype("<u2"), 16, black=0), "I;16"),
        (b"Pf\n16 16\n-1.0\n" + (RAMP / 255).astype("<f4").tobytes(), "F"),
    ],
)
def test_images_of_unknown_range_are_named_with_their_mode(tmp_path, content, mode):
    path = tmp_path / "image.tif"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"image\.tif: .*mode {mode}: save it as unsigned"):
        cache.read_image(path)


# ---------------------------------------------------------------------------------------------
# Cache


def forbid_decoding(monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded again")

    monkeypatch.setattr(cache, "read_image", refuse)


def cached(root: Path) -> Path:
    (path,) = (root / ".rws_cache").glob("train-*.npy")
    return path


def test_second_load_comes_from_the_cache(tmp_path, monkeypatch):
    folder_set(tmp_path)
    first = datasets.load("folder", tmp_path, "all")
    forbid_decoding(monkeypatch)
    assert torch.equal(datasets.load("folder", tmp_path, "all").images, first.images)
    val = datasets.load("folder", tmp_path, "val")
    assert torch.equal(val.images, first.images[val.rows])
    with pytest.raises(AssertionError, match="decoded again"):
        datasets.load("folder", tmp_path, "all", 4)


def test_many_pieces_stay_in_order(tmp_path, monkeypatch):
    folder_set(tmp_path, train=40)
    monkeypatch.setattr(cache, "_PIECE", 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    expected = [*range(40), *range(100, 140)]
    assert red(datasets.load("folder", tmp_path, "all").images) == expected
    assert cached(tmp_path).stat().st_size > 80 * 3 * 64
    names = cache.list_images(tmp_path / "train")
    uncached = torch.from_numpy(cache.decode(tmp_path / "train", names, None, "train"))
    assert red(uncached) == expected


@pytest.mark.parametrize("change", ["pixels", "added", "removed", "renamed"])
def test_changed_source_is_decoded_anew(tmp_path, change):
    folder_set(tmp_path)
    datasets.load("folder", tmp_path, "all")
    before, target = cached(tmp_path), tmp_path / "train/c00/007.png"
    expected = [*range(20), *range(100, 120)]
    if change == "pixels":
        size, time = target.stat().st_size, target.stat().st_mtime_ns
        write_image(target, 8)
        assert target.stat().st_size == size  # so that it is the time that tells
        os.utime(target, ns=(time + 10**9, time + 10**9))
        expected[7] = 8
    elif change == "added":
        write_image(tmp_path / "train/c01/999.png", 222)
        expected.append(222)
    elif change == "removed":
        target.unlink()
        del expected[7]
    else:
        target.rename(target.with_name("999.png"))
        expected.insert(19, expected.pop(7))
    assert red(datasets.load("folder", tmp_path, "all").images) == expected
    assert cached(tmp_path) != before  # and the stale one is gone


def as_objects() -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return file.getvalue()


DAMAGE = {
    "byte": lambda good: good[:999] + bytes([good[999] ^ 1]) + good[1000:],
    "short": lambda good: good[:-100],
    "long": lambda good: good + b"\0",
    "empty": lambda good: b"",
    "text": lambda good: b"hello",
    "pickle": lambda good: as_objects(),
    "shape": lambda good: good.replace(b"(40, 3, 8, 8)", b"(20, 6, 8, 8)"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_cache_is_decoded_anew(tmp_path, damage):
    folder_set(tmp_path)
    expected = datasets.load("folder", tmp_path, "all").images
    path = cached(tmp_path)
    good = path.read_bytes()
    path.write_bytes(damage(good))
    assert path.read_bytes() != good
    assert torch.equal(datasets.load("folder", tmp_path, "all").images, expected)
    assert cached(tmp_path).read_bytes() == good


def test_cache_survives_any_single_damaged_byte_of_its_header(tmp_path):
    folder_set(tmp_path, train=2)
    datasets.load("folder", tmp_path, "all")
    path, rows = cached(tmp_path), torch.arange(4)
    good = path.read_bytes()
    assert cache._from_cache(path, 4, rows) is not None
    for position in range(128):
        for flip in (0x01, 0x80, 0xFF):
            data = bytearray(good)
            data[position] ^= flip
            path.write_bytes(data)
            found = cache._from_cache(path, 4, rows)
            # Spaces that pad the header may change without harm; pixels may not.
            assert found is None or bytes(found.numpy().tobytes()) == good[128:-4]


def test_unwritable_data_folder_caches_in_the_home(tmp_path, monkeypatch):
    folder_set(tmp_path)
    (tmp_path / ".rws_cache").write_text("in the way, as a read-only folder would be")
    expected = datasets.load("folder", tmp_path, "all").images
    home = Path(os.environ["XDG_CACHE_HOME"]) / "robust-weight-signatures"
    assert len(list(home.rglob("train-*.npy"))) == 1
    forbid_decoding(monkeypatch)
    assert torch.equal(datasets.load("folder", tmp_path, "all").images, expected)


def test_full_disk_only_costs_the_cache(tmp_path, monkeypatch):
    folder_set(tmp_path)

    def full(path):
        raise InputError(f"cannot write {path}: No space left on device") from OSError(28, "full")

    monkeypatch.setattr(cache, "replacing", full)
    with pytest.warns(UserWarning, match="no cache of the decoded images"):
        val = datasets.load("folder", tmp_path, "val")
    monkeypatch.undo()
    assert torch.equal(val.images, datasets.load("folder", tmp_path, "all").images[val.rows])


def test_loading_twice_at_once_leaves_one_whole_cache(tmp_path):
    folder_set(tmp_path)
    with ThreadPoolExecutor(4) as pool:
        sets = list(pool.map(lambda _: datasets.load("folder", tmp_path, "all").images, range(4)))
    assert all(torch.equal(images, sets[0]) for images in sets)
    assert cache._from_cache(cached(tmp_path), 40, torch.arange(40)) is not None
    assert len(list((tmp_path / ".rws_cache").iterdir())) == 1


# ---------------------------------------------------------------------------------------------
# Tiny-ImageNet


def test_tiny_imagenet_as_unzipped(tmp_path):
    tiny_set(tmp_path)
    for root in (tmp_path, tmp_path / "tiny-imagenet-200"):
        train = datasets.load("tinyimagenet", root, "train")
        val = datasets.load("tinyimagenet-c", root, "val")
        test = datasets.load("tinyimagenet", root, "test")
        assert train.classes == ["n01", "n02", "n03"]
        # By wnid, then by number (10 after 9): values are 20·(place in wnids.txt) + number.
        assert red(train.images) == [base + i for base in (20, 40, 0) for i in range(6)]
        assert red(val.images) == [base + i for base in (20, 40, 0) for i in range(6, 12)]
        assert train.files[:2] == ["n01/n01_0.JPEG", "n01/n01_1.JPEG"]
        assert red(test.images) == [101, 111, 102, 112, 100, 110]
        assert test.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert test.files[0] == "n01/val_1.JPEG"


def test_tiny_imagenet_sorted_val(tmp_path):
    tiny_set(tmp_path)
    before = datasets.load("tinyimagenet", tmp_path, "test")
    val = tmp_path / "tiny-imagenet-200" / "val"
    for name in before.files:
        (val / name).parent.mkdir(exist_ok=True)
        (val / "images" / name.split("/")[1]).rename(val / name)
    (val / "images").rmdir()
    after = datasets.load("tinyimagenet", tmp_path, "test")
    assert torch.equal(after.images, before.images) and after.files == before.files
    assert torch.equal(after.labels, before.labels)


VAL = {  # where each image of val/images is moved, or copied, and by which wnid
    "sorted within images": lambda val, file, wnid: [val / "images" / wnid / file],
    "as the training classes": lambda val, file, wnid: [val / wnid / "images" / file],
    "in part": lambda val, file, wnid: [val / ("images" if wnid == "n01" else wnid) / file],
    "both": lambda val, file, wnid: [val / "images" / file, val / wnid / file],
    "both, in images": lambda val, file, wnid: [
        *(val / "images" / file, val / "images" / wnid / file)
    ],
    "all three": lambda val, file, wnid: [
        *(val / "images" / file, val / "images" / wnid / file, val / wnid / "images" / file)
    ],
}


@pytest.mark.parametrize("places", VAL.values(), ids=list(VAL))
def test_tiny_imagenet_val_in_every_order(tmp_path, places):
    tiny_set(tmp_path)
    before, val = (
        datasets.load("tinyimagenet", tmp_path, "test"),
        tmp_path / "tiny-imagenet-200/val",
    )
    for name in before.files:
        wnid, file = name.split("/")
        content = (val / "images" / file).read_bytes()
        (val / "images" / file).unlink()
        for place in places(val, file, wnid):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
    after = datasets.load("tinyimagenet", tmp_path, "test")
    assert torch.equal(after.images, before.images) and after.files == before.files
    assert torch.equal(after.labels, before.labels)


def test_tiny_imagenet_annotations_with_a_mark_and_blank_lines(tmp_path):
    tiny_set(tmp_path)
    before = datasets.load("tinyimagenet", tmp_path, "test")
    place = tmp_path / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    text = place.read_text().replace("\n", "\r\n\r\n")
    place.write_bytes(f"{text}  \r\n".encode("utf-8-sig"))
    after = datasets.load("tinyimagenet", tmp_path, "test")
    assert after.files == before.files and torch.equal(after.labels, before.labels)


def test_tiny_imagenet_validation_is_the_last_fifty_of_each_class():
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([500, 334, 60]))
    rows = tiny_imagenet.validation_rows(labels).tolist()
    assert rows == [*range(450, 500), *range(784, 834), *range(864, 894)]


def test_tiny_imagenet_errors(tmp_path):
    with pytest.raises(InputError, match=r"--data .*: no Tiny-ImageNet there"):
        datasets.load("tinyimagenet", tmp_path)
    tiny_set(tmp_path)
    val = tmp_path / "tiny-imagenet-200" / "val"
    write_image(val / "n02" / "val_1.JPEG", 0)
    with pytest.raises(InputError, match=r"n02/val_1\.JPEG lies in n02, .*txt says n01"):
        datasets.load("tinyimagenet", tmp_path, "test")
    (val / "n02" / "val_1.JPEG").unlink()
    (val.parent / "train" / "n00" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match=r"n00 holds no images"):
        datasets.load("tinyimagenet", tmp_path, "train")
    shutil.rmtree(val.parent / "train" / "n00")
    annotations = val / "val_annotations.txt"
    text = annotations.read_text()
    for wrong, message in (
        (text.replace("val_1.JPEG", "val_99.JPEG"), "has no line for val_1.JPEG"),
        (text + "val_99.JPEG\tn01\n", "lacks val_99.JPEG"),
        (text + "nonsense\n", "val_annotations.txt:7"),
        (text.replace("n02", "n09"), "n09 is no folder of train/"),
        (None, "cannot read .*val_annotations.txt"),
    ):
        annotations.unlink()
        if wrong is not None:
            annotations.write_text(wrong)
        with pytest.raises(InputError, match=message):
            datasets.load("tinyimagenet", tmp_path, "test")
        annotations.touch()


# ---------------------------------------------------------------------------------------------
# CIFAR


class _Touch:
    """Pickles to a call that makes a file: what a hostile pickle would do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def pickles(tmp_path, monkeypatch):
    """A CIFAR-10 of 5 × 20 training and 20 test images in the published files."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)

    def write(name: str, content: object) -> list[str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((folder / name).read_bytes()).hexdigest()]

    def batch(name: str) -> list[str]:
        data = rng.integers(0, 256, (20, 3072), dtype=np.uint8)
        return write(name, {"data": data, "labels": rng.integers(0, 10, 20).tolist()})

    published = cifar.CIFAR10
    monkeypatch.setattr(published, "train_list", [batch(f"data_batch_{i}") for i in range(1, 6)])
    monkeypatch.setattr(published, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": [f"class{i}" for i in range(10)]})
    monkeypatch.setattr(published, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder


def test_cifar_pickles(pickles):
    raw = [pickle.loads((pickles / f"data_batch_{i}").read_bytes()) for i in range(1, 6)]
    data = np.concatenate([batch["data"] for batch in raw]).reshape(-1, 3, 32, 32)
    for root in (pickles.parent, pickles):
        whole, train, val, test = (
            datasets.load("cifar10", root, split) for split in ("all", "train", "val", "test")
        )
        assert np.array_equal(whole.images.numpy(), data)
        assert whole.labels.tolist() == [label for batch in raw for label in batch["labels"]]
        assert torch.equal(train.images, whole.images[:90])
        assert torch.equal(val.images, whole.images[90:])
        assert val.rows.tolist() == list(range(90, 100)) and val.total == 100
        assert len(test) == 20 and test.classes[3] == "class3"
    small = datasets.load("cifar10", pickles, "test", image_size=16)
    box = test.images.float().view(20, 3, 16, 2, 16, 2).mean((3, 5))
    assert (small.images - box).abs().max() <= 1


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_never_unpickles_what_is_not_published(pickles, tmp_path, name, split):
    marker = tmp_path / "executed"
    (pickles / name).write_bytes(pickle.dumps(_Touch(marker)))
    with pytest.raises(InputError, match=rf"{name}: MD5 is not .*train/<class>/ and test/") as said:
        datasets.load("cifar10", pickles, split)
    assert "delete" not in str(said.value)
    assert not marker.exists()
    (pickles / name).unlink()
    with pytest.raises(InputError, match=f"{name}: no such file"):
        datasets.load("cifar10", pickles, split)


def test_cifar_without_data_or_network(tmp_path, monkeypatch):
    def unreachable(address, timeout):
        raise OSError("no route to host")

    def refuse(*_):
        raise RuntimeError("host went away")

    monkeypatch.setattr(cifar.socket, "create_connection", unreachable)
    said = r"--data .*cifar-10-batches-py/ nor train/<class>/.*downloading cifar10 failed: no route"
    with pytest.raises(InputError, match=said):
        datasets.load("cifar10", tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    monkeypatch.setattr(cifar.socket, "create_connection", lambda *_, timeout: io.BytesIO())
    monkeypatch.setattr(cifar, "download_url", refuse)
    with pytest.raises(InputError, match=r"cifar-100-python.*downloading cifar100 failed: host"):
        datasets.load("cifar100", tmp_path)


def test_a_download_is_whole_or_absent(pickles, tmp_path, monkeypatch):
    """Interrupted it leaves nothing; the next run fetches it again, and unpacks it."""

    def fetch(url, folder, name, md5):
        folder.mkdir()
        (folder / name).write_bytes(b"half")
        if interrupted:
            raise KeyboardInterrupt
        with tarfile.open(folder / name, "w:gz") as packed:
            packed.add(pickles, "cifar-10-batches-py")

    monkeypatch.setattr(cifar.socket, "create_connection", lambda *_, timeout: io.BytesIO())
    monkeypatch.setattr(cifar, "download_url", fetch)
    root, interrupted = tmp_path / "new", True
    with pytest.raises(KeyboardInterrupt):
        datasets.load("cifar10", root)
    assert not root.exists()
    interrupted = False
    assert len(datasets.load("cifar10", root, "test")) > 0
    there = {path.name for path in root.iterdir()}
    assert there == {"cifar-10-python.tar.gz", "cifar-10-batches-py"}


# ---------------------------------------------------------------------------------------------
# Archives, and folders one deeper


@pytest.fixture
def offline(monkeypatch):
    def unreachable(address, timeout):
        raise OSError("no route to host")

    monkeypatch.setattr(cifar.socket, "create_connection", unreachable)


def pack(archive: Path, folder: Path, inside: str) -> Path:
    """Move `folder` into a .zip or .tar.gz, under the name `inside` ("." for its content)."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as packed:
            for file in folder.rglob("*"):
                packed.write(file, Path(inside) / file.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz") as packed:
            packed.add(folder, inside)
    shutil.rmtree(folder)
    return archive


@pytest.mark.parametrize("inside", ["cifar-10-batches-py", "."])
def test_an_archive_in_the_folder_is_unpacked(pickles, tmp_path, offline, inside, capsys):
    expected = datasets.load("cifar10", pickles, "all").images
    archive = pack(tmp_path / "cifar-10-python.tar.gz", pickles, inside)
    for _ in range(2):
        assert torch.equal(datasets.load("cifar10", tmp_path, "all").images, expected)
    assert capsys.readouterr().err == f"unpacking {archive}\n"  # once
    assert sorted(os.listdir(tmp_path)) == ["cifar-10-batches-py", archive.name]
    # A folder that was unpacked is not replaced, nor is its damage passed over.
    (pickles / "test_batch").write_bytes(b"")
    with pytest.raises(InputError, match="test_batch: MD5"):
        datasets.load("cifar10", tmp_path, "test")


@pytest.mark.parametrize("inside", ["tiny-imagenet-200", "."])
def test_the_archive_of_tiny_imagenet_is_unpacked(tmp_path, inside):
    folder = tiny_set(tmp_path) / "tiny-imagenet-200"
    expected = datasets.load("tinyimagenet", tmp_path, "test")
    pack(tmp_path / "tiny-imagenet-200.zip", folder, inside)
    found = datasets.load("tinyimagenet", tmp_path, "test")
    assert torch.equal(found.images, expected.images) and found.files == expected.files


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


MEMBERS = {
    "absolute": member("/tmp/rws-escaped"),
    "above": member("cifar-10-batches-py/../../escaped"),
    "backslash": member("..\\escaped"),
    "drive": member("C:\\escaped"),
    "link": member("cifar-10-batches-py/inside", tarfile.SYMTYPE, "data_batch_1"),
    "link out": member("cifar-10-batches-py/out", tarfile.SYMTYPE, "/etc/passwd"),
    "hard link": member("cifar-10-batches-py/hard", tarfile.LNKTYPE, "cifar-10-batches-py/x"),
    "device": member("cifar-10-batches-py/null", tarfile.CHRTYPE),
}


@pytest.mark.parametrize("odd", MEMBERS.values(), ids=list(MEMBERS))
@pytest.mark.parametrize("name", ["cifar10", "tinyimagenet"])
def test_an_archive_that_leads_elsewhere_is_refused(tmp_path, offline, odd, name):
    root = tmp_path / "data"
    root.mkdir()
    if name == "cifar10":
        archive = root / "cifar-10-python.tar.gz"
        with tarfile.open(archive, "w:gz") as packed:
            packed.addfile(member("cifar-10-batches-py/x"))
            packed.addfile(odd)
    elif odd.type in (tarfile.LNKTYPE, tarfile.CHRTYPE):
        pytest.skip("zip has no such members")
    else:
        archive = root / "tiny-imagenet-200.zip"
        info = zipfile.ZipInfo(odd.name)
        info.external_attr = (0o120777 if odd.type == tarfile.SYMTYPE else 0o100644) << 16
        with zipfile.ZipFile(archive, "w") as packed:
            packed.writestr("tiny-imagenet-200/x", "")
            packed.writestr(info, odd.linkname)
    said = rf"cannot unpack .*{archive.name}: {re.escape(odd.name)} in it is a link, or leads"
    with pytest.raises(InputError, match=said):
        datasets.load(name, root, "train")
    assert os.listdir(root) == [archive.name] and os.listdir(tmp_path) == ["data"]


@pytest.mark.parametrize("damage", [lambda good: good[: len(good) // 2], lambda good: b"text"])
def test_a_damaged_archive_is_named_and_leaves_nothing(pickles, tmp_path, offline, damage):
    archive = pack(tmp_path / "cifar-10-python.tar.gz", pickles, pickles.name)
    archive.write_bytes(damage(archive.read_bytes()))
    with pytest.raises(InputError, match=rf"cannot unpack .*{archive.name}: "):
        datasets.load("cifar10", tmp_path)
    assert os.listdir(tmp_path) == [archive.name]


@pytest.mark.parametrize("name", ["cifar10", "cifar10 in class folders", "tinyimagenet", "folder"])
def test_a_set_one_folder_deeper_is_read_and_told(tmp_path, request, offline, name):
    if name == "cifar10":
        root = request.getfixturevalue("pickles")
    elif name == "tinyimagenet":
        root = tiny_set(tmp_path) / "tiny-imagenet-200"
    else:
        root = folder_set(
            tmp_path / "set", classes=10 if name.startswith("cifar10") else 2, train=2
        )
    name = name.split()[0]
    expected = datasets.load(name, root, "test").images
    outer = tmp_path / "outer"
    (outer / "deeper").mkdir(parents=True)
    root.rename(outer / "deeper" / root.name)
    for given in (outer / "deeper", outer):
        if given == outer and root.name == "set":
            continue  # two deeper, and not under the published name
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert torch.equal(datasets.load(name, given, "test").images, expected)
        deeper = given == outer or root.name == "set"
        assert [f"--data {given}: read from" in str(w.message) for w in caught] == [True] * deeper
    if name == "cifar10":  # another set beside it is no CIFAR-10
        folder_set(outer / "other")
        assert len(datasets.load(name, outer / "deeper", "test")) == len(expected)
    else:
        for other in ("a", "b"):
            folder_set(outer / "several" / other, train=2)
        with pytest.raises(InputError, match=r"several: several sets there, name one .*: a, b"):
            datasets.load(name, outer / "several")


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("cifar-10-batches-bin/data_batch_1.bin", "bin files are the binary version, the Python"),
        ("cifar-10-binary.tar.gz", "archive is the binary version, the Python version"),
    ],
)
def test_other_forms_of_cifar_are_named(tmp_path, file, said):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).touch()
    for root in {tmp_path, (tmp_path / file).parent}:
        with pytest.raises(InputError, match=rf"--data .*cifar-10-batches-py.*; the .?{said}"):
            datasets.load("cifar10", root)


def test_cifar_as_folders(tmp_path):
    folder_set(tmp_path, classes=10, train=10, test=1)
    train, val = (datasets.load("cifar10", tmp_path, split) for split in ("train", "val"))
    assert len(train) == 90 and val.labels.tolist() == list(range(10))
    assert val.rows.tolist() == [row for row in range(100) if row not in train.rows]
    assert train.name == "cifar10"
    with pytest.raises(InputError, match="10 class folders, cifar100 has 100"):
        datasets.load("cifar100", tmp_path)


def test_split_rows():
    val = torch.tensor([1, 4])
    assert split_rows(5, val, "train").tolist() == [0, 2, 3]
    assert split_rows(5, val, "val").tolist() == [1, 4]
    assert split_rows(5, val, "all").tolist() == split_rows(5, val, "test").tolist() == [*range(5)]
