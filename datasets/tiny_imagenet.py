"""Tiny-ImageNet as unzipped: `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG`, annotations.

A val/ already sorted into `val/<wnid>/` is read as well. The last 50 images of each training class
by number are validation, the published val images are the test set. Classes are the sorted wnids.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from datasets.cache import list_images
from datasets.image_folder import Part, class_folders, labels_of
from utils.errors import InputError

VAL_PER_CLASS = 50
_NUMBER = re.compile(r"(\d+)\.[^.]*$")


def part(root: Path, split: str) -> Part:
    """List the part that `split` belongs to: images by wnid, within it by image number.

    root: the unzipped folder, or the one that holds tiny-imagenet-200.
    Raises InputError for missing folders and annotations that don't fit.
    """
    base = root if (root / "train").is_dir() else root / "tiny-imagenet-200"
    if not (base / "train").is_dir():
        raise InputError(
            f"--data {root}: no Tiny-ImageNet there (no train/ in it or in {base.name}/)"
        )
    classes = class_folders(base / "train")
    folder = base / ("val" if split == "test" else "train")
    if not folder.is_dir():
        raise InputError(f"--data: {base} has no val/ folder, which is the test set")
    names = named = list_images(folder)
    if split == "test" and any(name.startswith("images/") for name in names):
        named = _annotated(folder, names, classes)
    order = published_order(named)
    files = [short_name(named[i]) for i in order]
    labels = labels_of(folder, files, classes)
    rows = None if split == "test" else validation_rows(labels)
    return Part(folder, [names[i] for i in order], files, labels, classes, rows)


def published_order(names: list[str]) -> list[int]:
    """Positions of `names` by class folder, by the number that ends the file name, by name."""

    def key(position: int) -> tuple[str, int, str]:
        name = names[position]
        number = _NUMBER.search(name)
        return name.partition("/")[0], int(number[1]) if number else -1, name

    return sorted(range(len(names)), key=key)


def short_name(name: str) -> str:
    """`name` without the "images/" folder that Tiny-ImageNet puts into each class."""
    return name.replace("/images/", "/", 1)


def validation_rows(labels: torch.Tensor) -> torch.Tensor:
    """The last 50 rows of each label (half of them where a class has under 100), ascending.

    labels: int64 (N,), ascending, images of a class by number.
    """
    counts = torch.bincount(labels)
    sizes = (counts // 2).clamp(max=VAL_PER_CLASS)
    place_from_end = counts.cumsum(0)[labels] - torch.arange(len(labels))
    return torch.nonzero(place_from_end <= sizes[labels]).flatten()


def _annotated(folder: Path, names: list[str], classes: list[str]) -> list[str]:
    """ "<wnid>/<file>" of each of `names`, "images/<file>", from val_annotations.txt."""
    place = folder / "val_annotations.txt"
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {place}, which labels val/images/: {error}") from error
    wnid_of = {}
    for number, line in enumerate(lines, 1):
        file, *rest = line.split("\t")
        if not rest:
            raise InputError(f"{place}:{number}: not '<file> TAB <wnid> …': {line[:60]!r}")
        wnid_of[file] = rest[0].strip()
    plain = [name.removeprefix("images/") for name in names]
    if missing := set(plain) - wnid_of.keys():
        raise InputError(f"{place} has no line for {min(missing)}")
    if lost := wnid_of.keys() - set(plain):
        raise InputError(f"{folder / 'images'} lacks {min(lost)}, which {place.name} names")
    if unknown := set(wnid_of.values()) - set(classes):
        raise InputError(f"{place}: {min(unknown)} is no folder of train/")
    return [f"{wnid_of[file]}/{file}" for file in plain]
