"""Tiny-ImageNet as unzipped: `train/<wnid>/images/*.JPEG`, `val/images/*.JPEG`, annotations.

A val/ already sorted into `val/<wnid>/` is read as well. The last 50 images of each training class
by number are validation, the published val images are the test set. Classes are the sorted wnids.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from datasets.cache import ImageFiles, list_images
from datasets.image_folder import Part, class_folders, labels_of, short_names
from datasets.images import ImageSet, split_rows
from utils.errors import InputError

VAL_PER_CLASS = 50
_NUMBER = re.compile(r"(\d+)\.[^.]*$")


def load(root: Path, split: str, image_size: int | None = None) -> ImageSet:
    """Load a split: images uint8 (N, 3, 64, 64), by wnid, within it by image number.

    root: the unzipped folder, or the one that holds tiny-imagenet-200.
    image_size: side to resize to (Pillow's BOX to reduce, BILINEAR to enlarge) at decoding.
    Raises InputError for missing folders, annotations that don't fit, and unreadable images.
    """
    base = _base(Path(root))
    title = "test" if split == "test" else "train"
    return _part(base, split).load("tinyimagenet", base, split, image_size, title)


def rows(root: Path, split: str) -> torch.Tensor:
    """Rows (int64) of `split` in its part (`ImageSet.rows`), without reading any image."""
    part = _part(_base(Path(root)), split)
    return split_rows(len(part.files), part.val_rows, split)


def published_order(files: ImageFiles) -> list[int]:
    """Positions of `files` by class folder, by the number that ends the file name, by name."""

    def key(position: int) -> tuple[str, int, str]:
        name = files.names[position]
        number = _NUMBER.search(name)
        return name.partition("/")[0], int(number[1]) if number else -1, name

    return sorted(range(len(files)), key=key)


def in_published_order(files: ImageFiles) -> ImageFiles:
    """`files` in `published_order`."""
    return files.pick(published_order(files))


def validation_rows(labels: torch.Tensor) -> torch.Tensor:
    """The last 50 rows of each label (half of them where a class has under 100), ascending.

    labels: int64 (N,), ascending, images of a class by number.
    """
    counts = torch.bincount(labels)
    ends = counts.cumsum(0)
    sizes = (counts // 2).clamp(max=VAL_PER_CLASS)
    return torch.cat(
        [torch.arange(e - s, e) for e, s in zip(ends.tolist(), sizes.tolist(), strict=True)]
    )


def _base(root: Path) -> Path:
    for base in (root, root / "tiny-imagenet-200"):
        if (base / "train").is_dir():
            return base
    raise InputError(
        f"--data {root}: no Tiny-ImageNet there (looked for train/<wnid>/ in it and in "
        f"{root / 'tiny-imagenet-200'})"
    )


def _part(base: Path, split: str) -> Part:
    classes = class_folders(base / "train")
    if split != "test":
        files = in_published_order(list_images(base / "train"))
        if not len(files):
            raise InputError(f"{base / 'train'} holds no images")
        labels = labels_of(files, classes)
        return Part(files, labels, classes, validation_rows(labels), short_names(files))
    val = base / "val"
    if not val.is_dir():
        raise InputError(f"--data: {base} has no val/ folder, which is the test set")
    files = list_images(val)
    no_val = torch.empty(0, dtype=torch.int64)
    if any(name.startswith("images/") for name in files.names):
        files, named = _annotated(files, val / "val_annotations.txt")
        index = {wnid: label for label, wnid in enumerate(classes)}
        labels = torch.tensor([index.get(name.partition("/")[0], -1) for name in named])
        if (labels < 0).any():
            wnid = named[int((labels < 0).int().argmax())].partition("/")[0]
            raise InputError(f"{val / 'val_annotations.txt'}: {wnid} is no folder of train/")
        return Part(files, labels, classes, no_val, named)
    if not len(files):
        raise InputError(f"{val} holds no images")
    files = in_published_order(files)
    return Part(files, labels_of(files, classes), classes, no_val, short_names(files))


def _annotated(files: ImageFiles, annotations: Path) -> tuple[ImageFiles, list[str]]:
    """`files`, "images/<file>", ordered by class and number, and their "<wnid>/<file>" names."""
    try:
        lines = annotations.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {annotations}, which labels val/images/: {error}") from error
    wnid_of = {}
    for number, line in enumerate(lines, 1):
        fields = line.split("\t")
        if len(fields) < 2:
            raise InputError(f"{annotations}:{number}: not '<file> TAB <wnid> …': {line[:60]!r}")
        wnid_of[fields[0]] = fields[1].strip()
    plain = [name.removeprefix("images/") for name in files.names]
    missing = [name for name in plain if name not in wnid_of]
    if missing:
        raise InputError(f"{annotations} has no line for {missing[0]}")
    if len(wnid_of) > len(plain):
        lost = min(wnid_of.keys() - set(plain))
        raise InputError(f"{files.folder / 'images'} lacks {lost}, which {annotations.name} names")
    named = ImageFiles(files.folder, [f"{wnid_of[n]}/{n}" for n in plain], files.stats)
    order = published_order(named)
    return files.pick(order), [named.names[i] for i in order]
