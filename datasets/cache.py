"""Image files decoded once into one uint8 array, kept beside the data.

The array lies in `<root>/.rws_cache/`, or in `$XDG_CACHE_HOME/robust-weight-signatures/` (default
`~/.cache`) where the data folder can't be written. Its name carries a fingerprint of the file list
(names, sizes, times of modification) and of the image size, so a changed source is decoded anew;
a CRC-32 follows the array, so a damaged file is decoded anew too.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from utils.atomic import replacing
from utils.errors import InputError

WORKERS: int | None = None  # threads that decode images; None: one per core, at most 16
# Part of every fingerprint: raise it when decoding or resizing changes.
FORMAT = 1
# No training image comes near; a file that claims more is a decompression bomb or a mistake.
MAX_PIXELS = 50_000_000
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"))
# What Pillow may open. It goes by content, and for some others (EPS) starts an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Images per piece of work: large enough to amortize the hand-over, small enough to spread evenly.
_PIECE = 256


@dataclass
class ImageFiles:
    """Image files under one folder: `names` relative to it ("/" between), `stats` (size, ns)."""

    folder: Path
    names: list[str]
    stats: list[tuple[int, int]]

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, positions: list[int]) -> ImageFiles:
        """The files at `positions`, in that order."""
        return ImageFiles(
            self.folder, [self.names[i] for i in positions], [self.stats[i] for i in positions]
        )


def list_images(folder: Path) -> ImageFiles:
    """Every image file under `folder`, at any depth, sorted by relative name.

    Files with other suffixes, and files and folders whose name starts with a dot, are passed over.
    Raises InputError when the folder can't be read.
    """
    found: list[tuple[str, int, int]] = []
    pending = [""]
    try:
        while pending:
            prefix = pending.pop()
            with os.scandir(folder / prefix) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        pending.append(f"{prefix}{entry.name}/")
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        stat = entry.stat()
                        found.append((prefix + entry.name, stat.st_size, stat.st_mtime_ns))
    except OSError as error:
        place = error.filename or folder
        raise InputError(f"cannot read {place}: {error.strerror or error}") from error
    found.sort()
    return ImageFiles(folder, [f[0] for f in found], [(f[1], f[2]) for f in found])


def resized(image: Image.Image, side: int) -> Image.Image:
    """The central square of `image` at side×side: Pillow's BOX to reduce, BILINEAR to enlarge."""
    width, height = image.size
    if (width, height) == (side, side):
        return image
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    method = Image.Resampling.BOX if square >= side else Image.Resampling.BILINEAR
    return image.resize((side, side), method, box=(left, top, left + square, top + square))


