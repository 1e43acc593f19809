"""Image sets in memory, clean and corrupted.

    import datasets
    train = datasets.load("cifar10", "data/cifar10", split="train")

"all" is train and val together, in published row order; a corrupted copy is kept in that order.
"""

import os
from pathlib import Path

from datasets import cifar, image_folder, synthetic, tiny_imagenet
from datasets.images import SPLITS, ImageSet, every_other_class, fingerprint, spaced
from utils.errors import InputError, check_known

MAX_SIDE = 4096  # a slip of the keyboard would ask for terabytes
DATASETS = ("cifar10", "cifar100", "tinyimagenet", "synthetic", "folder")

__all__ = ["DATASETS", "SPLITS", "ImageSet", "base_name", "fingerprint", "load", "spaced"]


def base_name(name: str) -> str:
    """The clean set of a --dataset value: "cifar10" for "cifar10" and "cifar10-c".

    Raises InputError for an unknown name.
    """
    base = name.removesuffix("-c")
    check_known("--dataset", base, DATASETS)
    return base


def load(
    name: str,
    root: str | Path | None = None,
    split: str = "train",
    image_size: int | None = None,
    class_parity: str | None = None,
    limit: int | None = None,
) -> ImageSet:
    """Load a split ("train", "val", "test" or "all") of a clean data set.

    name: one of DATASETS, a "-c" at its end passed over; root: its folder (none for synthetic).
    images are uint8 (N, 3, side, side). image_size: resize to that side at decoding, with Pillow's
    BOX filter to reduce (BILINEAR to enlarge), the central square if need be; None keeps the set's
    own size. Image files are decoded once and cached (`cache`). class_parity: "even" or "odd",
    every other class only; limit: at most so many images, evenly spaced.
    Raises InputError for anything wrong with the name, the folder or a file.
    """
    base = base_name(name)
    if image_size is not None and not 1 <= image_size <= MAX_SIDE:
        raise InputError(f"--image_size {image_size}: must be 1 to {MAX_SIDE:,}")
    if base == "synthetic":
        images = synthetic.load(split, image_size)
    else:
        check_known("split", split, SPLITS)
        if root is None:
            raise InputError(f"--dataset {base} needs its folder: give --data")
        if os.path.isfile(root):
            raise InputError(f"--data {root}: a file; name the folder it lies in")
        if base in cifar.PUBLISHED:
            images = cifar.load(Path(root), split, image_size, base)
        else:
            module = tiny_imagenet if base == "tinyimagenet" else image_folder
            images = module.part(Path(root), split).load(base, split, image_size)
    return spaced(every_other_class(images, class_parity) if class_parity else images, limit)
