"""How fast each stage is on this machine, beside the classic way of doing it.

    python benchmark.py train --data data/cifar10      # ours, the ceiling, the classic way
    python benchmark.py evaluate --dataset synthetic --arch resnet50 --device cuda
    python benchmark.py signature                      # patch, project, store
    python benchmark.py check --device cuda            # whether a new kind of GPU computes right

The ways of a comparison take turns, a window of time each. The table has the median over the
windows, their spread (largest less smallest) and speeds relative to the best of a group.
ours: a BatchLoader and fused SGD, in each arithmetic and memory format; one is the default here.
ceiling: the same step on one batch that stays on the device; what ours lacks to it, batches cost.
classic: Pillow image by image in a DataLoader, from decoded images and with workers that stay up;
contiguous float32, plain SGD, loss and accuracy read in every step.
"""

import copy
import itertools
import os
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from torchvision import transforms
from tqdm import tqdm

import datasets
from datasets import bank, flags, loader, synthetic
from datasets.corrupted import Copies, corrupted_set
from datasets.corruptions import CORRUPTIONS, corrupt
from datasets.images import ImageSet
from datasets.loader import BatchLoader, augmentation_for, evaluation_batches
from datasets.normalization import normalization
from device_checks import Ways, check, measure
from models import build_model
from utils import arguments, engine, report
from utils.arguments import count, flag, number
from utils.errors import script_errors
from utils.files import check_writable, write_text
from utils.signature import Method, RobustWeightSignature, patch, project_out

GROUPS = ("classic", "ceiling", "one by one", "fixed")  # ways by the beginning of their names
RESAMPLED = ("gaussian_noise", "glass_blur", "snow", "jpeg_compression")  # one of each family
# A batch learnt by heart has gradients that are denormal numbers, which take a CPU longer.
TINY_LR = 1e-6


def compare(args: Namespace, what: dict, ways: Ways, images: dict | None = None) -> Iterator[dict]:
    """A row for each way: its speed, its spread, and how much faster it is than the best of GROUPS.

    images: how many each way handles in a call; the speed is then images/s, else ms per call.
    """
    times = measure(ways, args.seconds, args.windows)
    each = {way: median(times[way]) / (images[way] if images else 1) for way in ways}
    for way, s in each.items():
        row = {**what, "way": way} | ({"images/s": 1 / s} if images else {"ms": 1e3 * s})
        row["spread, %"] = 100 * (max(times[way]) - min(times[way])) / median(times[way])
        for group in GROUPS:
            if best := min((each[w] for w in ways if w.startswith(group)), default=None):
                row[f"× {group}"] = best / s
        yield row | {"each": times[way]}


def compare_epochs(
    args: Namespace, device: torch.device, batches: BatchLoader, ours: Callable, classic: Ways
) -> Iterator[dict]:
    """Rows of ours(batches, in bf16?, memory format), its ceiling, and `classic` on these images.

    Ours in every arithmetic and memory format; "default" is what the scripts choose here.
    """
    chosen = (amp := engine.use_amp(device, args.amp)), engine.memory_format(device, amp)
    slow = "no bf16" in engine.bf16_gain(device.type)[1]  # it would be emulated
    amps = (args.amp,) if args.amp is not None else (False,) if slow else (False, True)
    ways = {}
    for amp, layout in itertools.product(amps, (torch.contiguous_format, torch.channels_last)):
        name = f"ours, {'bf16' if amp else 'float32'} {engine.layout_words(layout)}"
        name += ", default" if (amp, layout) == chosen else ""
        ways[name] = ours(batches, amp, layout)
    first = next(iter(batches))
    ways["ceiling"] = ours([first] * len(batches), *chosen)
    ways |= classic
    handled = dict.fromkeys(ways, sum(map(batches.whole_batch, range(len(batches)))))
    handled["ceiling"] = len(batches) * len(first[1])
    yield from compare(args, {"model": args.arch}, ways, handled)


def load_images(args: Namespace, split: str = "train") -> ImageSet:
    return datasets.load(args.dataset, args.data, split, args.image_size, limit=args.images)


def new_model(args: Namespace, images: ImageSet, seed: int = 0) -> nn.Module:
    """Random weights from `seed`. Raises InputError for images too small for --arch."""
    engine.check_side(args.arch, images.images)
    torch.manual_seed(seed)
    return build_model(args.arch, len(images.classes), *normalization(images.name, images))


