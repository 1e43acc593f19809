"""The data set `synthetic`: small natural-looking pictures made from a seed, nothing downloaded.

For the demo and the tests, not for the paper's tables. Each picture shows one textured, lit object
on a mottled 1/f background. Its class is told twice: by a fine texture (periods of 3 to 5 pixels
at 32x32), which noise, blur and low contrast wipe out, and by the outline, which survives them. So
a standard model drops under corruption and a robust one recovers, as with photographs.
The split `pretrain` plays ImageNet's part: 20 other classes.

    from datasets import synthetic
    train, test = synthetic.load("train"), synthetic.load("test")
"""

import math

import numpy as np
import torch
from torch import Tensor

from datasets.images import ImageSet, split_rows
from utils.errors import InputError, check_known

SEED = 2302
SIZES = {"all": 10_000, "test": 2_000, "pretrain": 10_000}
VAL_FRACTION = 0.1  # the last rows of `all`
SPLITS = ("train", "val", "test", "all", "pretrain")
TEXTURE_CONTRAST = (0.14, 0.34)
BLOCK = 200  # images drawn together from one generator; a multiple of both class counts

# Outline in polar coordinates about the object's centre, in units of its radius:
#   R(φ) = 1 − depth·(½ − ½·cos(lobes·φ))^sharp, with a hole of radius `hole`, `long` times as long.
OUTLINES = {  # name: (lobes, depth, sharp, hole, long)
    "disk": (0, 0.0, 1.0, 0.0, 1.0),
    "ring": (0, 0.0, 1.0, 0.55, 1.0),
    "bean": (2, 0.6, 1.0, 0.0, 1.0),
    "triangle": (3, 0.55, 0.7, 0.0, 1.0),
    "cross": (4, 0.65, 1.2, 0.0, 1.0),
    "star": (5, 0.6, 0.8, 0.0, 1.0),
    "flower": (6, 0.35, 1.5, 0.3, 1.0),
    "leaf": (0, 0.0, 1.0, 0.0, 2.4),
    "cog": (9, 0.25, 1.0, 0.0, 1.0),
    "drop": (1, 0.65, 0.3, 0.0, 1.0),
    # for pretraining
    "egg": (1, 0.3, 1.5, 0.0, 1.2),
    "hoop": (0, 0.0, 1.0, 0.6, 1.6),
    "clover": (3, 0.6, 1.5, 0.0, 1.0),
    "kite": (4, 0.5, 0.6, 0.0, 1.5),
    "sun": (8, 0.45, 0.8, 0.0, 1.0),
}
# A wave along the object's axis p, its distance ρ from the centre and its angle φ, times one across
# (axis q); frequencies in cycles per half image side, so 4 is a period of 4 pixels at 32x32:
#   cos(2π(along·p + radial·ρ) + spokes·φ + wobble·sin(4πq)) · cos(2π·across·q)
TEXTURES = {  # name: (along, across, radial, spokes, wobble)
    "bars": (5.0, 0.0, 0.0, 0, 0.0),
    "spokes": (0.0, 0.0, 0.0, 14, 0.0),
    "checks": (3.6, 3.6, 0.0, 0, 0.0),
    "stripes": (0.0, 5.0, 0.0, 0, 0.0),
    "circles": (0.0, 0.0, 4.6, 0, 0.0),
    "waves": (3.8, 0.0, 0.0, 0, 1.8),
    "swirl": (0.0, 0.0, 3.2, 5, 0.0),
    "bricks": (2.6, 5.4, 0.0, 0, 0.0),
    "scales": (0.0, 3.0, 4.5, 0, 0.0),
    "planks": (5.4, 2.6, 0.0, 0, 0.0),
    # for pretraining
    "lattice": (4.4, 4.4, 0.0, 0, 0.0),
    "fan": (2.5, 0.0, 0.0, 9, 0.0),
    "ripples": (0.0, 4.2, 0.0, 0, 0.0),
    "zigzag": (4.6, 0.0, 2.0, 0, 1.2),
}
# Ten classes, each an outline and a texture of its own; twenty for pretraining, every pair of the
# five further outlines and four further textures, so that both cues have to be learnt.
CLASSES = {
    f"{texture} {outline}": (outline, texture)
    for outline, texture in zip(list(OUTLINES)[:10], list(TEXTURES)[:10], strict=True)
}
PRETRAIN_CLASSES = {
    f"{texture} {outline}": (outline, texture)
    for outline in list(OUTLINES)[10:]
    for texture in list(TEXTURES)[10:]
}


