"""Quantization against a scalar definition, its edge cases, and the packing of codes."""

import math

import pytest
import torch

from utils import quantize
from utils.errors import InputError
from utils.quantize import METHODS, bits_per_code, encode, fake_quantize, pack_bits, unpack_bits


def nearest_level(x, values, levels):
    """min + k (max − min) / (levels − 1) with k rounded half to even, in double precision."""
    low, high = min(values), max(values)
    k = round((x - low) / (high - low) * (levels - 1))  # Python rounds half to even
    return low + k * (high - low) / (levels - 1)


def slow(values, levels, method):
    if method == "linear":
        return [nearest_level(x, values, levels) for x in values]
    if method == "tanh":
        squeezed = [math.tanh(x) for x in values]
        return [math.atanh(nearest_level(x, squeezed, levels)) for x in squeezed]
    logs = [math.log2(abs(x)) for x in values]
    return [
        math.copysign(2 ** nearest_level(m, logs, levels // 2), x)
        for m, x in zip(logs, values, strict=True)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("levels", [4, 6, 16, 256, 1024])
def test_against_the_definition(method, levels):
    x = torch.randn(200, generator=torch.Generator().manual_seed(levels)) * 0.05
    expected = torch.tensor(slow(x.double().tolist(), levels, method))
    result = fake_quantize(x, levels, method)
    # A value on the edge between two levels may fall to either side in float32.
    off = (result - expected).abs() > 1e-6
    assert off.float().mean() < 0.01
    allowed = levels if method != "log" else 2 * (levels // 2)
    assert result.unique().numel() <= allowed


@pytest.mark.parametrize("method", METHODS)
def test_extremes_are_levels(method):
    x = torch.tensor([-0.3, 0.1, 0.05, 0.7])
    result, smallest = fake_quantize(x, 16, method), 2 if method == "log" else 0
    torch.testing.assert_close(result[[smallest, 3]], x[[smallest, 3]])


def test_half_goes_to_even():
    # With 5 levels on [0, 4] the steps are whole: 0.5 → 0, 1.5 → 2, 2.5 → 2
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 4.0])
    assert fake_quantize(x, 5, "linear").tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "x",
    [
        *(torch.full((3, 5), value) for value in (0.0, 0.1, -7.25)),
        torch.tensor(0.3),
        torch.empty(0, 4),
    ],
    ids=str,
)
def test_constant_and_empty_tensors_are_kept(method, x):
    assert torch.equal(fake_quantize(x, 16, method), x)


def test_zeros_under_log_are_kept():
    x = torch.tensor([0.0, 0.5, -0.25, 0.0, 2.0])
    assert torch.equal(fake_quantize(x, 64, "log").sign(), x.sign())


def test_tanh_of_large_values_stays_finite():
    low, *_, high = fake_quantize(torch.tensor([-30.0, 0.0, 0.5, 30.0]), 16, "tanh").tolist()
    assert high == -low and 8 < high < 9


def test_per_channel_is_each_slice_alone():
    x = torch.randn(6, 4, 3) * torch.logspace(-3, 0, 6).view(6, 1, 1)
    together = fake_quantize(x, 16, "linear", per_channel=True)
    alone = torch.stack([fake_quantize(row, 16, "linear") for row in x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 8, 16, 17, 32, 256, 1000, 4096, 65536])
@pytest.mark.parametrize("method", METHODS)
def test_codes_fit_their_bits_and_packing_is_lossless(method, levels):
    if method == "log" and (levels % 2 or levels < 4):
        pytest.skip("log has half of the levels per sign")
    q, bits = encode(torch.randn(301), levels, method), bits_per_code(levels)
    assert q.codes.min() >= 0 and q.codes.max() < levels <= 2**bits
    packed = pack_bits(q.codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(301 * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, 301), q.codes)
    assert torch.isfinite(quantize.decode(q)).all()
    with pytest.raises(InputError):
        unpack_bits(packed[:-1], bits, 301)


@pytest.mark.parametrize(
    ("value", "levels", "method", "said"),
    [
        (0.5, 1, "linear", "--quantization 1: .*2 to 65536"),
        (0.5, 0, "tanh", "--quantization 0: .*2 to 65536"),
        (0.5, 65537, "linear", "--quantization 65537: .*2 to 65536"),
        (0.5, 3, "log", "--quantization 3: .*even"),
        (0.5, 2, "log", "--quantization 2: .*even"),
        (0.5, 16, "cubic", "--quantization_type cubic: known are linear, tanh, log"),
        (math.nan, 16, "linear", "NaN"),
    ],
)
def test_impossible_quantizers_and_values_are_refused(value, levels, method, said):
    with pytest.raises(InputError, match=said):
        fake_quantize(torch.tensor([0.0, value]), levels, method)
