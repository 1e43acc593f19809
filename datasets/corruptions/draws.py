"""Random numbers for corruptions: the same for one seed, whatever the chunk size.

Images are numbered in blocks of `BLOCK`; every block has a generator of its own, seeded with
(seed + number of the block), so what a block gets depends neither on the chunk it is part of nor
on the blocks before it. A chunk is a whole number of blocks. GPUs draw the same: CUDA's draws
depend on the number of multiprocessors where these can't hold all values, so pieces fill a block.
"""

import torch
from torch import Tensor

BLOCK = 256
_PIECE = 2**14  # values: 64 blocks of CUDA threads, what 16 multiprocessors hold at once


class Draws:
    """Independent draws for `n` images; `seed`: that of their first block.

    Every method returns a tensor (n, *shape) on `device` and moves the streams on. Tests put an
    object with the same three methods in its place to replay recorded draws.
    """

    def __init__(self, n: int, device: torch.device | str, seed: int):
        self.n = n
        self.device = torch.device(device)
        seeds = range(seed, seed - (-n // BLOCK))
        self._generators = [torch.Generator(self.device).manual_seed(each) for each in seeds]

    def _filled(self, shape: tuple[int, ...], dtype: torch.dtype, fill: str, *limits) -> Tensor:
        out = torch.empty(self.n, *shape, dtype=dtype, device=self.device)
        for part, generator in zip(out.split(BLOCK), self._generators, strict=True):
            whole = max(1, part.numel() if self.device.type == "cpu" else _PIECE)
            for piece in part.view(-1).split(whole):
                getattr(piece, fill)(*limits, generator=generator)
        return out

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws, float32 (n, *shape)."""
        return self._filled(shape, torch.float32, "normal_")

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform draws from [low, high), float32 (n, *shape)."""
        return self._filled(shape, torch.float32, "uniform_", low, high)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Uniform integers from {low, …, high − 1}, int64 (n, *shape)."""
        return self._filled(shape, torch.int64, "random_", low, high)
