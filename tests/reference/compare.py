"""Comparing a batched corruption with its definition, image by image under the same draws."""

from __future__ import annotations

import importlib
import inspect

import numpy as np
import torch

from datasets.corruptions import FAMILIES
from datasets.corruptions.draws import Draws


class Recorder:
    """Stands in for a batch's draws, passes them on and keeps them, to be replayed by image."""

    def __init__(self, draws):
        self.draws, self.kept = draws, []

    def __getattr__(self, method):
        def draw(*shape, **limits):
            self.kept.append(getattr(self.draws, method)(*shape, **limits))
            return self.kept[-1].clone()

        return draw

    def image(self, i):
        """What image i of the batch was given, in the same order."""
        return _Replay([tensor[i].double().numpy() for tensor in self.kept])


class _Replay:
    def __init__(self, arrays):
        self.arrays = iter(arrays)

    def normal(self, *shape, low=None, high=None):
        array = next(self.arrays)
        assert array.shape == shape
        assert low is None or (low <= array.min() and array.max() <= high)
        return array

    uniform = normal

    def integers(self, low, high, *shape):
        return self.normal(*shape, low=low, high=high - 1).astype(int)


def pictures(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (n, H, W, 3): smooth colour, edges, fine noise, clipped areas; one dim, one black."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:height, :width] / max(height, width)
    images = np.empty((n, height, width, 3))
    for image in images:
        for k in range(3):
            fy, fx, phase = rng.uniform(-6, 6, 3)
            image[..., k] = 128 + 120 * np.sin(fy * yy + fx * xx + phase)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        image[top : top + height // 3, left : left + width // 3] = rng.uniform(-50, 305, 3)
        image += rng.normal(0, 12, image.shape) * (xx > 0.4)[..., None]
    images[-2:] /= [[[[9]]], [[[np.inf]]]]
    return images.clip(0, 255).astype(np.uint8)


def to_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def differences(name, images: np.ndarray, c, *extra, draws=None) -> np.ndarray:
    """|batched − by definition| of corruption `name`, shape and kind of `images` (n, H, W, 3).

    extra: what the definition is given besides image, constants and draws.
    """
    batched, defined = (
        getattr(importlib.import_module(f"{place}.{FAMILIES[name]}"), name)
        for place in ("datasets.corruptions", "tests.reference")
    )
    recorder = Recorder(draws or Draws(len(images), "cpu", seed=3))
    random = "draws" in inspect.signature(batched).parameters
    out = batched(to_batch(images), c, *[recorder] * random)
    assert out.dtype == torch.uint8
    expected = [
        defined(image, c, *[recorder.image(i)] * random, *extra) for i, image in enumerate(images)
    ]
    return np.abs(out.permute(0, 2, 3, 1).numpy().astype(int) - np.stack(expected))
