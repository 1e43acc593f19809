"""The noise corruptions one image at a time, in double precision, from their definition."""

from __future__ import annotations

import numpy as np


def to_uint8(x):
    # Sums of decimal fractions may fall an ulp short of the whole number they stand for.
    return np.floor(np.clip(x, 0, 1) * 255 + 1e-9).astype(np.uint8)


def per_value(draw, image):
    """A draw for every value: made as (channels, height, width), used as (H, W, 3)."""
    height, width, channels = image.shape
    return np.moveaxis(np.asarray(draw(channels, height, width), np.float64), 0, -1)


def gaussian_noise(image, c, draws):
    return to_uint8(image / 255 + c * per_value(draws.normal, image))


def shot_noise(image, c, draws):
    return to_uint8(draws.poisson(c * image / 255) / c)


def impulse_noise(image, c, draws):
    u = per_value(draws.uniform, image)
    x = image / 255
    x[u < c / 2] = 1
    x[(c / 2 <= u) & (u < c)] = 0
    return to_uint8(x)


def speckle_noise(image, c, draws):
    x = image / 255
    return to_uint8(x + x * c * per_value(draws.normal, image))
