"""What the frost corruption lays over an image: frost photographs, or procedural stand-ins.

The published sets use the first five frost photographs of ImageNet-C. They aren't part of this
project, so without them five textures of the same sizes stand in: Gaussian random fields made
once from a fixed seed, each with the mean colour, colour axes, skewness and radial spectrum of
one photograph.

How near they come, over 300 random crops of each texture, photographs → stand-ins (R, G, B on the
0…255 scale; grey power at 1, 2–3, 4–7 and 8 or more cycles per crop, in dB):

    scaled by 0.2, crops 32×32                   scaled by 0.3, crops 64×64
    mean        144 165 177 → 144 165 177        144 165 177 → 144 165 177
    std, all    56.1 42.5 41.3 → 56.2 42.3 41.0  55.2 41.5 40.4 → 55.2 40.9 39.7
    std, crop   23.5 21.9 22.1 → 23.8 22.2 22.3  22.7 21.1 21.4 → 22.6 20.9 21.0
    std of crops' means     38.6 → 38.3          38.2 → 37.8
    power  39.9 33.6 29.0 26.0 →                 47.1 39.0 33.2 25.1 →
           39.4 33.3 28.8 26.2                   46.2 38.2 33.0 25.3

What they lack is the crystals' shapes.
"""

import functools
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.cache import read_image
from datasets.corruptions.filters import interpolation
from utils.errors import InputError

PHOTOGRAPHS = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
SMALLEST_SIDE = 315  # of any photograph, and of any stand-in
DARKEST = 14  # value in any photograph, so frost changes every pixel in both


# Statistics of each photograph, on the 0…255 scale; the second and third show the same picture.
SIZES = ((600, 900), (315, 560), (315, 560), (350, 527), (495, 660))  # height, width
MEANS = (  # RGB
    (82.0, 148.9, 163.9),
    (195.0, 199.5, 208.8),
    (195.0, 199.5, 208.8),
    (151.6, 166.7, 179.5),
    (102.1, 113.3, 125.2),
)
AXES = (  # the two main axes of colour, RGB per standard deviation
    ((29.5, 17.8, 13.8), (-8.6, 5.9, 11.0)),
    ((20.3, 21.0, 21.5), (1.4, 0.2, -1.5)),
    ((20.3, 21.0, 21.5), (1.4, 0.2, -1.5)),
    ((27.9, 27.9, 29.1), (1.4, 1.0, -2.2)),
    ((37.8, 37.2, 36.2), (-1.2, -0.1, 1.3)),
)
SKEWS = (0.09, -0.17, -0.17, 0.02, 0.08)  # quadratic part of the first axis
SPECTRA = (  # power along the first axis at 2⁻⁹, 2⁻⁸, …, 2⁻¹ cycles per pixel, in dB
    (59, 46, 36, 28, 21, 13, 11, 9, 0),
    (50, 51, 28, 31, 24, 22, 15, 11, 0),
    (50, 51, 28, 31, 24, 22, 15, 11, 0),
    (51, 39, 16, 24, 21, 17, 14, 10, 0),
    (42, 28, 31, 26, 22, 16, 11, 5, 0),
)


@functools.lru_cache(maxsize=8)
def textures(frost_dir: str | None, factor: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """The photographs in `frost_dir`, or the stand-ins for None, scaled by `factor`; cached.

    Returns the pixels, uint8 (5, 3, H', W'), padded at the right and below, and the heights and
    widths without the padding, int64 (5, 2).
    Raises InputError when the folder or one of the photographs is missing or unreadable.
    """
    full = _synthetic() if frost_dir is None else _photographs(Path(frost_dir))
    scaled = [_downscale(texture, factor) for texture in full]
    sizes = torch.tensor([texture.shape[1:] for texture in scaled])
    pixels = torch.zeros(len(scaled), 3, *sizes.max(0).values.tolist(), dtype=torch.uint8)
    for row, texture in zip(pixels, scaled, strict=True):
        row[:, : texture.shape[1], : texture.shape[2]] = texture
    return pixels.to(device), sizes.to(device)


def _photographs(folder: Path) -> list[Tensor]:
    """The five photographs as uint8 (3, H, W), transparency dropped."""
    found = []
    for name in PHOTOGRAPHS:
        if not (folder / name).is_file():
            raise InputError(
                f"--frost_dir {folder}: {name} is missing; it must hold {', '.join(PHOTOGRAPHS)}"
            )
        rgb = np.array(read_image(folder / name))
        if min(rgb.shape[:2]) < SMALLEST_SIDE:
            raise InputError(
                f"--frost_dir {folder}: {name} is {rgb.shape[1]}×{rgb.shape[0]}; the original "
                f"photographs are at least {SMALLEST_SIDE} pixels high"
            )
        found.append(torch.from_numpy(rgb).permute(2, 0, 1))
    return found


@functools.cache
def _synthetic() -> list[Tensor]:
    """Five textures from a fixed seed, with the looks of the photographs, as uint8 (3, H, W)."""
    generator = torch.Generator().manual_seed(20190527)
    looks = zip(SIZES, MEANS, AXES, SKEWS, SPECTRA, strict=True)
    return [_random_texture(generator, *look) for look in looks]


def _random_texture(generator: torch.Generator, size, mean, axes, skew, spectrum) -> Tensor:
    """A Gaussian random field with the statistics of one photograph."""
    height, width = size
    frequency = torch.hypot(
        torch.fft.fftfreq(height, dtype=torch.float64)[:, None],
        torch.fft.rfftfreq(width, dtype=torch.float64)[None],
    )
    octave = frequency.clamp(2.0**-9, 2.0**-1).log2().numpy()
    power = 10 ** (np.interp(octave, np.arange(-9, 0), spectrum) / 10)
    amplitude = torch.from_numpy(np.sqrt(power))
    noise = torch.randn(2, height, width, generator=generator, dtype=torch.float64)
    field = _standardized(torch.fft.irfft2(torch.fft.rfft2(noise) * amplitude, s=size))
    field[0] = _standardized(field[0] + skew * field[0] ** 2)
    rgb = torch.einsum("kc,khw->chw", torch.tensor(axes, dtype=torch.float64), field)
    rgb += torch.tensor(mean, dtype=torch.float64)[:, None, None]
    return rgb.round_().clamp_(DARKEST, 255).to(torch.uint8)


def _standardized(field: Tensor) -> Tensor:
    spread, centre = torch.std_mean(field, dim=(-2, -1), keepdim=True)
    return (field - centre) / spread


def _downscale(image: Tensor, factor: float) -> Tensor:
    """Plain bilinear sampling of uint8 (3, H, W) at (i + ½)/factor − ½, without antialiasing."""
    rows, columns = (_sampling(size, factor) for size in image.shape[1:])
    return (rows @ image.double() @ columns.T).add_(0.5).to(torch.uint8)


def _sampling(size: int, factor: float) -> Tensor:
    """Bilinear sampling along an axis of `size` as a float64 (round(size·factor), size) matrix."""
    position = (np.arange(round(size * factor)) + 0.5) / factor - 0.5
    return torch.from_numpy(interpolation(position.clip(0, size - 1), size))
