"""Gaussian, shot, impulse and speckle noise on batches (Hendrycks & Dietterich, ICLR 2019).

Every function takes images uint8 (n, 3, H, W), the constant of one severity and the draws, and
returns uint8 (n, 3, H, W). x stands for the image in [0, 1]. Tables: {32: severities 1..5 for
images up to 48 pixels (CIFAR-10-C), 64: for larger ones (Tiny-ImageNet-C)}.
"""

import functools

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from datasets.corruptions.draws import Draws
from datasets.corruptions.filters import truncate

GAUSSIAN_NOISE = {32: (0.04, 0.06, 0.08, 0.09, 0.10), 64: (0.04, 0.08, 0.12, 0.15, 0.18)}


def gaussian_noise(images: Tensor, c: float, draws: Draws) -> Tensor:
    """x + N(0, c)."""
    return truncate(draws.normal(*images.shape[1:]).mul_(255 * c).add_(images))


SHOT_NOISE = {32: (500, 250, 100, 75, 50), 64: (250, 100, 50, 30, 15)}


def shot_noise(images: Tensor, c: float, draws: Draws) -> Tensor:
    """P(c·x)/c, P a Poisson draw.

    An 8-bit value has one of 256 rates and gives one of 256 results, so a draw is a look-up in an
    alias table (Walker 1977) of its rate: about twenty times as fast as `torch.poisson` on a CPU.
    One uniform float chooses the column by its first 8 bits and the side by the other 16.
    """
    table = _poisson_aliases(float(c), images.device)
    u = draws.uniform(*images.shape[1:]).mul_(2**24).to(torch.int32)
    entry = images.to(torch.int32).bitwise_left_shift_(8).add_(u >> 16)
    entry = table.index_select(0, entry.view(-1)).view(images.shape)
    # An entry is (threshold·2¹⁶, column, alias): 15 bits and a half would do, 17 + 8 are used.
    return torch.where((u & 0xFFFF) < (entry >> 8), u >> 16, entry & 0xFF).to(torch.uint8)


@functools.lru_cache(maxsize=32)
def _poisson_aliases(c: float, device: torch.device) -> Tensor:
    """Alias tables of P(c·k/255)/c as 8-bit values, one for each k: int32 (256·256,).

    Entry 256·k + j holds threshold·2⁸ + alias: column j stands for itself with probability
    threshold/2¹⁶, else for its alias.
    """
    counts = np.arange(int(np.ceil(c)) + 1)
    results = np.floor(np.minimum(counts / c, 1) * 255 + 1e-9).astype(int)
    table = np.zeros((256, 256), dtype=np.int64)
    for k in range(256):
        below = stats.poisson.cdf(counts, c * k / 255)
        share = np.diff(below, prepend=0)
        share[-1] = 1 - below[-2]  # every count ≥ c is white
        mass = np.bincount(results, weights=share, minlength=256) * 256
        threshold, alias = np.ones(256), np.arange(256)
        small = [j for j in range(256) if mass[j] < 1]
        large = [j for j in range(256) if mass[j] >= 1]
        while small and large:
            i, j = small.pop(), large[-1]
            threshold[i], alias[i] = mass[i], j
            mass[j] -= 1 - mass[i]
            if mass[j] < 1:
                small.append(large.pop())
        table[k] = np.rint(threshold * 2**16).astype(np.int64) * 2**8 + alias
    return torch.from_numpy(table.astype(np.int32).ravel()).to(device)


IMPULSE_NOISE = {32: (0.01, 0.02, 0.03, 0.05, 0.07), 64: (0.01, 0.02, 0.05, 0.08, 0.14)}


def impulse_noise(images: Tensor, c: float, draws: Draws) -> Tensor:
    """Each value set with probability c to 0 or 1, evenly."""
    u = draws.uniform(*images.shape[1:])
    return torch.where(u < c, (u < c / 2).to(torch.uint8) * 255, images)


SPECKLE_NOISE = {32: (0.06, 0.1, 0.12, 0.16, 0.2), 64: (0.15, 0.2, 0.25, 0.3, 0.35)}


def speckle_noise(images: Tensor, c: float, draws: Draws) -> Tensor:
    """x + x·N(0, c)."""
    return truncate(draws.normal(*images.shape[1:]).mul_(c).add_(1).mul_(images))
