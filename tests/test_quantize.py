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
    result = fake_quantize(x, 16, method)
    torch.testing.assert_close(result[3], x[3])
    if method == "log":
        torch.testing.assert_close(result[2], x[2])
    else:
        torch.testing.assert_close(result[0], x[0])


def test_half_goes_to_even():
    # With 5 levels on [0, 4] the steps are whole: 0.5 → 0, 1.5 → 2, 2.5 → 2
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 4.0])
    assert fake_quantize(x, 5, "linear").tolist() == [0, 0, 2, 2, 4]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.0, 0.1, -7.25])
def test_constant_tensors_are_kept(method, value):
    x = torch.full((3, 5), value)
    assert torch.equal(fake_quantize(x, 16, method), x)


def test_zeros_under_log_are_kept():
    x = torch.tensor([0.0, 0.5, -0.25, 0.0, 2.0])
    result = fake_quantize(x, 64, "log")
    assert (result == 0).tolist() == (x == 0).tolist()
    assert (result.sign() == x.sign()).all()


def test_tanh_of_large_values_stays_finite():
    x = torch.tensor([-30.0, 0.0, 0.5, 30.0])
    result = fake_quantize(x, 16, "tanh")
    assert torch.isfinite(result).all()
    assert result[3] == -result[0] and 8 < result[3] < 9


@pytest.mark.parametrize("method", METHODS)
def test_shape_kept_and_scalars_and_empty(method):
    assert fake_quantize(torch.rand(2, 3, 4), 8, method).shape == (2, 3, 4)
    assert fake_quantize(torch.tensor(0.3), 8, method).shape == ()
    assert fake_quantize(torch.empty(0, 4), 8, method).shape == (0, 4)


def test_per_channel_is_each_slice_alone():
    x = torch.randn(6, 4, 3) * torch.logspace(-3, 0, 6).view(6, 1, 1)
    together = fake_quantize(x, 16, "linear", per_channel=True)
    alone = torch.stack([fake_quantize(row, 16, "linear") for row in x])
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("bits", [1, 2, 3, 5, 8, 12, 16])
def test_packing_is_lossless(bits):
    codes = torch.randint(0, 2**bits, (101,), dtype=torch.int32)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == math.ceil(101 * bits / 8)
    assert torch.equal(unpack_bits(packed, bits, 101), codes)
    with pytest.raises(InputError):
        unpack_bits(packed[:-1], bits, 101)


@pytest.mark.parametrize("levels", [2, 3, 4, 5, 16, 17, 256, 1000, 65536])
def test_codes_fit_their_bits(levels):
    for method in METHODS:
        if method == "log" and (levels % 2 or levels < 4):
            continue
        q = encode(torch.randn(300), levels, method)
        assert int(q.codes.min()) >= 0 and int(q.codes.max()) < levels <= 2 ** bits_per_code(levels)
        repacked = unpack_bits(
            pack_bits(q.codes, bits_per_code(levels)), bits_per_code(levels), 300
        )
        assert torch.equal(repacked, q.codes)
        assert torch.isfinite(quantize.decode(q)).all()


@pytest.mark.parametrize(
    ("levels", "method"),
    [(1, "linear"), (0, "tanh"), (65537, "linear"), (3, "log"), (2, "log"), (16, "cubic")],
)
def test_impossible_quantizers_are_refused(levels, method):
    with pytest.raises(InputError):
        fake_quantize(torch.rand(4), levels, method)


def test_nan_is_refused():
    with pytest.raises(InputError, match="NaN"):
        fake_quantize(torch.tensor([0.0, float("nan")]), 16, "linear")
