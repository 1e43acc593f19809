"""The digital corruptions against the per-image definitions in tests/reference/digital.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datasets.corruptions import digital
from tests.reference import digital as reference

SEVERITIES = range(5)
SIDES = (32, 64)


def photo_like(n: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 (n, H, W, 3): smooth colour, edges, fine noise and clipped areas in every image."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[:height, :width] / max(height, width)
    images = np.empty((n, height, width, 3))
    for image in images:
        for k in range(3):
            fy, fx, phase = rng.uniform(-6, 6, 3)
            image[..., k] = 128 + 120 * np.sin(fy * yy + fx * xx + phase)
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        image[top : top + height // 3, left : left + width // 3] = rng.uniform(-50, 305, 3)
        image += rng.normal(0, 12, image.shape) * (xx > 0.4)[..., None]
    return images.clip(0, 255).astype(np.uint8)


def to_batch(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def to_arrays(batch: torch.Tensor) -> np.ndarray:
    assert batch.dtype == torch.uint8
    return batch.permute(0, 2, 3, 1).numpy()


def difference(batch: torch.Tensor, arrays: list[np.ndarray]) -> np.ndarray:
    return np.abs(to_arrays(batch).astype(int) - np.stack(arrays).astype(int))


class RecordedUniform:
    """Draws for a batch that keep what they gave, to be replayed image by image."""

    def __init__(self, n: int, seed: int = 0):
        self.n = n
        self.rng = np.random.default_rng(seed)
        self.given = []

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
        self.given.append(self.rng.uniform(low, high, (self.n, *shape)).astype(np.float32))
        return torch.from_numpy(self.given[-1])


class ReplayedUniform:
    """What image i of a recording got, behind numpy's `uniform`."""

    def __init__(self, recording: RecordedUniform, i: int):
        self.left = [given[i] for given in recording.given]

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
        values = self.left.pop(0)
        assert values.shape == size
        assert low <= values.min() and values.max() <= high
        return values.astype(float)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["contrast", "saturate"])
def test_colours_match_the_definition(name, severity, side):
    images = photo_like(4, side, side)
    c = getattr(digital, name.upper())[side][severity]
    batch = getattr(digital, name)(to_batch(images), c)
    expected = [getattr(reference, name)(image, c) for image in images]
    # Where the exact result is a whole number, the noise of doubles may truncate it to one less.
    assert difference(batch, expected).max() <= 1
    assert difference(batch, expected).mean() <= 0.2


@pytest.mark.parametrize("c", [0.15, 0.5])
def test_contrast_keeps_flat_images(c):
    flat = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(256, 3, 32, 32)
    assert torch.equal(digital.contrast(flat, c), flat)


def test_saturate_turns_greys_reddish_and_keeps_black():
    grey = torch.tensor([0, 100, 255], dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    out = digital.saturate(grey, (2, 0.25))
    assert out[0].eq(0).all()
    assert out[1, 0].eq(100).all() and out[1, 1:].eq(75).all()
    assert out[2, 0].eq(255).all() and out[2, 1:].eq(191).all()


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("severity", SEVERITIES)
def test_elastic_transform_matches_the_definition(severity, side):
    noise = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    c = digital.ELASTIC_TRANSFORM[side][severity]
    # Flat areas: doubles give v − 1e-14 here and there, which truncation takes to v − 1.
    for images, mean_bound in ((photo_like(3, side, side), 0.05), (noise, 0.01)):
        draws = RecordedUniform(len(images))
        batch = digital.elastic_transform(to_batch(images), c, draws)
        expected = [
            reference.elastic_transform(image, c, ReplayedUniform(draws, i))
            for i, image in enumerate(images)
        ]
        assert difference(batch, expected).max() <= 1
        assert difference(batch, expected).mean() <= mean_bound
        assert difference(batch, images).mean() > 3


def test_elastic_transform_keeps_flat_images():
    flat = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(256, 3, 32, 32)
    c = digital.ELASTIC_TRANSFORM[32][4]
    assert torch.equal(digital.elastic_transform(flat, c, RecordedUniform(256)), flat)


# Sides at which no bound between two cells falls on the centre of a pixel.
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (32, 64), (16, 128)])
@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_is_pillows(severity, shape):
    images = photo_like(3, *shape)
    for column in digital.PIXELATE.values():
        c = column[severity]
        expected = [reference.pixelate(image, c) for image in images]
        assert difference(digital.pixelate(to_batch(images), c), expected).max() == 0


QUALITIES = sorted({*digital.JPEG_COMPRESSION[32], *digital.JPEG_COMPRESSION[64], 5, 95, 100})


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 40), (33, 47), (31, 30), (50, 9)])
@pytest.mark.parametrize("quality", QUALITIES)
def test_jpeg_is_libjpegs(quality, shape):
    images = photo_like(6, *shape)
    batch = digital.jpeg_compression(to_batch(images), quality)
    expected = [reference.jpeg_compression(image, quality) for image in images]
    # Every step is libjpeg's, so only sums beyond 24 bits could differ, in one block of many.
    assert (difference(batch, expected) > 0).mean() <= 0.002


def test_jpeg_of_noise_and_saturated_colours_is_libjpegs():
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    colours = rng.choice(np.array([0, 255], dtype=np.uint8), (4, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    for images in (noise, colours):
        for quality in (25, 40, 80):
            batch = digital.jpeg_compression(to_batch(images), quality)
            expected = [reference.jpeg_compression(image, quality) for image in images]
            assert (difference(batch, expected) > 0).mean() <= 0.002


NO_DRAWS = ["contrast", "saturate", "pixelate", "jpeg_compression"]


@pytest.mark.parametrize("name", NO_DRAWS)
def test_an_image_does_not_depend_on_its_batch_or_layout(name):
    images = to_batch(photo_like(5, 32, 32))
    before = images.clone()
    c = getattr(digital, name.upper())[32][4]
    function = getattr(digital, name)
    together = function(images, c)
    one_by_one = torch.cat([function(image[None].contiguous(), c) for image in images])
    assert torch.equal(together, one_by_one)
    assert torch.equal(images, before)


@pytest.mark.parametrize("name", [*NO_DRAWS, "elastic_transform"])
def test_autocast_and_fast_matmul_change_nothing(name):
    images = to_batch(photo_like(4, 32, 32))
    c = getattr(digital, name.upper())[32][4]

    def corrupted():
        draws = [RecordedUniform(len(images))] if name == "elastic_transform" else []
        return getattr(digital, name)(images, c, *draws)

    expected = corrupted()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = corrupted()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(out, expected)
