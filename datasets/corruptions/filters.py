"""Steps that several corruptions share: 8-bit conversion, constants, filters, motion blur, zoom.

Linear filters along one axis are small dense matrices, borders included: on a batch, a product
with a 32×32 or 64×64 matrix is faster than a loop over taps, on CPUs and GPUs alike.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

# Rounding leaves what is a whole number in exact arithmetic up to this much below it, and
# truncation would make it one less.
TRUNCATION_SLACK = {torch.float32: 1 / 8192, torch.float64: 1e-9}


def to_float(images: Tensor) -> Tensor:
    """uint8 (…) to float32 in [0, 1]."""
    return images.to(torch.float32).div_(255)


def to_uint8(x: Tensor) -> Tensor:
    """float32 (…) to uint8: clip to [0, 1], times 255, truncate."""
    return truncate(x * 255)


def truncate(v: Tensor) -> Tensor:
    """float32 or float64 (…) on the 0…255 scale to uint8: clip, truncate. Overwrites `v`."""
    return v.add_(TRUNCATION_SLACK[v.dtype]).clamp_(0, 255).to(torch.uint8)


@functools.lru_cache(maxsize=64)
def on_device(table: tuple, device: torch.device) -> Tensor:
    """A table of constants as a float32 tensor; kept, as copying one to a GPU waits for the GPU."""
    return torch.tensor(table, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=256)
def gaussian_matrix(
    size: int, sigma: float, border: str, cut: float, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """The Gaussian filter along an axis of `size`, as a (size, size) matrix.

    border and cut (of the kernel, in σ): mode and truncate of scipy.ndimage.gaussian_filter1d.
    Cached: don't write to the result.
    """
    matrix = ndimage.gaussian_filter1d(np.eye(size), sigma, axis=0, mode=border, truncate=cut)
    return torch.from_numpy(matrix).to(device, dtype)


def gaussian_blur(x: Tensor, sigma: float) -> Tensor:
    """Gaussian filter of float32 or float64 (…, H, W), cut at 4σ, edges replicated."""
    if sigma < 1 / 8:  # one tap
        return x
    how = (sigma, "nearest", 4.0, x.device, x.dtype)
    rows, columns = (gaussian_matrix(side, *how) for side in x.shape[-2:])
    return rows @ (x @ columns.T)


def motion_blur(images: Tensor, phi: Tensor, radius: int, sigma: float) -> Tensor:
    """One-sided blur along a line, on 8-bit values, edges replicated.

    images: uint8 (n, C, H, W); phi: float32 (n,), the angle of each image in degrees, y down.
    Taps i = 0 … 2·radius with weights ∝ exp(−i²/2σ²) are read at the integer offset
    (⌈i·cosφ − ½⌉, ⌈i·sinφ − ½⌉) in (x, y). The sum is rounded to a multiple of 1/257, then
    truncated (the 16-bit image library of the published sets). Returns uint8 (n, C, H, W).
    """
    n, channels, height, width = images.shape
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    weights /= weights.sum()
    # Taps beyond this weigh less than 1e-7 of the sum together.
    weights = weights[: np.searchsorted(np.cumsum(weights), 1 - 1e-7) + 1]
    reach = len(weights) - 1

    phi = torch.deg2rad(phi.double())[:, None]
    steps = torch.arange(len(weights), device=images.device)
    dx = torch.ceil(steps * torch.cos(phi) - 0.5).to(torch.int32)
    dy = torch.ceil(steps * torch.sin(phi) - 0.5).to(torch.int32)

    # Every row of a shifted image is `width` neighbours in memory: index_select copies those
    # several times as fast as advanced indexing copies images.
    padded = F.pad(images.float(), (reach,) * 4, mode="replicate")
    pitch, plane = padded.shape[-1], padded[0, 0].numel()
    rows = padded.view(-1).unfold(0, width, 1)
    how = {"dtype": index_type(padded.numel()), "device": images.device}
    unshifted = torch.arange(n * channels, **how)[:, None] * plane
    unshifted = unshifted + torch.arange(height, **how) * pitch
    unshifted = unshifted.view(n, -1) + reach * (pitch + 1)
    v = torch.zeros(images.shape, device=images.device)
    for tap, weight in enumerate(weights):
        start = unshifted + (dy[:, tap] * pitch + dx[:, tap])[:, None]
        v.add_(rows.index_select(0, start.view(-1)).view_as(v), alpha=257 * float(weight))
    # The half keeps whole numbers whole where a division is a product with the reciprocal.
    return v.round_().add_(0.5).div_(257).to(torch.uint8)


def zoom_weights(size: int, factor: float) -> np.ndarray:
    """The central zoom by `factor` along an axis of `size`, as a float64 (size, size) matrix.

    The central ⌈size/f⌉ pixels are enlarged to round(⌈size/f⌉·f) by linear interpolation with
    corners aligned, and the centre is cropped; both crops start at ⌊difference/2⌋. A product
    that ends in ½ is rounded to even, so 26·1.25 gives 32 but 26·1.2500000000000002 gives 33.
    """
    inside = math.ceil(size / factor)
    outside = round(inside * factor)
    position = (np.arange(size) + (outside - size) // 2) * ((inside - 1) / (outside - 1))
    first = (size - inside) // 2
    return np.pad(interpolation(position, inside), ((0, 0), (first, size - inside - first)))


def interpolation(position: np.ndarray, size: int) -> np.ndarray:
    """Linear interpolation at each `position` (n,) of an axis of `size`, as a (n, size) matrix."""
    return np.stack([np.interp(position, np.arange(size), row) for row in np.eye(size)], 1)


@functools.lru_cache(maxsize=256)
def zoom_matrix(size: int, factor: float, device: torch.device | str = "cpu") -> Tensor:
    """`zoom_weights` as a float32 tensor. Cached: don't write to the result."""
    return torch.from_numpy(zoom_weights(size, factor)).to(device, torch.float32)


def zoom(x: Tensor, factor: float) -> Tensor:
    """Zoom into the centre of float32 (…, H, W) by `factor`, as in `zoom_weights`."""
    rows, columns = (zoom_matrix(side, factor, x.device) for side in x.shape[-2:])
    return rows @ (x @ columns.T)


def index_type(count: int) -> torch.dtype:
    """int32, which is faster, where it can index `count` values."""
    return torch.int32 if count < 2**31 else torch.int64


def pick(values: Tensor, index: Tensor) -> Tensor:
    """values[i, j, index[i, j]] for values (n, C, m), index int32 (n, C, k); see torch.gather,
    which takes several times as long on a CPU."""
    n, channels, m = values.shape
    how = {"dtype": index_type(values.numel()), "device": values.device}
    start = torch.arange(0, n * channels * m, m, **how)
    flat = (index + start.view(n, channels, 1)).view(-1)
    return values.reshape(-1).index_select(0, flat).view(index.shape)
