"""The digital corruptions on batches: contrast, elastic_transform, pixelate, jpeg_compression and
the extra saturate.

Definitions and constants: Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common
Corruptions and Perturbations" (ICLR 2019); column 32 is CIFAR-10-C, column 64 Tiny-ImageNet-C.
Each function takes images uint8 (n, 3, H, W) and the constants of one severity, and returns uint8
(n, 3, H, W) on the same device. Most compute on the 0..255 scale, where pixel values are exact in
float32, and end with the definition's truncation.

Run: from datasets.corruptions import corrupt; corrupt(images, "jpeg_compression", severity=5)
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.corruptions.filters import gaussian_matrix, on_device, truncate

CONTRAST = {32: (0.75, 0.5, 0.4, 0.3, 0.15), 64: (0.4, 0.3, 0.2, 0.1, 0.05)}

# (a, b): saturation · a + b
SATURATE = {
    32: ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    64: ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
}

# (a, σ, r) in units of the side: displacement strength, its smoothing, moves of the affine map
ELASTIC_TRANSFORM = {
    32: ((0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)),
    64: ((0, 0, 0.08), (0.05, 0.3, 0.06), (0.1, 0.08, 0.06), (0.1, 0.03, 0.03), (0.16, 0.03, 0.02)),
}

# Side of the shrunken image, as a share of the side.
PIXELATE = {32: (0.95, 0.9, 0.85, 0.75, 0.65), 64: (0.9, 0.8, 0.7, 0.6, 0.5)}

# JPEG quality
JPEG_COMPRESSION = {32: (80, 65, 58, 50, 40), 64: (65, 58, 50, 40, 25)}


# ---------------------------------------------------------------------------------------------
# contrast, saturate
# ---------------------------------------------------------------------------------------------


def contrast(images: Tensor, c: float) -> Tensor:
    """(x − mean)·c + mean, with one mean per image and channel.

    images: uint8 (n, 3, H, W); c: 0 ≤ c ≤ 1, so that nothing needs clipping. Returns uint8.
    """
    x = images.float()
    mean = x.mean((2, 3), keepdim=True)
    return x.sub_(mean).mul_(c).add_(mean).to(torch.uint8)


def saturate(images: Tensor, c: tuple[float, float]) -> Tensor:
    """Saturation s of the HSV hexcone becomes min(s·a + b, 1); hue and value stay.

    With V the largest channel and δ = V − smallest, s = δ/V and a channel is V − V·s·(a share that
    depends on the hue alone), so scaling V − x by s'/s is the whole conversion there and back.
    images: uint8 (n, 3, H, W); c: (a, b), both ≥ 0. Returns uint8.
    """
    a, b = c
    x = images.float()
    value = x.amax(1, keepdim=True)
    delta = value - x.amin(1, keepdim=True)
    below = torch.sub(value, x, out=x)
    # Greys have hue 0, which is red: their green and blue fall to V·(1 − s').
    below[:, 1:] += 1 - delta.clamp(max=1)
    # Full saturation s' = 1 is where V·s' reaches V.
    ratio = torch.minimum(value * b + delta * a, value).div_(delta.clamp_(min=1))
    return truncate(torch.addcmul(value, below, ratio, value=-1, out=below))


# ---------------------------------------------------------------------------------------------
# elastic_transform
# ---------------------------------------------------------------------------------------------


def elastic_transform(images: Tensor, c: tuple[float, float, float], draws) -> Tensor:
    """A random affine map, then a smooth random displacement of every pixel.

    images: uint8 (n, 3, H, H); c: (a, σ, r) in units of H; draws: uniform (n, 3, 2) moves of three
    points in (x, y), then, where a > 0, uniform (n, 2, H, H) noise of the fields dx, dy.
    Returns uint8.
    """
    a, sigma, r = c
    side = images.shape[-1]
    x = images.float()

    grid = _affine_grid(draws.uniform(3, 2, low=-r * side, high=r * side), side)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=True)

    if a > 0:
        noise = draws.uniform(2, side, side, low=-1.0, high=1.0)
        smooth = gaussian_matrix(side, sigma * side, "reflect", 3.0, x.device, x.dtype)
        # grid_sample's pixel is 2/H wide, so a·H pixels are 2a.
        fields = torch.matmul(2 * a * smooth, torch.matmul(noise, smooth.T))
        centres = (torch.arange(side, device=x.device) * 2 + 1) / side - 1
        fields[:, 0] += centres
        fields[:, 1] += centres[:, None]
        fields = fields.permute(0, 2, 3, 1)
        x = F.grid_sample(x, fields, padding_mode="reflection", align_corners=False)
    return truncate(x)


def _affine_grid(moves: Tensor, side: int) -> Tensor:
    """Where to read each output pixel so that three points p move to q = p + moves.

    moves: (n, 3, 2) pixels. Returns (n, side, side, 2) in grid_sample's corner-aligned units.
    The map takes p to q and is read backwards: source = p₁ + L·(output − q₁), with
    L·(q₀ − q₁) = p₀ − p₁ = (0, 2s) and L·(q₂ − q₁) = p₂ − p₁ = (−2s, 0).
    """
    c, s = side / 2, side // 3
    p = on_device(((c + s, c + s), (c + s, c - s), (c - s, c - s)), moves.device)
    q = p + moves
    u, v = (q[:, 0] - q[:, 1]).unbind(-1), (q[:, 2] - q[:, 1]).unbind(-1)
    scale = 2 * s / (u[0] * v[1] - v[0] * u[1])
    # (n, 2): how the source (x, y) changes with the output's x, then with its y.
    along_x = torch.stack([u[1] * scale, v[1] * scale], -1)
    along_y = torch.stack([-u[0] * scale, -v[0] * scale], -1)
    origin = p[1] - along_x * q[:, 1, :1] - along_y * q[:, 1, 1:]

    unit = 2 / (side - 1)
    line = torch.arange(side, device=moves.device) * unit
    columns = along_x[..., None, None] * line
    rows = along_y[..., None, None] * line[:, None] + (origin * unit - 1)[..., None, None]
    return (rows + columns).permute(0, 2, 3, 1)


# ---------------------------------------------------------------------------------------------
# pixelate
# ---------------------------------------------------------------------------------------------


def pixelate(images: Tensor, c: float) -> Tensor:
    """Pillow's BOX filter down to int(side·c), back up by nearest neighbour.

    Across, then down, each pass a plain mean rounded to 8 bit. Nearest only repeats rows and
    columns, so each pass writes them repeated at once.
    images: uint8 (n, 3, H, W); c: 0 < c ≤ 1 with at least one pixel left. Returns uint8.
    """
    n, channels, height, width = images.shape
    across, across_count = _box_nearest(width, int(width * c), images.device)
    down, down_count = _box_nearest(height, int(height * c), images.device)
    # Sums by 0/1 matrices, then a division: halves stay exact, so they round up.
    x = torch.matmul(images.float().reshape(-1, width), across.T)
    x = x.div_(across_count).add_(0.5).floor_().view(n * channels, height, width)
    x = torch.matmul(down, x).div_(down_count[:, None]).add_(0.5)
    return x.to(torch.uint8).view(n, channels, height, width)


@functools.lru_cache(maxsize=64)
def _box_nearest(side: int, small: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which source pixels each output pixel averages, as a 0/1 (side, side) matrix, and how many.

    Output j shows cell i = ⌊(j+½)·small/side⌋, the mean of sources ⌊i·side/small + ½⌋ up to, not
    including, ⌊(i+1)·side/small + ½⌋. In exact arithmetic: where a tie decides (never at the
    published sides and sizes) Pillow follows the noise of its doubles.
    """
    cell = (2 * torch.arange(side) + 1) * small // (2 * side)
    first = (2 * cell * side + small) // (2 * small)
    stop = (2 * (cell + 1) * side + small) // (2 * small)
    source = torch.arange(side)
    member = (source >= first[:, None]) & (source < stop[:, None])
    return member.float().to(device), (stop - first).float().to(device)


