"""Files that torch wrote, read as data: tensors and plain values, and no code from them runs.

torch's restricted reader does the work. Beside what it knows, values that trainers keep in their
checkpoints are read: NumPy's scalars and arrays of numbers and text, argparse.Namespace,
defaultdict (as a dict), paths. What is no such file is named for what it is.
"""

import argparse
import pathlib
import re
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from utils.errors import InputError
from utils.files import AnyPath

CODE = "was not opened, it holds code"
# Two lines for the person who knows where the file is from; told, never run.
SAVE_ANEW = (
    "c = torch.load({path!r}, map_location='cpu', weights_only=False)",
    "torch.save({{k: v.state_dict() if hasattr(v, 'state_dict') else v for k, v in "
    "(c if isinstance(c, dict) else {{'model': c}}).items() "
    "if hasattr(v, 'state_dict') or isinstance(v, (dict, torch.Tensor))}}, {new!r})",
)
PACKED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"7z\xbc\xaf": "7-Zip"}


def read(path: AnyPath, what: str = "checkpoint") -> dict:
    """The dict in a file that torch wrote, tensors on the CPU; `what` it is, for the messages.

    Raises InputError when the file is missing, damaged, of another kind, or holds code.
    """
    path = Path(path)
    if path.is_dir():
        hint = "; name a file in it, e.g. model_SA_best.pth.tar" if what == "checkpoint" else ""
        for parts in (path, *path.iterdir()):
            if (parts / "data.pkl").is_file():
                hint = f", what unzipping makes of one; to undo it, in {parts.parent.absolute()}: "
                hint += f"zip -0 -r {parts.name}.pth {parts.name}"
        raise InputError(f"{path}: a folder, not a {what} file{hint}")
    if not path.is_file():
        raise InputError(f"{path}: no such {what} file")
    try:
        if kind := _other_kind(path):
            raise InputError(f"not a {what} file but {kind}")
        _check_archive(path)
        with torch.serialization.safe_globals(_SAFE):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    except Exception as error:  # torch and zipfile raise many types for damaged or refused files
        told = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = next(iter(told.strip().splitlines()), type(error).__name__)
        # An operand is any byte of a file that is no pickle at all; one of text may name a global.
        refused = re.match(r"Unsupported (?!operand)|Trying to|Can only|.*TorchScript", told)
        if not refused or not _is_pickle(path):
            wrong = f"damaged, or not a {what} file ({reason})"
        else:
            wrong = f"{CODE} ({reason.partition('. ')[0]})"
            if what == "checkpoint":
                lines = "; ".join(SAVE_ANEW).format(path=str(path), new=f"{path}.weights.pth")
                wrong += f"; if you trust its source, save the weights anew: import torch; {lines}"
        raise InputError(f"{path}: {wrong}") from error
    if not isinstance(content, Mapping):
        hint = "; is it the model's state_dict()?" if what == "checkpoint" else ""
        raise InputError(f"{path}: a {what} holds a dict, this is a {type(content).__name__}{hint}")
    return dict(content)


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(1) == b"\x80" or zipfile.is_zipfile(path)


def _other_kind(path: Path) -> str | None:
    """What a file of another kind is and what to do, in words; None for what torch may read."""
    with path.open("rb") as file:
        head = file.read(512)
    if re.match(rb"\x80[\x04-\x09]", head):
        return "a pickle, which can hold code; if you trust its source, torch.save what is in it"
    for magic, name in PACKED.items():
        if head.startswith(magic):
            return f"packed with {name}: unpack it first"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, as a download ends that is refused: open the link in a browser"
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS: git lfs pull gets the file"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length < path.stat().st_size:
        lines = f"torch.save(load_file({str(path)!r}), {str(path.with_suffix('.pth'))!r})"
        return f"safetensors; convert it: from safetensors.torch import load_file; {lines}"
    return None


def _check_archive(path: Path) -> None:
    """Raise BadZipFile for a torch archive with a wrong checksum, or packed like no torch file."""
    if not zipfile.is_zipfile(path):
        return  # the format before torch 1.6
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise zipfile.BadZipFile("compressed")
        damaged = archive.testzip()
    if damaged:
        raise zipfile.BadZipFile(f"checksum of {damaged}")


# ---- what carries data, no code ---------------------------------------------------------------


class _Kind:
    """A pickled np.dtype: type and byte order. NumPy's own also takes flags, on trust."""

    def __init__(self, code: str, *_: object) -> None:
        if not re.fullmatch(r"[biufcSU]\d{1,6}", code):
            raise TypeError(f"a NumPy type {code}, not numbers or text")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder({">": ">"}.get(state[1], "="))


class _Array(np.ndarray):
    """An array that takes bytes and a `_Kind` when it is unpickled, and nothing else."""

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind, fortran, data = state
        if not isinstance(kind, _Kind) or not isinstance(data, bytes):
            raise TypeError("an array that holds no bytes")
        super().__setstate__((1, shape, kind.dtype, fortran, data))


def _array(*_: object) -> _Array:
    return _Array(0, np.uint8)


def _scalar(kind: _Kind, data: bytes) -> np.generic:
    (value,) = np.frombuffer(data, kind.dtype)
    return value


# What stands in for a class, and the name that files have for that.
_SAFE = [_Kind, _Array, argparse.Namespace, types.SimpleNamespace, list, dict, int, float, str]
_SAFE += [(_Kind, "numpy.dtype"), (_array, "numpy.ndarray")]
_SAFE += [(lambda *_: {}, "collections.defaultdict"), (lambda: b"", "builtins.bytes")]
for core in ("numpy.core.multiarray", "numpy._core.multiarray"):  # NumPy 1 and 2
    _SAFE += [(_array, f"{core}._reconstruct"), (_scalar, f"{core}.scalar")]
for module in ("pathlib", "pathlib._local"):  # Python 3.13 has the second
    for pure, other in (("PurePosixPath", "PosixPath"), ("PureWindowsPath", "WindowsPath")):
        _SAFE += [(getattr(pathlib, pure), f"{module}.{name}") for name in (pure, other)]
