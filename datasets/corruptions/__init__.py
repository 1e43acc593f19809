"""The 19 corruptions of Hendrycks & Dietterich (ICLR 2019), on batches of uint8 images.

    from datasets.corruptions import CORRUPTIONS, corrupt
    foggy = corrupt(images, "fog", severity=5, generator=torch.Generator().manual_seed(0))

Every corruption is one function of (images, constants of one severity, random draws) in noise.py,
blur.py, weather.py or digital.py, with the table of its constants beside it.
"""

import inspect
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from datasets.corruptions import blur, digital, noise, weather
from datasets.corruptions.draws import BLOCK, Draws
from datasets.images import check_images
from utils.errors import InputError, check_known, thread_pool, warn

# name → (function, its constants {32: severity 1..5, 64: the same for images above 48 pixels})
_TABLE = {
    "gaussian_noise": (noise.gaussian_noise, noise.GAUSSIAN_NOISE),
    "shot_noise": (noise.shot_noise, noise.SHOT_NOISE),
    "impulse_noise": (noise.impulse_noise, noise.IMPULSE_NOISE),
    "defocus_blur": (blur.defocus_blur, blur.DEFOCUS_BLUR),
    "glass_blur": (blur.glass_blur, blur.GLASS_BLUR),
    "motion_blur": (blur.motion_blur, blur.MOTION_BLUR),
    "zoom_blur": (blur.zoom_blur, blur.ZOOM_BLUR),
    "snow": (weather.snow, weather.SNOW),
    "frost": (weather.frost, weather.FROST),
    "fog": (weather.fog, weather.FOG),
    "brightness": (weather.brightness, weather.BRIGHTNESS),
    "contrast": (digital.contrast, digital.CONTRAST),
    "elastic_transform": (digital.elastic_transform, digital.ELASTIC_TRANSFORM),
    "pixelate": (digital.pixelate, digital.PIXELATE),
    "jpeg_compression": (digital.jpeg_compression, digital.JPEG_COMPRESSION),
    "speckle_noise": (noise.speckle_noise, noise.SPECKLE_NOISE),
    "gaussian_blur": (blur.gaussian_blur, blur.GAUSSIAN_BLUR),
    "spatter": (weather.spatter, weather.SPATTER),
    "saturate": (digital.saturate, digital.SATURATE),
}
CORRUPTIONS = tuple(_TABLE)
_PUBLISHED = {32: "CIFAR-10-C", 64: "Tiny-ImageNet-C"}  # side of images → who published them
SEVERITIES = 5
# name → "noise", "blur", "weather" or "digital", the file it is defined in
FAMILIES = {name: function.__module__.rpartition(".")[2] for name, (function, _) in _TABLE.items()}

