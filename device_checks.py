"""Whether a device computes what a CPU does, waits for nothing and is fast: `benchmark.py check`.

For the first hour with a new kind of GPU. Images and weights are made from seeds; what only CUDA
has (recorded steps, waiting, memory of its own) is left out elsewhere.
"""

import copy
import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import median

import torch
from torch import Tensor

from datasets import bank, synthetic
from datasets.corruptions import CORRUPTIONS, corrupt
from datasets.images import ImageSet
from datasets.loader import AUGMENTATIONS, BatchLoader
from models import build_model
from utils import engine
from utils.batchnorm import reestimate, running_statistics
from utils.learn import learn
from utils.signature import Method, RobustWeightSignature, patch

CPU, IMAGES = torch.device("cpu"), 512
Ways = Mapping[str, Callable[[], object]]
Figures = Iterator[tuple[str, float, float]]  # what, its figure, the most that this may be


def measure(ways: Ways, seconds: float, windows: int) -> dict[str, list[float]]:
    """Seconds per call of each way in each window of at least `seconds`, warm; they take turns."""
    from torch.utils.benchmark import Timer  # may log that it finds no GPU, which is no error

    threads = torch.get_num_threads()
    timers = {way: Timer("f()", globals={"f": f}, num_threads=threads) for way, f in ways.items()}
    found: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(windows):
        for way, timer in timers.items():
            found[way].append(timer.blocked_autorange(min_run_time=seconds).median)
    return found


def check(args: Namespace, device: torch.device) -> Iterator[dict]:
    """Whether the device computes what a CPU does, waits for nothing and is fast."""
    images, cudnn = synthetic.load("train", 32).subset(range(IMAGES)), torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic

    def row(what: str, figure: float, most: float) -> dict:
        told = {"check": what, "figure": f"{figure:.3g}", "at most": f"{most:g}"}
        return told | {"result": "pass" if figure <= most else "fail"}

    parts = [corruptions, batches, logits, signatures, training]
    parts += [recording, waiting, memory] if device.type == "cuda" else []
    for part in (*parts, speed):
        # Float32 is to be float32, and twice the same; but speed is that of the scripts.
        cudnn.allow_tf32, cudnn.deterministic = before if part is speed else (False, True)
        try:
            yield from itertools.starmap(row, part(args, device, images))
        except Exception as error:  # torch raises many types
            said = str(error).partition("\n")[0] or type(error).__name__
            yield row(f"{part.__name__}: {said}", math.inf, 0)


