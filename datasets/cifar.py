"""CIFAR-10 and CIFAR-100: the published pickles, or `train/<class>/*` and `test/<class>/*` images.

Pickles: the first 45,000 training rows are train, the last 5,000 validation. Folders: see
`image_folder`.
"""

import shutil
import socket
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.utils import check_integrity, download_url

from datasets import image_folder
from datasets.archives import located, unpack
from datasets.cache import folders_in, resized
from datasets.images import ImageSet, split_rows
from utils.errors import InputError
from utils.files import hold

PUBLISHED = {"cifar10": CIFAR10, "cifar100": CIFAR100}
_OTHERS = {  # what people have in its place
    "*.npy": "the .npy files are a corrupted copy",
    "*.bin": "the .bin files are the binary version, the Python version is read",
    "*-binary.tar.gz": "the archive is the binary version, the Python version is read",
}


def load(root: Path, split: str, image_size: int | None = None, name: str = "cifar10") -> ImageSet:
    """Load a split of `name` ("cifar10" or "cifar100"): images uint8 (N, 3, 32, 32).

    root: holds cifar-10-batches-py (cifar-100-python) or its archive, or is that folder, or holds
    train/ and test/ with one folder of images per class, or all this lies one folder deeper. Where
    it has none, the published archive is downloaded into it.
    image_size: side to resize to, as in `cache.resized`; None keeps 32.
    Raises InputError when nothing is found and nothing can be downloaded, for damaged files and
    for a wrong number of classes.
    """
    published = PUBLISHED[name]
    wanted = int(name.removeprefix("cifar"))

    def has_pickles(folder: Path) -> bool:
        return any((folder / file).is_file() for file, _ in published.train_list)

    def classes_in(folder: Path) -> int:
        return len(folders_in(folder / "train")) if (folder / "train").is_dir() else 0

    places = root, published.base_folder, published.filename
    folder = located(*places, lambda place: has_pickles(place) or classes_in(place) == wanted)
    if folder is None and (count := classes_in(root)):
        raise InputError(
            f"{root / 'train'} holds {count} class folders, {name} has {wanted}: for another set "
            "use --dataset folder"
        )
    if folder is None or has_pickles(folder):
        return _load_pickles(folder or _download(root, name), split, image_size, name)
    return image_folder.part(folder, split).load(name, split, image_size)


def _load_pickles(folder: Path, split: str, image_size: int | None, name: str) -> ImageSet:
    part = _verified(folder, name, train=split != "test")
    total = len(part.data)
    rows = split_rows(total, torch.arange(total - total // 10, total), split)
    pixels = part.data[rows.numpy()]
    if image_size is not None and image_size != pixels.shape[1]:
        pixels = np.stack([np.asarray(resized(Image.fromarray(p), image_size)) for p in pixels])
    images = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))
    labels = torch.tensor(part.targets, dtype=torch.int64)[rows]
    return ImageSet(images, labels, list(part.classes), name, rows, total, source=str(folder))


def _verified(folder: Path, name: str, train: bool) -> CIFAR10:
    """The published files in `folder`; torchvision unpickles none unless the MD5 of all is right.

    Raises InputError naming the file that is missing or not the published one.
    """
    published = PUBLISHED[name]
    in_place = type(name, (published,), {"base_folder": ""})
    try:
        return in_place(folder, train=train)
    except RuntimeError:
        meta = [published.meta["filename"], published.meta["md5"]]
        files = [*published.train_list, *published.test_list, meta]
        wrong = next(
            folder / file for file, md5 in files if not check_integrity(folder / file, md5)
        )
        what = f"MD5 is not that of the published {name}" if wrong.exists() else "no such file"
        raise InputError(
            f"{wrong}: {what}; images of your own go into train/<class>/ and test/<class>/ "
            f"folders; to have {name} downloaded, name another --data"
        ) from None


def _download(root: Path, name: str) -> Path:
    published = PUBLISHED[name]
    looked_for = f"neither {published.base_folder}/ nor train/<class>/ folders of images there"
    for pattern, what in _OTHERS.items() if root.is_dir() else ():
        if any(root.glob(f"**/{pattern}")):
            raise InputError(f"--data {root}: {looked_for}; {what}")
    archive, folder = root / published.filename, root / published.base_folder
    with hold(root / f".{archive.name}.download.lock"):
        if not (archive.exists() or folder.exists()):  # another process may have been faster
            work = root / f".{archive.name}.download"
            try:
                # urllib alone would wait for minutes where there is no network.
                socket.create_connection(("www.cs.toronto.edu", 443), timeout=5).close()
                download_url(published.url, work, archive.name, published.tgz_md5)
                (work / archive.name).rename(archive)
            except (OSError, RuntimeError) as error:
                raise InputError(
                    f"--data {root}: {looked_for}, and downloading {name} failed: {error}"
                ) from error
            finally:
                shutil.rmtree(work, ignore_errors=True)
    if not folder.exists():
        unpack(archive, folder)
    return folder
