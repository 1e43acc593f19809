"""A VGG-11 of few channels, in test files that train or measure many models."""

import pytest

from models import vgg

WIDE = vgg.cfgs["A"]
CHANNELS = [16, "M", 32, "M", 32, 32, "M", 64, 64, "M", 64, 512, "M"]


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """To be imported by a test file, in which it then works by itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(vgg.cfgs, "A", CHANNELS)
        yield
