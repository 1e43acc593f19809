"""Batch-norm running statistics of a patched model: re-estimate, then interpolate.

One pass over the corrupted *training* images with a cumulative average: statistics reset first,
momentum b/(n + b) for a batch of b after n images. For a strength a < 1 the result is
(1 − a) · θ_target's statistics + a · the re-estimated ones. A signature's file may hold these, of
θ_std patched at α = 1; then no images are needed.
"""

import copy
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.errors import InputError

_BatchNorm = nn.modules.batchnorm._BatchNorm
_KINDS = ("running_mean", "running_var")


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def has_batchnorm(model: nn.Module) -> bool:
    """Whether `model` keeps running statistics."""
    return bool(_layers(model))


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the running means and variances of `model`, by state-dict key."""
    return {k: t.clone() for k, t in model.named_buffers() if k.endswith(_KINDS)}


@torch.no_grad()
def interpolate(model: nn.Module, statistics: Mapping[str, Tensor], strength: float) -> None:
    """Move the running statistics of `model`, in place, by `strength` (0 … 1) towards these."""
    for key, tensor in statistics.items():
        own = model.get_buffer(key)
        own.mul_(1 - strength).add_(tensor.to(own), alpha=strength)


def pooled(a: Mapping[str, Tensor], b: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Statistics of a mixture, 1 − share of which has `a`, share `b`; none where either has none.

    mean = (1 − s) a + s b and likewise for the variance, + s (1 − s) (difference of the means)².
    """
    if a.keys() != b.keys():
        return {}
    found = {key: tensor.lerp(b[key].to(tensor), share) for key, tensor in a.items()}
    for key in found:
        if key.endswith(_KINDS[1]):
            mean = key.removesuffix(_KINDS[1]) + _KINDS[0]
            found[key] += share * (1 - share) * (a[mean] - b[mean].to(a[mean])).square()
    return found


def _is_batch(value: object) -> bool:
    """Whether it is images, or images with labels; several images of a kind are a loader."""
    if isinstance(value, (tuple, list)) and value and isinstance(value[0], Tensor):
        return len({getattr(part, "ndim", None) for part in value[:2]}) == min(2, len(value))
    return isinstance(value, Tensor)


@torch.no_grad()
def reestimate(
    model: nn.Module, loaders: Iterable[Iterable], strength: float = 1.0, *, amp: bool = False
) -> None:
    """Replace the running statistics of `model`, in place, by those of the batches in `loaders`.

    `loaders` are passed over one after the other into one running average (one per corruption); one
    loader alone is taken, too. A batch is images, or (images, labels): float in [0, 1], or 0 … 255.
    With `amp` batches are drawn and passed in bf16 autocast.
    `strength` is a = min(1, Σ w_c), 0 … 1; at 0 nothing is read and nothing changes.
    Parameters are not touched and the model's mode is left as it was.
    Raises InputError where there are no batches of images; the statistics are then as before.
    """
    if not 0 <= strength <= 1:
        raise InputError(f"strength {strength}: must be 0 to 1")
    if strength == 0 or not has_batchnorm(model):
        return
    work = copy.deepcopy(model).eval()  # so that the model stays whole, whatever happens
    layers = _layers(work)
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    device, seen = next(model.parameters()).device, 0
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):  # one: weights are cast once
        for loader in loaders:
            batches = [loader] if _is_batch(loader) else loader  # `loaders` is one loader
            for batch in tqdm(batches, desc="batch-norm statistics", disable=None, leave=False):
                images = (batch if isinstance(batch, Tensor) else batch[0]).to(device)
                if not len(images):
                    continue
                if not images.is_floating_point():
                    images = images.float() / 255
                for layer in layers:
                    layer.momentum = len(images) / (seen + len(images))
                work(images)
                seen += len(images)
    if not seen:
        raise InputError("no images to re-estimate the batch-norm statistics from")
    interpolate(work, running_statistics(model), 1 - strength)
    for key, buffer in work.named_buffers():
        model.get_buffer(key).copy_(buffer)