def read_image(path: str | os.PathLike, image_size: int | None = None) -> Image.Image:
    """Decode one file to RGB, resized to image_size×image_size where that is given.

    Raises InputError naming the file when it is empty, truncated, over MAX_PIXELS or in none of
    FORMATS.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise InputError(
                    f"{path}: {image.width}×{image.height} pixels, "
                    f"more than the limit of {MAX_PIXELS:,}"
                )
            rgb = image.convert("RGB")
    except InputError:
        raise
    # Decoders meet damaged files with anything from OSError to struct.error and IndexError.
    except Exception as error:
        reason = "empty file" if _is_empty(path) else str(error) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from error
    return rgb if image_size is None else resized(rgb, image_size)


def read_images(
    files: ImageFiles,
    rows: torch.Tensor,
    image_size: int | None,
    root: Path | None,
    title: str,
) -> torch.Tensor:
    """Pixels of `files` at `rows` (int64), uint8 (len(rows), 3, side, side).

    All files are decoded on the first call and come from the cache of `root` afterwards; with
    root None only those at `rows` are decoded, and nothing is cached. `title` names the part
    in the progress bar and the file. image_size None: the images' own size, which must be square
    and the same for all.
    Raises InputError for a file that can't be decoded and for sizes that differ.
    """
    rows = torch.as_tensor(rows, dtype=torch.int64)
    if root is not None and len(files):
        key = _key(files, image_size)
        places = [place / f"{title}-{key}.npy" for place in _places(root)]
        for path in places:
            pixels = _from_cache(path, len(files), rows)
            if pixels is not None:
                return pixels
        side = image_size or _own_side(files)
        for path in places:
            if _write_cache(path, files, side, image_size, title):
                pixels = _from_cache(path, len(files), rows)
                if pixels is not None:
                    return pixels
    wanted = files.pick(rows.tolist())
    side = image_size or (_own_side(wanted) if len(wanted) else 1)
    pixels = np.empty((len(wanted), 3, side, side), np.uint8)
    start = 0
    for piece in _decoded(wanted, side, image_size, title):
        pixels[start : start + len(piece)] = piece
        start += len(piece)
    return torch.from_numpy(pixels)


def _is_empty(path: str | os.PathLike) -> bool:
    with contextlib.suppress(OSError):
        return os.path.getsize(path) == 0
    return False


def _own_side(files: ImageFiles) -> int:
    """Side of the first image, which the others must share."""
    path = files.folder / files.names[0]
    width, height = read_image(path).size
    if width != height:
        raise InputError(f"{path} is {width}×{height}, not square: give --image_size")
    return width


def _decoded(
    files: ImageFiles, side: int, image_size: int | None, title: str
) -> Iterator[np.ndarray]:
    """Yield uint8 (n, 3, side, side) pieces of `files`, in order."""
    folder = str(files.folder)

    def piece(start: int) -> np.ndarray:
        names = files.names[start : start + _PIECE]
        pixels = np.empty((len(names), side, side, 3), np.uint8)
        for i, name in enumerate(names):
            image = read_image(f"{folder}/{name}", image_size)
            if image.size != (side, side):
                raise InputError(
                    f"{folder}/{name} is {image.width}×{image.height}, "
                    f"{files.names[0]} is {side}×{side}: give --image_size"
                )
            pixels[i] = image
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))

    workers = WORKERS or min(16, os.cpu_count() or 1)
    starts = iter(range(0, len(files), _PIECE))
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(files), desc=f"decoding {title}", unit="img", disable=None) as bar,
    ):
        # A short queue, so that a slow disk under the cache doesn't pile up pieces in memory.
        queue = [pool.submit(piece, start) for start in itertools.islice(starts, 2 * workers)]
        try:
            while queue:
                pixels = queue.pop(0).result()
                start = next(starts, None)
                if start is not None:
                    queue.append(pool.submit(piece, start))
                bar.update(len(pixels))
                yield pixels
        finally:
            for waiting in queue:
                waiting.cancel()


def _key(files: ImageFiles, image_size: int | None) -> str:
    digest = hashlib.sha256(f"{FORMAT} {image_size} {files.folder.name}\n".encode())
    for name, (size, time) in zip(files.names, files.stats, strict=True):
        digest.update(f"{name}\0{size}\0{time}\n".encode("utf-8", "surrogateescape"))
    return f"{image_size or 'own'}-{digest.hexdigest()[:24]}"


def _places(root: Path) -> list[Path]:
    """Folders to look for the cache and, in this order, to write it."""
    root = root.resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    tag = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return [root / ".rws_cache", Path(base) / "robust-weight-signatures" / tag]


def _from_cache(path: Path, count: int, rows: torch.Tensor) -> torch.Tensor | None:
    """Rows of the cached array, or None where it is missing or damaged."""
    try:
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(pixels, np.memmap) or pixels.dtype != np.uint8:
            return None
        if pixels.ndim != 4 or pixels.shape[:2] != (count, 3):
            return None
        with open(path, "rb") as file:
            file.seek(-4, os.SEEK_END)
            expected = int.from_bytes(file.read(4), "big")
        if not pixels.flags.c_contiguous or path.stat().st_size != pixels.offset + pixels.size + 4:
            return None
        checksum = 0
        for start in range(0, count, 1024):
            checksum = zlib.crc32(pixels[start : start + 1024], checksum)
    # A damaged header leads NumPy's parser to anything from ValueError to tokenize.TokenError.
    except Exception:
        return None
    if checksum != expected:
        return None
    return torch.from_numpy(pixels[rows.numpy()])


def _write_cache(
    path: Path, files: ImageFiles, side: int, image_size: int | None, title: str
) -> bool:
    """Decode `files` into `path`; False, and nothing left behind, where that can't be written."""
    if not _can_write(path.parent):
        return False
    shape = (len(files), 3, side, side)
    pieces = _decoded(files, side, image_size, title)
    failed = False
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            checksum = 0
            for piece in pieces:
                checksum = zlib.crc32(piece, checksum)
                file.write(piece)
            file.write(checksum.to_bytes(4, "big"))
    except InputError as error:
        # A full disk only costs the cache; a bad image is the caller's to hear of.
        if not isinstance(error.__cause__, OSError) or not str(error).startswith("cannot write"):
            raise
        warnings.warn(f"no cache of the decoded images: {error}", stacklevel=2)
        failed = True
    finally:
        pieces.close()
    if failed:
        return False
    for old in path.parent.glob(f"{title}-{image_size or 'own'}-*.npy"):
        if old != path:
            with contextlib.suppress(OSError):
                old.unlink()
    return True


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK)