def corruptions(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """The pixels that a CPU gives; where they are drawn, their statistics by fresh draws."""
    clean = images.images

    def corrupted(name: str, seed: int, device: torch.device) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return corrupt(clean, name, 5, generator, device=device).double() - clean

    for name in CORRUPTIONS:
        mine, other, its = (corrupted(name, *how) for how in ((0, CPU), (1, CPU), (1, device)))
        if torch.equal(mine, other):
            yield f"{name}: mean difference of pixels", (mine - its).abs().mean().item(), 0.5
            continue
        mine, its = (torch.cat([x.mean((2, 3)), x.std((2, 3))], 1) for x in (mine, its))
        error = ((mine.var(0) + its.var(0)) / len(clean)).sqrt().clamp(min=1e-9)
        away = ((mine.mean(0) - its.mean(0)).abs() / error).max().item()
        yield f"{name}: mean and deviation of the change, standard errors", away, 5


def batches(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """An epoch is that of a CPU, wherever the images lie."""
    for augment in AUGMENTATIONS:
        form = (images, 64, augment)
        expected = torch.cat([batch for batch, _ in BatchLoader(*form, shuffle=True)])
        for resident in (True, False):
            loader = BatchLoader(*form, device, shuffle=True, resident=resident)
            away = (torch.cat([batch.cpu() for batch, _ in loader]) - expected).abs()
            share = 100 * (away > 1e-6).double().mean().item()  # a GPU divides by 255 less exactly
            yield f"{augment}, {place(resident)}: % of values that differ", share, 0.1


def place(resident: bool) -> str:
    return f"images on the {'device' if resident else 'host'}"


def has_bf16(device: torch.device) -> bool:
    """Whether `device` computes in bf16 at all; a GPU without it may fail to."""
    return device.type == "cpu" or engine.bf16_gain(device.type)[0]


@torch.no_grad()
def logits(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """In float32 and in bf16, beside a CPU's in float32; as shares of the largest."""
    batch = images.images[:32] / 255
    for arch in ("vgg16", "resnet18"):
        torch.manual_seed(0)
        model = build_model(arch, 10).eval()
        expected = model(batch)
        for amp, most in ((False, 1e-3), (True, 0.1))[: 1 + has_bf16(device)]:
            ours = engine.to_device(copy.deepcopy(model), device, amp)
            with torch.autocast(device.type, torch.bfloat16, amp):
                away = (ours(batch.to(device)).float().cpu() - expected).abs().max()
            what = f"{arch}, {'bf16' if amp else 'float32'}: difference of logits"
            yield what, (away / expected.abs().max()).item(), most


def signatures(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """What a ResNet-18 does with signatures that lie on the CPU, beside a CPU's."""
    found = []
    for where in (CPU, device):
        torch.manual_seed(0)
        model = build_model("resnet18", 10).eval()
        of_stem = {"conv1.weight": 0.1 * torch.randn_like(model.conv1.weight)}
        rws = RobustWeightSignature(of_stem, "resnet18", Method(), corruptions=("fog",))
        model = engine.to_device(model, where, False)
        with patch(model, rws):
            reestimate(model, [BatchLoader(images, 128, device=where)])
            statistics = running_statistics(model)
        chooser, mixed = bank.example(rws, model)
        logits = chooser.apply(model, mixed, torch.arange(len(mixed), device=where) % 31)
        parts = images.images, images.images.to(where)
        how = {"per_layer": False, "statistics": statistics, "steps": 5}
        learnt = learn(model, [rws], parts, images.labels, **how)
        each = [
            torch.cat([t.flatten() for t in statistics.values()]),
            logits,
            learnt.weights["fog"],
        ]
        found.append([tensor.double().cpu() for tensor in each])
    names = "re-estimated statistics of batch norm", "logits of a bank", "learnt weights"
    for what, mine, its in zip(names, *found, strict=True):
        yield f"{what}: difference", ((mine - its).abs().max() / mine.abs().max()).item(), 1e-2


def epochs(
    device: torch.device, images: ImageSet, amp: bool, recorded: bool = True, resident: bool = True
) -> Callable[[], engine.TrainStats]:
    """What trains a ResNet-18 for an epoch; its keyword "step" is the TrainStep."""
    torch.manual_seed(0)
    model = engine.to_device(build_model("resnet18", 10), device, amp)
    step = engine.TrainStep(model, engine.sgd(model, 0.01), amp=amp)
    step.rate = step.rate if recorded else None
    loader = BatchLoader(images, 64, "crop_flip", device, shuffle=True, resident=resident)
    return partial(engine.train_epoch, model, loader, step.optimizer, amp=amp, step=step)


def training(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """The loss of an epoch of plain steps beside a CPU's; then of one that goes on from there."""
    mine, its = (epochs(where, images, False, recorded=False) for where in (CPU, device))
    what = "training, float32: difference of the loss, as a share"
    yield what, abs(its().loss / mine().loss - 1), 0.01
    model, _, optimizer = its.args
    model.load_state_dict(mine.args[0].state_dict())
    optimizer.load_state_dict(mine.args[2].state_dict())
    its.keywords["step"] = engine.TrainStep(model, optimizer, amp=False)
    yield f"resumed {what}", abs(its().loss / mine().loss - 1), 0.01


def recording(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """Weights after an epoch of recorded steps beside plain ones; its last batch is smaller."""
    images = images.subset(range(IMAGES - 12))
    for amp, most in ((False, 1e-3), (True, 1e-2))[: 1 + has_bf16(device)]:
        runs = [epochs(device, images, amp, recorded) for recorded in (True, False)]
        for epoch in runs:
            epoch()
        if runs[0].keywords["step"].graph is None:
            raise RuntimeError("no step was recorded")
        mine, its = (torch.cat([p.flatten() for p in run.args[0].parameters()]) for run in runs)
        away = ((mine - its).norm() / its.norm()).item()
        yield f"recorded steps, {'bf16' if amp else 'float32'}: distance of weights", away, most


def waiting(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """No batch and no step waits for the GPU: torch raises where one does."""
    for resident in (True, False):
        epoch = epochs(device, images, has_bf16(device), resident=resident)
        epoch()  # records a step
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in epoch.args[1]:
                epoch.keywords["step"](*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield f"waits in an epoch, {place(resident)}", 0, 0


def memory(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """What it takes to corrupt a set that lies in host memory: a chunk at a time."""
    clean = images.images.repeat(400, 1, 1, 1)
    engine.free_memory()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    corrupt(clean, "fog", 5, device=device)
    most = torch.cuda.max_memory_allocated(device) - before
    yield f"GPU memory to corrupt {clean.nbytes / 1e6:.0f} MB of images, MB", most / 1e6, 600


def speed(args: Namespace, device: torch.device, images: ImageSet) -> Figures:
    """An epoch of training as the scripts do it, beside ways that are to be no faster."""
    amp = engine.use_amp(device, None)
    ours = epochs(device, images, amp)
    model, loader, optimizer = ours.args
    alone = [next(iter(loader))] * len(loader)
    steps = partial(ours.func, model, alone, optimizer, **ours.keywords)
    ways = {"ours": ours, "steps alone": steps}
    bounds = {"steps alone": 1.5}
    if device.type == "cuda":
        ways["images on the host"] = epochs(device, images, amp, resident=False)
        ways["plain steps"] = epochs(device, images, amp, recorded=False)
        bounds |= {"images on the host": 1.2, "plain steps": 1.1}
    seconds = {way: median(s) for way, s in measure(ways, args.seconds, args.windows).items()}
    rate = f"training at {len(images) / seconds['ours']:,.0f} images/s"
    for way, most in bounds.items():
        yield f"{rate}: time, as a share of {way}", seconds["ours"] / seconds[way], most
