"""Any tree of images, `train/<class>/*` and `test/<class>/*` (or `val/<class>/*`).

Validation is a fixed, stratified 10 % of train: in each class the images whose names hash lowest.
A corrupted copy under the same names is split alike, and so is the set on any other machine.
"""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from datasets.archives import located
from datasets.cache import folders_in, list_images, read_images
from datasets.images import ImageSet, split_rows
from utils.errors import InputError, suggest

# Fixed, so that the split of a folder is the same always.
SPLIT_SEED = 0
VAL_SHARE = 0.1


@dataclass
class Part:
    """One part of a set kept as image files: "train" (validation included) or "test".

    folder     its images; the cache of the set lies beside it
    names      files there, in order of the rows
    files      "<class>/<file>" of each
    labels     int64 (N,), indices into `classes`
    val_rows   int64, the rows of validation in train
    """

    folder: Path
    names: list[str]
    files: list[str]
    labels: torch.Tensor
    classes: list[str]
    val_rows: torch.Tensor | None = None

    def load(self, name: str, split: str, image_size: int | None) -> ImageSet:
        """The images of `split`: uint8 (N, 3, side, side), from the cache where it has them.

        image_size: side to resize to (central square; Pillow's BOX to reduce, BILINEAR to enlarge)
        at decoding; None keeps the images as they are, if they are square and all of one size.
        Raises InputError for an unreadable image, and sizes that differ without an image_size.
        """
        rows = split_rows(len(self.names), self.val_rows, split)
        if not len(rows):
            raise InputError(f"{self.folder} has too few images to make a {split} split")
        title = "test" if split == "test" else "train"
        images = read_images(self.folder, self.names, rows, image_size, title)
        labels, files = self.labels[rows], [self.files[row] for row in rows.tolist()]
        place = str(self.folder)
        return ImageSet(images, labels, self.classes, name, rows, len(self.names), files, place)


def part(root: Path, split: str) -> Part:
    """List the part of the tree that `split` belongs to: by class, by name.

    The test part is `test/`, or `val/` where there is no `test/`.
    Raises InputError for a missing folder, a class without images, a test class that train lacks.
    """
    root, given = located(root, "", "", lambda place: (place / "train").is_dir()), root
    if root is None:
        raise InputError(f"--data {given}: no train/<class>/ folders of images there")
    train = root / "train"
    classes = class_folders(train)
    if split != "test":
        names = list_images(train)
        labels = labels_of(train, names, classes)
        check_classes(train, labels, classes)
        return Part(train, names, names, labels, classes, validation_rows(names))
    folder = root / ("test" if (root / "test").is_dir() else "val")
    if not folder.is_dir():
        raise InputError(f"--data {root}: no test/<class>/ (or val/<class>/) folders there")
    names = list_images(folder)
    return Part(folder, names, names, labels_of(folder, names, classes), classes)


def class_folders(folder: Path) -> list[str]:
    """Sorted names of the folders in `folder`, which are the classes."""
    names = [path.name for path in folders_in(folder)]
    if not names:
        raise InputError(f"{folder} holds no <class>/ folders of images")
    return names


def check_classes(folder: Path, labels: torch.Tensor, classes: list[str]) -> None:
    """Raise InputError where one of `classes`, the folders in `folder`, has none of `labels`."""
    counts = torch.bincount(labels, minlength=len(classes))
    if not counts.all():
        raise InputError(f"{folder / classes[int(counts.argmin())]} holds no images")


def labels_of(folder: Path, names: list[str], classes: list[str]) -> torch.Tensor:
    """Label (int64) of each file from the first folder in its name; others are an InputError."""
    index = {name: label for label, name in enumerate(classes)}
    labels = []
    for name in names:
        top, slash, _ = name.partition("/")
        if not slash:
            raise InputError(f"{folder / name} lies in no class folder")
        if top not in index:
            hint = suggest(top, classes)
            raise InputError(f"{folder / top} is not one of the training classes{hint}")
        labels.append(index[top])
    return torch.tensor(labels, dtype=torch.int64)


def validation_rows(names: list[str]) -> torch.Tensor:
    """Positions (int64, ascending) of the validation images among `names`, "<class>/<file>".

    Of a class of n > 1 images, the max(1, round(n / 10)) whose names, without suffix and seeded by
    SPLIT_SEED, have the lowest SHA-256: no generator's stream is involved, and an image added
    or a suffix changed moves no others across the split.
    """
    by_class: dict[str, list[tuple[bytes, str, int]]] = {}
    for row, name in enumerate(names):
        stem = os.path.splitext(name)[0]
        digest = hashlib.sha256(f"{SPLIT_SEED}/{stem}".encode("utf-8", "surrogateescape")).digest()
        by_class.setdefault(name.partition("/")[0], []).append((digest, name, row))
    chosen = []
    for ranked in by_class.values():
        count = max(1, round(len(ranked) * VAL_SHARE)) if len(ranked) > 1 else 0
        chosen += [row for _, _, row in sorted(ranked)[:count]]
    return torch.tensor(sorted(chosen), dtype=torch.int64)
