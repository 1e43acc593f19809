"""Image files decoded once into one uint8 array, kept beside the data.

The array lies in `<root>/.rws_cache/`, or in `$XDG_CACHE_HOME/robust-weight-signatures/` (default
`~/.cache`) where the data folder can't be written. Its name carries a fingerprint of the file list
(names, sizes, times of modification) and of the image size, so a changed source is decoded anew;
a CRC-32 follows the array, so a damaged file is decoded anew too.
"""

import contextlib
import hashlib
import os
import warnings
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from utils.errors import InputError, thread_pool, warn
from utils.files import AnyPath, refusals_of, replacing

WORKERS: int | None = None  # threads that decode images; None: one per core, at most 16
# Part of every fingerprint: raise it when decoding or resizing changes.
FORMAT = 2
# No training image comes near; a file that claims more is a decompression bomb or a mistake.
MAX_PIXELS = 50_000_000
SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"))
# What Pillow may open. It goes by content, and for some others (EPS) starts an interpreter.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF")
# What Pillow converts to RGB without loss.
EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB")
# Folders that systems and programs leave beside people's files, besides those with a dot in front.
DEBRIS = ("__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN")
DEBRIS += ("lost+found", "System Volume Information")
warnings.simplefilter("error", Image.DecompressionBombWarning)
# Images per piece of work: large enough to amortize the hand-over, small enough to spread evenly.
_PIECE = 256


def is_debris(name: str) -> bool:
    """Whether a file or folder of that name is none of a data set's: hidden, or in DEBRIS."""
    return name.startswith(".") or name in DEBRIS


def folders_in(folder: Path) -> list[Path]:
    """The folders directly in `folder`, sorted by name, debris passed over."""
    with refusals_of(folder, "read"):
        return sorted(p for p in folder.iterdir() if not is_debris(p.name) and p.is_dir())


def list_images(folder: Path) -> list[str]:
    """Names of all image files under `folder`, at any depth: relative to it, "/" between, sorted.

    Files with other suffixes, and debris, are passed over.
    Raises InputError when the folder can't be read or holds no images.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = []
    with refusals_of(folder, "read"):
        for place, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
            folders[:] = [name for name in folders if not is_debris(name)]
            prefix = "".join(f"{part}/" for part in Path(place).relative_to(folder).parts)
            for name in names:
                if not is_debris(name) and os.path.splitext(name)[1].lower() in SUFFIXES:
                    found.append(prefix + name)
    if not found:
        raise InputError(f"{folder} holds no images")
    return sorted(found)


def resized(image: Image.Image, side: int) -> Image.Image:
    """The central square of `image` at side×side: Pillow's BOX to reduce, BILINEAR to enlarge."""
    width, height = image.size
    if (width, height) == (side, side):
        return image
    square = min(width, height)
    left, top = (width - square) // 2, (height - square) // 2
    method = Image.Resampling.BOX if square >= side else Image.Resampling.BILINEAR
    return image.resize((side, side), method, box=(left, top, left + square, top + square))


