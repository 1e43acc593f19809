"""Files that are whole or absent, and locks between processes.

A file is written as .NAME.tmp (with NAME's suffix once more at its end), fsynced and renamed. A
killed process leaves at most that, which nothing reads and the next write of NAME reuses. A lock
is an flock, which the kernel lifts when its process ends, however it ends; systems without flock
(Windows, some network file systems) go unlocked.
"""

import contextlib
import io
import itertools
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from utils.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

AnyPath = str | os.PathLike


@contextlib.contextmanager
def replacing(path: AnyPath) -> Iterator[Path]:
    """Give a temporary path beside `path`; on a clean exit fsync it and rename it to `path`.

    On any exception the temporary file is removed and `path` stays as it was. Another process that
    writes `path` waits. Raises InputError where that can't be written (full disk, permissions).
    """
    path = Path(path)
    temporary = path.parent / f".{path.name}.tmp{path.suffix}"  # savers go by the suffix
    with refusals_of(path):
        if path.is_char_device():  # as /dev/null, whose place root's file would take
            raise InputError(f"cannot write {path}: a device, name a file")
        file, _ = _open_locked(temporary)
        with file:
            try:
                file.truncate(0)  # what a killed process left
                yield temporary
                os.fsync(file.fileno())
                if fcntl is None:
                    file.close()  # Windows renames no open file
                temporary.replace(path)
            finally:  # once it is renamed, the name may be another process's
                if file.closed or _is_at(file, temporary):
                    temporary.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # make the rename durable, where folders can be fsynced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def write_text(path: AnyPath, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(folder: AnyPath) -> None:
    """Raise InputError unless files can be made in `folder`, which may not exist yet.

    Leaves nothing behind; for asking before hours of work instead of after.
    """
    folder = Path(folder).absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    with refusals_of(f"to {folder}"), tempfile.TemporaryFile(dir=existing):
        pass


@contextlib.contextmanager
def hold(path: AnyPath, refusal: str | None = None) -> Iterator[None]:
    """Hold the lock file `path`, which is there, with the folders it needs, meanwhile only.

    While another process has it, wait; with `refusal`, what can't be done now, raise an InputError
    that adds who has it. Raises InputError where the file can't be made.
    """

    def busy(file: io.FileIO) -> None:
        file.seek(0)
        holder = file.read(500).decode(errors="replace") or "another process"
        if refusal:
            raise InputError(f"{refusal}: {holder} is already using it; wait or end it")
        print(f"waiting for {holder}", file=sys.stderr)

    path = Path(path).absolute()
    with refusals_of(path):
        file, made = _open_locked(path, busy)
    try:
        with contextlib.suppress(OSError):  # for people only; a full disk may refuse it
            file.truncate(0)
            command = shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])[:300]
            file.write(f"process {os.getpid()} on {platform.node()} ({command})".encode())
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes no open file
            path.unlink(missing_ok=True)  # before the lock goes: nobody's newer file is here yet
        file.close()
        for folder in made:
            with contextlib.suppress(OSError):  # something was written there
                folder.rmdir()


def _open_locked(
    path: Path, busy: Callable[[io.FileIO], None] = lambda file: None
) -> tuple[io.FileIO, list[Path]]:
    """The file `path` open under a lock, and the folders made for it, innermost first.

    `busy` is called with the open file before waiting for another process that has the lock.
    """
    made: list[Path] = []
    for attempt in itertools.count():
        try:
            missing = [folder for folder in path.parents if not folder.exists()]
            path.parent.mkdir(parents=True, exist_ok=True)
            made += [folder for folder in missing if folder not in made]
            file = io.FileIO(path, "a+")
        except FileNotFoundError:
            if attempt == 100:
                raise
            continue  # the last holder has just removed a folder
        try:
            if not _lock(file):
                busy(file)
                _lock(file, wait=True)
            if _is_at(file, path):  # the holder before may have taken it away
                return file, made
        except BaseException:
            file.close()
            raise
        file.close()


def _lock(file: io.FileIO, wait: bool = False) -> bool:
    """Lock an open file for as long as it is open; False: another process has it."""
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            pass
    return True


def _is_at(file: io.FileIO, path: Path) -> bool:
    """Whether `path` still names the open file: another process may have moved or deleted it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    return False


@contextlib.contextmanager
def refusals_of(what: object, verb: str = "write") -> Iterator[None]:
    """Raise an InputError, `what` can't be written (or read), where the system refuses."""
    try:
        yield
    except OSError as error:
        if verb == "read" and error.filename:  # in a folder `what`; written is a temporary file
            what = error.filename
        raise InputError(f"cannot {verb} {what}: {error.strerror or error}") from error