def our_training(
    start: nn.Module, device: torch.device, batches: Iterable, amp: bool, layout: object = None
) -> Callable:
    """An epoch of training as train_corruption.py does it, of a copy of `start`."""
    layout = layout or engine.memory_format(device, amp)
    model = engine.to_device(copy.deepcopy(start), device, amp).to(memory_format=layout)
    optimizer = engine.sgd(model, TINY_LR)
    step = engine.TrainStep(model, optimizer, amp=amp)
    return partial(engine.train_epoch, model, batches, optimizer, amp=amp, step=step)


def classic_ways(
    args: Namespace, device: torch.device, images: ImageSet, augment: str | None, step: Callable
) -> dict[str, Callable[[], list]]:
    """For each of --workers an epoch of step(images, labels), which gives what those give."""
    side = images.images.shape[-1]
    crop = transforms.RandomCrop(side, max(1, round(loader.CROP_PADDING * side / 32)))
    first = {"crop_flip": crop, "rotate_flip": transforms.RandomRotation(loader.MAX_ANGLE)}
    steps = [first[augment], transforms.RandomHorizontalFlip()] if augment else []
    transform = transforms.Compose([transforms.ToPILImage(), *steps, transforms.ToTensor()])
    pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
    pictures = list(zip(pixels, images.labels.tolist(), strict=True))
    form = {
        "batch_size": args.batch_size,
        "shuffle": bool(augment),
        "drop_last": bool(augment) and len(images) % args.batch_size == 1,  # for batch norm
        "collate_fn": partial(classic_batch, transform),
        "pin_memory": device.type == "cuda",
    }
    ways = {}
    for n in args.workers:
        batches = DataLoader(pictures, num_workers=n, persistent_workers=n > 0, **form)
        ways[f"classic, {n} workers"] = partial(classic_epoch, batches, step, device)
    return ways


def classic_batch(transform: Callable, pictures: list) -> list[Tensor]:
    """Images float32 (n, 3, H, W) in [0, 1], labels int64 (n,): each picture by `transform`."""
    return default_collate([(transform(pixels), label) for pixels, label in pictures])


def classic_epoch(batches: Iterable, step: Callable, device: torch.device) -> list:
    """What `step` gives for each batch, moved to the device."""
    moved = ([t.to(device, non_blocking=True) for t in batch] for batch in batches)
    return [step(images, labels) for images, labels in moved]


