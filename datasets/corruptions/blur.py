"""Defocus, glass, motion, zoom and Gaussian blur on batches (Hendrycks & Dietterich, ICLR 2019).

Every function takes images uint8 (n, 3, H, W), the constants of one severity and, where something
is random, the draws, and returns uint8 (n, 3, H, W). Tables: {32: severities 1..5 for images up to
48 pixels (CIFAR-10-C), 64: for larger ones (Tiny-ImageNet-C)}.
"""

import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage, sparse
from torch import Tensor

from datasets.corruptions import filters
from datasets.corruptions.draws import Draws
from datasets.corruptions.filters import truncate

# (r, a): radius of the disk, σ of its smoothing
DEFOCUS_BLUR = {
    32: ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
    64: ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
}


def defocus_blur(images: Tensor, c: tuple[float, float]) -> Tensor:
    """Correlation with a smoothed disk, borders mirrored without repeating the edge."""
    return _apply(_disk_operator(*images.shape[-2:], *c, images.device), images)


@functools.lru_cache(maxsize=32)
def _disk_operator(height: int, width: int, r: float, a: float, device: torch.device):
    """The disk X² + Y² ≤ r², normalized, then smoothed by a 3×3 Gaussian of σ = a."""
    reach = math.floor(r) + 1
    k = np.arange(-reach, reach + 1)
    disk = (k[:, None] ** 2 + k**2 <= r**2).astype(np.float64)
    kernel = ndimage.gaussian_filter(disk / disk.sum(), a, mode="constant", radius=1)
    source = np.pad(np.arange(height * width).reshape(height, width), reach, mode="reflect")
    pixels, reads, weights = np.arange(height * width), [], []
    for (i, j), weight in np.ndenumerate(kernel):
        if weight > 1e-9:
            reads.append(source[i : i + height, j : j + width].ravel())
            weights.append(np.full(pixels.size, weight))
    entries = (np.tile(pixels, len(reads)), np.concatenate(reads))
    shape = (pixels.size, pixels.size)
    return _operator(sparse.coo_array((np.concatenate(weights), entries), shape), device)


# (σ, δ, n): σ of both filters, reach of a copy in pixels, number of passes
GLASS_BLUR = {
    32: ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
    64: ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
}


def glass_blur(images: Tensor, c: tuple[float, int, int], draws: Draws) -> Tensor:
    """Gaussian filter, n passes that copy every pixel from near by, Gaussian filter.

    A pass visits h = H−δ … δ+1 and, inside, w = W−δ … δ+1, and copies y[h+dy, w+dx] into y[h, w],
    dy and dx from {−δ … δ−1}: draws.integers(0, (2δ)², …) gives (dy+δ)·2δ + dx+δ for the visited
    positions in raster order (first row h = δ+1). The passes are resolved into one gather.
    """
    sigma, delta, passes = c
    n, channels, height, width = images.shape
    source = None
    for _ in range(passes):
        copied_from = _glass_pass(n, height, width, delta, draws)
        source = copied_from if source is None else filters.pick(source, copied_from)
    y = gaussian_blur(images, sigma).view(n, channels, -1)
    y = filters.pick(y, source.expand(-1, channels, -1)).view(images.shape)
    return gaussian_blur(y, sigma)


def _glass_pass(n: int, height: int, width: int, delta: int, draws: Draws) -> Tensor:
    """Where each pixel's value comes from in one pass: flat positions, int32 (n, 1, H·W)."""
    h, w = height - 2 * delta, width - 2 * delta
    k = draws.integers(0, (2 * delta) ** 2, h, w).to(torch.int32)
    shift = k.div(2 * delta, rounding_mode="floor").mul_(width - 2 * delta).add_(k)
    shift -= delta * (width + 1)
    here = torch.arange(height * width, dtype=torch.int32, device=k.device).view(height, width)
    visited = slice(delta + 1, delta + 1 + h), slice(delta + 1, delta + 1 + w)
    copied_from = here.repeat(n, 1, 1)
    copied_from[:, visited[0], visited[1]] += shift
    copied_from = copied_from.view(n, 1, -1)
    if delta == 1:
        return copied_from  # dy, dx ≤ 0: what is copied was never written before
    # What is copied was itself written earlier in this pass if it lies in the visited region
    # further on in raster order. Such chains grow with probability 5/16 a link at δ = 2; 64
    # links, which six doublings resolve, come up once in 10³² pixels.
    inside = torch.zeros(height, width, dtype=torch.bool, device=k.device)
    inside[visited] = True
    here = here.view(1, 1, -1)
    written = (copied_from > here) & inside.view(-1)[copied_from]
    last = torch.where(written, copied_from, here)
    for _ in range(6):
        last = filters.pick(last, last)
    return filters.pick(copied_from, last)


