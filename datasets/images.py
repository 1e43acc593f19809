"""A set of images in memory: what every dataset here loads to and every corruption maps.

Images stay uint8 from the disk to the batch (`loader.BatchLoader` makes the floats).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from utils.errors import InputError

SPLITS = ("train", "val", "test", "all")
CLASS_PARITIES = ("even", "odd")


@dataclass
class ImageSet:
    """Images with labels, and where they stand in the published set.

    images  uint8 (N, 3, H, W), on the CPU as loaded
    labels  int64 (N,), indices into `classes`
    classes class names; the index is the label
    name    the dataset, e.g. "cifar10"
    rows    int64 (N,): the row of each image in its published part, that is in split "all" for
            train and val, in split "test" for test. Corrupted copies are kept in this order.
    total   number of rows of that part
    files   "<class>/<file>" of each image where the set is kept as image files, else empty
    source  in words, where the pixels come from
    class_parity  "even" or "odd" where only every other class of the published set is here
    """

    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    name: str
    rows: torch.Tensor | None = None
    total: int | None = None
    files: list[str] = field(default_factory=list, repr=False)
    source: str = ""
    class_parity: str | None = None

    def __post_init__(self) -> None:
        check_images(self.images)
        count, labels = len(self.images), self.labels
        if labels.dtype != torch.int64 or labels.shape != (count,):
            got = f"{labels.dtype} {tuple(labels.shape)}"
            raise InputError(f"{self.name}: labels must be int64 ({count},), not {got}")
        if self.rows is None:
            self.rows = torch.arange(count)
        if self.total is None:
            self.total = count

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: str | torch.device) -> ImageSet:
        """This set with images and labels on `device`."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def subset(self, indices: torch.Tensor | Sequence[int]) -> ImageSet:
        """The images at `indices` (int64 positions in this set), in that order, copied."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return replace(
            self,
            images=self.images[indices],
            labels=self.labels[indices],
            rows=self.rows[indices],
            files=[self.files[i] for i in indices.tolist()] if self.files else [],
        )


def every_other_class(images: ImageSet, class_parity: str) -> ImageSet:
    """The images of every other class, from the first ("even") or the second ("odd") on.

    Labels are counted anew; `rows` and `total` remain those of the published part.
    """
    first = CLASS_PARITIES.index(class_parity)
    kept = images.subset(torch.nonzero(images.labels % 2 == first).flatten())
    kept.labels = kept.labels // 2
    kept.classes, kept.class_parity = images.classes[first::2], class_parity
    return kept


def spaced(images: ImageSet, limit: int | None) -> ImageSet:
    """At most `limit` of the images, evenly spaced over the set; all of them for None."""
    if limit is None or limit >= len(images):
        return images
    return images.subset(torch.arange(limit) * len(images) // limit)


def split_rows(total: int, val_rows: torch.Tensor, split: str) -> torch.Tensor:
    """Rows (int64, ascending) of `split` in a part of `total` rows; `val_rows` are validation's.

    In the test part there is no validation: "test" and "all" are every row.
    """
    if split in ("all", "test"):
        return torch.arange(total)
    is_val = torch.zeros(total, dtype=torch.bool)
    is_val[val_rows] = True
    return torch.nonzero(is_val if split == "val" else ~is_val).flatten()


def check_images(images: torch.Tensor) -> None:
    """Raise InputError unless `images` are uint8 (N, 3, H, W)."""
    shape = tuple(images.shape)
    if images.dtype != torch.uint8 or len(shape) != 4 or shape[1] != 3:
        raise InputError(f"images must be uint8 (N, 3, H, W), not {images.dtype} {shape}")


def stable_seed(*parts: object) -> int:
    """A 63-bit seed from `parts` (numbers and strings), the same in every process and version."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def fingerprint(image_set: ImageSet) -> str:
    """16 hexadecimal digits of the SHA-256 over shape, pixels and labels, for results files."""
    digest = hashlib.sha256(repr(tuple(image_set.images.shape)).encode())
    digest.update(image_set.images.cpu().contiguous().numpy())
    digest.update(image_set.labels.cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
