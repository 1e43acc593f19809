"""Batch-norm running statistics of a patched model: re-estimate, then interpolate.

One pass over the corrupted *training* images with a cumulative average: statistics reset first,
momentum b/(n + b) for a batch of b after n images. For a strength a < 1 the result is
(1 − a) · θ_target's statistics + a · the re-estimated ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from tqdm import tqdm

_BatchNorm = nn.modules.batchnorm._BatchNorm


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def has_batchnorm(model: nn.Module) -> bool:
    """Whether `model` keeps running statistics."""
    return bool(_layers(model))


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
    before = [(m.running_mean.clone(), m.running_var.clone()) for m in layers]
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
    for layer, momentum, (mean, var) in zip(layers, momenta, before, strict=True):
        layer.momentum = momentum
        layer.running_mean.mul_(strength).add_(mean, alpha=1 - strength)
        layer.running_var.mul_(strength).add_(var, alpha=1 - strength)
    for module, training in modes.items():
        module.training = training
