"""Checkpoints: read whatever researchers have, write ours whole or not at all.

Read: the RWS authors' files (a dict with `state_dict`, with or without `normalize.*`),
torchvision's ImageNet weights, plain state dicts, and DataParallel's `module.` prefix; half
precision becomes float32. Files are read with `weights_only=True`, so nothing in them is executed,
and the checksums in them are compared, which torch doesn't do.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from models import head_prefix
from utils.atomic import replacing
from utils.errors import InputError

IMAGENET = "torchvision's ImageNet weights"
LAST, BEST_SA, BEST_RA = "checkpoint.pth.tar", "model_SA_best.pth.tar", "model_RA_best.pth.tar"

# Published checkpoints hold best accuracies as NumPy scalars; these types carry data, no code.
_NUMPY_SCALARS = [
    np.dtype,
    np.ndarray,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    (np.core if np.__version__.startswith("1.") else np._core).multiarray.scalar,
]


def read(path: str | os.PathLike, what: str = "checkpoint") -> dict:
    """The dict in a file that torch wrote, tensors on the CPU; `what` it is, for the messages.

    Raises InputError when the file is missing, damaged, or holds more than values and tensors.
    """
    path = Path(path)
    if path.is_dir():
        hint = f"; name a file in it, e.g. {BEST_SA}" if what == "checkpoint" else ""
        raise InputError(f"{path}: a folder, not a {what} file{hint}")
    if not path.is_file():
        raise InputError(f"{path}: no such {what} file")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise many types for damaged or refused files
        told = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        reason = next(iter(told.strip().splitlines()), type(error).__name__)[:120]
        if told.startswith("Unsupported"):
            raise InputError(
                f"{path}: holds more than weights and was not opened ({reason.partition('. ')[0]})"
            ) from error
        raise InputError(f"{path}: damaged, or not a {what} file ({reason})") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: a {what} holds a dict, this is a {type(content).__name__}")
    return dict(content)


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


def state_dict_of(checkpoint: Mapping, path: str | os.PathLike) -> dict[str, Tensor]:
    """The float32 state dict in a `read` checkpoint; `path` is for the error messages."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, Mapping):
        raise InputError(f"{path}: its 'state_dict' is no state dict")
    tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    if not tensors:
        raise InputError(f"{path}: no tensors in it, so not a state dict")
    tensors = {k.removeprefix("module."): v for k, v in tensors.items()}
    for key, tensor in tensors.items():
        if not is_plain(tensor):
            raise InputError(f"{path}: {key} is no plain tensor")
        if tensor.is_floating_point():
            tensors[key] = tensor = tensor.float()
            if not torch.isfinite(tensor).all():
                raise InputError(f"{path}: NaN or Inf in {key}")
    return tensors


