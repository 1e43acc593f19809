"""Weights of composed signatures that are learnt: w_c, or w_{c,l} for every layer l.

    θ_target[l] + Σ_c w_{c,l} · RWS_c[l]

by Adam from w = 1/n, on clean images and each corruption in equal parts. The loss is cross-entropy,
or without labels the entropy of the predictions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from models.layers import depth_order
from utils.errors import InputError
from utils.patch import check_fits
from utils.signature import RobustWeightSignature

STEPS, BATCH, LR = 100, 128, 0.02  # of Adam; images in a step, all parts together


def learn(
    model: nn.Module,
    signatures: Sequence[RobustWeightSignature],
    parts: Sequence[Tensor],
    labels: Tensor | None,
    *,
    per_layer: bool,
    statistics: Mapping[str, Tensor],
    steps: int = STEPS,
    amp: bool = False,
    seed: int = 0,
) -> RobustWeightSignature:
    """Σ w · RWS, with the learnt `weights`: float32 by signature, one or one per layer.

    model: θ_target, in eval mode; parts: uint8 (n, 3, H, W), clean images and their copies under
    each corruption; labels: int64 (n,), None to do without; statistics: those of batch norm
    meanwhile. The layers are those that a signature touches, the shallowest first (of a ResNet all,
    for each has batch norm). Raises InputError for two signatures of one name.
    """
    names = [s.name for s in signatures]
    if len(set(names)) < len(names):
        raise InputError(f"learnt weights: two signatures of one name in {', '.join(names)}")
    for s in signatures:
        check_fits(model, s)
    device = next(model.parameters()).device
    held, order = {k for s in signatures for k in s.tensors}, depth_order(signatures[0].arch)
    layers = [keys for each in order if (keys := [k for k in each if k in held])]
    place = {key: i if per_layer else 0 for i, keys in enumerate(layers) for key in keys}
    θ = {key: model.get_parameter(key).detach() for key in place}
    RWS = {
        k: torch.stack([s.tensors.get(k, torch.zeros(t.shape)).to(t) for s in signatures])
        for k, t in θ.items()
    }
    w = torch.full((len(names), len(layers) if per_layer else 1), 1 / len(names), device=device)
    optimizer = torch.optim.Adam([w.requires_grad_()], lr=LR)

    def total() -> dict[str, Tensor]:
        return {k: torch.tensordot(w[:, i], RWS[k], 1) for k, i in place.items()}

    batches = _batches(parts, labels, steps, torch.Generator().manual_seed(seed), device)
    for images, wanted in tqdm(batches, "weights", steps, leave=False, disable=None):
        patched = {k: θ[k] + delta for k, delta in total().items()} | dict(statistics)
        with torch.autocast(device.type, torch.bfloat16, amp):
            logits = functional_call(model, patched, images.float() / 255)
        log_p = logits.float().log_softmax(1)
        loss = -(log_p.exp() * log_p).sum(1).mean() if labels is None else F.nll_loss(log_p, wanted)
        (w.grad,) = torch.autograd.grad(loss, [w])
        optimizer.step()
    w.requires_grad_(False)
    composed = sum(s.scale(1.0) for s in signatures)
    weights = dict(zip(names, w.cpu(), strict=True))
    tensors = {key: tensor.cpu() for key, tensor in total().items()}
    return replace(composed, tensors=tensors, weights=weights, fingerprint={}, statistics={})


def words(signature: RobustWeightSignature) -> list[str]:
    """A line for each learnt weight, or weights, the shallowest layer's first."""
    told = {name: " ".join(f"{x:.3f}" for x in w) for name, w in signature.weights.items()}
    return [f"w {name:<20} {numbers}" for name, numbers in told.items()]


def _batches(
    parts: Sequence[Tensor],
    labels: Tensor | None,
    steps: int,
    generator: torch.Generator,
    device: torch.device,
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Batches on `device`, as many images of each part; none comes twice before all were there.

    Parts may lie on different devices.
    """
    count = len(parts[0])
    size = min(count, max(1, BATCH // len(parts)))
    passes = -(-steps * size // count)
    rows, wanted = [], []
    for part in parts:
        order = torch.cat([torch.randperm(count, generator=generator) for _ in range(passes)])
        rows.append(order.to(part.device).split(size))
        if labels is not None:
            wanted.append(labels[order].to(device).split(size))
    for step in range(steps):
        images = [part[order[step]].to(device) for part, order in zip(parts, rows, strict=True)]
        yield torch.cat(images), torch.cat([each[step] for each in wanted]) if wanted else None
