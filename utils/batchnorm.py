"""Batch-norm running statistics of a patched model: re-estimate, then interpolate.

One pass over the corrupted *training* images with a cumulative average: statistics reset first,
momentum b/(n + b) for a batch of b after n images. For a strength a < 1 the result is
(1 − a) · θ_target's statistics + a · the re-estimated ones. A signature's file may hold these, of
θ_std patched at α = 1; then no images are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from tqdm import tqdm

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


@torch.no_grad()
def reestimate(
    model: nn.Module, loaders: Iterable[Iterable], strength: float = 1.0, *, amp: bool = False
) -> None:
    """Replace the running statistics of `model`, in place, by those of the batches in `loaders`.

    `loaders` are passed over one after the other into one running average (one per corruption).
    `strength` is a = min(1, Σ w_c), 0 … 1; at 0 nothing is read and nothing changes.
    Parameters are not touched and the model's mode is left as it was.
    """
    layers = _layers(model)
    if strength == 0 or not layers:
        return
    device = next(model.parameters()).device
    before = running_statistics(model)
    momenta = [m.momentum for m in layers]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
    seen = 0
    for loader in loaders:
        for images, _ in tqdm(loader, desc="batch-norm statistics", disable=None, leave=False):
            for layer in layers:
                layer.momentum = len(images) / (seen + len(images))
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                model(images)
            seen += len(images)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    interpolate(model, before, 1 - strength)
    for module, training in modes.items():
        module.training = training
