"""CIFAR-10 and CIFAR-100: the published pickles, or `train/<class>/*` and `test/<class>/*` images.

Pickles: the first 45,000 training rows are train, the last 5,000 validation. Folders: see
`image_folder`.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100

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
    downloaded into it. Pickles are opened only if their MD5 is the published one, and then by a
    reader that makes lists, dicts, text, numbers and byte arrays, and calls nothing.
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
    parts = published.test_list if split == "test" else published.train_list
    # All of them are wanted, so that half a download is noticed whatever is asked for.
    for file, _ in [*published.train_list, *published.test_list]:
        if not (folder / file).is_file():
            raise InputError(f"--data: {folder} lacks {file} of the published {name}")
    meta = _read_pickle(folder / published.meta["filename"], published.meta["md5"], name)
    classes = meta[published.meta["key"]]
    batches = [_read_pickle(folder / file, md5, name) for file, md5 in parts]
    pixels = np.concatenate([batch["data"] for batch in batches])
    pixels = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    targets = [batch["labels" if name == "cifar10" else "fine_labels"] for batch in batches]
    labels = torch.cat([torch.tensor(labels, dtype=torch.int64) for labels in targets])
    chosen = split_rows(len(pixels), _last_tenth(len(pixels)), split)
    pixels = pixels[chosen.numpy()]
    if image_size is not None and image_size != pixels.shape[1]:
        pixels = np.stack([np.asarray(resized(Image.fromarray(p), image_size)) for p in pixels])
    return ImageSet(
        images=torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))),
        labels=labels[chosen],
        classes=list(classes),
        name=name,
        rows=chosen,
        total=len(labels),
        source=str(folder),
    )


def _read_pickle(path: Path, md5: str, name: str) -> dict:
    """The dict in a published file, its "data" as uint8 (N, 3072).

    Raises InputError for another MD5 than the published one, and for contents of any other kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise InputError(
            f"{path}: MD5 is not that of the published {name}; delete {path.parent} to download "
            "it again"
        )
    try:
        return _Unpickler(io.BytesIO(content), encoding="latin1").load_dict()
    except Exception as error:  # a damaged pickle may stop its reader in any way
        raise InputError(f"{path}: not a pickle of the published {name} ({error})") from error


class _Unpickler(pickle.Unpickler):
    """Reads pickles of values and byte arrays; names of code are looked up in a list of three."""

    def find_class(self, module: str, name: str) -> object:
        if module.startswith(("numpy.core.", "numpy._core.")) and name == "_reconstruct":
            return _Array
        if module == "numpy" and name in ("ndarray", "dtype"):
            return _Type
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def load_dict(self) -> dict:
        content = self.load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError("no dict")
        if "data" in content:
            content["data"] = content["data"].array
        return content


class _Type:
    """Stands for numpy.ndarray, and for the type of an array's elements."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code

    def __setstate__(self, _: tuple) -> None:
        """Byte order and fields, of which single bytes have none."""


class _Array:
    """Stands for an array while it is read: only bytes in rows become one."""

    def __init__(self, *_: object) -> None:
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, (rows, columns), kind, by_columns, data = state
        if kind.code != "u1":
            raise pickle.UnpicklingError("an array of something else than bytes")
        data = data.encode("latin1") if isinstance(data, str) else data
        order = "F" if by_columns else "C"
        self.array = np.frombuffer(data, np.uint8).reshape((rows, columns), order=order)


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