def load(split: str = "train", image_size: int | None = None) -> ImageSet:
    """Make one split; the same images for the same arguments, bit for bit.

    split: train | val | test | all (train, then val) | pretrain. image_size: side in pixels,
    default 32; the scene is the same at any size, but for the noise in it. Classes are balanced in
    every run of 10 (pretrain: 20) rows, and a smaller set would be the beginning of a larger one.
    Returns an ImageSet, images uint8 (N, 3, image_size, image_size).
    Raises InputError for an unknown split and a size out of range.
    """
    check_known("split", split, SPLITS)
    side = 32 if image_size is None else image_size
    if not 16 <= side <= 256:
        raise InputError(f"synthetic images are 16 to 256 pixels wide, not --image_size {side}")
    stream = split if split in SIZES else "all"
    total = SIZES[stream]
    validation = torch.arange(total - round(total * VAL_FRACTION), total)
    rows = split_rows(total, validation, "all" if split == "pretrain" else split)
    first, last = int(rows[0]), int(rows[-1])
    kinds = PRETRAIN_CLASSES if split == "pretrain" else CLASSES
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # how work is shared out shows in the last bits of float results
    try:
        blocks = range(first // BLOCK, last // BLOCK + 1)
        drawn = [_draw_block(stream, block, side, kinds) for block in blocks]
    finally:
        torch.set_num_threads(threads)
    wanted = slice(first - blocks.start * BLOCK, last + 1 - blocks.start * BLOCK)
    images, labels = (torch.cat(parts)[wanted] for parts in zip(*drawn, strict=True))
    source = "made from a seed (datasets/synthetic.py)"
    return ImageSet(images, labels, list(kinds), "synthetic", rows, total, source=source)


def _draw_block(
    stream: str, block: int, side: int, classes: dict[str, tuple[str, str]]
) -> tuple[Tensor, Tensor]:
    """Images uint8 (BLOCK, 3, side, side) and labels int64 (BLOCK,) of one block of a stream."""
    seed = np.random.SeedSequence([SEED, list(SIZES).index(stream), block])
    generator = torch.Generator().manual_seed(int(seed.generate_state(1)[0]))
    labels = torch.rand(BLOCK // len(classes), len(classes), generator=generator)
    labels = labels.argsort(1).flatten()
    rows = torch.tensor([(*OUTLINES[o], *TEXTURES[t]) for o, t in classes.values()])
    columns = rows[labels].T[:, :, None, None]  # each as (BLOCK, 1, 1)
    lobes, depth, sharp, hole, long, along, across, radial, spokes, wobble = columns

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        draw = torch.rand(BLOCK, *(shape or (1, 1)), generator=generator)
        return low + (high - low) * draw

    # The object: place, scale, turn, tilt.
    turn, tilt, radius = uniform(-0.5, 0.5), uniform(0.8, 1.0), uniform(0.6, 0.9)
    x0, y0 = uniform(-0.2, 0.2), uniform(-0.2, 0.2)
    grid = (torch.arange(side) + 0.5) * (2 / side) - 1

    def outline(x0: Tensor, y0: Tensor, softness: float):
        """Cover (BLOCK, side, side) in [0, 1] and the object's coordinates p, q there."""
        x, y = grid - x0, grid[:, None] - y0
        p, q = turn.cos() * x + turn.sin() * y, (turn.cos() * y - turn.sin() * x) / tilt
        u, v = p / radius, q * long / radius
        rho, phi = torch.hypot(u, v), torch.atan2(v, u)
        edge = 1 - depth * (0.5 - 0.5 * (lobes * phi).cos()).clamp_min(0).pow(sharp)
        gap = torch.minimum(edge - rho, rho - hole) * radius / softness
        return (gap + 0.5).clamp(0, 1), p, q

    cover, p, q = outline(x0, y0, 2 / side)
    rho, phi = torch.hypot(p, q), torch.atan2(q, p)
    period = uniform(0.88, 1.12)
    wave = 2 * math.pi * (along * p + radial * rho) / period + uniform(0, 2 * math.pi)
    wave = (wave + spokes * phi + wobble * (4 * math.pi * q).sin()).cos()
    wave = wave * (2 * math.pi * across * q / period + uniform(0, 2 * math.pi) * (across > 0)).cos()
    texture = wave * uniform(*TEXTURE_CONTRAST)

    # Light: a gradient over the scene, shading over the object, its shadow on the ground.
    angle = uniform(0, 2 * math.pi)
    dx, dy = angle.cos(), angle.sin()
    ramp = uniform(0.0, 0.25) * (dx * grid + dy * grid[:, None])
    shading = uniform(0.1, 0.35) * (dx * (grid - x0) + dy * (grid[:, None] - y0)) / radius
    shadow = uniform(0.1, 0.5) * outline(x0 - 0.15 * dx, y0 - 0.15 * dy, 8 / side)[0]

    # Colours, uneven as 1/f noise is. Draws whose number depends on `side` come last.
    means, slope = uniform(-1.0, 1.0, 6, 1, 1), uniform(1.2, 1.7, 1, 1, 1)
    ground_contrast, body_contrast = uniform(0.04, 0.12, 1, 1, 1), uniform(0.02, 0.05, 1, 1, 1)
    fields = _power_law_fields(generator, slope, side)
    ground = 0.5 + _colour(0.25 * means[:, :3] + ground_contrast * fields[:, :3])
    body = 0.5 + _colour(0.25 * means[:, 3:] + body_contrast * fields[:, 3:])
    ground = ground * (1 - shadow).unsqueeze(1)
    body = (body + texture.unsqueeze(1)) * (1 + shading).unsqueeze(1)
    image = ground + cover.unsqueeze(1) * (body - ground)
    image = image * (1 + ramp).unsqueeze(1)
    image = image + 0.005 * torch.randn(image.shape, generator=generator)  # the camera's
    return (image.clamp(0, 1) * 255).round().to(torch.uint8), labels


def _power_law_fields(generator: torch.Generator, slope: Tensor, side: int) -> Tensor:
    """Six random fields (n, 6, side, side), mean 0, variance 1, amplitude ∝ 1/frequency^slope."""
    noise = torch.randn(len(slope), 6, side, side, generator=generator)
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side))
    frequency[0, 0] = math.inf
    fields = torch.fft.irfft2(torch.fft.rfft2(noise) * frequency**-slope, s=(side, side))
    return fields / fields.std((2, 3), keepdim=True)


@torch.autocast("cpu", enabled=False)  # the same images wherever they are asked for
def _colour(fields: Tensor) -> Tensor:
    """RGB (n, 3, H, W) from one field of luminance and two, weaker, of opponent colours."""
    basis = torch.tensor([[1.0, 0.5, 0.25], [1.0, 0.0, -0.5], [1.0, -0.5, 0.25]])
    return torch.einsum("ck,nkhw->nchw", basis, fields)
