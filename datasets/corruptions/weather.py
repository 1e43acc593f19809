"""The weather corruptions: snow, frost, fog, brightness, spatter.

Hendrycks & Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations" (ICLR 2019); constants of CIFAR-10-C (32) and Tiny-ImageNet-C (64), severity 1..5.
Each function takes uint8 (n, 3, H, W), the constants of one severity and, if it draws, `draws`;
it returns uint8 (n, 3, H, W).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.corruptions import filters, frost_texture
from datasets.corruptions.draws import Draws
from datasets.corruptions.filters import gaussian_blur, to_float, to_uint8, truncate

_FLAKES = (  # μ, σ, zoom, threshold, blur radius, blur σ
    (0.1, 0.2, 1.0, 0.6, 8, 3),
    (0.1, 0.2, 1.0, 0.5, 10, 4),
    (0.15, 0.3, 1.75, 0.55, 10, 4),
    (0.25, 0.3, 2.25, 0.6, 12, 6),
    (0.3, 0.3, 1.25, 0.65, 14, 12),
)
SNOW = {  # and m, the weight of the image against its whitened self
    32: [(*row, m) for row, m in zip(_FLAKES, (0.95, 0.9, 0.9, 0.85, 0.8), strict=True)],
    64: [(*row, m) for row, m in zip(_FLAKES, (0.8, 0.8, 0.7, 0.65, 0.6), strict=True)],
}
# weight of the image, weight of the frost
FROST = {
    32: ((1.0, 0.2), (1.0, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
    64: ((1.0, 0.3), (0.9, 0.4), (0.8, 0.45), (0.75, 0.5), (0.7, 0.55)),
}
# amount of fog, decay of the wobble
FOG = {
    32: ((0.2, 3), (0.5, 3), (0.75, 2.5), (1.0, 2), (1.5, 1.75)),
    64: ((0.4, 3), (0.7, 3), (1.0, 2.5), (1.5, 2), (2.0, 1.75)),
}
# added to the HSV value
BRIGHTNESS = {32: (0.05, 0.1, 0.15, 0.2, 0.3), 64: (0.1, 0.2, 0.3, 0.4, 0.5)}
# μ, σ, blur of the liquid, threshold, mud: blur of the mask, water: opacity, mud?
SPATTER = {
    32: (
        (0.62, 0.1, 0.7, 0.7, 0.5, False),
        (0.65, 0.1, 0.8, 0.7, 0.5, False),
        (0.65, 0.3, 1.0, 0.69, 0.5, False),
        (0.65, 0.1, 0.7, 0.69, 0.6, True),
        (0.65, 0.1, 0.5, 0.68, 0.6, True),
    ),
    64: (
        (0.62, 0.1, 0.7, 0.7, 0.6, False),
        (0.65, 0.1, 0.8, 0.7, 0.6, False),
        (0.65, 0.3, 1.0, 0.69, 0.6, False),
        (0.65, 0.1, 0.7, 0.68, 0.6, True),
        (0.65, 0.1, 0.5, 0.67, 0.6, True),
    ),
}


# ---- snow ----------------------------------------------------------------------------------------


def snow(images: Tensor, c: tuple, draws: Draws) -> Tensor:
    """Whiten the image a little, then add streaks of motion-blurred noise, twice: L and L turned.

    c: (μ, σ, zoom, threshold, blur radius, blur σ, m), a row of SNOW. Draws: the noise, normal
    (H, W); the direction of the streaks, uniform ().
    """
    mean, spread, factor, threshold, radius, sigma, m = c
    flakes = draws.normal(*images.shape[-2:]).mul_(spread).add_(mean)
    if factor > 1:
        flakes = filters.zoom(flakes, factor)
    flakes = to_uint8(F.threshold(flakes, threshold, 0.0))[:, None]
    phi = draws.uniform(low=-135.0, high=-45.0)
    layer = to_float(filters.motion_blur(flakes, phi, radius, sigma))

    x = to_float(images)
    luma = (x[:, :1] * 0.299).add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)
    whitened = luma.mul_(1.5).add_(0.5)
    x = torch.lerp(torch.maximum(x, whitened), x, m)
    return to_uint8(x.add_(layer + layer.flip(2, 3)))


# ---- frost ---------------------------------------------------------------------------------------


def frost(images: Tensor, c: tuple, draws: Draws, frost_dir: str | None = None) -> Tensor:
    """Lay a random crop of a frost photograph, or of its procedural stand-in, over each image.

    c: (weight of the image, weight of the frost), a row of FROST. frost_dir: folder with the
    original photographs. Draws: integers (3,) for the photograph, the row and the column.
    Raises InputError when frost_dir, or a photograph in it, is missing or unreadable.
    """
    keep, lay = c
    height, width = images.shape[-2:]
    side = max(height, width)
    # Images of 94 pixels and more don't fit into the smallest photograph at 0.3.
    factor = max(0.2 if side <= 48 else 0.3, (side + 1) / frost_texture.SMALLEST_SIDE)
    pixels, sizes = frost_texture.textures(frost_dir, factor, images.device)

    # The remainders of 2⁴⁰ are even to 1e-9.
    pick = draws.integers(0, 2**40, 3)
    which = pick[:, 0] % len(sizes)
    row = pick[:, 1] % (sizes[which, 0] - height)
    column = pick[:, 2] % (sizes[which, 1] - width)
    windows = pixels.unfold(2, height, 1).unfold(3, width, 1)
    crops = windows.permute(0, 2, 3, 1, 4, 5)[which, row, column]
    return truncate((images * keep).add_(crops, alpha=lay))


# ---- fog -----------------------------------------------------------------------------------------


def fog(images: Tensor, c: tuple, draws: Draws) -> Tensor:
    """Add a diamond–square plasma, then scale back to the image's own maximum.

    c: (amount of fog, decay of the wobble), a row of FOG. Draws: those of `plasma`.
    """
    amount, decay = c
    height, width = images.shape[-2:]
    size = 1 << (max(height, width) - 1).bit_length()
    x = to_float(images)
    top = x.amax((1, 2, 3), keepdim=True)
    mist = plasma(size, decay, draws)[:, None, :height, :width]
    return to_uint8(x.add_(mist, alpha=amount).mul_(top / (top + amount)))


def plasma(size: int, decay: float, draws: Draws) -> Tensor:
    """Diamond–square plasma on a torus: float32 (n, size, size), smallest value 0, largest 1.

    size: a power of two. Starts from a single 0 with wobble 100, divided by `decay` whenever the
    step is halved. Draws: uniform (size² − 1,) from [−1, 1), in order of use: per step the
    squares' centres, then the points on their horizontal, then on their vertical sides, row by
    row.
    """
    noise = draws.uniform(size * size - 1, low=-1.0, high=1.0)
    counts = [4**level for level in range(size.bit_length() - 1) for _ in range(3)]
    parts = iter(noise.split(counts, 1))
    field = torch.zeros(len(noise), size, size, device=noise.device)
    step, wobble = size, 100.0

    def wobbled(total: Tensor) -> Tensor:
        return total.div_(4).add_(next(parts).view_as(total), alpha=wobble * wobble)

    while step >= 2:
        half = step // 2
        corners = field[:, ::step, ::step]
        right = corners + corners.roll(-1, 2)
        below = corners + corners.roll(-1, 1)
        centres = wobbled(right + right.roll(-1, 1))
        field[:, half::step, half::step] = centres
        field[:, ::step, half::step] = wobbled(right.add_(centres).add_(centres.roll(1, 1)))
        field[:, half::step, ::step] = wobbled(below.add_(centres).add_(centres.roll(1, 2)))
        step, wobble = half, wobble / decay
    low, high = field.amin((1, 2), keepdim=True), field.amax((1, 2), keepdim=True)
    return field.sub_(low).div_(high - low)


# ---- brightness ----------------------------------------------------------------------------------


def brightness(images: Tensor, c: float) -> Tensor:
    """Add c to the HSV value and clip it; hue and saturation stay.

    The three channels then share one factor, (value + c) / value; black becomes grey.
    """
    value = images.amax(1, keepdim=True).float()
    brighter = (value + 255 * c).clamp_(max=255)
    black = value == 0
    factor = brighter / value.masked_fill(black, 1)
    return truncate((images * factor).add_(brighter * black))


# ---- spatter -------------------------------------------------------------------------------------

WATER = (175, 238, 238)
MUD = (63, 42, 20)
HYSTERESIS = 12  # enough for each of 30,000 masks tried; 8 leave one unfinished


def spatter(images: Tensor, c: tuple, draws: Draws) -> Tensor:
    """Drops of water (severity 1 to 3) or mud (4 and 5) where smooth noise is high.

    c: (μ, σ, blur, threshold, mud: blur of the mask, water: opacity, mud?), a row of SPATTER.
    Draws: normal (H, W).
    """
    mean, spread, blur, threshold, k, mud = c
    noise = draws.normal(*images.shape[-2:]).mul_(spread).add_(mean)
    liquid = F.threshold(gaussian_blur(noise, blur), threshold, 0.0)
    colour = filters.on_device(MUD if mud else WATER, images.device).view(3, 1, 1)
    if mud:
        mask = gaussian_blur((liquid > threshold).float(), k)
        mask = torch.where(mask < 0.8, 0.0, mask)[:, None]
        return truncate(torch.lerp(images.float(), colour, mask))
    # The published sets were made by a cast that wraps around where the liquid exceeds 1.
    liquid = (liquid * 255).floor_().remainder_(256)
    shine = liquid * _relief(liquid)
    top = shine.amax((1, 2), keepdim=True)
    shine = shine.mul_(k / torch.where(top > 0, top, 1.0))[:, None]
    return truncate(images + shine * colour)


def _relief(liquid: Tensor) -> Tensor:
    """Embossed, equalized distance to the drops' edges.

    liquid: float32 (n, H, W) of whole numbers 0..255. Returns the same kind.
    """
    distance = chamfer_distance(canny(liquid, low=50, high=150), cut=20)
    padded = _mirrored(equalize(_mean3(distance).div_(1e4).floor_(), levels=21))
    height, width = liquid.shape[-2:]
    embossed = torch.zeros_like(liquid)
    for i, row in enumerate(((-2, -1, 0), (-1, 1, 1), (0, 1, 2))):
        for j, weight in enumerate(row):
            embossed.add_(padded[:, i : i + height, j : j + width], alpha=weight)
    return _mean3(embossed.clamp_(0, 255)).round_()


def _mirrored(x: Tensor) -> Tensor:
    """One more pixel on every side of (n, H, W), mirrored without repeating the edge."""
    return F.pad(x[:, None], (1, 1, 1, 1), mode="reflect")[:, 0]


def _mean3(x: Tensor) -> Tensor:
    """3×3 mean of float32 (n, H, W), borders mirrored without repeating the edge."""
    padded = _mirrored(x)
    rows = (padded[:, :-2] + padded[:, 1:-1]).add_(padded[:, 2:])
    return (rows[:, :, :-2] + rows[:, :, 1:-1]).add_(rows[:, :, 2:]).div_(9)


def canny(image: Tensor, low: float, high: float) -> Tensor:
    """Canny edges: 3×3 Sobel with edges replicated, L1 norm, no smoothing.

    image: float32 (n, H, W) of whole numbers 0..255. A local maximum of the gradient above `high`
    is an edge, and so is one above `low` that touches an edge, at most HYSTERESIS steps away.
    Returns bool (n, H, W).
    """
    height, width = image.shape[-2:]
    padded = F.pad(image[:, None], (1, 1, 1, 1), mode="replicate")[:, 0]
    smooth = (padded[:, 1:-1] * 2).add_(padded[:, :-2]).add_(padded[:, 2:])
    dx = smooth[:, :, 2:] - smooth[:, :, :-2]
    smooth = (padded[:, :, 1:-1] * 2).add_(padded[:, :, :-2]).add_(padded[:, :, 2:])
    dy = smooth[:, 2:] - smooth[:, :-2]
    ax, ay = dx.abs(), dy.abs()
    norm = ax + ay

    around = F.pad(norm, (1, 1, 1, 1))

    def neighbour(down: int, right: int) -> Tensor:
        return around[:, 1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # Three sectors of 45°, with tan 22.5° = 13573/2¹⁵ (tan 67.5° is 2 more), exact in float32.
    slope = ax * 13573
    flat = ay * 2**15 < slope
    steep = ay * 2**15 - ax * 2**16 > slope
    falling = dx * dy >= 0
    across = (norm > neighbour(0, -1)) & (norm >= neighbour(0, 1))
    along = (norm > neighbour(-1, 0)) & (norm >= neighbour(1, 0))
    fall = (norm > neighbour(-1, -1)) & (norm > neighbour(1, 1))
    rise = (norm > neighbour(-1, 1)) & (norm > neighbour(1, -1))
    oblique = (falling & fall) | (~falling & rise)
    peak = (flat & across) | (steep & along) | (~(flat | steep) & oblique)
    possible = (norm > low) & peak

    edges = F.pad((possible & (norm > high)).byte(), (1, 1, 1, 1))
    inside = edges[:, 1:-1, 1:-1]
    possible = possible.byte()
    for _ in range(HYSTERESIS):
        rows = edges[:, :-2] | edges[:, 1:-1] | edges[:, 2:]
        inside.copy_(possible & (rows[:, :, :-2] | rows[:, :, 1:-1] | rows[:, :, 2:]))
    return inside.bool()


def chamfer_distance(edges: Tensor, cut: int) -> Tensor:
    """Distance to the nearest edge by steps of 1, 1.4 (diagonal) and 2.1969 (knight's move).

    edges: bool (n, H, W). Returns float32 (n, H, W): whole numbers of 1e-4 pixel, at most `cut`
    pixels; sums of a few stay exact.

    A shortest path can go sideways first, then up or down only. So the distance within the row
    is settled for all rows at once, by steps of 1, 2, 4, …; one pass down the rows (and, stacked
    with it, one up) does the rest.
    """
    height, width = edges.shape[-2:]
    cut, straight, diagonal, knight = cut * 1e4, 1e4, 1.4e4, 2.1969e4
    row = torch.where(edges, 0.0, cut)
    step = 1
    while step < min(width, cut / straight):
        left = row[:, :, :-step] + step * straight
        right = row[:, :, step:] + step * straight
        row = row.clone()
        torch.minimum(row[:, :, step:], left, out=row[:, :, step:])
        torch.minimum(row[:, :, :-step], right, out=row[:, :, :-step])
        step *= 2

    # (rows, upright or turned over, image, column), with two more columns on either side.
    rows = torch.stack((row, row.flip(1))).permute(2, 0, 1, 3)
    rows = F.pad(rows, (2, 2), value=cut).contiguous()
    inner = rows[..., 2:-2]
    for y in range(1, height):
        last = rows[y - 1]
        long = torch.minimum(last[..., :-4], last[..., 4:])
        if y > 1:
            beyond = rows[y - 2]
            long = torch.minimum(long, torch.minimum(beyond[..., 1:-3], beyond[..., 3:-1]))
        oblique = torch.minimum(last[..., 1:-3], last[..., 3:-1])
        best = torch.minimum(long.add(knight), oblique.add_(diagonal))
        best = torch.minimum(best, last[..., 2:-2] + straight)
        torch.minimum(inner[y], best, out=inner[y])
    down, up = inner.permute(1, 2, 0, 3)
    return torch.minimum(down, up.flip(1))


def equalize(image: Tensor, levels: int) -> Tensor:
    """Histogram equalization to 0..255, per image.

    image: float32 (n, H, W) of whole numbers 0..levels−1. The lowest level that occurs maps to 0,
    the highest to 255; an image of one level stays as it is. Returns the same kind.
    """
    n = len(image)
    level = image.reshape(n, -1).long()
    histogram = torch.zeros(n, levels, device=image.device)
    histogram.scatter_add_(1, level, torch.ones_like(level, dtype=torch.float32))
    cumulative = histogram.long().cumsum(1)  # of whole numbers it is deterministic on CUDA too
    lowest = histogram.gather(1, level.amin(1, keepdim=True))
    others = level.shape[1] - lowest
    mapped = (cumulative - lowest) * (255 / others.clamp(min=1))
    mapped = torch.where(others > 0, mapped.round_(), torch.arange(levels, device=image.device))
    return mapped.gather(1, level).view_as(image)
