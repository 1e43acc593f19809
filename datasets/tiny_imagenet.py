"""Tiny-ImageNet as unzipped: `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG`, annotations.

A val/ already sorted into `val/<wnid>/` or `val/images/<wnid>/`, or in part, is read as well, an
image that lies in two of these places once. The last 50 images of each training class
by number are validation, the published val images are the test set. Classes are the sorted wnids.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import torch

from datasets.archives import located
from datasets.cache import list_images
from datasets.image_folder import Part, check_classes, class_folders, labels_of
from utils.errors import InputError

VAL_PER_CLASS = 50
_NUMBER = re.compile(r"(\d+)\.[^.]*$")


def part(root: Path, split: str) -> Part:
    """List the part that `split` belongs to: images by wnid, within it by image number.

    root: the unzipped folder, or the one that holds tiny-imagenet-200 or its archive.
    Raises InputError for missing folders and annotations that don't fit.
    """
    name = "tiny-imagenet-200"
    base = located(root, name, f"{name}.zip", lambda place: (place / "train").is_dir())
    if base is None:
        raise InputError(
            f"--data {root}: no Tiny-ImageNet there (no train/ in it or in {name}/, no {name}.zip)"
        )
    classes = class_folders(base / "train")
    folder = base / ("val" if split == "test" else "train")
    if not folder.is_dir():
        raise InputError(f"--data: {base} has no val/ folder, which is the test set")
    names = list_images(folder)
    named = _annotated(folder, names, classes) if split == "test" else names
    place_of = {short_name(short): name for short, name in zip(named, names, strict=True)}
    files = published_order(place_of)
    labels = labels_of(folder, files, classes)
    if split != "test":
        check_classes(folder, labels, classes)
    rows = None if split == "test" else validation_rows(labels)
    return Part(folder, [place_of[file] for file in files], files, labels, classes, rows)


def published_order(names: Iterable[str]) -> list[str]:
    """`names` by class folder, by the number that ends the file name, by name."""

    def key(name: str) -> tuple[str, int, str]:
        number = _NUMBER.search(name)
        return name.partition("/")[0], int(number[1]) if number else -1, name

    return sorted(names, key=key)


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
    """ "<wnid>/…" of each of `names`, of "images/<file>" from val_annotations.txt."""
    named = [name.removeprefix("images/") for name in names]
    if all("/" in name for name in named):  # all are sorted
        return named
    place = folder / "val_annotations.txt"
    try:
        lines = place.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {place}, which labels val/images/: {error}") from error
    wnid_of = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        file, *rest = line.split("\t")
        if not rest:
            raise InputError(f"{place}:{number}: not '<file> TAB <wnid> …': {line[:60]!r}")
        wnid_of[file] = rest[0].strip()
    if missing := {name for name in named if "/" not in name} - wnid_of.keys():
        raise InputError(f"{place} has no line for {min(missing)}")
    for name in named:  # of those sorted by hand
        top, slash, file = short_name(name).partition("/")
        if slash and wnid_of.get(file, top) != top:
            raise InputError(f"{folder / name} lies in {top}, {place} says {wnid_of[file]}")
    if lost := wnid_of.keys() - {name.rpartition("/")[2] for name in named}:
        raise InputError(f"{folder / 'images'} lacks {min(lost)}, which {place.name} names")
    if unknown := set(wnid_of.values()) - set(classes):
        raise InputError(f"{place}: {min(unknown)} is no folder of train/")
    return [name if "/" in name else f"{wnid_of[name]}/{name}" for name in named]