def classic_training(model: nn.Module, lr: float = TINY_LR) -> Callable:
    """A training step on (images, labels) that gives the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    model.train()

    def step(images: Tensor, labels: Tensor) -> float:
        logits = model(images)
        loss = nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        (logits.argmax(1) == labels).float().mean().item()
        return loss.item()

    return step


# ---- stages: rows, from the settings and the device -----------------------------------------


def training(args: Namespace, device: torch.device) -> Iterator[dict]:
    """An epoch of training."""
    images = load_images(args)
    augment = augmentation_for(images.name)
    classic = new_model(args, images).to(device)
    batches = BatchLoader(images, args.batch_size, augment, device, shuffle=True)
    ours = partial(our_training, copy.deepcopy(classic), device)
    ways = classic_ways(args, device, images, augment, classic_training(classic))
    yield from compare_epochs(args, device, batches, ours, ways)


def evaluation(args: Namespace, device: torch.device) -> Iterator[dict]:
    """An evaluation; ours and the ceiling in batches of the size that suits the device."""
    images = load_images(args)
    classic = new_model(args, images).eval().to(device)

    def ours(batches: Iterable, amp: bool, layout: torch.memory_format) -> Callable:
        model = engine.to_device(copy.deepcopy(classic), device, amp).to(memory_format=layout)
        return partial(engine.evaluate, model, batches, amp=amp)

    @torch.no_grad()
    def step(images: Tensor, labels: Tensor) -> int:
        return (classic(images).argmax(1) == labels).sum().item()

    ways = classic_ways(args, device, images, None, step)
    yield from compare_epochs(args, device, evaluation_batches(images, device), ours, ways)


def loading(args: Namespace, device: torch.device) -> Iterator[dict]:
    """An epoch of augmented training batches alone, float32 on the device."""
    images = load_images(args)
    augment = augmentation_for(images.name)
    batches = BatchLoader(images, args.batch_size, augment, device, shuffle=True)
    ways = {"ours": lambda: [None for _ in batches]}
    ways |= classic_ways(args, device, images, augment, lambda images, labels: None)
    yield from compare(args, {"data": images.name}, ways, dict.fromkeys(ways, len(images)))


def accuracy(args: Namespace, device: torch.device) -> Iterator[dict]:
    """Training from the same random weights, mean ± standard deviation over --seeds."""
    images = load_images(args)
    test = evaluation_batches(load_images(args, "test"), device)
    augment, amp = augmentation_for(images.name), engine.use_amp(device, args.amp)
    found: dict[tuple[int, str], list] = {}  # (epoch, way) → loss and accuracy of each seed
    for seed in args.seeds:
        classic = new_model(args, images, seed).to(device)
        model = engine.to_device(copy.deepcopy(classic), device, amp)
        batches = BatchLoader(images, args.batch_size, augment, device, shuffle=True, seed=seed)
        optimizer, step = engine.sgd(model, args.lr), classic_training(classic, args.lr)
        slow, *_ = classic_ways(args, device, images, augment, step).values()
        for epoch in range(1, args.epochs + 1):
            stats = engine.train_epoch(model, batches, optimizer, amp=amp, title=f"epoch {epoch}")
            ours = stats.loss, engine.evaluate(model, test, amp=amp)
            found.setdefault((epoch, "ours"), []).append(ours)
            theirs = fmean(slow()), engine.evaluate(classic, test, amp=False)
            found.setdefault((epoch, "classic"), []).append(theirs)
    for (epoch, way), points in found.items():
        losses, accuracies = (report.spread(each, 3) for each in zip(*points, strict=True))
        row = {"epoch": epoch, "way": way, "loss": losses, "test accuracy, %": accuracies}
        yield row | {"each": points}


def corruptions(args: Namespace, device: torch.device) -> Iterator[dict]:
    """Corrupting a batch, and with the same function image by image."""
    made = synthetic.load("test", args.size).images
    images = made[torch.arange(args.images) % len(made)].to(device)
    batches = {"batched": images, "one by one": images[:1]}
    sizes = {way: len(batch) for way, batch in batches.items()}
    for name in args.corruption:
        ways = {way: partial(corrupt, b, name, args.severity) for way, b in batches.items()}
        yield from compare(args, {"corruption": name}, ways, sizes)


def resampling(args: Namespace, device: torch.device) -> Iterator[dict]:
    """An epoch of training on fixed images, and on a corruption drawn anew in every epoch."""
    images = load_images(args)
    model, amp = new_model(args, images), engine.use_amp(device, args.amp)
    form = (args.batch_size, augmentation_for(images.name), device, True)

    def draw(name: str, epoch: int) -> Tensor:
        how = Copies(args.severity, epoch, None, args.frost_dir, device, resident=True)
        return corrupted_set(images, name, "train", how).images

    loaders = {"fixed": BatchLoader(images, *form)}
    for name in args.corruption:
        loaders[f"{name} anew"] = BatchLoader(images, *form, resample=partial(draw, name))
    ways = {way: our_training(model, device, b, amp) for way, b in loaders.items()}
    yield from compare(args, {"model": args.arch}, ways, dict.fromkeys(ways, len(images)))


def project_by_matrix(delta: Tensor, base: Tensor) -> Tensor:
    """`project_out` by the n×n matrix of the projection on `base`, in 4n² bytes."""
    matrix = torch.outer(base.flatten(), base.flatten()).div_(base.square().sum())
    return delta - (matrix @ delta.flatten()).view_as(delta)


def signature(args: Namespace, device: torch.device) -> Iterator[dict]:
    """What one signature costs, beside whole models and a projection by an n×n matrix."""
    method = Method.from_args(args)
    model, *others = (build_model(args.arch, num_classes=10).to(device) for _ in range(4))
    θ_pre, θ_std, θ_c = (other.state_dict() for other in others)
    extract = partial(RobustWeightSignature.extract, θ_pre, θ_std, θ_c, method=method)
    rws, key = extract(), method.keys(args.arch)[0]
    deltas = θ_c[key] - θ_pre[key], θ_std[key] - θ_pre[key]
    six, mixed = bank.example(rws, model.eval())
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "one.rws"
        size = rws.save(file)
        steps = {
            "patch, take off": {
                "RWS": lambda: patch(model, rws).remove(),
                "classic: load θ_c, θ_std": lambda: [*map(model.load_state_dict, (θ_c, θ_std))],
            },
            f"project {key}, {deltas[0].numel():,} values": {
                "RWS": partial(project_out, *deltas),
                "classic: n×n matrix": partial(project_by_matrix, *deltas),
            },
            f"extract {len(rws.tensors)} tensors, quantize": {"RWS": extract},
            f"predict {len(mixed)} images": {
                "RWS, each its own of six or none": partial(six.predict, model, mixed),
                "classic: a plain forward pass": torch.no_grad()(partial(model, mixed)),
            },
            f"save {size:,} bytes": {"RWS": partial(rws.save, file)},
            f"load {size:,} bytes": {"RWS": partial(RobustWeightSignature.load, file)},
        }
        for step, ways in steps.items():
            yield from compare(args, {"step": step}, ways)


# ---- command line ---------------------------------------------------------------------------

WORKERS = sorted({0, min(16, os.cpu_count() or 1)})
DATA = "dataset image_size data images batch_size"
FLAGS = {
    **arguments.FLAGS,
    **flags.FLAGS,
    "batch_size": arguments.FLAGS["batch_size"] | {"type": count(2)},  # batch norm needs two
    "images": flag("at most; of two defaults the first is a CPU's", "N", type=count(2)),
    "size": flag("side of the images", type=int, choices=(32, 64), default=32),
    "workers": flag("of DataLoader, a line each", type=count(0), nargs="+", default=WORKERS),
    "seeds": flag("a run each", "N", type=arguments.SEED, nargs="+", default=[0, 1, 2]),
    "threads": flag("CPU threads of torch", "N", type=count(), default=torch.get_num_threads()),
    "windows": flag("measurements; the median counts", "N", type=count(), default=5),
    "seconds": flag("length of a window", "S", type=number(0), default=0.5),
}
STAGES = {
    "train": (training, f"arch amp workers {DATA}"),
    "evaluate": (evaluation, f"arch amp workers {DATA}"),
    "loader": (loading, f"workers {DATA}"),
    "corruptions": (corruptions, "corruption severity size images"),
    "signature": (signature, "arch keep_num quantization quantization_type"),
    "resample": (resampling, f"arch amp corruption severity frost_dir {DATA}"),
    "accuracy": (accuracy, f"arch amp workers epochs lr seeds {DATA}"),
    "check": (check, ""),
}
DEFAULTS = {
    "train": {"images": (512, 50_000)},
    "evaluate": {"images": (2_000, 10_000)},
    "loader": {"images": (10_000, 50_000)},
    "corruptions": {"images": (2_048, 16_384), "corruption": CORRUPTIONS},
    "signature": {"keep_num": 5, "levels": 16},
    "resample": {"images": (1_024, 50_000), "corruption": RESAMPLED, "dataset": "synthetic"},
    "accuracy": {"dataset": "synthetic", "arch": "resnet18", "epochs": 4, "lr": 0.02},
}


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="COMMAND")
    for name, (function, names) in STAGES.items():
        command = stages.add_parser(name, help=function.__doc__, description=function.__doc__)
        arguments.add(command, f"{names} device threads windows seconds out", FLAGS)
        command.set_defaults(**DEFAULTS.get(name, {}))
    args = parser.parse_args(argv)
    if args.out:
        check_writable(args.out)
    return args


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Measure, print the table, write --out; gives the rows."""
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    device = engine.choose_device(args.device)
    if isinstance(getattr(args, "images", None), tuple):
        args.images = args.images[device.type != "cpu"]
    function, _ = STAGES[args.stage]
    report.header("benchmark.py", vars(args) | {"device": report.device_name(device)})
    rows = list(tqdm(function(args, device), desc=args.stage, unit=" rows", disable=None))
    columns = list(dict.fromkeys(c for row in rows for c in row if c != "each"))
    cells = [[_shown(row.get(column)) for column in columns] for row in rows]
    table = f"{report.markdown_table(columns, cells)}\n\n{function.__doc__}"
    print(table)
    if args.out:
        facts = report.provenance(device) | {"cpu": report.device_name(torch.device("cpu"))}
        told = "\n".join(f"- {name}: {fact}" for name, fact in facts.items())
        write_text(Path(args.out) / "table.md", f"{table}\n\n{told}\n")
        results = {"rows": rows, "arguments": vars(args), **facts}
        report.write_json(Path(args.out) / "results.json", results)
    return rows


def _shown(value: object) -> object:
    """A float with three digits or more."""
    if not isinstance(value, float):
        return value
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


if __name__ == "__main__":
    with script_errors():
        raise SystemExit(any(row.get("result") == "fail" for row in main()))
