"""What the blur corruptions and their filters consist of, each against a definition of its own."""

import numpy as np
import pytest
import torch
from scipy import ndimage

from datasets.corruptions import blur, filters
from datasets.corruptions.draws import Draws
from tests.reference.compare import Recorder


def test_constant_images_stay_as_they_are():
    """Weights sum to one and borders are filled with image values; truncation takes nothing."""
    values = torch.arange(256, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    for name in ("gaussian_blur", "defocus_blur", "zoom_blur", "glass_blur", "motion_blur"):
        for size in (32, 64):
            for c in getattr(blur, name.upper())[size]:
                draws = [Draws(256, "cpu", 0)] if name in ("glass_blur", "motion_blur") else []
                assert torch.equal(getattr(blur, name)(values, c, *draws), values), (name, c)


@pytest.mark.parametrize("phi", [-45.0, -30.0, 0.0, 20.0, 44.9, -90.0, -135.0, -100.0])
def test_motion_blur_of_one_white_pixel_is_a_line_at_phi(phi):
    """The pixel at tap i's offset from the one that reads it lights up with tap i's weight."""
    image = torch.zeros(1, 1, 65, 65, dtype=torch.uint8)
    image[..., 32, 32] = 255
    out = filters.motion_blur(image, torch.tensor([phi]), 9, 2.5)[0, 0]
    expected = np.zeros((65, 65))
    weights = np.exp(-(np.arange(19) ** 2) / (2 * 2.5**2))
    for i, weight in enumerate(weights / weights.sum()):
        dx = int(np.ceil(i * np.cos(np.deg2rad(phi)) - 0.5))
        dy = int(np.ceil(i * np.sin(np.deg2rad(phi)) - 0.5))
        expected[32 - dy, 32 - dx] += 255 * weight
    expected = np.floor(np.round(257 * expected) / 257)
    assert np.abs(out.numpy() - expected).max() <= (phi % 45 == 0)  # ties of ⌈·−½⌉ may part


def test_more_values_than_int32_can_index(monkeypatch):
    assert filters.index_type(2**31 - 1) == torch.int32
    assert filters.index_type(2**31) == torch.int64
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    blurred = [filters.motion_blur(images, torch.full((4,), 20.0), 9, 2.5)]
    blurred.append(blur.glass_blur(images, blur.GLASS_BLUR[32][4], Draws(4, "cpu", 0)))
    monkeypatch.setattr(filters, "index_type", lambda count: torch.int64)
    assert torch.equal(blurred[0], filters.motion_blur(images, torch.full((4,), 20.0), 9, 2.5))
    again = blur.glass_blur(images, blur.GLASS_BLUR[32][4], Draws(4, "cpu", 0))
    assert torch.equal(blurred[1], again)


def test_glass_copies_come_from_where_they_should():
    """At δ = 2 copies chain: a pixel may receive one that was itself copied in the same pass."""
    n, height, width, delta = 4, 12, 17, 2
    draws = Recorder(Draws(n, "cpu", seed=0))
    source = blur._glass_pass(n, height, width, delta, draws)[:, 0].view(n, height, width)
    chained = 0
    for i in range(n):
        y = np.arange(height * width).reshape(height, width)
        k = draws.image(i).integers(0, 16, height - 4, width - 4)
        for h in range(height - delta, delta, -1):
            for w in range(width - delta, delta, -1):
                dy, dx = divmod(int(k[h - 3, w - 3]), 4)
                chained += y[h + dy - 2, w + dx - 2] != (h + dy - 2) * width + w + dx - 2
                y[h, w] = y[h + dy - 2, w + dx - 2]
        np.testing.assert_array_equal(source[i].numpy(), y)
    assert chained > 50


def test_zoom_rounds_halves_to_even():
    """26·1.25 = 32.5: snow's factor gives 32, zoom_blur's, a step above it, 33."""
    read = filters.zoom_weights(32, 1.25) @ np.arange(32)
    above = filters.zoom_weights(32, 1.2500000000000002) @ np.arange(32)
    assert read[1] - read[0] == pytest.approx(25 / 31)
    assert above[1] - above[0] == pytest.approx(25 / 32)


@pytest.mark.parametrize("border", ["nearest", "reflect"])
def test_gaussian_filters_match_scipy(border):
    x = torch.rand(2, 9, 13)
    for sigma, cut in ((0.05, 4.0), (0.8, 4.0), (3.0, 3.0)):
        how = (sigma, border, cut, x.device, x.dtype)
        rows, columns = (filters.gaussian_matrix(side, *how) for side in x.shape[1:])
        theirs = ndimage.gaussian_filter(x.numpy(), (0, sigma, sigma), mode=border, truncate=cut)
        np.testing.assert_allclose((rows @ x @ columns.T).numpy(), theirs, atol=1e-5)
        if border == "nearest" and cut == 4:
            np.testing.assert_allclose(filters.gaussian_blur(x, sigma).numpy(), theirs, atol=1e-5)
