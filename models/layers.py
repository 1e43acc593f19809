"""Depth order: which state-dict keys make up layer 1, 2, … of a network, shallowest first.

A VGG layer is one convolution (weight and bias). In a ResNet layer 1 is the stem and every
residual block is one more, so VGG-16 has 13 layers and ResNet-50 has 17. The RWS keeps the
`keep_num` shallowest.
"""

import functools
import random
from collections.abc import Iterable

import torch

from models import ARCHS, build_model, head_prefix

LAYERS = ("shallowest", "deepest", "random")  # which ones a signature keeps


@functools.cache
def _parameter_keys(arch: str) -> tuple[str, ...]:
    """Every parameter of `arch` outside its head, in forward order; nothing is allocated."""
    with torch.device("meta"):
        model = build_model(arch, num_classes=1)
    return tuple(k for k, _ in model.named_parameters() if not k.startswith(head_prefix(arch)))


@functools.cache
def depth_order(arch: str) -> tuple[tuple[str, ...], ...]:
    """State-dict keys of `arch` grouped into layers, shallowest first, head and buffers left out.

    Raises ValueError for an unknown architecture.
    """
    layers: dict[str, list[str]] = {}
    for key in _parameter_keys(arch):
        # layer2.0.conv1.weight → layer2.0; features.10.bias → features.10; conv1.*, bn1.* → stem
        name = ".".join(key.split(".")[:2]) if key.startswith(("layer", "features")) else "stem"
        layers.setdefault(name, []).append(key)
    return tuple(tuple(keys) for keys in layers.values())


def layer_keys(arch: str, keep_num: int, layers: str = "shallowest", seed: int = 0) -> list[str]:
    """State-dict keys of the `keep_num` shallowest layers of `arch`, shallowest first.

    Batch-norm affine parameters and downsample branches of those layers are included.
    layers: "shallowest", or for ablations "deepest" or "random" (drawn from `seed`).
    Raises ValueError when `keep_num` is not in 1 … number of layers.
    """
    order = depth_order(arch)
    if not 1 <= keep_num <= len(order):
        raise ValueError(
            f"--keep_num {keep_num}: {arch} has {len(order)} layers, so 1 to {len(order)}"
        )
    if layers not in LAYERS:
        raise ValueError(f"--layers {layers}: one of {', '.join(LAYERS)}")
    chosen = {
        "shallowest": range(keep_num),
        "deepest": range(len(order) - keep_num, len(order)),
        "random": sorted(random.Random(seed).sample(range(len(order)), keep_num)),
    }[layers]
    return [key for k in chosen for key in order[k]]


def is_carried(key: str) -> bool:
    """Whether `key` is batch-norm affine or in a downsample branch: carried over, not projected."""
    return any(part.startswith(("bn", "downsample")) for part in key.split("."))


def carried_keys(arch: str) -> list[str]:
    """Batch-norm affine parameters and downsample branches of every stage, in forward order.

    They come from the robust models whatever `keep_num` is.
    Empty for a VGG.
    """
    return [key for key in _parameter_keys(arch) if is_carried(key)]


def infer_arch(keys: Iterable[str]) -> str | None:
    """The architecture whose parameters are among the state-dict `keys`, head aside; None if none.

    No two architectures here share their set of keys, so the answer is unambiguous.
    """
    keys = set(keys)
    fitting = [arch for arch in ARCHS if keys.issuperset(_parameter_keys(arch))]
    return max(fitting, key=lambda arch: len(_parameter_keys(arch)), default=None)
