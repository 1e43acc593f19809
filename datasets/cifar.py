"""CIFAR-10 and CIFAR-100: the published pickles, or `train/<class>/*` and `test/<class>/*` images.

Pickles: the first 45,000 training rows are train, the last 5,000 validation. Folders: see
`image_folder`.
"""

from __future__ import annotations

import socket
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity

from datasets import image_folder
from datasets.cache import resized
from datasets.images import ImageSet, split_rows
from utils.errors import InputError

NUM_CLASSES = {"cifar10": 10, "cifar100": 100}
_PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_HOST = "www.cs.toronto.edu"


def load(root: Path, split: str, image_size: int | None = None, name: str = "cifar10") -> ImageSet:
    """Load a split of `name` ("cifar10" or "cifar100"): images uint8 (N, 3, 32, 32).

    root: holds cifar-10-batches-py (cifar-100-python), or is that folder, or holds train/ and
    test/ with one folder of images per class. Where it has neither, the published archive is
    downloaded into it. Pickles are opened only if their MD5 is the published one.
    image_size: side to resize to (Pillow's BOX to reduce, BILINEAR to enlarge); None keeps 32.
    Raises InputError when nothing is found and nothing can be downloaded, for damaged files and
    for a wrong number of classes.
    """
    root = Path(root)
    folder = _pickle_folder(root, name)
    if folder is None and (root / "train").is_dir():
        part = _folder_part(root, split, name)
        title = "test" if split == "test" else "train"
        return part.load(name, root, split, image_size, title)
    if folder is None:
        folder = _download(root, name)
    return _load_pickles(folder, split, image_size, name)


def rows(root: Path, split: str, name: str = "cifar10") -> torch.Tensor:
    """Rows (int64) of `split` in its part (`ImageSet.rows`), without reading any image."""
    root = Path(root)
    if _pickle_folder(root, name) is None and (root / "train").is_dir():
        part = _folder_part(root, split, name)
        return split_rows(len(part.files), part.val_rows, split)
    total = 10_000 if split == "test" else 50_000
    return split_rows(total, _last_tenth(total), split)


def _last_tenth(total: int) -> torch.Tensor:
    return torch.arange(total - total // 10, total)


def _folder_part(root: Path, split: str, name: str) -> image_folder.Part:
    part = image_folder.part(root, split)
    if len(part.classes) != NUM_CLASSES[name]:
        raise InputError(
            f"{root / 'train'} holds {len(part.classes)} class folders, {name} has "
            f"{NUM_CLASSES[name]}: for another set use --dataset folder"
        )
    return part


def _pickle_folder(root: Path, name: str) -> Path | None:
    """The folder that holds the published pickles, or None."""
    published = _PUBLISHED[name]
    for folder in (root / published.base_folder, root):
        if any((folder / file).is_file() for file, _ in published.train_list):
            return folder
    return None


def _load_pickles(folder: Path, split: str, image_size: int | None, name: str) -> ImageSet:
    published = _PUBLISHED[name]
    checks = [*published.train_list, *published.test_list]
    checks.append([published.meta["filename"], published.meta["md5"]])
    for file, md5 in checks:
        if not (folder / file).is_file():
            raise InputError(f"--data: {folder} lacks {file} of the published {name}")
        if not check_integrity(folder / file, md5):
            raise InputError(
                f"{folder / file}: MD5 is not that of the published {name}; delete "
                f"{folder} to download it again"
            )
    # torchvision joins root and base_folder; the pickles may lie in a folder of any name.
    reader = type("Pickles", (published,), {"base_folder": ""})
    with warnings.catch_warnings():
        # The published pickles predate NumPy 2.4's wish for a boolean `align`.
        warnings.simplefilter("ignore", np.exceptions.VisibleDeprecationWarning)
        raw = reader(str(folder), train=split != "test")
    chosen = split_rows(len(raw.data), _last_tenth(len(raw.data)), split)
    pixels = raw.data[chosen.numpy()]
    if image_size is not None and image_size != pixels.shape[1]:
        pixels = np.stack([np.asarray(resized(Image.fromarray(p), image_size)) for p in pixels])
    return ImageSet(
        images=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        labels=torch.tensor(raw.targets, dtype=torch.int64)[chosen],
        classes=list(raw.classes),
        name=name,
        rows=chosen,
        total=len(raw.data),
        source=str(folder),
    )


def _download(root: Path, name: str) -> Path:
    published = _PUBLISHED[name]
    looked_for = f"neither {published.base_folder}/ nor train/<class>/ folders of images there"
    if root.is_dir() and any(root.glob("**/*.npy")):
        raise InputError(f"--data {root}: {looked_for}; the .npy files are a corrupted copy")
    if not _network_answers():
        raise InputError(f"--data {root}: {looked_for}, and no network to download {name} from")
    try:
        published(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"--data {root}: {looked_for}, and downloading {name} failed: {error}"
        ) from error
    return root / published.base_folder


def _network_answers() -> bool:
    """Whether the download host accepts a connection; urllib alone would wait for minutes."""
    try:
        with socket.create_connection((_HOST, 443), timeout=5):
            return True
    except OSError:
        return False
