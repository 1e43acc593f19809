"""Where under --data a set lies: in the folder itself, one deeper, or in an archive to unpack."""

import shutil
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from datasets.cache import folders_in
from utils.errors import InputError, warn
from utils.files import hold


def located(root: Path, published: str, archive: str, holds: Callable[[Path], bool]) -> Path | None:
    """The folder under --data `root` of which `holds` is true; None where there is none.

    Looked at in this order: the folder `published` in `root`; `root`; what `archive`, if that lies
    there, is unpacked to; the other folders in `root`, with a warning.
    Raises InputError where several of these fit, and for an archive that can't be unpacked.
    """
    home = root / published
    if not (holds(home) or holds(root)) and (root / archive).is_file():
        unpack(root / archive, home)
    for place in (home, root):
        if holds(place):
            return place
    inside = folders_in(root) if root.is_dir() else []
    places = dict.fromkeys(p for folder in inside for p in (folder, folder / published))
    found = [place for place in places if holds(place)]
    if len(found) > 1:
        there = ", ".join(str(place.relative_to(root)) for place in found)
        raise InputError(f"--data {root}: several sets there, name one of them: {there}")
    if found:
        warn(f"--data {root}: read from {found[0]}, which lies deeper")
    return found[0] if found else None


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a .zip or .tar.gz, of `folder` or its content, to `folder`: whole or absent.

    Raises InputError before anything is written where a member is no plain file or folder below
    it, and for a damaged archive; the archive stays.
    """
    work = archive.with_name(f".{archive.name}.tmp")
    with hold(archive.with_name(f".{archive.name}.lock")):
        if folder.exists():  # another process has unpacked it meanwhile
            return
        print(f"unpacking {archive}", file=sys.stderr)
        try:
            with (zipfile.ZipFile if archive.suffix == ".zip" else tarfile.open)(archive) as packed:
                if isinstance(packed, zipfile.ZipFile):
                    links = [(m.filename, m.external_attr >> 28 == 0o12) for m in packed.infolist()]
                else:
                    links = [(m.name, not (m.isfile() or m.isdir())) for m in packed.getmembers()]
                    packed.extraction_filter = getattr(tarfile, "data_filter", None)
                for name, link in links:
                    path = PurePosixPath(name.replace("\\", "/"))
                    if link or path.is_absolute() or ".." in path.parts or ":" in name:
                        raise ValueError(f"{name} in it is a link, or leads out of the folder")
                shutil.rmtree(work, ignore_errors=True)  # what a killed run left
                packed.extractall(work)
            inner = work / folder.name
            (inner if inner.is_dir() else work).rename(folder)
        # Damaged archives raise anything from OSError to zlib.error and EOFError.
        except Exception as error:
            half = isinstance(error, (zipfile.BadZipFile, tarfile.ReadError, EOFError, zlib.error))
            hint = "; if it is half a download, delete it and fetch it again" if half else ""
            raise InputError(f"cannot unpack {archive}: {error}{hint}") from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
