"""Throughput and memory of each stage beside the classic way of doing it, measured in one run.

    python benchmark.py corruptions --threads 1        # batched, and one image at a time
    python benchmark.py corruptions --device cuda --size 64
    python benchmark.py signature --full               # patch, project, store
    python benchmark.py resample --device cuda         # corruptions drawn anew while training

Ours and the classic way take turns, a window of time each, so that whatever else the machine does
slows both; the tables show the median window, results.json in --out all of them. Warm-up is left
out, and a GPU has finished before the clock is read.

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
import contextlib
import functools
import importlib
import inspect
import itertools
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import harmonic_mean, median

import numpy as np
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import datasets
from datasets.corrupted import corrupted_set
from datasets.corruptions import CORRUPTIONS, FAMILIES, corrupt, frost_texture
from datasets.loader import BatchLoader, augmentation_for
from datasets.normalization import normalization
from models import ARCHS, build_model
from models.layers import is_carried, layer_keys
from tests.reference import RandomDraws, digital, weather
from utils import arguments, quantize, report
from utils import checkpoint as ckpt
from utils.atomic import write_text
from utils.engine import choose_device, to_device, train_epoch, use_amp
from utils.errors import script_errors
from utils.signature import RobustWeightSignature, patch, project_out

CORRUPTED = {"cpu": 2_048, "cuda": 16_384}  # images corrupted at once
TRAINED = {"cpu": 1_024, "cuda": 50_000}  # images in an epoch
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


def take_turns(
    functions: Sequence[Callable[[], object]], device: torch.device, windows: int, seconds: float
) -> list[list[float]]:
    """For each function the seconds per call in each window; 0 `seconds` is one call a window."""
    calls = [calls_in(seconds, function, device) for function in functions]
    times = [
        [seconds_per_call(*call, device) for call in zip(functions, calls, strict=True)]
        for _ in range(windows)
    ]
    return [list(window) for window in zip(*times, strict=True)]


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
            epochs.append(functools.partial(train_epoch, model, loader, optimizer, amp=amp))
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


# ---- command line ---------------------------------------------------------------------------

COMMANDS = {"corruptions": corruptions, "signature": signature, "resample": resample}


DEFAULT_CORRUPTIONS = {"corruptions": CORRUPTIONS, "resample": RESAMPLED}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
    command.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bf16 autocast; by itself on where the hardware has bf16",
    )

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
        help="CPU threads of torch, and processes of what is done one image at a time",
    )
    command.add_argument("--windows", type=int, default=5, help="measurements; the median counts")
    if name != "resample":
        command.add_argument("--seconds", type=float, default=0.5, help="length of a window")
    command.add_argument("--out", metavar="DIR", help="where to write table.md and results.json")
    return command


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
    lowest = {"threads": 1, "windows": 1, "seconds": 0, "images": 2, "batch_size": 1}
    for flag, low in lowest.items():
        if getattr(args, flag, None) is not None:
            arguments.check_at_least(args, **{flag: low})
    if "corruption" in args:
        args.corruption = args.corruption or list(DEFAULT_CORRUPTIONS[args.command])
        arguments.check_corruptions(args.corruption)
        arguments.check_severity(args.severity)
    if args.command == "signature":
        layer_keys(args.arch, args.keep_num)
        for method in quantize.METHODS:
            quantize.check_levels(args.quantization, method)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the table, write --out; gives the rows."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = choose_device(args.device)
    rows = COMMANDS[args.command](args, device)
    columns = [column for column in rows[0] if column != "windows"]
    table = report.markdown_table(
        columns, [[_shown(row[column]) for column in columns] for row in rows]
    )
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