# (R, σ): reach and fall-off of the blur, in pixels along the line
MOTION_BLUR = {
    32: ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
    64: ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
}


def motion_blur(images: Tensor, c: tuple[int, float], draws: Draws) -> Tensor:
    """One-sided blur along a line at φ ~ U(−45°, 45°)."""
    return filters.motion_blur(images, draws.uniform(low=-45, high=45), *c)


_ZOOM_BLUR = (1.06, 1.11, 1.15, 1.20, 1.25)  # the largest zoom factor
ZOOM_BLUR = {32: _ZOOM_BLUR, 64: _ZOOM_BLUR}


def zoom_blur(images: Tensor, c: float) -> Tensor:
    """Mean of x and of x zoomed by f = 1, 1.01, …, c."""
    return _apply(_zoom_operator(*images.shape[-2:], c, images.device), images)


@functools.lru_cache(maxsize=32)
def _zoom_operator(height: int, width: int, c: float, device: torch.device):
    # The step as numpy.arange takes it: 25 steps give 1.2500000000000002, and 26·f rounds up.
    factors = [1 + i * ((1 + 0.01) - 1) for i in range(round((c - 1) / 0.01) + 1)]
    total = sparse.eye_array(height * width, format="csr")
    for factor in factors:
        rows, columns = (
            sparse.coo_array(filters.zoom_weights(side, factor)) for side in (height, width)
        )
        total = total + sparse.kron(rows, columns, "csr")
    return _operator(total / (len(factors) + 1), device)


GAUSSIAN_BLUR = {32: (0.4, 0.6, 0.7, 0.8, 1), 64: (0.5, 0.75, 1, 1.25, 1.5)}


def gaussian_blur(images: Tensor, c: float) -> Tensor:
    """Gaussian filter of σ = c, edges replicated.

    In double precision: the outer weights are down to 10⁻⁵, and in almost flat regions truncation
    turns on what they add (1 % of the values of some images, in single precision).
    """
    # On a CPU 64 images at a time: temporaries of more go back to the system after every step,
    # and faulting them in again took half of glass_blur's time.
    step = 64 if images.device.type == "cpu" else len(images)
    parts = [truncate(filters.gaussian_blur(x.double(), c)) for x in images.split(step)]
    return torch.cat(parts)


# A fixed linear map of the pixels is a sparse matrix; on pixel-major images its product is a
# weighted `embedding_bag`: 1 µs an image at 32×32 where a loop over taps takes tens.


def _operator(matrix, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """A scipy sparse (H·W, H·W) matrix as (pixels read, first entry of every row, weights)."""
    matrix = matrix.tocsr()
    return (
        torch.from_numpy(matrix.indices.astype(np.int64)).to(device),
        torch.from_numpy(matrix.indptr[:-1].astype(np.int64)).to(device),
        torch.from_numpy(matrix.data.astype(np.float32)).to(device),
    )


def _apply(operator: tuple[Tensor, Tensor, Tensor], images: Tensor) -> Tensor:
    """The linear map on every channel of uint8 (n, C, H, W), truncated to uint8."""
    reads, rows, weights = operator
    pixels = images.flatten(2).flatten(0, 1).T.float().contiguous()
    v = F.embedding_bag(reads, pixels, rows, mode="sum", per_sample_weights=weights)
    return truncate(v).T.reshape(images.shape)
