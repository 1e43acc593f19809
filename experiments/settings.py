"""What reproduce.py is told: presets, flags, what follows from them, what doesn't go together."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from datasets import flags
from datasets.corruptions import CORRUPTIONS, FAMILIES
from datasets.images import CLASS_PARITIES
from models.layers import depth_order
from utils import arguments
from utils import checkpoint as ckpt
from utils.arguments import count, flag, number, several, switch
from utils.engine import choose_device
from utils.errors import InputError
from utils.learn import STEPS
from utils.quantize import check_levels
from utils.signature import Method


@dataclass(frozen=True)
class Preset:
    """How much of a study: length of the recipe, and defaults of --corruptions and of sweeps."""

    epochs: int
    decreasing_lr: str  # epochs after which lr × 0.1
    pretrain_epochs: int
    corruptions: tuple[str, ...]
    alphas: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1, 1.25)
    bits: tuple[int, ...] = (8, 4, 3, 2)
    every: int = 1  # of the numbers of layers, in a sweep
    lr: float = 0.01
    batch_size: int = 128
    train_images: int | None = None
    test_images: int | None = None
    learn_steps: int = STEPS  # of weights that are learnt
    union: bool = True  # train the model of data augmentation


TWO, THREE = ("gaussian_noise", "fog"), ("gaussian_noise", "motion_blur", "fog")
SIX = ("gaussian_noise", "impulse_noise", "motion_blur", "defocus_blur", "fog", "contrast")
PRESETS = {
    "paper": Preset(
        *(50, "20,40", 60, tuple(CORRUPTIONS)),
        alphas=(0, 0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4),
        bits=(8, 6, 4, 3, 2),
    ),
    "quick": Preset(3, "2", 12, SIX, every=2),
    "smoke": Preset(
        *(1, "1", 1, THREE, (0, 1), (4,)),
        **{"every": 99, "train_images": 256, "test_images": 100, "learn_steps": 2},
    ),
    # At the paper's lr 0.01 two short epochs drive θ_c too far from θ_std for patching.
    "demo": Preset(
        *(2, "1", 4, TWO),
        **{"lr": 0.002, "batch_size": 64, "train_images": 4000, "test_images": 1000},
        union=False,
    ),
}
DEMO = ["main", "--preset", "demo", "--dataset", "synthetic", "--arch", "vgg11"]
DEMO += ["--keep_num", "2", "--out", "results/demo"]


FLAGS = {
    "runs": flag("for models; reused", "DIR", default="runs"),
    "force": switch("train again what is there"),
    "title": flag("what to call the data in results (default: --dataset)"),
    "corruptions": several(
        "all, or these (default: the preset's)", "NAME", flags.corruption_or_all
    ),
    "preset": flag("how much: the full recipe, or less", choices=PRESETS, default="paper"),
    "pretrain_classes": flag(
        "make θ_pre here, on this half; study the other", choices=CLASS_PARITIES
    ),
    "pretrain_epochs": flag("of making θ_pre", "N", type=count()),
    "seeds": several("a study for each", "N", arguments.SEED, default=[0]),
    "repeat_corruptions": several("seeds after the first: only these", "NAME", str),
    "devices": flag("train on these at once: 0 1 are cuda:0 cuda:1", "D", nargs="+"),
    "list": switch("print the commands that train what is missing"),
    "keep_nums": several("swept (default: the preset's)", "K", count()),
    "alphas": several("swept (default: the preset's)", "A", number(0)),
    "bits": several("of a value, swept (default: the preset's)", "N", count(1, 16)),
    "groups": several("to compose (default: two of different families, and all)", "A+B", str),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every experiment."""
    arguments.add(parser, "runs force", FLAGS)
    arguments.add(parser, "out", help="for the results (default: under --runs)")
    arguments.add(parser, "device amp")
    data = parser.add_argument_group("data")
    names = "dataset image_size classes train_images test_images data severity frost_dir"
    arguments.add(data, names, flags.FLAGS)
    told = "read corrupted images from here where they are, but to train models"
    arguments.add(data, "corruption_data", flags.FLAGS, help=told, type=arguments.folder)
    arguments.add(data, "title corruptions", FLAGS)
    models = parser.add_argument_group("models")
    arguments.add(models, "arch pretrained pretrained_path checkpoint_key")
    names = "pretrain_classes pretrain_epochs preset seeds repeat_corruptions devices list"
    arguments.add(models, names, FLAGS)
    arguments.add(models, "epochs lr batch_size", default=None)
    target = parser.add_argument_group("second data set (consistency, transfer, choose)")
    second = {"prefix": "target_", "default": None}
    arguments.add(target, "dataset data image_size classes", flags.FLAGS, **second)
    arguments.add(target, "epochs", **second)
    arguments.add(target, "corruptions", FLAGS, **second)
    method = parser.add_argument_group("patching")
    kept = "quantization", "bn_float"  # --bits sweeps them
    arguments.add(method, " ".join(f for f in arguments.METHOD.split() if f not in kept))
    arguments.add(method, "keep_nums alphas bits groups", FLAGS)


