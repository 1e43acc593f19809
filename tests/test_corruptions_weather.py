"""The steps of spatter, fog and frost beside their definitions, and the frost textures."""

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.corruptions import corrupt, frost_texture, weather
from datasets.corruptions.draws import Draws
from tests.reference import compare
from tests.reference import weather as reference
from utils.errors import InputError

CPU = torch.device("cpu")
# ---- the steps of water ----------------------------------------------------------------------


def blobs(n, height, width):
    """Steps of several heights, softened, so that weak and strong gradients meet."""
    rng = np.random.default_rng(5)
    field = np.stack(
        [reference.gaussian(rng.standard_normal((height, width)), 1.5) for _ in "x" * n]
    )
    field = np.where(field > 0.1, 90 + 400 * field, 0).clip(0, 255)
    return np.stack([reference.gaussian(plane, 0.6) for plane in field]).astype(np.uint8)


def test_canny_matches_the_definition():
    images = blobs(4, 40, 31)
    ours = weather.canny(torch.from_numpy(images).float(), 50, 150).numpy()
    theirs = np.stack([reference.canny(image, 50, 150) for image in images])
    assert 0.02 < theirs.mean() < 0.5
    assert (ours == theirs).all()


def test_weak_edges_count_only_where_a_chain_of_them_reaches_a_strong_one():
    image = torch.zeros(2, 16, 16)
    image[:, :, 8:] = 20  # a weak edge all the way down
    image[0, :6, 8:] = 120  # strong in the upper part of the first image
    edges = weather.canny(image, 50, 150)
    assert edges[0, 8:, 7:9].any(1).all()
    assert not edges[1].any()


@pytest.mark.parametrize("density", [0.002, 0.02, 0.3])
def test_chamfer_distance_is_the_shortest_path(density):
    edges = np.random.default_rng(3).random((3, 45, 38)) < density
    edges[0] = False
    edges[0, 44, 0] = True
    ours = weather.chamfer_distance(torch.from_numpy(edges), cut=20).numpy()
    theirs = [np.minimum(reference.chamfer_distance(plane), 20) for plane in edges]
    assert np.abs(ours / 1e4 - theirs).max() < 1e-5


def test_equalize_matches_the_definition_and_keeps_a_single_level():
    levels = np.random.default_rng(4).binomial(20, 0.3, (3, 9, 11)).astype(np.uint8)
    levels[2] = 7
    ours = weather.equalize(torch.from_numpy(levels).float(), levels=21).numpy()
    assert (ours == [reference.equalize(plane) for plane in levels]).all()
    assert (ours[2] == 7).all()


def test_spatter_without_liquid_changes_nothing():
    class Calm:
        def normal(self, *shape):
            return torch.zeros(4, *shape)

    clean = compare.to_batch(compare.pictures(4, 32, 32))
    for c in weather.SPATTER[32]:
        assert torch.equal(weather.spatter(clean, c, Calm()), clean)


def test_liquid_beyond_one_wraps_around_in_8_bits():
    class Wild(Draws):
        def normal(self, *shape):
            return super().normal(*shape) * 3

    images = compare.pictures(4, 32, 32)
    wild = Wild(4, "cpu", seed=0)
    assert compare.differences("spatter", images, weather.SPATTER[32][2], draws=wild).max() <= 1


# ---- fog and frost beyond the two published sizes ---------------------------------------------


