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
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights

from models import head_prefix
from utils.errors import InputError
from utils.files import replacing

IMAGENET = "torchvision's ImageNet weights"
LAST, BEST_SA, BEST_RA = "checkpoint.pth.tar", "model_SA_best.pth.tar", "model_RA_best.pth.tar"

# Published checkpoints hold best accuracies as NumPy scalars; these types carry data, no code.
_NUMPY_SCALARS = [
    np.dtype,
    np.ndarray,
    *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)),
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
        wrong = f"damaged, or not a {what} file"
        # An operand is any byte of a file that is no pickle at all.
        if told.startswith("Unsupported") and not told.startswith("Unsupported operand"):
            wrong, reason = "holds more than weights and was not opened", reason.partition(". ")[0]
        raise InputError(f"{path}: {wrong} ({reason})") from error
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
    tensors = {str(k).removeprefix("module."): v for k, v in tensors.items()}
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


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """16 hex digits of the SHA-256 over all names and bits, in the order of the names."""
    digest = hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].detach().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def backbone_hash(state: Mapping[str, Tensor]) -> str:
    """`tensors_hash` of the weights outside head and normalization: which model this is.

    The same for every file format and precision of storage that gives the same float32 values.
    """
    heads = ("fc.", "classifier.")
    kept = {k: v.float() for k, v in state.items() if not (k.startswith(heads) or _is_optional(k))}
    return tensors_hash(kept)


def load_model_weights(
    model: nn.Module, arch: str, state: Mapping[str, Tensor], path: str | os.PathLike
) -> None:
    """Load a fine-tuned model of the same classes into `model`.

    Absent `normalize.*` and counters of batch norm keep the model's.
    Raises InputError that lists missing and unexpected keys, or names the tensor whose shape
    differs (a head of another data set among them).
    """
    own = model.state_dict()
    state = {k: v for k, v in own.items() if _is_optional(k)} | dict(state)
    wrong = {"missing": own.keys() - state.keys(), "unexpected": state.keys() - own.keys()}
    told = [f"{what} {_some_of(keys)}" for what, keys in wrong.items() if keys]
    if told:
        raise InputError(f"{path} does not hold a {arch}: {'; '.join(told)}")
    for key, tensor in own.items():
        if key.startswith("normalize.") and state[key].numel() == tensor.numel():
            state[key] = state[key].reshape(tensor.shape)  # some files keep (1, 3, 1, 1)
        if state[key].shape != tensor.shape:
            shapes = f"{tuple(state[key].shape)}, {arch} here has {tuple(tensor.shape)}"
            head = key.startswith(head_prefix(arch))
            hint = "; its head is for another data set" if head else ""
            raise InputError(f"{path}: {key} is {shapes}{hint}")
    model.load_state_dict(state)


def _some_of(keys: Collection[str]) -> str:
    more = f" and {len(keys) - 6} more" if len(keys) > 6 else ""
    return ", ".join(sorted(keys)[:6]) + more


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
    own = {k: v for k, v in model.state_dict().items() if k.startswith(head_prefix(arch))}
    head = {k: v for k, v in state.items() if k.startswith(head_prefix(arch))}
    fits = {k: v.shape for k, v in head.items()} == {k: v.shape for k, v in own.items()}
    if keep_head and not fits:
        classes = len(own[f"{head_prefix(arch)}bias"])
        raise InputError(f"--keep_head: {path} holds no linear head of {classes} classes")
    taken = head if keep_head or (fits and arch.startswith("vgg")) else own
    rest = {k: v for k, v in state.items() if k not in head and not _is_optional(k)}
    load_model_weights(model, arch, rest | taken, path)
    return sorted(head) if taken is own else []


def _is_optional(key: str) -> bool:
    """Whether files may lack `key`: normalization, and the counter of a batch norm."""
    return key.startswith("normalize.") or key.endswith("num_batches_tracked")


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


def save(checkpoint: Mapping, *paths: str | os.PathLike) -> None:
    """Write a checkpoint dict of tensors and plain values to each of `paths`, atomically."""
    # torch's own writer meets a full disk with errors of several kinds, or aborts.
    buffer = io.BytesIO()
    for path in paths:
        with replacing(path) as temporary:
            if not buffer.tell():  # 0.5 s for a VGG-16: once
                torch.save(dict(checkpoint), buffer)
            temporary.write_bytes(buffer.getbuffer())
