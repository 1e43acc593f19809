"""The digital corruptions one image at a time, in double precision with numpy, scipy and Pillow.

The definitions of Hendrycks & Dietterich (ICLR 2019), written for clarity: the tests compare the
batched versions with these, the benchmark takes them as the classic way. Images are uint8
(H, W, 3).
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image
from scipy import ndimage


def _truncate(x: np.ndarray) -> np.ndarray:
    return (np.clip(x, 0, 1) * 255).astype(np.uint8)


def contrast(image: np.ndarray, c: float) -> np.ndarray:
    """(x − mean per channel)·c + mean."""
    x = image / 255
    mean = x.mean((0, 1))
    return _truncate((x - mean) * c + mean)


def saturate(image: np.ndarray, c: tuple[float, float]) -> np.ndarray:
    """To HSV, saturation·a + b clipped to [0, 1], and back."""
    hue, saturation, value = _rgb_to_hsv(image / 255)
    saturation = np.clip(saturation * c[0] + c[1], 0, 1)
    return _truncate(_hsv_to_rgb(hue, saturation, value))


def elastic_transform(image: np.ndarray, c: tuple[float, float, float], draws) -> np.ndarray:
    """An affine map by three moved points, then a smooth displacement field."""
    a, sigma, r = c
    side = len(image)
    x = image / 255

    centre, s = side / 2, side // 3
    old = centre + np.array([[s, s], [s, -s], [-s, -s]])
    new = old + draws.uniform(3, 2, low=-r * side, high=r * side)
    # Rows (x, y, 1) times this 3×2 matrix take new points to old ones.
    inverse = np.linalg.solve(np.column_stack([new, np.ones(3)]), old)
    yy, xx = np.mgrid[:side, :side]
    source = np.stack([xx, yy, np.ones_like(xx)], -1) @ inverse
    x = _sample(x, source[..., 1], source[..., 0], "mirror")

    if a > 0:
        dx, dy = (
            a * side * ndimage.gaussian_filter(field, sigma * side, mode="reflect", truncate=3)
            for field in draws.uniform(2, side, side, low=-1.0, high=1.0)
        )
        x = _sample(x, yy + dy, xx + dx, "reflect")
    return _truncate(x)


def pixelate(image: np.ndarray, c: float) -> np.ndarray:
    """Pillow's BOX filter down, nearest neighbour up."""
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * c), int(height * c)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.NEAREST))


def jpeg_compression(image: np.ndarray, c: int) -> np.ndarray:
    """Pillow's JPEG at quality c, written and read."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=c)
    return np.asarray(Image.open(file).convert("RGB"))


def _sample(x: np.ndarray, rows: np.ndarray, columns: np.ndarray, mode: str) -> np.ndarray:
    """Bilinear; scipy's "mirror" does not repeat the edge, its "reflect" does."""
    channels = [
        ndimage.map_coordinates(x[..., k], [rows, columns], order=1, mode=mode) for k in range(3)
    ]
    return np.stack(channels, -1)


def _rgb_to_hsv(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Hexcone model, all three in [0, 1]; greys have hue 0."""
    red, green, blue = np.moveaxis(x, -1, 0)
    value = x.max(-1)
    delta = value - x.min(-1)
    safe = np.where(delta == 0, 1, delta)
    sextant = np.select(
        [delta == 0, value == red, value == green],
        [0, (green - blue) / safe, 2 + (blue - red) / safe],
        4 + (red - green) / safe,
    )
    return sextant / 6 % 1, delta / np.where(value == 0, 1, value), value


def _hsv_to_rgb(hue: np.ndarray, saturation: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Inverse of `_rgb_to_hsv`: full at a third of the circle around a primary, then a ramp."""
    share = [np.clip(np.abs((hue * 6 + shift) % 6 - 3) - 1, 0, 1) for shift in (0, 4, 2)]
    return np.stack([value * (1 - saturation * (1 - k)) for k in share], -1)
