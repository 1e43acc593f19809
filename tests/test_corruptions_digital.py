"""The digital corruptions at the sizes, qualities and colours where they could part from Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datasets.corruptions import digital
from datasets.corruptions.draws import Draws
from tests.reference.compare import differences, pictures, to_batch


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


def test_elastic_transform_keeps_flat_images_and_moves_others():
    flat = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(256, 3, 32, 32)
    noise = torch.randint(256, flat.shape, dtype=torch.uint8)
    for c in digital.ELASTIC_TRANSFORM[32]:
        draws = Draws(256, "cpu", seed=0)
        assert torch.equal(digital.elastic_transform(flat, c, draws), flat)
        moved = digital.elastic_transform(noise, c, draws).int()
        assert (moved - noise.int()).abs().float().mean() > 3


# Sides at which no bound between two cells falls on the centre of a pixel.
@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (32, 64), (16, 128)])
@pytest.mark.parametrize("c", sorted({*digital.PIXELATE[32], *digital.PIXELATE[64]}))
def test_pixelate_is_pillows(c, shape):
    assert differences("pixelate", pictures(3, *shape), c).max() == 0


QUALITIES = sorted({*digital.JPEG_COMPRESSION[32], *digital.JPEG_COMPRESSION[64], 5, 95, 100})


@pytest.mark.parametrize("shape", [(32, 32), (64, 64), (48, 40), (33, 47), (31, 30), (50, 9)])
@pytest.mark.parametrize("quality", QUALITIES)
def test_jpeg_is_libjpegs(quality, shape):
    found = differences("jpeg_compression", pictures(8, *shape), quality)
    # Every step is libjpeg's, so only sums beyond 24 bits could differ, in one block of many.
    assert (found > 0).mean() <= 0.002


@pytest.mark.parametrize("quality", [25, 40, 80])
def test_jpeg_of_noise_and_saturated_colours_is_libjpegs(quality):
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    colours = rng.choice(np.array([0, 255], dtype=np.uint8), (4, 8, 8, 3)).repeat(4, 1).repeat(4, 2)
    for images in (noise, colours):
        assert (differences("jpeg_compression", images, quality) > 0).mean() <= 0.002


@pytest.mark.parametrize("name", ["contrast", "saturate", "pixelate", "jpeg_compression"])
def test_an_image_does_not_depend_on_its_batch(name):
    images = to_batch(pictures(5, 32, 32))
    before = images.clone()
    c = getattr(digital, name.upper())[32][4]
    function = getattr(digital, name)
    one_by_one = torch.cat([function(image[None].contiguous(), c) for image in images])
    assert torch.equal(function(images, c), one_by_one)
    assert torch.equal(images, before)