def resolve(args: argparse.Namespace) -> None:
    """Fill in what the preset and other flags say."""
    preset = PRESETS[args.preset]
    args.dataset = datasets.base_name(args.dataset)
    for name, usual in vars(preset).items():
        if getattr(args, name, ...) is None:  # a flag that was not given
            setattr(args, name, list(usual) if isinstance(usual, tuple) else usual)
    for name in ("corruptions", "target_corruptions"):
        if "all" in (getattr(args, name) or ()):
            setattr(args, name, list(CORRUPTIONS))
    args.epochs, args.decreasing_lr = recipe(args.epochs)
    args.learn_steps = preset.learn_steps
    layers = len(depth_order(args.arch))
    if args.keep_nums is None:
        args.keep_nums = sorted({*range(1, layers + 1, preset.every), args.keep_num, layers})
    args.devices = [f"cuda:{d}" if d.isdigit() else d for d in args.devices or [args.device]]
    args.device = args.devices[0]
    pair = pair_of_families(args.corruptions)
    if args.groups is None:
        both = dict.fromkeys((tuple(pair), tuple(args.corruptions)))
        args.groups = ["+".join(group) for group in both if len(group) > 1]
    args.groups = [group.split("+") for group in args.groups]
    resolve_pretrained(args)
    if args.target_dataset is None and args.dataset == "synthetic" and args.classes is None:
        args.target_dataset, args.target_classes = "synthetic", "odd"  # its classes are few
    if args.target_dataset:
        args.target_dataset = datasets.base_name(args.target_dataset)
    args.target_corruptions = args.target_corruptions or pair


def recipe(epochs: int) -> tuple[int, str]:
    """Epochs, and those after which the learning rate falls: a preset's, or at 0.4 and 0.8."""
    known = {preset.epochs: preset.decreasing_lr for preset in PRESETS.values()}
    falls = dict.fromkeys(str(max(1, round(epochs * at))) for at in (0.4, 0.8))
    return epochs, known.get(epochs) or ",".join(falls)


def pair_of_families(names: Sequence[str]) -> list[str]:
    """The first corruption, and the next of another family (or just the next)."""
    others = sorted(names[1:], key=lambda name: FAMILIES.get(name) == FAMILIES.get(names[0]))
    return [*names[:1], *others[:1]]


def data_tag(args: argparse.Namespace, classes: str | None) -> str:
    """The data set in a folder's name, e.g. "tinyimagenet-32-odd"."""
    root = Path(args.data).resolve().name if args.dataset == "folder" and args.data else None
    parts = (args.dataset, root, args.image_size, classes)
    return "-".join(str(part) for part in parts if part is not None)


def resolve_pretrained(args: argparse.Namespace) -> None:
    """Where θ_pre is: the file named, or one that the study makes."""
    named = arguments.pretrained_source(args)
    if args.pretrain_classes:
        if named:
            raise InputError("--pretrain_classes makes θ_pre; --pretrained names one: choose")
        if args.classes == args.pretrain_classes:
            raise InputError(f"--classes {args.classes} is the half that θ_pre is trained on")
        args.classes = next(half for half in CLASS_PARITIES if half != args.pretrain_classes)
    args.pretrains = bool(args.pretrain_classes) or (args.dataset == "synthetic" and not named)
    args.pretrained, args.pretrained_path = named or ckpt.IMAGENET, None
    if args.pretrains:
        tag = data_tag(args, args.pretrain_classes or "pretrain")
        few = "" if args.train_images is None else f"-{args.train_images}"
        name = f"{tag}{few}_{args.arch}_{args.pretrain_epochs}ep.pth.tar"
        args.pretrained = str(Path(args.runs) / "pretrained" / name)


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that don't go together, before any work."""
    for name in args.repeat_corruptions or ():
        if name not in args.corruptions:
            raise InputError(f"--repeat_corruptions {name}: is not among --corruptions")
    if args.repeat_corruptions and len(args.seeds) == 1:
        raise InputError("--repeat_corruptions is for seeds after the first; name several --seeds")
    for name in ("target_data", "target_image_size", "target_classes", "target_epochs"):
        if getattr(args, name) is not None and args.target_dataset is None:
            raise InputError(f"--{name} is of a second data set; name --target_dataset")
    if args.corruption_data and args.classes:
        raise InputError(f"--corruption_data holds all classes, not the {args.classes} ones alone")
    for group in args.groups:
        if len(set(group)) < max(2, len(group)) or not set(group) <= set(args.corruptions):
            raise InputError(f"--groups {'+'.join(group)}: two or more of --corruptions, as A+B")
    if args.experiment == "compose" and not args.groups:
        raise InputError("compose needs at least two --corruptions")
    if args.experiment in ("consistency", "transfer", "choose") and len(args.seeds) > 1:
        raise InputError(f"{args.experiment} measures one seed; --seeds names {len(args.seeds)}")
    if args.experiment == "consistency" and args.target_dataset is None:
        raise InputError("consistency needs a second data set: name --target_dataset")
    of_bits = args.experiment in ("quantization", "all")
    if (args.scheme != "linear" or args.per_channel) and not of_bits:
        raise InputError("--quantization_type and --per_channel are of the quantization experiment")
    for k in (*args.keep_nums, args.keep_num):
        Method.from_args(args, keep_num=k)
    for bits in args.bits:
        check_levels(2**bits, args.scheme)
    for device in args.devices:
        choose_device(device, probe=len(args.devices) == 1)  # several: each opened by its process
