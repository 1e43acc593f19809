"""Corrupted copies: published layouts read row for row, the rest generated reproducibly."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
from datasets import corrupted
from datasets.corrupted import Copies, corrupted_set, load_published, mixed_training_set
from datasets.corruptions import corrupt
from datasets.images import ImageSet, split_rows, stable_seed
from utils.errors import InputError

SIDE, CLASSES = 8, ["a", "b", "c"]


def clean_set(total: int = 30, split: str = "all", seed: int = 0) -> ImageSet:
    """A split of a set kept in pickles: val is the last tenth."""
    rng = np.random.default_rng([seed, split == "test"])
    whole = ImageSet(
        torch.from_numpy(rng.integers(0, 256, (total, 3, SIDE, SIDE), dtype=np.uint8)),
        torch.arange(total) % 3,
        CLASSES,
        "cifar10",
    )
    return whole.subset(split_rows(total, torch.arange(total - total // 10, total), split))


def write_npy(folder: Path, name: str, pixels: np.ndarray, labels: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / f"{name}.npy", pixels)
    np.save(folder / "labels.npy", labels)


def pixels_of(count: int, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def chw(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------
# Arrays


@pytest.mark.parametrize("inside", ["", "CIFAR-10-C"])
def test_cifar_c_severities_and_labels(tmp_path, inside):
    clean, pixels = clean_set(split="test"), pixels_of(150)
    write_npy(tmp_path / inside, "fog", pixels, np.tile(np.arange(30) % 3, 5).astype(np.uint8))
    for severity in (1, 5):
        found = load_published(clean, tmp_path, "fog", severity, "test")
        assert torch.equal(found.images, chw(pixels[30 * (severity - 1) : 30 * severity]))
        assert torch.equal(found.labels, clean.labels) and found.labels.dtype == torch.int64
        assert found.source == str(tmp_path / inside / "fog.npy")
    part = load_published(clean.subset([4, 2]), tmp_path, "fog", 2, "test")
    assert torch.equal(part.images, chw(pixels[[34, 32]]))
    # Neither another corruption nor the training part is there.
    assert load_published(clean, tmp_path, "snow", 1, "test") is None
    assert load_published(clean_set(split="train"), tmp_path, "fog", 1, "train") is None
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(
            InputError, match=f"{name}: no such folder of corrupted images; without it"
        ):
            load_published(clean, tmp_path / name, "fog", 1, "test")


SPELT = {  # where the copy of severity 2 lies, for "test" and for "train"
    "/Gaussian-Noise.npy": "test",
    "/CIFAR-10-C/gaussian_noise.npy": "test",
    "/copies/gaussian noise.npy": "test",
    "/Test/GaussianNoise.npy": "test",
    "/copies/TRAIN/Gaussian_Noise.npy": "train",
    "/Gaussian_noise/severity_2": "test",
    "/noise/gaussian_noise/2": "test",
    "/copies/Train/gaussian-noise/2": "train",
}


@pytest.mark.parametrize(("place", "split"), SPELT.items(), ids=list(SPELT))
def test_a_copy_spelt_otherwise_or_one_folder_deeper_is_read_and_told(tmp_path, place, split):
    clean, place = clean_set(split=split), tmp_path / place[1:]
    single, total = place.parent.name.lower() in ("test", "train"), 30
    expected = pixels_of(total if single else 5 * total)
    if place.suffix:
        write_npy(
            place.parent, place.stem, expected, np.tile(np.arange(30) % 3, 1 if single else 5)
        )
        expected = expected if single else expected[total : 2 * total]
    else:
        expected = expected[:total]
        for row, pixels in enumerate(expected):
            image = place / CLASSES[row % 3] / f"row{row:06d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(image)
    for debris in ("__MACOSX", ".hidden"):
        write_npy(tmp_path / debris, "gaussian_noise", pixels_of(150), np.arange(150) % 3)
    (place.parent / f"._{place.name}").write_bytes(b"of a Macintosh")
    with pytest.warns(UserWarning, match=re.escape(f"gaussian_noise is read from {place}")):
        found = corrupted_set(clean, "gaussian_noise", split, Copies(2, root=tmp_path))
    assert torch.equal(found.images, chw(expected)[clean.rows]) and found.source == str(place)


def test_of_several_copies_the_clean_sets_own_is_read(tmp_path):
    clean, pixels, labels = clean_set(split="test"), pixels_of(150), np.arange(150) % 3
    for name in ("CIFAR-100-C", "Tiny-ImageNet-C"):
        write_npy(tmp_path / name, "fog", pixels[::-1], labels)
    with pytest.raises(InputError, match=r"several copies.*CIFAR-100-C/fog.npy, .*Tiny-Image"):
        corrupted_set(clean, "fog", "test", Copies(2, root=tmp_path))
    write_npy(tmp_path / "CIFAR-10-C", "fog", pixels, labels)
    found = corrupted_set(clean, "fog", "test", Copies(2, root=tmp_path))
    assert torch.equal(found.images, chw(pixels[30:60]))
    for name in ("FOG.npy", "f-o-g.npy"):
        np.save(tmp_path / name, pixels)
    with pytest.raises(InputError, match=r"several copies of fog, .*/FOG\.npy, .*/f-o-g\.npy"):
        corrupted_set(clean, "fog", "test", Copies(2, root=tmp_path))


def test_what_a_named_root_lacks_is_told(tmp_path):
    write_npy(tmp_path, "snow", pixels_of(150), np.arange(150) % 3)
    for split, said in (
        ("test", r"fog\.npy, test/fog\.npy, val/fog/5, test/fog/5, fog/5"),
        ("val", r"train/fog\.npy, train/fog/5"),
    ):
        said = rf"fog is generated: .* have none of {said} \(there: labels\.npy, snow\.npy\)"
        with pytest.warns(UserWarning, match=said):
            found = corrupted_set(clean_set(split=split), "fog", split, Copies(root=tmp_path))
        own = corrupted_set(clean_set(split=split), "fog", split, Copies())
        assert torch.equal(found.images, own.images) and found.source.startswith("generated")
    with warnings.catch_warnings(record=True) as caught:  # the clean set's own folder
        warnings.simplefilter("always")
        corrupted_set(clean_set(split="val"), "fog", "val", Copies(root=tmp_path, named=False))
    assert not [w for w in caught if "is generated" in str(w.message)]


def test_a_bare_array_of_one_severity_is_told_its_place(tmp_path):
    write_npy(tmp_path, "fog", pixels_of(30), np.arange(30) % 3)
    with pytest.raises(InputError, match=r"\(30, 8, 8, 3\); .*severity belongs in .*/test$"):
        corrupted_set(clean_set(split="test"), "fog", "test", Copies(root=tmp_path))


@pytest.mark.parametrize("side", [32, 40, 48, 49, 64, 224])
def test_whose_constants_are_used_is_told(side):
    # What brightness at severity 5 adds to black tells the table.
    named, added = ("CIFAR-10-C (32×32)", 0.3) if side <= 48 else ("Tiny-ImageNet-C (64×64)", 0.5)
    images = torch.zeros(1, 3, side, side, dtype=torch.uint8)
    clean = ImageSet(images, torch.zeros(1, dtype=torch.int64), ["a"], "folder")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = corrupted_set(clean, "brightness", "test", Copies())
    assert made.source == f"generated, seed 0, constants of {named}"
    assert (made.images == int(255 * added)).all()
    said = [str(w.message) for w in caught if "no constants" in str(w.message)]
    assert len(said) == (side not in (32, 64))
    assert all(f"no constants for images of {side} pixels: those of {named}" in s for s in said)


def test_recorded_severity_of_a_one_severity_file_is_checked(tmp_path):
    clean = clean_set(split="test")
    write_npy(tmp_path / "test", "fog", pixels_of(30), np.arange(30) % 3)
    with pytest.warns(UserWarning, match="test: no record .*, taken as --severity 1"):
        assert load_published(clean, tmp_path, "fog", 1, "test") is not None
    (tmp_path / ".made.json").write_text('{"test/fog.npy": {"severity": [5]}}')
    assert load_published(clean, tmp_path, "fog", 5, "test") is not None
    with pytest.raises(InputError, match="severity"):
        load_published(clean, tmp_path, "fog", 1, "test")
    (tmp_path / "test" / "fog.npy").rename(tmp_path / "test" / "Fog.npy")
    with pytest.raises(InputError, match=r"Fog\.npy holds severity \[5\]"):
        load_published(clean, tmp_path, "fog", 1, "test")


@pytest.mark.parametrize("place", ["test/fog.npy", "fog.npy"])
def test_arrays_made_of_another_set_are_refused(tmp_path, place):
    count = 30 if place.startswith("test") else 150
    write_npy((tmp_path / place).parent, "fog", pixels_of(count), np.arange(count) % 3)
    made = {place: {"dataset": "cifar100", "severity": [5]}}
    (tmp_path / ".made.json").write_text(json.dumps(made))
    clean = clean_set(split="test")
    with pytest.raises(InputError, match=rf"fog\.npy is a copy of cifar100, .* {clean.name}"):
        load_published(clean, tmp_path, "fog", 5, "test")


def test_train_array_shares_the_clean_split(tmp_path):
    pixels = pixels_of(30)
    write_npy(tmp_path / "train", "fog", pixels, np.arange(30) % 3)
    write_npy(tmp_path / "test", "fog", pixels[::-1], np.arange(30) % 3)
    for split, rows in (("train", slice(0, 27)), ("val", slice(27, 30)), ("all", slice(0, 30))):
        found = load_published(clean_set(split=split), tmp_path, "fog", 5, split)
        assert torch.equal(found.images, chw(pixels[rows]))
    found = load_published(clean_set(split="test"), tmp_path, "fog", 5, "test")
    assert torch.equal(found.images, chw(pixels[::-1].copy()))


def bytes_of(save, *arrays) -> bytes:
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


PIXELS, LABELS = pixels_of(30), np.arange(30) % 3
DAMAGE = {  # what train/fog.npy, then labels.npy, is replaced by
    "truncated": ("fog", bytes_of(np.save, PIXELS)[:-10]),
    "empty": ("fog", b""),
    "zip": ("fog", bytes_of(np.savez, PIXELS)),
    "object": ("fog", np.array([{}], dtype=object)),
    "rows": ("fog", PIXELS[1:]),
    "side": ("fog", np.zeros((30, 9, 9, 3), np.uint8)),
    "float": ("fog", PIXELS.astype(np.float32)),
    "no labels": ("labels", None),
    "label range": ("labels", np.arange(30) % 4),
    "negative label": ("labels", LABELS - 1),
    "label count": ("labels", LABELS[1:]),
    "label type": ("labels", np.zeros(30)),
}


@pytest.mark.parametrize(("file", "content"), DAMAGE.values(), ids=list(DAMAGE))
def test_damaged_arrays_are_named(tmp_path, file, content):
    write_npy(tmp_path / "train", "fog", PIXELS, LABELS)
    place = tmp_path / "train" / f"{file}.npy"
    place.unlink()
    if isinstance(content, np.ndarray):
        content = bytes_of(np.save, content)
    if content is not None:
        place.write_bytes(content)
    with pytest.raises(InputError, match=place.name):
        corrupted_set(clean_set(split="train"), "fog", "train", Copies(5, root=tmp_path))


def test_other_labels_than_the_clean_sets_warn(tmp_path):
    write_npy(tmp_path / "train", "fog", pixels_of(30), (np.arange(30) + (np.arange(30) > 20)) % 3)
    with pytest.warns(UserWarning, match=r"fog.npy: 6 of 27 labels differ"):
        found = corrupted_set(clean_set(split="train"), "fog", "train", Copies(5, root=tmp_path))
    assert found.labels[21] == 1  # the published ones stand


# ---------------------------------------------------------------------------------------------
# Folders


def folder_clean(root: Path) -> Path:
    for label, name in enumerate("abc"):
        for part, stem, count in (("train", name, 20), ("test", "val", 4)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (SIDE, SIDE), (100 * label // 2, i, 0))
                image.save(root / part / name / f"{stem}_{i}.png")
    return root


def corrupt_copy(clean: ImageSet, folder: Path, suffix: str = ".JPEG", renamed: str = "") -> None:
    """Write each image of `clean` with blue 200, under the names of the clean set."""
    for image, name in zip(clean.images, clean.files, strict=True):
        changed = image.clone()
        changed[2] = 200
        path = folder / (name.rpartition(".")[0].replace("val_", renamed or "val_") + suffix)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(changed.permute(1, 2, 0).numpy()).save(path, "PNG")


@pytest.fixture
def trees(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return folder_clean(tmp_path / "clean"), tmp_path / "copy"


@pytest.mark.parametrize("front", ["val", "test", ""])
def test_tiny_imagenet_c_test_folders(trees, front):
    root, copy = trees
    clean = datasets.load("folder", root, "test")
    corrupt_copy(clean, copy / front / "fog" / "3")
    found = corrupted_set(clean, "fog", "test", Copies(3, root=copy))
    assert torch.equal(found.images[:, :2], clean.images[:, :2])
    assert (found.images[:, 2] == 200).all() and torch.equal(found.labels, clean.labels)
    assert found.source == str(copy / front / "fog" / "3")
    assert load_published(clean, copy, "fog", 4, "test") is None
    part = corrupted_set(clean.subset([7, 1]), "fog", "test", Copies(3, root=copy))
    assert torch.equal(part.images, found.images[[7, 1]])
    assert not list(copy.rglob(".rws_cache"))


def test_train_folders_share_the_clean_split(trees):
    root, copy = trees
    corrupt_copy(datasets.load("folder", root, "all"), copy / "train" / "fog" / "5")
    seen = []
    for split in ("train", "val"):
        clean = datasets.load("folder", root, split)
        found = corrupted_set(clean, "fog", split, Copies(5, root=copy))
        assert torch.equal(found.images[:, :2], clean.images[:, :2])
        seen += found.files
    assert len(set(seen)) == 60
    # Without a train/ there is nothing for the training set.
    (copy / "train" / "fog").rename(copy / "fog")
    assert load_published(clean, copy, "fog", 5, "val") is None


def test_folders_under_other_names_go_by_order(trees):
    root, copy = trees
    clean = datasets.load("folder", root, "test")
    corrupt_copy(clean, copy / "fog" / "1", renamed="test_")
    with pytest.warns(
        UserWarning, match=r"by their numbers, e\.g\. a/test_0\.JPEG for a/val_0\.png"
    ):
        found = corrupted_set(clean, "fog", "test", Copies(1, root=copy))
    assert torch.equal(found.images[:, :2], clean.images[:, :2])
    next((copy / "fog" / "1" / "a").iterdir()).unlink()
    with pytest.raises(InputError, match="holds 11 images, not the 12"):
        corrupted_set(clean, "fog", "test", Copies(1, root=copy))


def test_other_names_share_the_clean_split(trees):
    root, copy = trees
    every = datasets.load("folder", root, "all")
    number = re.compile(r"(\w)_(\d+)\.png")
    for to, way in ((r"\1_\2_fog.png", "numbers"), (r"0\2.png", "numbers"), ("", "order")):
        files = [number.sub(to, name) for name in every.files]
        if not to:  # no numbers: letters in the order of the clean set
            files = [f"{name[0]}/{'x' * i}.png" for i, name in enumerate(every.files, start=1)]
        corrupt_copy(replace(every, files=files), copy / "train" / "fog" / "5")
        for split in ("train", "val"):
            clean = datasets.load("folder", root, split)
            with pytest.warns(UserWarning, match=f"other file names .* taken by their {way}"):
                found = corrupted_set(clean, "fog", split, Copies(5, root=copy))
            assert torch.equal(found.images[:, :2], clean.images[:, :2])
        shutil.rmtree(copy)


def test_a_copy_that_was_made_anew_has_another_key(tmp_path):
    write_npy(tmp_path / "train", "fog", pixels_of(30), np.arange(30) % 3)
    first = corrupted.changed(str(tmp_path))
    assert corrupted.changed(str(tmp_path)) == first
    later = (tmp_path / "train").lstat().st_mtime_ns + 10**9
    os.utime(tmp_path / "train" / "fog.npy", ns=(later, later))
    assert corrupted.changed(str(tmp_path)) != first


def test_folder_errors(trees):
    root, copy = trees
    clean = datasets.load("folder", root, "test")
    place = copy / "fog" / "1"
    place.mkdir(parents=True)
    with pytest.raises(InputError, match="holds no images"):
        corrupted_set(clean, "fog", "test", Copies(1, root=copy))
    corrupt_copy(clean, place)
    (place / "b" / "val_2.JPEG").unlink()
    with pytest.raises(InputError, match=r"lacks 1 of 12 images .* b/val_2\.png"):
        corrupted_set(clean, "fog", "test", Copies(1, root=copy))
    (place / "b" / "val_2.JPEG").write_bytes(b"")
    with pytest.raises(InputError, match=r"val_2\.JPEG: not a readable image \(empty file\)"):
        corrupted_set(clean, "fog", "test", Copies(1, root=copy))
    corrupt_copy(clean, place)
    corrupt_copy(clean, place / "d")
    with pytest.raises(InputError, match="d is not one of the training classes"):
        corrupted_set(clean, "fog", "test", Copies(1, root=copy))


def test_folder_of_another_size_is_an_error(trees):
    root, copy = trees
    corrupt_copy(datasets.load("folder", root, "test"), copy / "fog" / "1")
    small = datasets.load("folder", root, "test", image_size=4)
    with pytest.raises(InputError, match="8-pixel images, the clean set 4-pixel"):
        corrupted_set(small, "fog", "test", Copies(1, root=copy))


# ---------------------------------------------------------------------------------------------
# Generated


def test_generated_is_corrupt_with_a_seed_of_its_own(tmp_path):
    clean = clean_set(split="test")
    made = corrupted_set(clean, "gaussian_noise", "test", Copies(5, 7, tmp_path))
    generator = torch.Generator().manual_seed(stable_seed(7, "gaussian_noise", 5, "test"))
    expected = corrupt(clean.images, "gaussian_noise", 5, generator)
    assert torch.equal(made.images, expected) and "generated" in made.source
    assert torch.equal(made.labels, clean.labels) and torch.equal(made.rows, clean.rows)
    assert torch.equal(clean.images, clean_set(split="test").images)
    again = corrupted_set(clean, "gaussian_noise", "test", Copies(5, 7))
    assert torch.equal(made.images, again.images)
    for other in (("test", Copies(5, 8)), ("val", Copies(5, 7)), ("test", Copies(4, 7))):
        assert not torch.equal(made.images, corrupted_set(clean, "gaussian_noise", *other).images)


def test_unknown_names_are_errors():
    clean = clean_set(split="test")
    for name, split, severity, said in (
        ("fogg", "test", 5, "did you mean 'fog'"),
        ("fog", "test", 6, "--severity 6"),
        ("fog", "tset", 5, "unknown split"),
    ):
        with pytest.raises(InputError, match=said):
            corrupted_set(clean, name, split, Copies(severity))
    with pytest.raises(InputError, match="--corruption"):
        mixed_training_set(clean, [], Copies())


# ---------------------------------------------------------------------------------------------
# Several corruptions


def test_mixed_set_partitions_the_images(monkeypatch):
    clean = clean_set(100, "train")
    names = ["brightness", "contrast", "saturate"]
    asked = []

    def count(images, name, *rest):
        asked.append((name, len(images)))
        return corrupt(images, name, *rest)

    monkeypatch.setattr(corrupted, "corrupt", count)
    mixed = mixed_training_set(clean, names, Copies(5, 3))
    assert asked == [(name, 30) for name in names]  # 90 images, each corrupted once
    # These draw nothing, so the copy that each image equals tells its corruption.
    copies = torch.stack([corrupt(clean.images, name, 5) for name in names])
    equal = (copies == mixed.images).flatten(2).all(2)
    assert (equal.sum(0) == 1).all() and equal.sum(1).tolist() == [30, 30, 30]
    assert torch.equal(mixed.labels, clean.labels)
    assert torch.equal(mixed_training_set(clean, names, Copies(5, 3)).images, mixed.images)
    assert not torch.equal(mixed_training_set(clean, names, Copies(5, 4)).images, mixed.images)
    # The partition is random, not a run of rows.
    assert equal[0, :45].sum() not in (0, 30)


def test_mixed_set_of_one_is_the_corrupted_set():
    clean = clean_set(split="train")
    mixed = mixed_training_set(clean, ["gaussian_noise"], Copies(5, 3))
    single = corrupted_set(clean, "gaussian_noise", "train", Copies(5, 3))
    assert torch.equal(mixed.images, single.images)


def test_mixed_set_takes_published_parts_where_there(tmp_path):
    clean, pixels = clean_set(split="train"), pixels_of(30)
    write_npy(tmp_path / "train", "fog", pixels, np.arange(30) % 3)
    mixed = mixed_training_set(clean, ["fog", "contrast"], Copies(root=tmp_path))
    published = (mixed.images == chw(pixels[:27])).flatten(1).all(1)
    generated = (mixed.images == corrupt(clean.images, "contrast", 5)).flatten(1).all(1)
    assert published.sum() == 14 and generated.sum() == 13 and not (published & generated).any()
    assert "fog.npy" in mixed.source and "generated" in mixed.source