# ---------------------------------------------------------------------------------------------
# jpeg_compression
# ---------------------------------------------------------------------------------------------

# Quantization tables of ITU-T T.81, Annex K.1 and K.2, rows of vertical frequency.
_LUMINANCE = (
    (16, 11, 10, 16, 24, 40, 51, 61),
    (12, 12, 14, 19, 26, 58, 60, 55),
    (14, 13, 16, 24, 40, 57, 69, 56),
    (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77),
    (24, 35, 55, 64, 81, 104, 113, 92),
    (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
_CHROMINANCE = (
    (17, 18, 24, 47, 99, 99, 99, 99),
    (18, 21, 26, 66, 99, 99, 99, 99),
    (24, 26, 56, 99, 99, 99, 99, 99),
    (47, 66, 99, 99, 99, 99, 99, 99),
    *[(99, 99, 99, 99, 99, 99, 99, 99)] * 4,
)

# Y, Cb, Cr from R, G, B and R, G, B − Y from Cb, Cr − 128, in units of 2⁻¹⁶.
_TO_YCC = ((19595, 38470, 7471), (-11059, -21709, 32768), (32768, -27439, -5329))
_TO_RGB = ((0, 91881), (-22554, -46802), (116130, 0))

# The 8-point DCT times √8 in units of 2⁻¹³: the Loeffler–Ligtenberg–Moschytz flow graph with the
# 13-bit constants of libjpeg's accurate integer transform, multiplied out (Σ x·entry is then the
# same integer). Some entries differ by one from rounded cosines because of those constants.
_DCT = (
    (8192, 8192, 8192, 8192, 8192, 8192, 8192, 8192),
    (11363, 9633, 6437, 2260, -2260, -6437, -9633, -11363),
    (10703, 4433, -4433, -10703, -10703, -4433, 4433, 10703),
    (9633, -2259, -11362, -6436, 6436, 11362, 2259, -9633),
    (8192, -8192, -8192, 8192, 8192, -8192, -8192, 8192),
    (6437, -11362, 2261, 9633, -9633, -2261, 11362, -6437),
    (4433, -10704, 10704, -4433, -4433, 10704, -10704, 4433),
    (2260, -6436, 9633, -11363, 11363, -9633, 6436, -2260),
)


def jpeg_compression(images: Tensor, c: int) -> Tensor:
    """JPEG at quality c and back, with libjpeg's integer arithmetic and 4:2:0 chroma.

    Every intermediate is an integer that float32 holds exactly (large sums of the last two DCT
    passes are rounded in their 25th bit, far below the rounding that follows). Batches lie along
    the last axis, which makes rows, columns and blocks plain matrix products.
    images: uint8 (n, 3, H, W), sides of 5 or more; c: quality 1..100. Returns uint8.
    """
    n, channels, height, width = images.shape
    device = images.device
    # Transposing bytes, then widening them, is ten times as fast as both at once on a CPU.
    x = images.reshape(n, -1).T.contiguous().float().view(channels, height, width, n)
    y, chroma = _rgb_to_ycc(x)
    y = _code(_pad_to_blocks(y), _table(_LUMINANCE, c, device))[:, :height, :width]
    # Sums of 2×2, then a bias of 1 in even and 2 in odd columns in place of rounding.
    chroma = _both_ways(_halving(height, True, device), _halving(width, False, device), chroma)
    chroma = chroma.add_(_alternating(chroma.shape[2], 1, 2, device)).mul_(0.25).floor_()
    chroma = _code(chroma, _table(_CHROMINANCE, c, device))
    chroma = chroma[:, : (height + 1) // 2, : (width + 1) // 2]
    # The triangle filter's halves round up in even columns and down in odd ones.
    chroma = _both_ways(_doubling(height, device), _doubling(width, device), chroma)
    chroma = chroma.add_(_alternating(width, 8 / 16, 7 / 16, device)).floor_()
    x = _ycc_to_rgb(y, chroma).to(torch.uint8)
    return x.view(-1, n).T.contiguous().view(n, channels, height, width)


def _table(rows: tuple[tuple[int, ...], ...], quality: int, device: torch.device) -> Tensor:
    """Annex K table at a quality, as float32 (8, 1, 8, 1): vertical, block, horizontal, image."""
    scale = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = [[min(max((t * scale + 50) // 100, 1), 255) for t in row] for row in rows]
    return on_device(tuple(map(tuple, steps)), device).view(8, 1, 8, 1)


def _rgb_to_ycc(x: Tensor) -> tuple[Tensor, Tensor]:
    """Y (1, H, W, n) and Cb, Cr (2, H, W, n), rounded to 8 bit, from RGB (3, H, W, n).

    All sums are integers below 2²⁴. Chroma rounds half down, as libjpeg's does.
    """
    ycc = (on_device(_TO_YCC, x.device) @ x.flatten(1)).view_as(x)
    ycc[0] += 32768
    ycc[1:] += (128 << 16) + 32767
    ycc.mul_(2.0**-16).floor_()
    return ycc[:1], ycc[1:]


def _ycc_to_rgb(y: Tensor, chroma: Tensor) -> Tensor:
    """RGB (3, H, W, n) in 0..255 from 8-bit Y (1, H, W, n) and Cb, Cr (2, H, W, n)."""
    rgb = on_device(_TO_RGB, y.device) @ chroma.sub_(128).flatten(1)
    rgb = rgb.view(3, *y.shape[1:])
    return rgb.add_(32768).mul_(2.0**-16).floor_().add_(y).clamp_(0, 255)


def _both_ways(down: Tensor, across: Tensor, x: Tensor) -> Tensor:
    """Matrices (k, H) on the columns and (l, W) on the rows of x (C, H, W, n): (C, k, l, n)."""
    channels, height, width, n = x.shape
    x = x.reshape(channels, height, width * n)
    x = torch.bmm(down.expand(channels, -1, -1), x).view(-1, width, n)
    x = torch.bmm(across.expand(len(x), -1, -1), x)
    return x.view(channels, len(down), len(across), n)


def _pad_to_blocks(x: Tensor) -> Tensor:
    """Repeat the last row and column of x (C, H, W, n) until H and W are multiples of 8."""
    _, height, width, _ = x.shape
    return F.pad(x[None], (0, 0, 0, -width % 8, 0, -height % 8), mode="replicate")[0]


@functools.lru_cache(maxsize=64)
def _halving(size: int, repeat_pair: bool, device: torch.device) -> Tensor:
    """Sums of neighbouring pairs as a matrix (whole blocks of 8, size).

    Past the end, as in libjpeg, rows repeat the last pair and columns the last sample (which also
    completes an odd last pair either way).
    """
    half = (size + 1) // 2
    row = torch.arange(-(-half // 8) * 8)
    pair = row.clamp(max=half - 1) if repeat_pair else row
    matrix = torch.zeros(len(row), size)
    matrix[row, (2 * pair).clamp(max=size - 1)] += 1
    matrix[row, (2 * pair + 1).clamp(max=size - 1)] += 1
    return matrix.to(device)


@functools.lru_cache(maxsize=64)
def _doubling(size: int, device: torch.device) -> Tensor:
    """Triangle-filter upsampling as a matrix (size, ⌈size/2⌉): ¾ the nearest, ¼ the next sample."""
    half = (size + 1) // 2
    row = torch.arange(size)
    near = row // 2
    further = (near + 2 * (row % 2) - 1).clamp(0, half - 1)
    matrix = torch.zeros(size, half)
    matrix[row, near] += 0.75
    matrix[row, further] += 0.25
    return matrix.to(device)


def _alternating(width: int, even: float, odd: float, device: torch.device) -> Tensor:
    """(W, 1): one value in even columns, another in odd ones."""
    return torch.where(torch.arange(width, device=device) % 2 == 0, even, odd)[:, None]


def _code(x: Tensor, table: Tensor) -> Tensor:
    """Quantize the 8×8 DCT coefficients of x and decode them: (C, H, W, n) 8-bit values, same back.

    H and W are multiples of 8. Rows are rounded to 1/4 and columns to 1/8 on the way there; columns
    to 1/4 and rows to integers on the way back, halves up.
    """
    channels, height, width, n = x.shape
    dct = on_device(_DCT, x.device)
    rows = (channels * height * width // 8, 8, n)
    columns = (channels * height // 8, 8, width * n)

    def transform(matrix: Tensor, x: Tensor, shape: tuple[int, int, int]) -> Tensor:
        y = torch.bmm(matrix.expand(shape[0], 8, 8), x.reshape(shape))
        return y.add_(0.5).floor_()

    x = transform(dct * 2.0**-11, x - 128, rows)
    x = transform(dct * 2.0**-15, x, columns)
    # Eightfold coefficients here. The factor 1 + 2⁻²⁰ turns ties away from zero under a rounding
    # that would take them to even, and is too small to move anything else.
    x = x.view(-1, 8, width // 8, 8, n)
    x = x.mul_((1 + 2.0**-20) / (8 * table)).round_().mul_(table)
    x = transform(dct.T * 2.0**-11, x, columns)
    x = transform(dct.T * 2.0**-18, x, rows)
    return x.add_(128).clamp_(0, 255).view(channels, height, width, n)