def read_image(path: AnyPath, image_size: int | None = None) -> Image.Image:
    """Decode one file to RGB, resized to image_size×image_size where that is given.

    Of integers of more than 8 bits the highest 8 are kept, as Pillow does for three channels.
    Raises InputError naming the file when it is empty, truncated, over MAX_PIXELS, in none of
    FORMATS or in a mode whose range is not known, as of floats.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width}×{image.height} pixels, the limit is {MAX_PIXELS:,}"
                )
            rgb = _eight_bits(image).convert("RGB")
    # Decoders meet damaged files with anything from OSError to struct.error and IndexError.
    except Exception as error:
        empty = os.path.exists(path) and not os.path.getsize(path)
        reason = "empty file" if empty else str(error) or type(error).__name__
        raise InputError(f"{path}: not a readable image ({reason})") from error
    return rgb if image_size is None else resized(rgb, image_size)


def _eight_bits(image: Image.Image) -> Image.Image:
    """`image` with 8 bits a channel; ValueError for floats and signed integers."""
    if image.mode in EIGHT_BITS:
        return image
    tags = image.tag_v2 if image.format == "TIFF" else {}  # others have 16, PGM scaled to that
    bits, kind, black = tags.get(258, [16])[0], tags.get(339, [1])[0], tags.get(262, 1)
    if not image.mode.startswith("I") or kind != 1 or black != 1:  # signed, or 0 is white
        raise ValueError(f"mode {image.mode}: save it as unsigned integers of 8 or 16 bits")
    values = np.asarray(image).astype(np.int64) % 2**bits  # Pillow has 32 bits as signed
    return Image.fromarray((values >> bits - 8).astype(np.uint8))


def read_images(
    folder: Path, names: list[str], rows: torch.Tensor, image_size: int | None, title: str
) -> torch.Tensor:
    """Pixels of the files `names` in `folder` at `rows` (int64), uint8 (len(rows), 3, side, side).

    All files are decoded on the first call and come from the cache beside `folder` afterwards.
    `title` names the part in the progress bar and the file. image_size None: the images' own size,
    which must be square and the same for all.
    Raises InputError for a file that can't be decoded and for sizes that differ.
    """
    stem, key = f"{title}-{image_size or 'own'}", _key(folder, names, image_size)
    places = [place / f"{stem}-{key}.npy" for place in _places(folder.parent)]
    for path in places:
        if (pixels := _from_cache(path, len(names), rows)) is not None:
            return pixels
    whole = decode(folder, names, image_size, title)
    for path in places:
        try:
            with replacing(path) as temporary, open(temporary, "wb") as file:
                np.save(file, whole)
                file.write(zlib.crc32(whole).to_bytes(4, "big"))
        except InputError as error:  # a full disk, or a folder that can't be written
            failure = error
            continue
        for old in path.parent.glob(f"{stem}-*.npy"):
            if old != path:
                with contextlib.suppress(OSError):
                    old.unlink()
        break
    else:
        warn(f"no cache of the decoded images: {failure}")
    return torch.from_numpy(whole[rows.numpy()])


def decode(folder: Path, names: list[str], image_size: int | None, title: str) -> np.ndarray:
    """Pixels of all files `names` in `folder`, uint8 (n, 3, side, side)."""
    side = image_size
    if side is None:  # the first one's, which the others must share
        side, height = read_image(folder / names[0]).size
        if side != height:
            raise InputError(
                f"{folder / names[0]} is {side}×{height}, not square: give --image_size"
            )
    pixels = np.empty((len(names), 3, side, side), np.uint8)

    def work(start: int) -> int:
        piece = names[start : start + _PIECE]
        for i, name in enumerate(piece, start):
            image = read_image(f"{folder}/{name}", image_size)
            if image.size != (side, side):
                raise InputError(
                    f"{folder}/{name} is {image.width}×{image.height}, "
                    f"{names[0]} is {side}×{side}: give --image_size"
                )
            pixels[i] = np.asarray(image).transpose(2, 0, 1)
        return len(piece)

    with (
        thread_pool(WORKERS or min(16, os.cpu_count() or 1)) as pool,
        tqdm(total=len(names), desc=f"decoding {title}", unit="img", disable=None) as bar,
    ):
        for done in pool.map(work, range(0, len(names), _PIECE)):
            bar.update(done)
    return pixels


def _key(folder: Path, names: list[str], image_size: int | None) -> str:
    digest = hashlib.sha256(f"{FORMAT} {image_size} {folder.name}\n".encode())
    with refusals_of(folder, "read"):
        for name in names:
            stat = os.stat(f"{folder}/{name}")
            line = f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:24]


def _places(root: Path) -> list[Path]:
    """Folders to look for the cache and, in this order, to write it."""
    root = root.resolve()
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    tag = hashlib.sha256(os.fsencode(root)).hexdigest()[:16]
    return [root / ".rws_cache", Path(base) / "robust-weight-signatures" / tag]


def _from_cache(path: Path, count: int, rows: torch.Tensor) -> torch.Tensor | None:
    """Rows of the cached array, or None where it is missing or damaged."""
    # A damaged header leads NumPy's parser to anything from ValueError to tokenize.TokenError.
    with contextlib.suppress(Exception):
        pixels = np.load(path, mmap_mode="r", allow_pickle=False)
        end = pixels.offset + pixels.size
        whole = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[:2] == (count, 3)
        whole = whole and pixels.flags.c_contiguous and path.stat().st_size == end + 4
        if whole and zlib.crc32(pixels) == np.fromfile(path, ">u4", offset=end).item():
            return torch.from_numpy(pixels[rows.numpy()])
    return None
