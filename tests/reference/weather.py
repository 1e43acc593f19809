"""The weather corruptions one image at a time, in double precision, from their definition."""

from __future__ import annotations

import colorsys

import numpy as np
from scipy import ndimage

from tests.reference.blur import line_blur, zoomed
from tests.reference.noise import to_uint8


def gaussian(x, sigma):
    return ndimage.gaussian_filter(x, sigma, mode="nearest", truncate=4.0)


def snow(image, c, draws):
    mean, spread, factor, threshold, radius, sigma, m = c
    x = image / 255.0
    layer = mean + spread * np.asarray(draws.normal(*image.shape[:2]), np.float64)
    layer = zoomed(layer[..., None], factor)[..., 0]
    layer[layer < threshold] = 0
    angle = float(draws.uniform(low=-135.0, high=-45.0))
    layer = line_blur(to_uint8(layer), angle, radius, sigma)[..., None] / 255.0
    grey = (x @ [0.299, 0.587, 0.114])[..., None]
    x = m * x + (1 - m) * np.maximum(x, 1.5 * grey + 0.5)
    return to_uint8(x + layer + np.rot90(layer, 2))


def frost(image, c, draws, textures):
    """textures: the five scaled photographs, each uint8 (h, w, 3)."""
    a, b = c
    height, width = image.shape[:2]
    which, row, column = draws.integers(0, 2**40, 3)
    texture = textures[which % len(textures)]
    row, column = row % (len(texture) - height), column % (texture.shape[1] - width)
    crop = texture[row : row + height, column : column + width]
    return to_uint8((a * image + b * crop) / 255)


def downscale(photograph, factor):
    """Bilinear sampling of uint8 (h, w, 3) at (i + ½)/factor − ½, without antialiasing."""
    rows, columns = (
        (np.arange(round(side * factor)) + 0.5) / factor - 0.5 for side in photograph.shape[:2]
    )
    at = np.meshgrid(rows, columns, indexing="ij")
    planes = [
        ndimage.map_coordinates(photograph[..., k] * 1.0, at, order=1, mode="nearest")
        for k in range(3)
    ]
    return np.floor(np.stack(planes, -1) + 0.5).astype(np.uint8)


def fog(image, c, draws):
    amount, decay = c
    height, width = image.shape[:2]
    size = 1
    while size < max(height, width):
        size *= 2
    x = image / 255.0
    mist = plasma(size, decay, draws.uniform(size * size - 1, low=-1.0, high=1.0))
    top = x.max()
    return to_uint8((x + amount * mist[:height, :width, None]) * top / (top + amount))


def plasma(size, decay, noise):
    """Diamond–square, point by point; `noise` in order of use."""
    noise = iter(np.asarray(noise, np.float64))
    field = np.zeros((size, size))
    step, wobble = size, 100.0

    def settle(row, column, *neighbours):
        mean = sum(field[y % size, x % size] for y, x in neighbours) / 4
        field[row, column] = mean + wobble * (wobble * next(noise))

    while step >= 2:
        h = step // 2
        grid = [(y, x) for y in range(0, size, step) for x in range(0, size, step)]
        for y, x in grid:
            settle(y + h, x + h, (y, x), (y + step, x), (y, x + step), (y + step, x + step))
        for y, x in grid:
            settle(y, x + h, (y, x), (y, x + step), (y - h, x + h), (y + h, x + h))
        for y, x in grid:
            settle(y + h, x, (y, x), (y + step, x), (y + h, x - h), (y + h, x + h))
        step, wobble = h, wobble / decay
    return (field - field.min()) / (field.max() - field.min())


def brightness(image, c):
    out = np.empty(image.shape)
    for at in np.ndindex(image.shape[:2]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(image[at] / 255.0))
        out[at] = colorsys.hsv_to_rgb(hue, saturation, min(value + c, 1.0))
    return to_uint8(out)


def spatter(image, c, draws):
    mean, spread, blur, threshold, k, mud = c
    x = image / 255.0
    liquid = mean + spread * np.asarray(draws.normal(*image.shape[:2]), np.float64)
    liquid = gaussian(liquid, blur)
    liquid[liquid < threshold] = 0
    if mud:
        mask = gaussian((liquid > threshold).astype(np.float64), k)[..., None]
        mask[mask < 0.8] = 0
        return to_uint8(x * (1 - mask) + mask * np.array([63, 42, 20]) / 255)
    # Above 1, the cast to 8 bits in the published generator wraps around; it doesn't clip.
    liquid = (np.floor(liquid * 255).astype(int) % 256).astype(np.uint8)
    distance = np.minimum(chamfer_distance(canny(liquid, 50, 150)), 20)
    level = np.floor(mean3(distance) + 1e-6).astype(np.uint8)
    kernel = np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]])
    relief = ndimage.correlate(equalize(level).astype(int), kernel, mode="mirror").clip(0, 255)
    shine = liquid * np.round(mean3(relief))
    if shine.max() > 0:
        shine = shine / shine.max() * k
    return to_uint8(x + shine[..., None] * np.array([175, 238, 238]) / 255)


def mean3(plane):
    return ndimage.correlate(plane.astype(np.float64), np.ones((3, 3)), mode="mirror") / 9


def canny(image, low, high):
    """Canny edges of uint8 (H, W): 3×3 Sobel, L1 norm; norms beyond the border count as 0."""
    plane = image.astype(int)
    dx = ndimage.sobel(plane, axis=1, mode="nearest")
    dy = ndimage.sobel(plane, axis=0, mode="nearest")
    norm = abs(dx) + abs(dy)
    around = np.pad(norm, 1)
    possible = np.zeros(image.shape, bool)
    for y, x in np.ndindex(image.shape):
        patch = around[y : y + 3, x : x + 3]
        here, gx, gy = norm[y, x], int(dx[y, x]), int(dy[y, x])
        angle = np.degrees(np.arctan2(abs(gy), abs(gx)))
        if angle < 22.5:
            peak = here > patch[1, 0] and here >= patch[1, 2]
        elif angle > 67.5:
            peak = here > patch[0, 1] and here >= patch[2, 1]
        elif (gx < 0) != (gy < 0):
            peak = here > patch[0, 2] and here > patch[2, 0]
        else:
            peak = here > patch[0, 0] and here > patch[2, 2]
        possible[y, x] = peak and here > low
    groups, _ = ndimage.label(possible, np.ones((3, 3)))
    return possible & np.isin(groups, np.unique(groups[possible & (norm > high)]))


def chamfer_distance(edges):
    """Least sum of steps 1, 1.4 and 2.1969 to any edge, from the closed form of its length."""
    out = np.full(edges.shape, np.inf)
    rows, columns = np.indices(edges.shape)
    for y, x in zip(*np.nonzero(edges), strict=True):
        long = np.maximum(abs(rows - y), abs(columns - x))
        short = np.minimum(abs(rows - y), abs(columns - x))
        flat = 2.1969 * short + (long - 2 * short)
        steep = 2.1969 * (long - short) + 1.4 * (2 * short - long)
        out = np.minimum(out, np.where(2 * short <= long, flat, steep))
    return out


def equalize(image):
    """Histogram equalization of uint8 (H, W); a single level stays."""
    histogram = np.bincount(image.ravel(), minlength=256)
    lowest = image.min()
    others = image.size - histogram[lowest]
    if not others:
        return image
    cumulative = np.cumsum(histogram) - histogram[lowest]
    return np.round(cumulative * 255.0 / others).clip(0, 255).astype(np.uint8)[image]
