"""Throughput and memory of each stage beside the classic way of doing it, measured in one run.

    python benchmark.py train --data data/cifar10      # ours, the classic way, and the ceiling
    python benchmark.py evaluate --arch vgg16 resnet50 --device cuda
    python benchmark.py loader --dataset tinyimagenet --data data/tiny-imagenet-200
    python benchmark.py corruptions --threads 1        # batched, and one image at a time
    python benchmark.py corruptions --device cuda --size 64
    python benchmark.py signature --full               # patch, project, store
    python benchmark.py resample --device cuda         # corruptions drawn anew while training
    python benchmark.py accuracy                       # the same losses and accuracies, seeds apart

Ours and the classic way take turns, a window of time each, so that whatever else the machine does
slows both; the tables show the median window, results.json in --out all of them. Warm-up is left
out, and a GPU has finished before the clock is read.

The classic way of `train`, `evaluate` and `loader` is the common PyTorch script: a DataLoader whose
worker processes transform image by image with Pillow, float32 in contiguous memory, SGD as it
comes, loss and accuracy read in every step; of several numbers of workers the fastest counts. It
gets what favours it: workers that are up and have their queues filled before the clock starts,
files that lie in the page cache, cuDNN's autotuning, and TF32 convolutions on GPUs that have it.
The ceiling is our own step on one batch that stays on the device.

The images of `corruptions` are corrupted one by one by the definitions in tests/reference, with
NumPy, SciPy and Pillow, in as many processes as the batched side has threads; fog and brightness,
which these do pixel by pixel in Python, by the array functions below instead. That is not the
generator of the published sets: a core makes about 900 images/s of 32×32 with that one, in the
harmonic mean (glass_blur 115, frost 215, zoom_blur 340, snow 710, motion_blur 900), figures from
elsewhere that are not measured here. Unlike it, frost here doesn't read its photograph from disk
each time. Water (spatter at severity 1 to 3) remains slower than it need be: Canny edges pixel by
pixel.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import importlib
import inspect
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from statistics import harmonic_mean, mean, median, stdev

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms
from torchvision.datasets import ImageFolder

import datasets
from datasets.cache import resized
from datasets.corrupted import corrupted_set
from datasets.corruptions import CORRUPTIONS, FAMILIES, corrupt, frost_texture
from datasets.images import ImageSet
from datasets.loader import CROP_PADDING, MAX_ANGLE, BatchLoader, augmentation_for
from datasets.normalization import normalization
from models import ARCHS, build_model
from models.layers import is_carried, layer_keys
from models.vgg import MIN_SIDE, VGGS
from tests.reference import RandomDraws, digital, weather
from utils import arguments, quantize, report
from utils import checkpoint as ckpt
from utils.atomic import check_writable, write_text
from utils.engine import (
    TrainStep,
    choose_device,
    eval_batch,
    evaluate,
    to_device,
    train_epoch,
    use_amp,
)
from utils.errors import InputError, script_errors
from utils.signature import RobustWeightSignature, patch, project_out

CORRUPTED = {"cpu": 2_048, "cuda": 16_384}  # images corrupted at once
TRAINED = {"cpu": 1_024, "cuda": 50_000}  # images in an epoch
EVALUATED = {"cpu": 2_000, "cuda": 10_000}  # images of an evaluation
LOADED = {"cpu": 10_000, "cuda": 50_000}  # images of an epoch of batches alone
PICTURED = {"cifar10": (32, 10), "cifar100": (32, 100), "tinyimagenet": (64, 200)}  # side, classes
# So small that weights hardly move: a batch seen again and again would else be learnt by heart,
# and gradients that vanish are denormal numbers, which take a CPU longer.
LEARNING_RATE = 1e-6
CLASSIC_STEPS = 8  # at least, in a window
CLASSIC = "classic"  # its sides are called this and the number of workers
# Sides of the square matrices whose products give the peak of a device.
PRODUCTS = {"cpu": (512, 1024, 2048), "cuda": (2048, 4096, 8192)}
RESAMPLED = ("gaussian_noise", "glass_blur", "snow", "jpeg_compression")  # one of each family
ONE_BY_ONE = 64  # different images that the slow way goes through, again and again
# Bytes of an n×n float32 matrix that is made: 1,728 values take 12 MB, 36,864 take 5.4 GB.
LARGEST_MATRIX, LARGEST_MATRIX_IN_FULL = 0.5e9, 8e9
PATCHES = 10  # patches per window of the other measurements: one takes milliseconds


# ---- measuring ------------------------------------------------------------------------------


def seconds_per_call(function: Callable[[], object], calls: int, device: torch.device) -> float:
    """Wall time of one of `calls` calls in a row, the device's work included."""
    _finish(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    _finish(device)
    return (time.perf_counter() - start) / calls


def calls_in(seconds: float, function: Callable[[], object], device: torch.device) -> int:
    """How many calls, at least one, take `seconds`; warms up by the way."""
    spent = seconds_per_call(function, 1, device)
    if spent < seconds:  # the first call may have been slow for reasons of its own
        spent = seconds_per_call(function, 1, device)
    return max(1, round(seconds / spent))


def in_turns(sides: Sequence[Callable[[], float]], windows: int) -> list[list[float]]:
    """For each side what it gives in each window, where all sides have their turn."""
    rounds = [[side() for side in sides] for _ in range(windows)]
    return [list(side) for side in zip(*rounds, strict=True)]


def take_turns(
    functions: Sequence[Callable[[], object]], device: torch.device, windows: int, seconds: float
) -> list[list[float]]:
    """For each function the seconds per call in each window; 0 `seconds` is one call a window."""
    sides = []
    for function in functions:
        calls = calls_in(seconds, function, device)
        sides.append(functools.partial(seconds_per_call, function, calls, device))
    return in_turns(sides, windows)


def peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Most memory of torch's that `function` has at once beyond what was there, result included."""
    if device.type == "cuda":
        _finish(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler logs that it found no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    events = sorted(profiler.events(), key=lambda event: event.time_range.start)
    return max(itertools.accumulate(event.self_cpu_memory_usage for event in events))


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---- corruptions ----------------------------------------------------------------------------


def corruptions(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each corruption, images/s batched and one by one; the last row is their means."""
    count = args.images or CORRUPTED.get(device.type, CORRUPTED["cuda"])
    images = pictures(count, args.size)
    report.header(
        "benchmark.py corruptions",
        {
            "images": f"{count:,} of {args.size}×{args.size}, severity {args.severity}",
            "batched": report.device_name(device),
            "one by one": f"{args.threads} at once on {report.device_name(torch.device('cpu'))}",
            "windows": f"{args.windows} of {args.seconds:g} s",
        },
    )
    batch = images.to(device)
    generator = torch.Generator().manual_seed(0)
    rows = []
    with one_by_one(images[:ONE_BY_ONE], args.severity, args.threads) as rate_one_by_one:
        for name in args.corruption:
            batched = functools.partial(corrupt, batch, name, args.severity, generator)
            calls = calls_in(args.seconds, batched, device)
            rate_one_by_one(name, 0)
            rates: tuple[list[float], list[float]] = ([], [])
            for _ in range(args.windows):
                rates[0].append(count / seconds_per_call(batched, calls, device))
                rates[1].append(rate_one_by_one(name, args.seconds))
            rows.append(_rates_row(name, *map(median, rates)) | {"windows": rates})
    means = [harmonic_mean([row[side] for row in rows]) for side in (BATCHED, SINGLE)]
    return [*rows, _rates_row("harmonic mean", *means)]


BATCHED, SINGLE = "batched, images/s", "one by one, images/s"


def _rates_row(name: str, batched: float, single: float) -> dict:
    return {"corruption": name, BATCHED: batched, SINGLE: single, "ratio": batched / single}


def pictures(count: int, side: int) -> Tensor:
    """uint8 (count, 3, side, side): blots with a 1/f spectrum, as in photographs, from a seed."""
    generator = torch.Generator().manual_seed(0)
    frequency = torch.hypot(torch.fft.fftfreq(side)[:, None], torch.fft.rfftfreq(side)[None])
    spectrum = 1 / frequency.clamp_min(1 / side)
    images = torch.empty(count, 3, side, side, dtype=torch.uint8)
    for part in images.split(256):
        noise = torch.randn(part.shape, generator=generator)
        noise[:, 1:] = 0.9 * noise[:, :1] + 0.4 * noise[:, 1:]  # colours vary less than light
        field = torch.fft.irfft2(torch.fft.rfft2(noise) * spectrum, s=(side, side))
        field = field / field.std((1, 2, 3), keepdim=True)
        part.copy_((field * 60 + 120).clamp_(0, 255))
    return images


@contextlib.contextmanager
def one_by_one(
    images: Tensor, severity: int, processes: int
) -> Iterator[Callable[[str, float], float]]:
    """(corruption, seconds) → images/s of the per-image definitions in so many processes at once.

    images: uint8 (n, 3, side, side), gone through again and again; 0 seconds do one image.
    """
    by_pixel = images.permute(0, 2, 3, 1).contiguous().numpy()
    if processes == 1:
        yield functools.partial(_rate_here, by_pixel, severity)
        return
    # Not forked: that is unsafe once torch has threads or a GPU is in use.
    context = multiprocessing.get_context("spawn")
    setup = (by_pixel, severity, context.Barrier(processes))
    with context.Pool(processes, _start_process, setup) as pool:
        yield lambda name, seconds: sum(
            pool.starmap(_rate_in_process, [(name, seconds)] * processes, chunksize=1)
        )


def _rate_here(images: np.ndarray, severity: int, name: str, seconds: float) -> float:
    """Images/s of one process; images uint8 (n, side, side, 3)."""
    define = _definition(name, images.shape[1], severity)
    start = time.perf_counter()
    for count in itertools.count(1):
        define(images[count % len(images)])
        spent = time.perf_counter() - start
        if spent >= seconds:
            return count / spent


def _start_process(*setup: object) -> None:
    global _SETUP
    _SETUP = setup


def _rate_in_process(name: str, seconds: float) -> float:
    images, severity, barrier = _SETUP
    _definition(name, images.shape[1], severity)
    barrier.wait(timeout=300)  # all processes at the same time, none twice
    return _rate_here(images, severity, name, seconds)


@functools.cache
def _definition(name: str, side: int, severity: int) -> Callable[[np.ndarray], np.ndarray]:
    """The per-image corruption with all but its image filled in."""
    reference = importlib.import_module(f"tests.reference.{FAMILIES[name]}")
    function = BY_ARRAYS.get(name) or getattr(reference, name)
    batched = importlib.import_module(f"datasets.corruptions.{FAMILIES[name]}")
    rng = np.random.default_rng(0)
    given = {"c": getattr(batched, name.upper())[side][severity - 1]}
    parameters = inspect.signature(function).parameters
    if "rng" in parameters:
        given["rng"] = rng
    if "draws" in parameters:
        given["draws"] = RandomDraws(rng)
    if "textures" in parameters:
        given["textures"] = _textures(side)
    return functools.partial(function, **given)


def fog_by_arrays(image: np.ndarray, c: tuple[float, float], draws: RandomDraws) -> np.ndarray:
    """tests.reference.weather.fog with a diamond–square of whole arrays."""
    amount, decay = c
    height, width = image.shape[:2]
    size = 1 << (max(height, width) - 1).bit_length()
    noise = draws.uniform(size * size - 1, low=-1.0, high=1.0)
    field = np.zeros((size, size))
    step, wobble, used = size, 100.0, 0
    while step >= 2:
        half, cells = step // 2, size // step
        shares = noise[used : used + 3 * cells**2].reshape(3, cells, cells) * wobble**2
        corners = field[::step, ::step]
        below, right = np.roll(corners, -1, 0), np.roll(corners, -1, 1)
        centres = (corners + below + right + np.roll(below, -1, 1)) / 4 + shares[0]
        field[half::step, half::step] = centres
        field[::step, half::step] = (corners + right + centres + np.roll(centres, 1, 0)) / 4
        field[::step, half::step] += shares[1]
        field[half::step, ::step] = (corners + below + centres + np.roll(centres, 1, 1)) / 4
        field[half::step, ::step] += shares[2]
        step, wobble, used = half, wobble / decay, used + 3 * cells**2
    mist = (field - field.min()) / (field.max() - field.min())
    x = image / 255.0
    top = x.max()
    return weather.to_uint8((x + amount * mist[:height, :width, None]) * top / (top + amount))


def brightness_by_arrays(image: np.ndarray, c: float) -> np.ndarray:
    """tests.reference.weather.brightness with the colour conversions of whole arrays."""
    hue, saturation, value = digital._rgb_to_hsv(image / 255.0)
    return weather.to_uint8(digital._hsv_to_rgb(hue, saturation, np.minimum(value + c, 1)))


BY_ARRAYS = {"fog": fog_by_arrays, "brightness": brightness_by_arrays}


def _textures(side: int) -> list[np.ndarray]:
    """The frost stand-ins at the scale of images of this side, uint8 (h, w, 3)."""
    stand_ins = frost_texture.textures(None, {32: 0.2, 64: 0.3}[side], torch.device("cpu"))
    return [
        texture[:, :height, :width].permute(1, 2, 0).contiguous().numpy()
        for texture, (height, width) in zip(stand_ins.pixels, stand_ins.sizes.tolist(), strict=True)
    ]


# ---- signature ------------------------------------------------------------------------------


def signature(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rows of (step, unit, RWS, classic, ratio, the classic way) for one signature's life."""
    pretrained, standard, robust = random_models(args.arch)
    extract = functools.partial(
        RobustWeightSignature.extract, pretrained, standard, robust, args.keep_num, arch=args.arch
    )
    rws = extract()
    report.header(
        "benchmark.py signature",
        {
            "model": f"{args.arch}, random weights, {_values(standard):,} values",
            "signature": f"the {args.keep_num} shallowest layers, {_values(rws.tensors):,} values",
            "device": report.device_name(device),
            "windows": f"{args.windows} of {args.seconds:g} s, {PATCHES} times as many patches",
        },
    )
    rows = [*_patch_rows(args, device, rws, standard, robust)]
    rows += _projection_rows(args, device, pretrained, standard, robust)
    times = take_turns([extract], torch.device("cpu"), args.windows, args.seconds)
    rows.append(_times_row(f"extract {len(rws.tensors)} tensors, hashes included", *times))
    return [*rows, *_storage_rows(args, rws, robust)]


def random_models(arch: str) -> list[dict[str, Tensor]]:
    """State dicts in the parts of θ_pre, θ_std and θ_c: random weights, and two steps from them."""
    torch.manual_seed(0)
    states = [build_model(arch, num_classes=10).state_dict()]
    for _ in range(2):
        states.append(
            {
                key: tensor + 0.01 * torch.randn_like(tensor)
                if tensor.is_floating_point()
                else tensor
                for key, tensor in states[0].items()
            }
        )
    return states


def _values(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())


def _row(
    step: str, unit: str, here: float, classic: float | None = None, way: str | None = None
) -> dict:
    ratio = None if classic is None else classic / here
    return {
        "step": step,
        "unit": unit,
        "RWS": here,
        "classic": classic,
        "ratio": ratio,
        "the classic way": way,
    }


def _times_row(
    step: str, here: list[float], classic: list[float] | None = None, way: str | None = None
) -> dict:
    """A row in ms from seconds per window."""
    windows = [[1e3 * s for s in side] for side in (here, classic) if side is not None]
    return _row(step, "ms", *map(median, windows), way=way) | {"windows": windows}


def _patch_rows(
    args: argparse.Namespace,
    device: torch.device,
    rws: RobustWeightSignature,
    standard: dict[str, Tensor],
    robust: dict[str, Tensor],
) -> list[dict]:
    """On and off a model on the device, beside loading whole models that are there too."""
    model = build_model(args.arch, num_classes=10).to(device)
    rws = rws.to(device)
    standard, robust = ({k: t.to(device) for k, t in s.items()} for s in (standard, robust))
    handles = []
    put_on, load_robust, take_off, load_standard = take_turns(
        [
            lambda: handles.append(patch(model, rws)),
            lambda: model.load_state_dict(robust),
            lambda: handles.pop().remove(),
            lambda: model.load_state_dict(standard),
        ],
        device,
        PATCHES * args.windows,
        seconds=0,
    )
    return [
        _times_row("patch", put_on, load_robust, "load_state_dict of the robust model"),
        _times_row("unpatch", take_off, load_standard, "load_state_dict of the standard model"),
    ]


def project_by_matrix(delta: Tensor, base: Tensor) -> Tensor:
    """`project_out` by the n×n matrix of the projection on `base`, in one matrix's memory."""
    matrix = torch.outer(base.flatten(), base.flatten()).div_(base.square().sum())
    return delta - (matrix @ delta.flatten()).view_as(delta)


def _projection_rows(
    args: argparse.Namespace,
    device: torch.device,
    pretrained: dict[str, Tensor],
    standard: dict[str, Tensor],
    robust: dict[str, Tensor],
) -> list[dict]:
    """Time and memory of the projection of each kept weight whose n×n matrix isn't too large."""
    rows = []
    limit = LARGEST_MATRIX_IN_FULL if args.full else LARGEST_MATRIX
    for key in layer_keys(args.arch, args.keep_num):
        θ_pre, θ_std, θ_c = (state[key].to(device) for state in (pretrained, standard, robust))
        n = θ_pre.numel()
        if θ_pre.dim() == 1 or is_carried(args.arch, key) or 4 * n * n > limit:
            continue
        ways = [
            functools.partial(way, θ_c - θ_pre, θ_std - θ_pre)
            for way in (project_out, project_by_matrix)
        ]
        times = take_turns(ways, device, args.windows, args.seconds)
        megabytes = [peak_bytes(way, device) / 1e6 for way in ways]
        rows.append(_times_row(f"project {key}, {n:,} values", *times, "n×n matrix"))
        rows.append(_row(f"project {key}, peak memory", "MB", *megabytes, "n×n matrix"))
    return rows


def _storage_rows(
    args: argparse.Namespace, rws: RobustWeightSignature, robust: dict[str, Tensor]
) -> list[dict]:
    """Quantizing; then saving, loading and size beside a checkpoint of the whole robust model."""
    cpu, rows = torch.device("cpu"), []
    for method in quantize.METHODS:
        quantizing = functools.partial(rws.quantize, args.quantization, method)
        times = take_turns([quantizing], cpu, args.windows, args.seconds)
        rows.append(_times_row(f"quantize to {args.quantization} levels, {method}", *times))
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "robust.pth.tar", Path(folder) / "one.rws"
        way = "checkpoint of the robust model"
        for form, stored in (
            ("float32", rws),
            (f"{args.quantization} levels", rws.quantize(args.quantization)),
        ):
            saving, saving_whole = take_turns(
                [
                    functools.partial(stored.save, part),
                    functools.partial(ckpt.save, {"state_dict": robust}, whole),
                ],
                cpu,
                args.windows,
                args.seconds,
            )
            loading, loading_whole = take_turns(
                [
                    functools.partial(RobustWeightSignature.load, part),
                    functools.partial(ckpt.read_state_dict, whole),
                ],
                cpu,
                args.windows,
                args.seconds,
            )
            sizes = [float(path.stat().st_size) for path in (part, whole)]
            rows.append(_times_row(f"save, {form}", saving, saving_whole, way))
            rows.append(_times_row(f"load, {form}", loading, loading_whole, way))
            rows.append(_row(f"file, {form}", "bytes", *sizes, way))
    return rows


# ---- resample -------------------------------------------------------------------------------


def resample(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """Rows of training images/s from a fixed corrupted set and from one drawn anew each epoch.

    The ratio is the share of the speed that drawing anew leaves.
    """
    clean = datasets.load(args.dataset, args.data, "train", args.image_size)
    count = min(len(clean), args.images or TRAINED.get(device.type, TRAINED["cuda"]))
    clean = clean.subset(torch.arange(count))
    amp = use_amp(device, args.amp)
    height, width = clean.images.shape[-2:]
    report.header(
        "benchmark.py resample",
        {
            "data": f"{count:,} images of {clean.name}, {height}×{width}, severity {args.severity}",
            **arguments.frost_note(args.corruption, args.frost_dir),
            "training": f"{args.arch}, batch {args.batch_size}, {'bf16' if amp else 'float32'}",
            "device": report.device_name(device),
            "windows": f"{args.windows} of one epoch",
        },
    )
    torch.manual_seed(0)
    model = build_model(args.arch, len(clean.classes), *normalization(clean.name, clean))
    model = to_device(model, device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        fused=device.type in ("cpu", "cuda"),
    )
    rows = []
    for name in args.corruption:

        def draw(epoch: int, name: str = name) -> Tensor:
            corrupted = corrupted_set(
                clean, name, args.severity, "train", epoch, None, args.frost_dir, device
            )
            return corrupted.images

        step = TrainStep(model, optimizer, amp=amp)
        epochs = []
        for redraw in (None, draw):
            loader = BatchLoader(
                corrupted_set(clean, name, args.severity, "train", 0, None, args.frost_dir, device),
                args.batch_size,
                augment=augmentation_for(clean.name),
                device=device,
                shuffle=True,
                resample=redraw,
            )
            epochs.append(
                functools.partial(train_epoch, model, loader, optimizer, amp=amp, step=step)
            )
        times = take_turns(epochs, device, args.windows, seconds=0)
        rates = [[count / s for s in windows] for windows in times]
        fixed, anew = map(median, rates)
        rows.append(
            {
                "corruption": name,
                "fixed, images/s": fixed,
                "anew each epoch, images/s": anew,
                "ratio": anew / fixed,
                "windows": rates,
            }
        )
    return rows


# ---- train, evaluate, loader ----------------------------------------------------------------


def training(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each --arch: images/s of a training epoch."""
    clean = clean_images(args, TRAINED, device)
    augment = augmentation_for(clean.name)
    amp = use_amp(device, args.amp)
    _check_sides(args.arch, clean.images.shape[-1])
    _pipeline_header(args, device, clean)
    loader = BatchLoader(clean, args.batch_size, augment, device, shuffle=True)
    steps = len(loader)
    count = min(len(clean), steps * args.batch_size)
    resident = _resident(loader)
    repeated = [resident] * steps
    rows = []
    with classic_loaders(args, device, clean, augment) as classic:
        for arch in args.arch:

            def window(batches: Iterable, images: int, arch: str = arch) -> Callable[[], float]:
                model = to_device(_model(arch, clean), device)
                optimizer = _optimizer(model, fused=device.type in ("cpu", "cuda"))
                step = TrainStep(model, optimizer, amp=amp)
                epoch = functools.partial(
                    train_epoch, model, batches, optimizer, amp=amp, step=step
                )
                return window_of(epoch, images, args.seconds, device)

            step = classic_training(_model(arch, clean).to(device), device)
            sides = {
                "ours": window(loader, count),
                "ceiling": window(repeated, steps * len(resident[1])),
                **classic_sides(args, device, classic, step),
            }
            rows.append(_model_row(args, device, arch, clean, amp, sides, training=True))
    return rows


def evaluation(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each --arch: images/s of an evaluation."""
    clean = clean_images(args, EVALUATED, device)
    amp = use_amp(device, args.amp)
    _check_sides(args.arch, clean.images.shape[-1])
    _pipeline_header(args, device, clean)
    batch_size = eval_batch(clean, device)
    images, labels = _resident(BatchLoader(clean, batch_size, device=device))
    steps = -(-len(clean) // len(labels))
    rows = []
    with classic_loaders(args, device, clean, augment=None) as classic:
        for arch in args.arch:
            model = to_device(_model(arch, clean), device).eval()
            ours = functools.partial(evaluate, model, clean.to(device), amp=amp)
            ceiling = functools.partial(evaluate_resident, model, images, labels, steps, amp)
            step = classic_evaluation(_model(arch, clean).to(device), device)
            sides = {
                "ours": window_of(ours, len(clean), args.seconds, device),
                "ceiling": window_of(ceiling, steps * len(labels), args.seconds, device),
                **classic_sides(args, device, classic, step),
            }
            rows.append(_model_row(args, device, arch, clean, amp, sides, training=False))
    return rows


def loading(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """One row: images/s of the batches of a training epoch alone, float32 on the device."""
    clean = clean_images(args, LOADED, device)
    augment = augmentation_for(clean.name)
    _pipeline_header(args, device, clean)
    loader = BatchLoader(clean, args.batch_size, augment, device, shuffle=True)
    count = min(len(clean), len(loader) * args.batch_size)
    epoch = functools.partial(collections.deque, loader, maxlen=0)

    def step(images: Tensor, labels: Tensor) -> None:
        images.to(device, non_blocking=True)
        labels.to(device, non_blocking=True)

    with classic_loaders(args, device, clean, augment) as classic:
        sides = {
            "ours": window_of(epoch, count, args.seconds, device),
            **classic_sides(args, device, classic, step),
        }
        rates = _measure(sides, args.windows)
    what = {"data": _told(args, clean), "augmentation": augment}
    return [what | _against_classic(rates) | {"windows": rates, "spread": _spread(rates)}]


def clean_images(
    args: argparse.Namespace, default: dict[str, int], device: torch.device
) -> ImageSet:
    """The first --images of the training set under --data, or without it made-up ones like them."""
    count = args.images or default.get(device.type, default["cuda"])
    name = datasets.base_name(args.dataset)
    if args.data is None and name in PICTURED:
        side, classes = PICTURED[name]
        return ImageSet(
            images=pictures(count, args.image_size or side),
            labels=torch.arange(count) % classes,
            classes=[f"class{label:03d}" for label in range(classes)],
            name=name,
        )
    whole = datasets.load(args.dataset, args.data, "all", args.image_size)
    return whole.subset(torch.arange(min(count, len(whole))))


def _told(args: argparse.Namespace, clean: ImageSet) -> str:
    height, width = clean.images.shape[-2:]
    made_up = ", made up" if args.data is None and clean.name in PICTURED else ""
    return f"{clean.name} {height}×{width}{made_up}"


def _pipeline_header(args: argparse.Namespace, device: torch.device, clean: ImageSet) -> None:
    models = {"models": ", ".join(args.arch)} if "arch" in args else {}
    report.header(
        f"benchmark.py {args.command}",
        {
            "data": f"{len(clean):,} images of {_told(args, clean)}, batch {args.batch_size}",
            **models,
            "classic way": f"DataLoader with {' / '.join(map(str, args.workers))} workers",
            "device": report.device_name(device),
            "windows": f"{args.windows} of {args.seconds:g} s or longer",
        },
    )


def _check_sides(archs: Sequence[str], side: int) -> None:
    for arch in archs:
        if arch in VGGS and side < MIN_SIDE:
            raise InputError(
                f"--arch {arch} halves its input four times: images of {side} pixels are too "
                f"small, use --image_size {MIN_SIDE} or more, or a ResNet"
            )


def _model(arch: str, clean: ImageSet) -> nn.Module:
    torch.manual_seed(0)
    return build_model(arch, len(clean.classes), *normalization(clean.name, clean))


def _optimizer(
    model: nn.Module, fused: bool | None = None, lr: float = LEARNING_RATE
) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=fused)


def _resident(loader: BatchLoader) -> tuple[Tensor, Tensor]:
    """A batch of `loader`, in the memory format of the convolutions."""
    images, labels = next(iter(loader))
    return images.contiguous(memory_format=torch.channels_last), labels


@torch.inference_mode()
def evaluate_resident(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, amp: bool
) -> float:
    """The loop of `evaluate` on one batch, `steps` times; gives the accuracy in percent."""
    correct = torch.zeros((), dtype=torch.int64, device=images.device)
    for _ in range(steps):
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            correct += (model(images).argmax(1) == labels).sum()
    return 100 * correct.item() / (steps * len(labels))


class ArrayDataset(Dataset):
    """Images in an array, each made a PIL image before `transform`, as torchvision's CIFAR10."""

    def __init__(self, images: Tensor, labels: Tensor, transform: Callable) -> None:
        self.data = images.permute(0, 2, 3, 1).contiguous().numpy()
        self.targets = labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.data[index])), self.targets[index]


class EndlessBatches:
    """Random indices, a batch at a time, until `ending`; the batch_sampler of a DataLoader."""

    def __init__(self, count: int, batch_size: int) -> None:
        self.count, self.batch_size = count, batch_size
        self.ending = False

    def __iter__(self) -> Iterator[list[int]]:
        self.ending = False
        while not self.ending:
            yield torch.randint(self.count, (self.batch_size,)).tolist()


@contextlib.contextmanager
def classic_loaders(
    args: argparse.Namespace, device: torch.device, clean: ImageSet, augment: str | None
) -> Iterator[dict[int, DataLoader]]:
    """For each of --workers a DataLoader of the classic way, without end.

    Tiny-ImageNet and image folders are read from their files for each batch: from those under
    --data, or from JPEG files made of `clean`. Other sets lie in an array.
    """
    transform = classic_transform(clean.images.shape[-1], augment, args.image_size is not None)
    with tempfile.TemporaryDirectory() as scratch:
        if clean.name not in ("tinyimagenet", "folder"):
            dataset = ArrayDataset(clean.images, clean.labels, transform)
        else:
            if args.data is None:
                write_jpegs(clean, Path(scratch))
            dataset = ImageFolder(scratch if args.data is None else clean.source, transform)
            dataset.samples = dataset.samples[: len(clean)]
            for path, _ in dataset.samples:
                Path(path).read_bytes()  # into the page cache
        yield {
            workers: DataLoader(
                dataset,
                batch_sampler=EndlessBatches(len(dataset), args.batch_size),
                num_workers=workers,
                persistent_workers=workers > 0,
                pin_memory=device.type == "cuda",
            )
            for workers in args.workers
        }


def classic_transform(side: int, augment: str | None, resize: bool = False) -> Callable:
    """Pillow's image to a float tensor (3, side, side), augmented by torchvision's transforms."""
    steps: list[Callable] = [functools.partial(resized, side=side)] if resize else []
    if augment == "crop_flip":
        steps.append(transforms.RandomCrop(side, max(1, round(CROP_PADDING * side / 32))))
    elif augment == "rotate_flip":
        steps.append(transforms.RandomRotation(MAX_ANGLE))
    if augment is not None:
        steps.append(transforms.RandomHorizontalFlip())
    return transforms.Compose([*steps, transforms.ToTensor()])


def write_jpegs(image_set: ImageSet, folder: Path) -> None:
    """Write each image to `folder`/<class>/, in the JPEG quality that Pillow takes by itself."""
    by_pixel = image_set.images.permute(0, 2, 3, 1).contiguous().numpy()
    for row, (pixels, label) in enumerate(zip(by_pixel, image_set.labels.tolist(), strict=True)):
        parent = folder / image_set.classes[label]
        parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(parent / f"{row:06d}.JPEG")


def classic_training(
    model: nn.Module, device: torch.device, lr: float = LEARNING_RATE
) -> Callable[[Tensor, Tensor], float]:
    """A training step of the classic way on a batch that lies on the host; gives its loss."""
    optimizer = _optimizer(model, lr=lr)
    model.train()

    def step(images: Tensor, labels: Tensor) -> float:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (logits.argmax(1) == labels).float().mean().item()
        return loss.item()

    return step


def classic_evaluation(model: nn.Module, device: torch.device) -> Callable[[Tensor, Tensor], None]:
    """A step of the classic evaluation on a batch that lies on the host."""
    model.eval()

    @torch.no_grad()
    def step(images: Tensor, labels: Tensor) -> None:
        images = images.to(device, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        (model(images).argmax(1) == labels).sum().item()

    return step


def window_of(
    function: Callable[[], object], count: float, seconds: float, device: torch.device
) -> Callable[[], float]:
    """A window of `seconds` as a function; gives `count` per call as a rate. Warms up here."""
    calls = calls_in(seconds, function, device)
    return lambda: count / seconds_per_call(function, calls, device)


def classic_window(
    loader: DataLoader,
    step: Callable[[Tensor, Tensor], None],
    seconds: float,
    device: torch.device,
) -> float:
    """Images/s of `step` over `loader` for `seconds`, and at least CLASSIC_STEPS.

    Its queue is in its steady state when the clock starts and when it stops; then the workers
    finish, so that they don't run in the turns of others.
    """
    batches = iter(loader)
    for _ in range(1 + loader.num_workers):
        step(*next(batches))
    _finish(device)
    images = steps = 0
    start = time.perf_counter()
    while steps < CLASSIC_STEPS or time.perf_counter() - start < seconds:
        batch = next(batches)
        step(*batch)
        images += len(batch[1])
        steps += 1
    _finish(device)
    rate = images / (time.perf_counter() - start)
    loader.batch_sampler.ending = True
    for _ in batches:
        pass
    return rate


def classic_sides(
    args: argparse.Namespace,
    device: torch.device,
    loaders: dict[int, DataLoader],
    step: Callable[[Tensor, Tensor], None],
) -> dict[str, Callable[[], float]]:
    """A window of `step` for each of `loaders`."""
    return {
        f"{CLASSIC}, {workers} workers": functools.partial(
            classic_window, loader, step, args.seconds, device
        )
        for workers, loader in loaders.items()
    }


def product_window(dtype: torch.dtype, seconds: float, device: torch.device) -> Callable[[], float]:
    """A window of products of square matrices, in FLOP/s, at the fastest of PRODUCTS."""
    windows = []
    for side in PRODUCTS.get(device.type, PRODUCTS["cuda"]):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        product = functools.partial(_product, a, b)
        windows.append(window_of(product, 2 * side**3, seconds, device))
    return max(windows, key=lambda window: window())


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32 on a GPU in TF32 as cuDNN's convolutions."""
    precision = torch.get_float32_matmul_precision()
    if a.is_cuda:
        torch.set_float32_matmul_precision("high")
    product = a @ b
    torch.set_float32_matmul_precision(precision)
    return product


def flops_per_image(model: nn.Module, side: int, training: bool) -> float:
    """Floating-point operations of a step for one image, an addition and a product being two."""
    images = torch.zeros(2, 3, side, side)  # batch norm can't train on one
    model.train(training)
    with torch.set_grad_enabled(training), FlopCounterMode(display=False) as counter:
        logits = model(images)
        if training:
            logits.sum().backward()
    return counter.get_total_flops() / len(images)


def _measure(sides: dict[str, Callable[[], float]], windows: int) -> dict[str, list[float]]:
    """The rate of each side in each window."""
    return dict(zip(sides, in_turns(list(sides.values()), windows), strict=True))


def _model_row(
    args: argparse.Namespace,
    device: torch.device,
    arch: str,
    clean: ImageSet,
    amp: bool,
    sides: dict[str, Callable[[], float]],
    training: bool,
) -> dict:
    """Measure the windows of `sides`, "ours" and "ceiling" among them, and matrix products."""
    dtype = torch.bfloat16 if amp else torch.float32
    products = product_window(dtype, args.seconds, device)
    rates = _measure(sides | {"products, FLOP/s": products}, args.windows)
    ours, ceiling, peak = (median(rates[s]) for s in ("ours", "ceiling", "products, FLOP/s"))
    flops = flops_per_image(_model(arch, clean), clean.images.shape[-1], training)
    return {
        "model": f"{arch}, {'bf16' if amp else 'float32'}",
        "data": _told(args, clean),
        **_against_classic(rates),
        "ceiling, images/s": ceiling,
        "ours / ceiling": ours / ceiling,
        "share of peak": ours * flops / peak,
        "windows": rates,
        "spread": _spread(rates),
        "FLOPs per image": flops,
    }


def _against_classic(rates: dict[str, list[float]]) -> dict:
    """Ours beside the classic way at its best number of workers, by the medians of `rates`."""
    ours = median(rates["ours"])
    best = max((s for s in rates if s.startswith(CLASSIC)), key=lambda s: median(rates[s]))
    classic = median(rates[best])
    return {
        "ours, images/s": ours,
        "classic, images/s": classic,
        "workers": int(best.split()[1]),
        "ours / classic": ours / classic,
    }


def _spread(rates: dict[str, list[float]]) -> dict[str, float]:
    """Of each side the largest rate less the smallest, over the median."""
    return {side: (max(w) - min(w)) / median(w) for side, w in rates.items()}


# ---- accuracy ------------------------------------------------------------------------------


def accuracy(args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each epoch: training loss and test accuracy of both ways, mean ± over the seeds.

    ours: bf16 where the hardware has it, batches from BatchLoader; classic: float32, contiguous,
    plain SGD, images augmented one by one with Pillow. Both start from the same weights.
    """
    train = datasets.load(args.dataset, args.data, "train", args.image_size, limit=args.images)
    test = datasets.load(args.dataset, args.data, "test", args.image_size)
    augment = augmentation_for(train.name)
    amp = use_amp(device, args.amp)
    _check_sides([args.arch], train.images.shape[-1])
    report.header(
        "benchmark.py accuracy",
        {
            "data": f"{len(train):,} training and {len(test):,} test images of {train.name}",
            "training": f"{args.arch} from random weights, {args.epochs} epochs of batches of "
            f"{args.batch_size}, lr {args.lr:g}, seeds {' '.join(map(str, args.seeds))}",
            "ours": "bf16" if amp else "float32",
            "device": report.device_name(device),
        },
    )
    transform = classic_transform(train.images.shape[-1], augment)
    curves: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for seed in args.seeds:
        torch.manual_seed(seed)
        start = build_model(args.arch, len(train.classes), *normalization(train.name, train))
        ours, classic = to_device(copy.deepcopy(start), device), start.to(device)
        loader = BatchLoader(train, args.batch_size, augment, device, shuffle=True, seed=seed)
        optimizer = _optimizer(ours, device.type in ("cpu", "cuda"), args.lr)
        one_by_one = DataLoader(
            ArrayDataset(train.images, train.labels, transform),
            args.batch_size,
            shuffle=True,
            drop_last=len(train) % args.batch_size == 1,  # batch norm can't train on one image
        )
        step = classic_training(classic, device, args.lr)
        fast = TrainStep(ours, optimizer, amp=amp)
        for epoch in range(1, args.epochs + 1):
            title = f"ours, epoch {epoch}"
            stats = train_epoch(ours, loader, optimizer, amp=amp, title=title, step=fast)
            classic.train()
            losses = [step(*batch) for batch in one_by_one]
            for way, loss, model, bf16 in (
                ("ours", stats.loss, ours, amp),
                ("classic", sum(losses) / len(losses), classic, False),
            ):
                right = evaluate(model, test, amp=bf16)
                curves.setdefault((way, epoch), []).append((loss, right))
            print(f"seed {seed}, epoch {epoch}: {curves['ours', epoch][-1]}", flush=True)
    rows = []
    for epoch in range(1, args.epochs + 1):
        row: dict = {"epoch": epoch}
        for k, what in enumerate(("loss", "test accuracy, %")):
            for way in ("ours", "classic"):
                values = [point[k] for point in curves[way, epoch]]
                spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
                row[f"{way}: {what}"] = f"{mean(values):.3f}{spread}"
        row["windows"] = {way: curves[way, epoch] for way in ("ours", "classic")}
        rows.append(row)
    return rows


# ---- command line ---------------------------------------------------------------------------

COMMANDS = {
    "train": training,
    "evaluate": evaluation,
    "loader": loading,
    "corruptions": corruptions,
    "signature": signature,
    "resample": resample,
    "accuracy": accuracy,
}

_CLASSIC_DATA = (
    "a DataLoader with `workers` processes (the fastest of {workers}) and Pillow's transforms "
    "image by image"
)
_CLASSIC_MODEL = (
    f"{_CLASSIC_DATA}, batch {{batch_size}}, float32 in contiguous memory; ceiling: our step on "
    "one batch that stays on the device; share of peak: FLOPs of ours over those of matrix "
    "products in the same dtype."
)
# What stands below the table, with the arguments filled in.
CAPTIONS = {
    "train": "Training, medians of {windows} windows. ours: train_epoch on a BatchLoader, batch "
    "{batch_size}, channels_last, fused SGD; classic: plain SGD, loss and accuracy read in every "
    f"step, {_CLASSIC_MODEL}",
    "evaluate": "Evaluation, medians of {windows} windows. ours: evaluate, in batches of its own, "
    f"channels_last; classic: accuracy read in every step, {_CLASSIC_MODEL}",
    "loader": "Augmented training batches of {batch_size}, float32 on the device, no model; "
    f"medians of {{windows}} windows. ours: BatchLoader; classic: {_CLASSIC_DATA}.",
    "accuracy": "{arch} on {dataset} from random weights, lr {lr:g}, mean ± standard deviation "
    "over seeds {seeds}. ours: train_epoch on a BatchLoader, bf16 where the hardware has it, "
    "channels_last, fused SGD; classic: plain SGD, images augmented one by one with Pillow, "
    "float32 in contiguous memory.",
}
HIDDEN = ("windows", "spread", "FLOPs per image")  # in results.json alone

DEFAULT_CORRUPTIONS = {"corruptions": CORRUPTIONS, "resample": RESAMPLED}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _add_pipeline(commands, "train", "training beside the classic way", TRAINED)
    _add_models(command)
    command = _add_pipeline(commands, "evaluate", "evaluation beside the classic way", EVALUATED)
    _add_models(command)
    _add_pipeline(commands, "loader", "batches alone beside the classic way", LOADED)

    command = _add(commands, "corruptions", "the corruptions, batched and one image at a time")
    command.add_argument("--size", type=int, default=32, choices=(32, 64), help="side of images")
    _add_images(command, CORRUPTED, "corrupted at once")
    _add_corruption(command, "all 19")

    command = _add(commands, "signature", "patching, projecting and storing a signature")
    command.add_argument("--arch", default="vgg16", choices=ARCHS, help="architecture")
    command.add_argument("--keep_num", type=int, default=5, help="layers in the signature")
    command.add_argument("--quantization", type=int, default=16, metavar="N", help="levels")
    command.add_argument(
        "--full", action="store_true", help="also n×n matrices of up to 8 GB, 20 s and more each"
    )

    command = _add(commands, "resample", "training on a corruption drawn anew in every epoch")
    arguments.add_dataset(command)
    command.set_defaults(dataset="synthetic")
    command.add_argument("--data", metavar="DIR", help="the clean set")
    _add_images(command, TRAINED, "in an epoch")
    _add_corruption(command, ", ".join(RESAMPLED))
    command.add_argument("--frost_dir", metavar="DIR", help="the original frost photographs")
    command.add_argument("--arch", default="vgg16", choices=ARCHS, help="architecture")
    command.add_argument("--batch_size", type=int, default=128, help="images per step")
    _add_amp(command)

    command = _add(commands, "accuracy", "loss and accuracy of ours beside the classic way")
    command.set_defaults(out="results/benchmark/accuracy")
    arguments.add_dataset(command)
    command.set_defaults(dataset="synthetic")
    command.add_argument("--data", metavar="DIR", help="the data set")
    command.add_argument("--images", type=int, metavar="N", help="train on so many")
    command.add_argument("--arch", default="resnet18", choices=ARCHS, help="architecture")
    command.add_argument("--batch_size", type=int, default=128, help="images per step")
    command.add_argument("--epochs", type=int, default=4, help="passes over the images")
    command.add_argument("--lr", type=float, default=0.02, help="learning rate")
    command.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="runs")
    _add_amp(command)

    args = parser.parse_args(argv)
    _check(args)
    return args


def _add(commands: argparse._SubParsersAction, name: str, purpose: str) -> argparse.ArgumentParser:
    """A subcommand with the flags that all of them have."""
    command = commands.add_parser(name, help=purpose, description=f"Measures {purpose}.")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    command.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help="CPU threads of torch, and processes that corrupt one image at a time",
    )
    if name != "accuracy":
        command.add_argument(
            "--windows", type=int, default=5, help="measurements; the median counts"
        )
    if name not in ("resample", "accuracy"):
        command.add_argument("--seconds", type=float, default=0.5, help="length of a window")
    command.add_argument("--out", metavar="DIR", help="where to write table.md and results.json")
    return command


def _add_pipeline(
    commands: argparse._SubParsersAction, name: str, purpose: str, images: dict[str, int]
) -> argparse.ArgumentParser:
    """`train`, `evaluate` or `loader`, with the flags that these three have."""
    command = _add(commands, name, purpose)
    command.set_defaults(seconds=2.0, out=f"results/benchmark/{name}")
    arguments.add_dataset(command)
    command.add_argument("--data", metavar="DIR", help="its folder; without it images are made up")
    _add_images(command, images, "gone through at once")
    command.add_argument("--batch_size", type=int, default=128, help="images per step")
    command.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=default_workers(),
        metavar="N",
        help="processes of the classic DataLoader, 0 for none beside the main one; the best counts",
    )
    return command


def default_workers() -> list[int]:
    """0, and the powers of two from 2 to 16 for which there are cores."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not everywhere
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return [0, *(workers for workers in (2, 4, 8, 16) if workers <= cores)]


def _add_models(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--arch", nargs="+", default=["vgg16"], choices=ARCHS, help="architectures, a row each"
    )
    _add_amp(command)


def _add_amp(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bf16 autocast; by itself on where the hardware has bf16",
    )


def _add_images(command: argparse.ArgumentParser, default: dict[str, int], what: str) -> None:
    command.add_argument(
        "--images",
        type=int,
        metavar="N",
        help=f"{what} (default: {default['cpu']:,} on a CPU, {default['cuda']:,} on a GPU)",
    )


def _add_corruption(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--corruption",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"the corruptions to measure (default: {default})",
    )
    command.add_argument("--severity", type=int, default=5, metavar="1…5", help="of corruptions")


def _check(args: argparse.Namespace) -> None:
    """Raise InputError for every value that can be judged before anything is measured."""
    lowest = {"threads": 1, "windows": 1, "seconds": 0, "images": 2, "batch_size": 1, "epochs": 1}
    for flag, low in lowest.items():
        if getattr(args, flag, None) is not None:
            arguments.check_at_least(args, **{flag: low})
    if args.out:
        check_writable(args.out)
    if "workers" in args:
        _check_pipeline(args)
    if "corruption" in args:
        args.corruption = args.corruption or list(DEFAULT_CORRUPTIONS[args.command])
        arguments.check_corruptions(args.corruption)
        arguments.check_severity(args.severity)
    if args.command == "signature":
        layer_keys(args.arch, args.keep_num)
        for method in quantize.METHODS:
            quantize.check_levels(args.quantization, method)


def _check_pipeline(args: argparse.Namespace) -> None:
    """The checks of `train`, `evaluate` and `loader`."""
    if min(args.workers) < 0:
        raise InputError(f"--workers {min(args.workers)}: must be at least 0")
    args.workers = list(dict.fromkeys(args.workers))
    if args.command == "train" and args.batch_size < 2:
        raise InputError("--batch_size 1: batch norm needs at least 2 images per step")
    name = datasets.base_name(args.dataset)
    if args.data is None and name == "folder":
        raise InputError("--dataset folder needs its folder: give --data")
    if args.image_size is not None:
        arguments.check_at_least(args, image_size=8)
        if "arch" in args:
            _check_sides(args.arch, args.image_size)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the table, write --out; gives the rows."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    rows = COMMANDS[args.command](args, device)
    columns = [column for column in rows[0] if column not in HIDDEN]
    table = report.markdown_table(
        columns, [[_shown(row[column]) for column in columns] for row in rows]
    )
    if args.command in CAPTIONS:
        lists = {k: " / ".join(map(str, v)) for k, v in vars(args).items() if isinstance(v, list)}
        table += "\n\n" + CAPTIONS[args.command].format(**vars(args) | lists)
    print(table)
    if args.out:
        facts = report.provenance(device) | {"cpu": report.device_name(torch.device("cpu"))}
        told = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        write_text(Path(args.out) / "table.md", f"{table}\n\n{told}\n")
        report.write_json(
            Path(args.out) / "results.json", {"rows": rows, "arguments": vars(args), **facts}
        )
    return rows


def _shown(value: object) -> object:
    """A float with three digits or more."""
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


if __name__ == "__main__":
    with script_errors():
        main()
