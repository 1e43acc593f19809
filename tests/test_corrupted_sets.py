"""Corrupted copies: published layouts read row for row, the rest generated reproducibly."""

from __future__ import annotations

import io
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
    assert load_published(clean, tmp_path / "nowhere", "fog", 1, "test") is None


def test_recorded_severity_of_a_one_severity_file_is_checked(tmp_path):
    clean = clean_set(split="test")
    write_npy(tmp_path / "test", "fog", pixels_of(30), np.arange(30) % 3)
    assert load_published(clean, tmp_path, "fog", 1, "test") is not None  # nothing is recorded
    (tmp_path / ".made.json").write_text('{"test/fog.npy": {"severity": [5]}}')
    assert load_published(clean, tmp_path, "fog", 5, "test") is not None
    with pytest.raises(InputError, match="severity"):
        load_published(clean, tmp_path, "fog", 1, "test")


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
    found = corrupted_set(clean, "fog", "test", Copies(1, root=copy))
    assert torch.equal(found.images[:, :2], clean.images[:, :2])
    next((copy / "fog" / "1" / "a").iterdir()).unlink()
    with pytest.raises(InputError, match="holds 11 images, not the 12"):
        corrupted_set(clean, "fog", "test", Copies(1, root=copy))


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
