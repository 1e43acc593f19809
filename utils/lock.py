"""Locks between processes: one trainer to a folder, one writer at a time to a log.

A lock is an flock on a small file, which the kernel lifts when its process ends, however it ends.
Systems without flock (Windows, some network file systems) go unlocked.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def take(handle: int, wait: bool = False) -> bool | None:
    """Lock an open file for as long as it is open; False: another process has it; None: no locks.

    Not inherited by other programs that this process starts.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # a file system without them
        return None
    return True


def is_at(handle: int, path: str | os.PathLike) -> bool:
    """Whether `path` still names the open file; another process may have deleted it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def hold(path: str | os.PathLike, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which is there, with the folders it needs, meanwhile only.

    While another process has it, wait; with `refusal`, what can't be done now, raise an InputError
    that adds who has it. Raises InputError where the file can't be made.
    """
    path = Path(path).absolute()
    handle, made = _acquire(path, refusal)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # before the lock goes: nobody's newer file is here yet
        os.close(handle)
        for folder in made:
            with contextlib.suppress(OSError):  # something was written there
                folder.rmdir()


def _acquire(path: Path, refusal: str | None) -> tuple[int, list[Path]]:
    """The open lock file and the folders made for it, innermost first."""
    made: list[Path] = []
    while True:
        try:
            missing = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            made += [folder for folder in missing if folder not in made]
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # the last holder has just removed a folder
            continue
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror or error}") from error
        try:
            if take(handle) is False:
                holder = os.read(handle, 500).decode(errors="replace") or "another process"
                if refusal:
                    raise InputError(f"{refusal}: {holder} is at it; wait for it or end it")
                print(f"waiting for {holder}", file=sys.stderr)
                take(handle, wait=True)
            if is_at(handle, path):  # the holder before us deletes its file
                with contextlib.suppress(OSError):  # for people only; a full disk may refuse it
                    os.ftruncate(handle, 0)
                    os.write(handle, _own_name().encode())
                return handle, made
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _own_name() -> str:
    command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
    return f"process {os.getpid()} on {platform.node()} ({command[:300]})"
