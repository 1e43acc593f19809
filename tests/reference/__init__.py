"""The corruptions one image at a time: slow, independent definitions to test and time against.

Each function takes one image, uint8 (H, W, 3), the constants of one severity and, where something
is random, `draws`, and returns uint8 (H, W, 3). They share no code with datasets/corruptions.
"""

from __future__ import annotations

import numpy as np


class RandomDraws:
    """Fresh draws for one image, from a numpy generator."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def normal(self, *shape):
        return self.rng.standard_normal(shape)

    def uniform(self, *shape, low=0.0, high=1.0):
        return self.rng.uniform(low, high, shape)

    def integers(self, low, high, *shape):
        return self.rng.integers(low, high, shape)

    def poisson(self, rate):
        return self.rng.poisson(rate)


class Recorder:
    """Stands in for a batch's draws, passes them on and keeps them, to be replayed by image."""

    def __init__(self, draws):
        self.draws, self.kept = draws, []

    def _keep(self, tensor):
        self.kept.append(tensor.cpu().numpy().copy())
        return tensor

    def normal(self, *shape):
        return self._keep(self.draws.normal(*shape))

    def uniform(self, *shape, low=0.0, high=1.0):
        return self._keep(self.draws.uniform(*shape, low=low, high=high))

    def integers(self, low, high, *shape):
        return self._keep(self.draws.integers(low, high, *shape))

    def image(self, i):
        """What image i of the batch was given, in the same order."""
        return _Replay([array[i] for array in self.kept])


class _Replay:
    def __init__(self, arrays):
        self.arrays = iter(arrays)

    def _next(self, shape):
        array = next(self.arrays)
        assert array.shape == shape
        return array

    def normal(self, *shape):
        return self._next(shape)

    def uniform(self, *shape, low=0.0, high=1.0):
        return self._next(shape)

    def integers(self, low, high, *shape):
        return self._next(shape)
