"""Quantization of signatures to N levels: linear, tanh and log.

The level values of a tensor are min + k (max − min) / (N − 1), k = 0 … N − 1, rounded half to
even, of the tensor itself (linear), of its tanh (tanh), or of log2 |x| with N/2 levels and the
sign kept (log). `encode` gives the integer codes, `decode` the values, and `fake_quantize` is one
after the other, so what a packed file restores is what was measured, bit for bit.

What the definitions leave open:
- a constant tensor has one level, its own value, kept exactly (it is coded linearly);
- exact zeros under log are kept as zeros, by a bitmap beside the codes;
- tanh values that round to ±1 (|x| > 9 in float32) decode to atanh of the nearest float32 inside
  (−1, 1), ±8.66, instead of ±inf.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from utils.errors import InputError

METHODS = ("linear", "tanh", "log")
MAX_LEVELS = 1 << 16
_BELOW_ONE = 1.0 - 2.0**-24


@dataclass(frozen=True)
class Quantized:
    """Integer codes of one tensor, with all that `decode` needs.

    codes: int32 (numel,), 0 … levels − 1; under log the sign is the code's lowest bit.
    low, high: float32 (groups,), the range of each group; groups is 1, or the number of output
    channels when the scales are per channel. zeros: bool (numel,) or None.
    """

    codes: Tensor
    low: Tensor
    high: Tensor
    shape: torch.Size
    levels: int
    method: str
    zeros: Tensor | None = None


def check_levels(levels: int, method: str) -> None:
    """Raise InputError unless `levels` and `method` describe a quantizer."""
    if method not in METHODS:
        raise InputError(f"--quantization_type {method}: known are {', '.join(METHODS)}")
    if not 2 <= levels <= MAX_LEVELS:
        raise InputError(f"--quantization {levels}: the number of levels is 2 to {MAX_LEVELS}")
    if method == "log" and (levels % 2 or levels < 4):
        raise InputError(
            f"--quantization {levels}: log has half of them per sign, so an even number ≥ 4"
        )


def encode(tensor: Tensor, levels: int, method: str, per_channel: bool = False) -> Quantized:
    """Codes of a float tensor of any shape; `per_channel` gives each slice of dim 0 its own range.

    Computed in float64. Raises InputError for NaN or Inf inside, and for levels or a method that
    do not exist.
    """
    check_levels(levels, method)
    x = tensor.detach().double().flatten()
    if not torch.isfinite(x).all():
        raise InputError("a tensor with NaN or Inf inside can't be quantized")
    if not len(x) or bool((x == x[0]).all()):
        method = "linear"  # one value: atanh(tanh x) and 2^log2 x would miss it by a rounding
    groups = tensor.shape[0] if per_channel and tensor.dim() > 1 and len(x) else 1
    x = x.reshape(groups, -1)
    values, steps, zeros = x, levels, None
    if method == "tanh":
        values = torch.tanh(x)
    elif method == "log":
        values, steps = torch.log2(x.abs()), levels // 2
        if bool((x == 0).any()):
            zeros = (x == 0).flatten()
            # Zeros take no part in the range: the group's largest magnitude stands in for them.
            largest = values.amax(dim=1, keepdim=True).clamp_min(-200)  # all zero: any will do
            values = torch.where(x == 0, largest, values)
    low, high = (values.min(1).values, values.max(1).values) if x.numel() else (x.new_zeros(1),) * 2
    low, high = low.float(), high.float()  # as they are stored
    span = (high.double() - low)[:, None]
    unit = (values - low[:, None]) / torch.where(span == 0, 1.0, span)
    codes = torch.round(unit.clamp(0, 1) * (steps - 1)).to(torch.int32)
    if method == "log":
        codes = codes * 2 + (x < 0).to(torch.int32)
    return Quantized(codes.flatten(), low, high, tensor.shape, levels, method, zeros)


def decode(quantized: Quantized) -> Tensor:
    """The float32 tensor, of the original shape, that the codes stand for.

    Looked up in a table of the level values, so that equal codes give equal bits wherever and with
    however many threads they are decoded.
    """
    q = quantized
    codes = q.codes.long().reshape(len(q.low), -1)
    values = torch.empty(codes.shape, device=codes.device)
    # The tables of many groups at 65,536 levels would take gigabytes together.
    step = max(1, 2**22 // q.levels)
    for first in range(0, len(codes), step):
        rows = slice(first, first + step)
        values[rows] = _table(q, rows).gather(1, codes[rows])
    if q.zeros is not None:
        values = values.masked_fill(q.zeros.reshape(codes.shape), 0.0)
    return values.reshape(q.shape)


def _table(q: Quantized, rows: slice) -> Tensor:
    """Level values, float32 (groups, levels), of some of the groups."""
    low, high = q.low[rows].double()[:, None], q.high[rows].double()[:, None]
    steps = q.levels // 2 if q.method == "log" else q.levels
    k = torch.arange(steps, dtype=torch.float64, device=low.device)
    table = low + k * (high - low) / (steps - 1)
    table[:, -1:] = high
    if q.method == "tanh":
        table = torch.atanh(table.clamp(-_BELOW_ONE, _BELOW_ONE))
    elif q.method == "log":
        table = torch.stack([torch.exp2(table), -torch.exp2(table)], dim=-1).flatten(1)
    return table.float()


def fake_quantize(tensor: Tensor, levels: int, method: str, per_channel: bool = False) -> Tensor:
    """`tensor` with every value replaced by the nearest of its levels; shape kept, float32."""
    return decode(encode(tensor, levels, method, per_channel))


def bits_per_code(levels: int) -> int:
    """⌈log2 levels⌉, the bits that one code takes in a packed file."""
    return math.ceil(math.log2(levels))


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Non-negative integers (n,) below 2**bits as a uint8 tensor of ⌈n · bits / 8⌉ bytes."""
    values = codes.cpu().numpy().astype(np.uint32)
    planes = (values[:, None] >> np.arange(bits, dtype=np.uint32)) & 1
    return torch.from_numpy(np.packbits(planes.astype(np.uint8).ravel(), bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: int32 (count,). Raises InputError for another length."""
    if packed.numel() != math.ceil(count * bits / 8):
        raise InputError(f"{packed.numel()} bytes can't hold exactly {count} codes of {bits} bits")
    flat = np.unpackbits(packed.cpu().numpy(), count=count * bits, bitorder="little")
    weights = (1 << np.arange(bits, dtype=np.int64)).astype(np.int32)
    return torch.from_numpy(flat.reshape(count, bits).astype(np.int32) @ weights)