def is_plain(tensor: Tensor) -> bool:
    """Dense, in memory, and no larger than its storage, as repeated strides can make it."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """`read` and `state_dict_of` in one: state-dict key → float32 tensor on the CPU."""
    return state_dict_of(read(path), path)


def backbone_hash(state: Mapping[str, Tensor]) -> str:
    """16 hex digits over the weights outside head and normalization: which model this is.

    The same for every file format and precision of storage that gives the same float32 values.
    """
    digest = hashlib.sha256()
    for key in sorted(state):
        if key.startswith(("normalize.", "fc.", "classifier.")) or key.endswith("_tracked"):
            continue
        digest.update(key.encode())
        digest.update(state[key].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def load_model_weights(
    model: nn.Module, arch: str, state: Mapping[str, Tensor], path: str | os.PathLike
) -> None:
    """Load a fine-tuned model of the same classes into `model`.

    Absent `normalize.*` keep the model's.
    Raises InputError that lists missing and unexpected keys, or names the tensor whose shape
    differs (a head of another data set among them).
    """
    own = model.state_dict()
    # Old files lack the counters of batch norm, and many the normalization: ours stand in.
    optional = ("normalize.", "num_batches_tracked")
    state = {**{k: v for k, v in own.items() if any(o in k for o in optional)}, **state}
    _require_same_keys(own, state, arch, path)
    head = head_prefix(arch)
    for key, tensor in own.items():
        if state[key].numel() == tensor.numel() and key.startswith("normalize."):
            state[key] = state[key].reshape(tensor.shape)  # some files keep (1, 3, 1, 1)
        if state[key].shape != tensor.shape:
            hint = "; its head is for another data set" if key.startswith(head) else ""
            raise InputError(
                f"{path}: {key} is {tuple(state[key].shape)}, {arch} here has "
                f"{tuple(tensor.shape)}{hint}"
            )
    model.load_state_dict(state)


def load_pretrained(
    model: nn.Module,
    arch: str,
    state: Mapping[str, Tensor],
    path: str | os.PathLike,
    keep_head: bool = False,
) -> list[str]:
    """Start `model` from pretrained weights of other classes; gives the keys of the head left out.

    The head of a ResNet is new, a VGG's is taken only when it is one linear layer of the same size;
    normalization stays the data set's. With `keep_head` the weights are of the same classes and
    their head is taken. Raises InputError for missing, unexpected or differently shaped keys beyond
    the head, and for a head to keep that doesn't fit.
    """
    head, own = head_prefix(arch), model.state_dict()
    theirs = {k: v for k, v in state.items() if k.startswith(head)}
    fits = {k: v.shape for k, v in theirs.items()} == {
        k: v.shape for k, v in own.items() if k.startswith(head)
    }
    if keep_head and not fits:
        classes = len(own[f"{head}bias"])
        raise InputError(f"--keep_head: {path} holds no linear head of {classes} classes")
    fits &= keep_head or arch.startswith("vgg")
    dropped = [] if fits else sorted(theirs)
    state = {k: v for k, v in state.items() if k not in dropped and not k.startswith("normalize.")}
    skipped = ("normalize.", "num_batches_tracked")
    state = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
    ours = {k: v for k, v in own.items() if not any(s in k for s in skipped)}
    if not fits:
        ours = {k: v for k, v in ours.items() if not k.startswith(head)}
    _require_same_keys(ours, state, arch, path)
    for key, tensor in ours.items():
        if state[key].shape != tensor.shape:
            raise InputError(
                f"{path}: {key} is {tuple(state[key].shape)}, {arch} has {tuple(tensor.shape)}"
            )
    model.load_state_dict(state, strict=False)
    return dropped


def pretrained_state_dict(source: str | os.PathLike, arch: str) -> dict[str, Tensor]:
    """θ_pre from a checkpoint file, or torchvision's ImageNet weights of `arch` (IMAGENET).

    The latter are downloaded once by torch.hub; without a network and a cached copy that is an
    InputError that names --pretrained_path.
    """
    if source != IMAGENET:
        return read_state_dict(source)
    try:
        # V1 is the classic recipe, what "ImageNet pretrained" meant in papers up to 2022.
        return dict(get_model_weights(arch).IMAGENET1K_V1.get_state_dict(progress=False))
    except Exception as error:
        raise InputError(
            f"--pretrained: {IMAGENET} of {arch} could not be fetched ({type(error).__name__}); "
            "name a checkpoint with --pretrained_path FILE"
        ) from error


def save(checkpoint: Mapping, path: str | os.PathLike) -> None:
    """Write a checkpoint dict of tensors and plain values to `path`, atomically."""
    with replacing(path) as temporary:
        # torch's own writer meets a full disk with errors of several kinds, or aborts.
        buffer = io.BytesIO()
        torch.save(dict(checkpoint), buffer)
        temporary.write_bytes(buffer.getbuffer())


def _require_same_keys(
    wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], arch: str, path: str | os.PathLike
) -> None:
    missing = sorted(wanted.keys() - given.keys())
    unexpected = sorted(given.keys() - wanted.keys())
    if missing or unexpected:
        told = [
            f"{what} {', '.join(keys[:6])}{f' and {len(keys) - 6} more' if len(keys) > 6 else ''}"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise InputError(f"{path} does not hold a {arch}: {'; '.join(told)}")
