"""Files that are whole or absent: write under a temporary name, fsync, rename.

The temporary name is .NAME.XXXXXXXX.tmp, with NAME's suffix once more at its end. A killed process
leaves at most that, which nothing reads and the next write of NAME removes.
"""

from __future__ import annotations

import contextlib
import glob
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from utils import lock
from utils.errors import InputError


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Give a temporary path beside `path`; on a clean exit fsync it and rename it to `path`.

    On any exception the temporary file is removed and `path` stays as it was.
    Raises InputError when the folder can't be written (full disk, permissions).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)
        if handle is not None:
            os.close(handle)
    _fsync_folder(path.parent)


def _temporary(path: Path) -> tuple[int | None, Path]:
    """A new file beside `path`, open and locked while its writer lives; dead writers' are deleted.

    The suffix stays at the end, since savers such as Pillow choose the format by it. Where there
    are no locks it isn't open, and nothing is deleted.
    """
    ending = f".tmp{path.suffix}"
    for old in path.parent.glob(f".{glob.escape(path.name)}.{'?' * 8}{glob.escape(ending)}"):
        with contextlib.suppress(OSError):  # another process was first
            handle = os.open(old, os.O_RDWR)
            if lock.take(handle):
                old.unlink()
            os.close(handle)
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=ending, dir=path.parent)
        taken = lock.take(handle)
        # Between its making and its locking another process may have taken the file for dead.
        if taken and lock.is_at(handle, name):
            return handle, Path(name)
        os.close(handle)
        if taken is None:
            return None, Path(name)


def check_writable(folder: str | os.PathLike) -> None:
    """Raise InputError unless files can be made in `folder`, which may not exist yet.

    Leaves nothing behind; for asking before hours of work instead of after.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}") from error


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _fsync_folder(folder: Path) -> None:
    """Make the rename itself durable; file systems that can't fsync a folder are left alone."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
