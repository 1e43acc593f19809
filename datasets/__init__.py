"""Image sets in memory, clean and corrupted.

    import datasets
    train = datasets.load("cifar10", "data/cifar10", split="train")

"all" is train and val together, in published row order; a corrupted copy is kept in that order.
"""

from __future__ import annotations

from pathlib import Path

import torch

from datasets import cifar, image_folder, synthetic, tiny_imagenet
from datasets.images import (
    SPLITS,
    ImageSet,
    check_split,
    fingerprint,
    half_of_classes,
    spaced,
    split_rows,
)
from utils.errors import InputError, suggest

MAX_SIDE = 4096  # a slip of the keyboard would ask for terabytes
DATASETS = ("cifar10", "cifar100", "tinyimagenet", "synthetic", "folder")

__all__ = [
    "DATASETS",
    "SPLITS",
    "ImageSet",
    "base_name",
    "fingerprint",
    "load",
    "split_indices",
]


def base_name(name: str) -> str:
    """The clean set of a --dataset value: "cifar10" for "cifar10" and "cifar10-c".

    Raises InputError for an unknown name.
    """
    base = name.removesuffix("-c")
    if base not in DATASETS:
        known = ", ".join(DATASETS)
        raise InputError(
            f"unknown --dataset {name!r}{suggest(base, DATASETS)}: {known}, or with -c"
        )
    return base


def load(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    half: str | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Load a split ("train", "val", "test" or "all") of a clean data set.

    name: one of DATASETS, a "-c" at its end passed over; root: its folder (none for synthetic).
    images are uint8 (N, 3, side, side). image_size: resize to that side at decoding, with Pillow's
    BOX filter to reduce (BILINEAR to enlarge), the central square if need be; None keeps the set's
    own size. Image files are decoded once and cached (`cache`). half: "even" or "odd", every other
    class only; limit: at most so many images, evenly spaced.
    Raises InputError for anything wrong with the name, the folder or a file.
    """
    base = base_name(name)
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise InputError(f"--image_size {image_size}: must be 1 to {MAX_SIDE:,}")
    images = _load(base, root, split, image_size)
    return spaced(half_of_classes(images, half) if half else images, limit)


def _load(base: str, root: str | Path | None, split: str, image_size: int | None) -> ImageSet:
    if base == "synthetic":
        made = synthetic.load(split, image_size)
        made.rows = _synthetic_rows(split)
        made.total = synthetic.SIZES.get(split, synthetic.SIZES["all"])
        made.source = "made from a seed (datasets/synthetic.py)"
        return made
    check_split(split)
    root = _root(base, root)
    if base == "tinyimagenet":
        return tiny_imagenet.load(root, split, image_size)
    if base == "folder":
        return image_folder.load(root, split, image_size)
    return cifar.load(root, split, image_size, base)


def split_indices(name: str, root: str | Path | None = None, split: str = "train") -> torch.Tensor:
    """Rows (int64, ascending) of a split in its part: "all" for train and val, else "test".

    The same as `load(…).rows`, without reading images: a corrupted copy of a training set, in the
    row order of "all", is split by these.
    """
    base = base_name(name)
    if base == "synthetic":
        return _synthetic_rows(split)
    check_split(split)
    root = _root(base, root)
    if base == "tinyimagenet":
        return tiny_imagenet.rows(root, split)
    if base == "folder":
        return image_folder.rows(root, split)
    return cifar.rows(root, split, base)


def _synthetic_rows(split: str) -> torch.Tensor:
    total = synthetic.SIZES.get(split, synthetic.SIZES["all"])
    cut = total - round(total * synthetic.VAL_FRACTION)
    return split_rows(total, torch.arange(cut, total), "all" if split == "pretrain" else split)


def _root(base: str, root: str | Path | None) -> Path:
    if root is None:
        raise InputError(f"--dataset {base} needs its folder: give --data")
    return Path(root)
