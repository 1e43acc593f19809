"""The blur corruptions one image at a time, in double precision, from their definition."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from tests.reference.noise import to_uint8


def gaussian(x, sigma):
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest", truncate=4.0)


def gaussian_blur(image, c):
    return to_uint8(gaussian(image / 255, c))


def defocus_blur(image, c):
    r, a = c
    grid = np.arange(-8, 9)
    kernel = np.array([[float(x * x + y * y <= r * r) for x in grid] for y in grid])
    kernel /= kernel.sum()
    taps = np.exp(-np.array([1.0, 0.0, 1.0]) / (2 * a * a))
    taps /= taps.sum()
    kernel = ndimage.correlate(kernel, np.outer(taps, taps), mode="constant")
    x = ndimage.correlate(image / 255, kernel[..., None], mode="mirror")
    return to_uint8(x)


def glass_blur(image, c, draws):
    sigma, delta, passes = c
    height, width, _ = image.shape
    y = to_uint8(gaussian(image / 255, sigma))
    for _ in range(passes):
        k = draws.integers(0, (2 * delta) ** 2, height - 2 * delta, width - 2 * delta)
        dy, dx = k // (2 * delta) - delta, k % (2 * delta) - delta
        for h in range(height - delta, delta, -1):
            for w in range(width - delta, delta, -1):
                at = h - delta - 1, w - delta - 1
                y[h, w] = y[h + dy[at], w + dx[at]]
    return to_uint8(gaussian(y / 255, sigma))


def motion_blur(image, c, draws):
    return line_blur(image, float(draws.uniform(low=-45.0, high=45.0)), *c)


def line_blur(image, degrees, radius, sigma):
    """uint8 (H, W, …): weights ∝ exp(−i²/2σ²) along a line at `degrees`, y down."""
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    phi = np.deg2rad(degrees)
    rows, columns = np.indices(image.shape[:2])
    v = np.zeros(image.shape)
    for i, weight in zip(taps, weights / weights.sum(), strict=True):
        dx, dy = np.ceil(i * np.cos(phi) - 0.5), np.ceil(i * np.sin(phi) - 0.5)
        y = np.clip(rows + int(dy), 0, image.shape[0] - 1)
        x = np.clip(columns + int(dx), 0, image.shape[1] - 1)
        v += weight * image[y, x]
    return np.floor(np.round(257 * v) / 257).astype(np.uint8)


def zoom_blur(image, c):
    x = image / 255
    factors = np.arange(1, c + 0.005, 0.01)
    total = x.copy()
    for factor in factors:
        total += zoomed(x, factor)
    return to_uint8(total / (len(factors) + 1))


def zoomed(x, factor):
    height, width = x.shape[:2]
    inside = np.ceil(np.array([height, width]) / factor).astype(int)
    top, left = (height - inside[0]) // 2, (width - inside[1]) // 2
    large = x[top : top + inside[0], left : left + inside[1]]
    large = ndimage.zoom(large, (factor, factor, 1), order=1)
    top, left = (large.shape[0] - height) // 2, (large.shape[1] - width) // 2
    return large[top : top + height, left : left + width]
