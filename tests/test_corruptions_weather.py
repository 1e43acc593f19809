"""snow, frost, fog, brightness and spatter beside their definition, one image at a time."""

import numpy as np
import pytest
import torch
from PIL import Image
from reference import weather as reference

from datasets.corruptions import frost_texture, weather
from datasets.corruptions.draws import Draws
from utils.errors import InputError

SEVERITIES = range(1, 6)


class Recorded(Draws):
    """Draws that can be replayed for one image."""

    def __init__(self, n, seed):
        super().__init__(n, "cpu", seed)
        self.calls = []

    def normal(self, *shape):
        self.calls.append(super().normal(*shape))
        return self.calls[-1].clone()

    def uniform(self, *shape, low=0.0, high=1.0):
        self.calls.append(super().uniform(*shape, low=low, high=high))
        return self.calls[-1].clone()

    def integers(self, low, high, *shape):
        self.calls.append(super().integers(low, high, *shape))
        return self.calls[-1].clone()

    def of(self, index):
        return Replayed([call[index].numpy() for call in self.calls])


class Replayed:
    def __init__(self, calls):
        self.calls = list(calls)

    def normal(self, *shape):
        return self._next(shape)

    def uniform(self, *shape, low=0.0, high=1.0):
        return self._next(shape)

    def integers(self, low, high, *shape):
        return self._next(shape)

    def _next(self, shape):
        call = self.calls.pop(0)
        assert call.shape == shape
        return call


def pictures(side, n=6):
    """Smooth colour fields, full-range noise, and one black image."""
    rng = np.random.default_rng(side)
    noise = rng.integers(0, 256, (n, side, side, 3))
    y, x = np.mgrid[:side, :side] / side
    waves = 127 + 120 * np.sin(rng.uniform(1, 9, (n, 1, 1, 3)) * (x + 2 * y)[None, ..., None])
    mixed = np.where(np.arange(n)[:, None, None, None] % 2, noise, waves).astype(np.uint8)
    mixed[-1] = 0
    return mixed


def batch(pictures):
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()


def channels_last(images):
    assert images.dtype == torch.uint8
    return images.permute(0, 2, 3, 1).numpy().astype(int)


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("name", ["snow", "fog", "spatter", "frost", "brightness"])
def test_matches_the_definition(name, severity, side):
    clean = pictures(side)
    c = getattr(weather, name.upper())[side][severity - 1]
    function = getattr(weather, name)
    arguments = []
    if name == "brightness":
        result = function(batch(clean), c)
        expected = [reference.brightness(image, c) for image in clean]
    else:
        draws = Recorded(len(clean), seed=severity)
        result = function(batch(clean), c, draws)
        if name == "frost":
            factor = 0.2 if side == 32 else 0.3
            full = [t.permute(1, 2, 0).numpy() for t in frost_texture._synthetic()]
            arguments = [[reference.downscale(texture, factor) for texture in full]]
        expected = [
            getattr(reference, name)(image, c, draws.of(i), *arguments)
            for i, image in enumerate(clean)
        ]
    difference = abs(channels_last(result) - np.stack(expected))
    print(name, severity, side, difference.max(), (difference > 0).mean())
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.005