def test_plasma_spans_zero_to_one_and_differs_between_images():
    field = weather.plasma(16, 2.0, Draws(5, "cpu", seed=0))
    assert field.shape == (5, 16, 16)
    assert (field.amin((1, 2)) == 0).all() and (field.amax((1, 2)) == 1).all()
    assert len(field.flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize("side", [49, 96, 330])
def test_frost_and_fog_take_larger_images(side):
    images = torch.full((2, 3, side, side), 100, dtype=torch.uint8)
    for name in ("frost", "fog"):
        result = corrupt(images, name, 5, torch.Generator().manual_seed(0))
        assert result.shape == images.shape
        assert (result != images).float().mean() > 0.5


# ---- frost textures ----------------------------------------------------------------------------

# The photographs themselves, over 300 random crops of each of the five: factor, side of the
# crops, mean and standard deviation of R, G, B over all of them, mean standard deviation within
# a crop, and power of the grey crops at 1, 2–3, 4–7 and 8 or more cycles per side in dB.
PHOTOGRAPHS = [
    (0.2, 32, (144, 165, 177), (56.1, 42.5, 41.3), (23.5, 21.9, 22.1), (39.9, 33.6, 29.0, 26.0)),
    (0.3, 64, (144, 165, 177), (55.2, 41.5, 40.4), (22.7, 21.1, 21.4), (47.1, 39.0, 33.2, 25.1)),
]


@pytest.mark.parametrize(("factor", "side", "mean", "spread", "within", "spectrum"), PHOTOGRAPHS)
def test_stand_ins_look_like_the_photographs(factor, side, mean, spread, within, spectrum):
    found = frost_texture.textures(None, factor, CPU)
    rng = np.random.default_rng(0)
    crops = []
    for texture, (height, width) in zip(*found, strict=True):
        for _ in range(100):
            y, x = rng.integers(int(height) - side), rng.integers(int(width) - side)
            crops.append(texture[:, y : y + side, x : x + side].numpy())
    crops = np.stack(crops).astype(float)
    assert np.abs(crops.mean((0, 2, 3)) - mean).max() < 2.5
    assert np.abs(crops.std((0, 2, 3)) / spread - 1).max() < 0.04
    assert np.abs(crops.std((2, 3)).mean(0) / within - 1).max() < 0.05
    grey = crops.mean(1)
    power = np.abs(np.fft.fft2(grey)) ** 2 / side**2
    cycles = np.fft.fftfreq(side, 1 / side)
    radius = np.hypot(cycles[:, None], cycles).round()
    for low, high, expected in zip((1, 2, 4, 8), (1, 3, 7, side // 2), spectrum, strict=True):
        ours = 10 * np.log10(power[:, (low <= radius) & (radius <= high)].mean())
        assert abs(ours - expected) < 1.5


@pytest.fixture
def frost_dir(tmp_path):
    """Five pictures with the photographs' names; the first has an alpha channel."""
    rng = np.random.default_rng(2)
    for k, name in enumerate(frost_texture.PHOTOGRAPHS):
        pixels = rng.integers(0, 256, (315 + 10 * k, 400 - 15 * k, 4 if k == 0 else 3))
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name)
    return tmp_path


def test_photographs_are_sampled_without_antialiasing(frost_dir):
    for factor in (0.2, 0.3):
        found = frost_texture.textures(str(frost_dir), factor, CPU)
        for pixels, size, name in zip(*found, frost_texture.PHOTOGRAPHS, strict=True):
            with Image.open(frost_dir / name) as image:
                theirs = reference.downscale(np.array(image)[..., :3], factor)
            assert tuple(size.tolist()) == theirs.shape[:2]
            ours = pixels[:, : size[0], : size[1]].permute(1, 2, 0).numpy().astype(int)
            assert np.abs(ours - theirs).max() <= 1
            assert (ours != theirs).mean() < 0.01


def test_frost_uses_the_photographs(frost_dir):
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    with_photographs = corrupt(
        images, "frost", 5, torch.Generator().manual_seed(0), frost_dir=str(frost_dir)
    )
    assert with_photographs.float().std((2, 3)).mean() > 15  # 0.45 of noise, plainly interpolated
    without = corrupt(images, "frost", 5, torch.Generator().manual_seed(0))
    assert without.float().std((2, 3)).mean() < 15


def test_missing_or_broken_photographs_are_named(frost_dir, tmp_path):
    with pytest.raises(InputError, match=r"nowhere: frost1\.png is missing"):
        frost_texture.textures(str(tmp_path / "nowhere"), 0.2, CPU)
    Image.new("RGB", (100, 90)).save(frost_dir / "frost3.png")
    with pytest.raises(InputError, match=r"frost3\.png is 100×90"):
        frost_texture.textures(str(frost_dir), 0.2, CPU)
    (frost_dir / "frost3.png").write_bytes(b"not a picture")
    with pytest.raises(InputError, match=r"frost3\.png: not a readable"):
        frost_texture.textures(str(frost_dir), 0.2, CPU)
    (frost_dir / "frost3.png").unlink()
    with pytest.raises(InputError, match=r"frost3\.png is missing"):
        frost_texture.textures(str(frost_dir), 0.2, CPU)
