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
