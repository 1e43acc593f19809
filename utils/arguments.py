"""Flags: a line for each, whose type checks the value and words the error.

A script names the flags it takes; those of the data are in datasets/flags.py. `-` and `_` are the
same in every flag.
"""

import argparse
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from models import ARCHS
from models.layers import LAYERS
from utils.checkpoint import BEST_RA, IMAGENET
from utils.errors import InputError
from utils.quantize import METHODS


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and each flag's default unless it is empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, []) or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints look like every other error here: one line, exit 2."""

    def __init__(self, description: str | None = None, **options: object) -> None:
        options |= {"formatter_class": Formatter, "allow_abbrev": False}
        super().__init__(description=description, **options)
        self._negative_number_matcher = re.compile(r"-(\.?\d|inf)")  # until 3.13 without 1e-3

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for arg in args:
            if arg != arg.encode(errors="replace").decode():
                self.error(f"{arg!a} is not UTF-8, rename it")
        return super().parse_known_args([_underscores(arg) for arg in args], namespace)

    def error(self, message: str) -> None:
        said = re.sub(r"^argument (--\w+)(?:/--\w+)*: (?=\S+: )", r"\1 ", message)
        raise InputError(f"{said.removeprefix('argument ')} (see {self.prog} --help)")


def _underscores(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


# ---- types ------------------------------------------------------------------------------------


def number(
    least: float, most: float = math.inf, kind: Callable = float
) -> Callable[[str], int | float]:
    """A type: a finite number (kind int: a whole one) from `least` to `most`."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text}: must be {what}") from None
        if not least <= value <= most or math.isinf(value):
            span = f"{least} to {most}"
            if most == math.inf:
                span = "finite" if least == -most else f"at least {least}, and finite"
            raise argparse.ArgumentTypeError(f"{text}: must be {span}")
        return value

    return parse


def count(least: int = 1, most: float = math.inf) -> Callable[[str], int]:
    """A type: a whole number from `least` to `most`."""
    return number(least, most, int)


def epochs(text: str) -> str:
    """A type: epochs separated by commas, "20,40", kept as text."""
    if not re.fullmatch(r"\s*\d*\s*(,\s*\d*\s*)*", text):
        raise argparse.ArgumentTypeError(f"{text}: epochs separated by commas, e.g. 20,40")
    return text


def folder(text: str) -> str:
    """A type: a folder that exists."""
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"{text}: no such folder")
    return text


SEED = count(0, 2**63 - 1)


class Distinct(argparse.Action):
    """Keep a list of values, none of them twice."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        twice = [value for value in values if values.count(value) > 1]
        if twice:
            parser.error(f"--{self.dest} names {twice[0]} twice")
        setattr(namespace, self.dest, values)


class OnOff(argparse.Action):
    """--FLAG and --no_FLAG."""

    def __init__(self, option_strings: list[str], dest: str, **options: object) -> None:
        super().__init__([*option_strings, f"--no_{dest}"], dest, nargs=0, **options)

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        setattr(namespace, self.dest, not option_string.startswith("--no_"))


# ---- the table --------------------------------------------------------------------------------


def flag(help: str, metavar: str | None = None, **options: object) -> dict:
    """A line of a table of flags: what `add_argument` is told."""
    return {"help": help, **({"metavar": metavar} if metavar else {}), **options}


def switch(help: str, **options: object) -> dict:
    """A flag without a value."""
    return flag(help, action="store_true", **options)


def optional(help: str, const: str) -> dict:
    """A flag whose FILE may be left out; `const` stands for it then."""
    return flag(help, "FILE", nargs="?", const=const)


def several(help: str, metavar: str, type: Callable, **options: object) -> dict:
    """A flag with one value or more, none twice."""
    return flag(help, metavar, type=type, nargs="+", action=Distinct, **options)


FLAGS = {
    # models
    "arch": flag("architecture", default="vgg16", choices=ARCHS),
    "pretrained": optional(
        "θ_pre, the pretrained weights; without a file torchvision's ImageNet weights", IMAGENET
    ),
    "pretrained_path": flag("the file of --pretrained", "FILE"),
    "checkpoint_key": flag("where in foreign checkpoints the weights are, e.g. model_ema", "KEY"),
    "keep_head": switch(
        "start from the head of --pretrained too: train a model of these classes on"
    ),
    "base_model": flag("θ_std: the standard model", "FILE"),
    "patched_model": flag("θ_target, the model to patch, if not --base_model", "FILE"),
    "corruption_model_root": flag(
        f"θ_c: a folder per corruption with its {BEST_RA}; with --choose that of one model "
        "trained on all, fog+snow",
        "DIR",
    ),
    # recipe
    "lr": flag("initial learning rate", type=number(0), default=0.01),
    "momentum": flag("of SGD", type=number(0), default=0.9),
    "weight_decay": flag("of all parameters", type=number(0), default=5e-4),
    "batch_size": flag("images per step", type=count(), default=128),
    "epochs": flag("passes over the training images", "N", type=count(), default=50),
    "decreasing_lr": flag("epochs after which lr × 0.1", "E,E", type=epochs, default="20,40"),
    "seed": flag("of everything that is drawn", "N", type=SEED, default=0),
    # where and how it runs
    "device": flag("auto, cpu, cuda, cuda:1, …", default="auto"),
    "amp": flag(
        "bf16 autocast, or float32 (on CUDA with convolutions in TF32, but for --deterministic); "
        "default: bf16 where the hardware gains from it",
        action=OnOff,
    ),
    "compile": switch("let torch.compile make the model's kernels"),
    "deterministic": switch("same seed, same bits on CUDA too, which is slower (CPUs: anyway)"),
    "save_dir": flag("for the checkpoints", "DIR", required=True),
    "resume": optional(
        "go on from FILE, or from --save_dir if it holds a checkpoint, else start", "auto"
    ),
    "print_freq": flag("between loss updates", "STEPS", type=count(), default=100),
    # the method: the fields of utils.signature.Method
    "keep_num": flag("shallowest layers kept", "K", type=count(), default=7),
    "layers": flag("ablation: which layers are kept", choices=LAYERS, default="shallowest"),
    "no_projection": flag(
        "ablation: keep the direction of clean fine-tuning in (plain task arithmetic)",
        dest="project",
        action="store_false",
    ),
    "quantization": flag("quantize each tensor to N levels", "N", dest="levels", type=int),
    "quantization_type": flag(
        "spacing of the levels", dest="scheme", choices=METHODS, default="linear"
    ),
    "per_channel": switch("a range of levels per output channel"),
    "bn_float": switch("keep the batch-norm tensors of a ResNet in float32"),
    # patching
    "alpha": flag(
        "strength; each of n signatures gets A/n; below 0 it takes their direction away",
        "A",
        type=number(-math.inf),
        nargs="+",
        default=[1.0],
    ),
    "finetune_alpha": flag(
        "a strength for each of --corruption, in its order; wins over --alpha",
        "A",
        type=number(0),
        nargs="+",
    ),
    "signature": flag(
        "patch from these .rws files; no --pretrained and no robust models are needed",
        "FILE",
        nargs="+",
        default=[],
    ),
    "choose": flag(
        "let the signatures choose, for N images in a row at a time; 1: for each image",
        "N",
        type=count(1, 256),
    ),
    "learn_alpha": flag(
        "learn the strength of each signature, or of each of its layers, on validation images",
        choices=("signature", "layer"),
    ),
    "unlabeled": switch("learn them without labels, from the entropy of predictions"),
    "reestimate": switch(
        "re-estimate the statistics of batch norm on training images, though --signature has them"
    ),
    "save_signature": flag(
        "write each signature to DIR/CORRUPTION.rws; with --learn_alpha their sum, composed.rws",
        "DIR",
    ),
    "save_log": flag("accumulate TA and RA over runs in FILE; this run's go to FILE.json", "FILE"),
    "baseline_log": flag("a --save_log whose standard model is the baseline of mCE", "FILE"),
    "save_model": flag("write the patched model, with torchvision's keys", "FILE"),
    "test_all_corruptions": switch("measure RA on all 19, not only these"),
    # files
    "out": flag("the folder to write to", "DIR"),
    "overwrite": switch("replace what is there"),
}
METHOD = "keep_num layers no_projection quantization quantization_type per_channel bn_float"


def add(
    group: argparse._ActionsContainer,
    names: str,
    table: Mapping[str, dict] = FLAGS,
    prefix: str = "",
    **changes: object,
) -> None:
    """Add the flags `names`, separated by spaces, as `table` has them but for `changes`.

    prefix: in front of every name. An entry may hold "also": other spellings.
    """
    for name in names.split():
        options = {**table[name], **changes}
        also = options.pop("also", ())
        group.add_argument(f"--{prefix}{name}", *also, **options)


def pretrained_source(args: argparse.Namespace) -> str | None:
    """The file that --pretrained and --pretrained_path name, IMAGENET for torchvision's, or None.

    Raises InputError when they name two.
    """
    named = args.pretrained if args.pretrained != IMAGENET else None
    if named and args.pretrained_path and named != args.pretrained_path:
        both = f"--pretrained {named} and --pretrained_path {args.pretrained_path}"
        raise InputError(f"{both} name two files")
    return args.pretrained_path or args.pretrained
