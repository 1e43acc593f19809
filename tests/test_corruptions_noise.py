"""The noise corruptions against the distributions they stand for."""

import numpy as np
import pytest
import torch
from scipy import stats

from datasets.corruptions import noise
from datasets.corruptions.draws import Draws


def grey(value, n=64, size=32):
    return torch.full((n, 3, size, size), value, dtype=torch.uint8)


@pytest.mark.parametrize("c", [500, 100, 50, 15])
@pytest.mark.parametrize("value", [0, 1, 30, 128, 254, 255])
def test_shot_noise_is_poisson(c, value):
    """The 8-bit results are distributed as P(c·x)/c, by a chi-square test at 10⁻⁶."""
    drawn = noise.shot_noise(grey(value), c, Draws(64, "cpu", seed=value)).flatten()
    counts = np.arange(20 * c)
    results = np.floor(np.clip(counts / c, 0, 1) * 255 + 1e-9).astype(int)
    share = stats.poisson.pmf(counts, c * value / 255)
    expected = np.bincount(results, weights=share, minlength=256) * len(drawn)
    observed = np.bincount(drawn.numpy(), minlength=256)
    assert observed[expected < 1e-9].sum() == 0
    often = expected >= 5
    square = ((observed - expected)[often] ** 2 / expected[often]).sum()
    rest = observed[~often].sum(), expected[~often].sum()
    assert square <= stats.chi2.ppf(1 - 1e-6, max(1, often.sum()))
    assert rest[0] <= stats.poisson.ppf(1 - 1e-6, rest[1])


def test_shot_noise_rates_are_those_of_the_pixels():
    """Neighbouring values have neighbouring means: no pixel reads another's table."""
    images = torch.arange(256, dtype=torch.uint8).repeat(12).view(1, 3, 32, 32).repeat(400, 1, 1, 1)
    mean = noise.shot_noise(images, 50, Draws(400, "cpu", 1)).float().view(-1, 256).mean(0)
    low = torch.arange(200)
    spread = (255 * low / 50).sqrt() / (400 * 12) ** 0.5
    # Truncation to 8 bits takes half a step off, on average 0.45 of it where 255/50 is not whole.
    assert ((mean[low] + 0.45 - low).abs() <= 5 * spread + 0.5).all()


@pytest.mark.parametrize("c", [0.01, 0.14])
def test_impulse_noise_touches_the_share_it_should(c):
    out = noise.impulse_noise(grey(100, n=128), c, Draws(128, "cpu", seed=3))
    for value in (0, 255):
        hits = int((out == value).sum())
        assert abs(hits - out.numel() * c / 2) <= 5 * (out.numel() * c / 2) ** 0.5
    assert set(out.unique().tolist()) == {0, 100, 255}


def test_noise_differs_between_images_channels_and_pixels():
    for name, c in (("gaussian_noise", 0.1), ("shot_noise", 50), ("speckle_noise", 0.2)):
        out = getattr(noise, name)(grey(128, n=300), c, Draws(300, "cpu", seed=5)).float()
        out -= out.mean()
        for axis in (0, 1, 2, 3):
            other = out.roll(1, dims=axis)
            assert abs((out * other).mean() / out.var()) < 0.01, (name, axis)
        across_blocks = (out[:44] * out[256:]).mean() / out.var()
        assert abs(across_blocks) < 0.02, name