MIN_SIDE = 8


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    generator: torch.Generator | int | None = None,
    frost_dir: str | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """A corrupted copy of `images`.

    images: uint8 (N, 3, H, W) on any device. severity: 1..5; images up to 48 pixels use the
    constants of CIFAR-10-C, larger ones those of Tiny-ImageNet-C. generator: gives the seed of
    all draws, or is that seed (default: torch's global CPU generator); one on the CPU serves images
    on any device. frost_dir: folder with the frost photographs, for "frost". device: where images
    are corrupted, a chunk at a time (default: where they are). out: uint8 (N, 3, H, W) to fill, on
    any device (default: a new one where `images` are). Returns it.
    Raises InputError for an unknown name, severity, shape or dtype.
    """
    check(name, severity)
    _check_images(images, name)
    seed, device = _base_seed(generator), torch.device(device or images.device)
    function, table = _TABLE[name]
    c = table[_table_side(max(images.shape[-2:]))][severity - 1]
    parameters = inspect.signature(function).parameters
    chunk = BLOCK * _blocks_per_chunk(images, device)
    if out is None:
        out = torch.empty_like(images, memory_format=torch.contiguous_format)

    def work(start: int) -> None:
        part = images[start : start + chunk].to(device).contiguous()
        more = {"frost_dir": frost_dir} if "frost_dir" in parameters else {}
        if "draws" in parameters:
            more["draws"] = Draws(len(part), device, seed + start // BLOCK)
        out[start : start + chunk] = function(part, c, **more)

    # Matrix products in float32, whatever training allows: TF32 and bf16 would move pixel values,
    # and integers above 2048 are to stay exact. The precision holds for the process, as PyTorch
    # keeps it; autocast, which each thread has of its own, is off in new ones anyway.
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            _for_each(work, range(0, len(images), chunk), device)
    finally:
        torch.set_float32_matmul_precision(before)
    return out


def corrupt_chunks(
    images: Tensor,
    name: str,
    severity: int,
    generator: torch.Generator | None = None,
    frost_dir: str | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Tensor]:
    """What `corrupt` gives, a chunk at a time and in order.

    For sets too large to have twice in memory. device: where each chunk is moved and corrupted
    (default: where `images` are); the draws are those of `corrupt` on that device.
    """
    seed, device = _base_seed(generator), torch.device(device or images.device)
    side_by_side = torch.get_num_threads() if device.type == "cpu" else 1
    step = BLOCK * _blocks_per_chunk(images, device) * side_by_side
    for start in range(0, len(images), step):
        part = images[start : start + step].to(device)
        yield corrupt(part, name, severity, seed + start // BLOCK, frost_dir)


def _base_seed(generator: torch.Generator | int | None) -> int:
    if isinstance(generator, int):
        return generator
    where = "cpu" if generator is None else generator.device
    return int(torch.randint(2**62, (), generator=generator, device=where))


def _table_side(side: int) -> int:
    return 32 if side <= 48 else 64


def constants_for(images: Tensor) -> str:
    """Whose constants `images` are corrupted with; a warning where it isn't those of their size."""
    side = max(images.shape[-2:])
    table = _table_side(side)
    words = f"{_PUBLISHED[table]} ({table}×{table})"
    if side != table:
        warn(
            f"corruptions have no constants for images of {side} pixels: those of {words} make "
            "results that compare with no published ones"
        )
    return words


def _for_each(work: Callable[[int], None], starts: range, device: torch.device) -> None:
    """work(start) for every chunk; on a CPU side by side, in as many threads as torch may use.

    Random numbers come from one thread at a time and most steps are too short to be worth
    splitting, so whole chunks in parallel scale where torch's own threads don't.
    """
    threads = torch.get_num_threads()
    workers = min(threads, len(starts)) if device.type == "cpu" else 1
    if workers < 2:
        for start in starts:
            work(start)
        return
    try:
        with thread_pool(workers, "corrupt", torch.set_num_threads, (1,)) as pool:
            list(pool.map(work, starts))
    finally:
        torch.set_num_threads(threads)  # set in one thread, it is the default of later ones


def _blocks_per_chunk(images: Tensor, device: torch.device) -> int:
    """Blocks in a chunk: one on a CPU, for the caches; elsewhere 64 MB in float32."""
    if device.type == "cpu":
        return 1
    return max(1, 2**24 // (BLOCK * math.prod(images.shape[1:])))


def check(name: str, severity: int) -> None:
    """Raise InputError unless `name` is one of CORRUPTIONS and `severity` 1 to SEVERITIES."""
    check_known("corruption", name, CORRUPTIONS)
    if isinstance(severity, bool) or severity not in range(1, SEVERITIES + 1):
        raise InputError(f"--severity {severity}: must be a whole number from 1 to {SEVERITIES}")


def _check_images(images: Tensor, name: str) -> None:
    if not isinstance(images, Tensor):
        raise InputError(f"images must be a uint8 tensor, not {type(images).__name__}")
    check_images(images)
    height, width = images.shape[2:]
    are = f"images are {height}×{width}"
    if min(height, width) < MIN_SIDE:
        raise InputError(f"{are}; corruptions need {MIN_SIDE}×{MIN_SIDE} pixels or more")
    if name == "elastic_transform" and height != width:
        raise InputError(f"{are}; elastic_transform takes square images only")
