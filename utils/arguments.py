"""Flags that several scripts share, with one meaning and one check each."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import datasets
from datasets.corruptions import CORRUPTIONS
from datasets.images import HALVES, ImageSet
from utils.checkpoint import IMAGENET
from utils.errors import InputError, suggest


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The script's docstring as it stands, and each flag's default unless it is empty."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default in (None, False, []):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse whose complaints look like every other error here: one line, exit 2."""

    def __init__(self, description: str | None = None, **options: object) -> None:
        options |= {"formatter_class": HelpFormatter, "allow_abbrev": False}
        super().__init__(description=description, **options)

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_dataset(group: argparse._ActionsContainer) -> None:
    """--dataset, --image_size."""
    group.add_argument(
        "--dataset",
        default="cifar10",
        metavar="NAME",
        help=f"{', '.join(datasets.DATASETS)}; -c at the end names the corrupted set",
    )
    group.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="resize images to this side at decoding"
    )


def add_subset(group: argparse._ActionsContainer) -> None:
    """--classes, --train_images, --test_images: less than the whole data set."""
    group.add_argument(
        "--classes", choices=HALVES, help="use every other class only, from the first or second on"
    )
    group.add_argument(
        "--train_images", type=int, metavar="N", help="train on so many, evenly spaced"
    )
    group.add_argument(
        "--test_images", type=int, metavar="N", help="validate and test on so many each"
    )


def load_images(args: argparse.Namespace, root: str | None, split: str) -> ImageSet:
    """The clean split "train", "val" or "test" at `root`, as add_dataset and add_subset say."""
    limit = args.train_images if split == "train" else args.test_images
    if limit is not None and limit < 1:
        flag = "train_images" if split == "train" else "test_images"
        raise InputError(f"--{flag} {limit}: must be at least 1")
    name = datasets.base_name(args.dataset)
    return datasets.load(name, root, split, args.image_size, args.classes, limit)


def add_corruption(group: argparse._ActionsContainer) -> None:
    """--severity (also in the original's spelling), --frost_dir."""
    group.add_argument(
        "--severity",
        "--serverity",
        type=int,
        default=5,
        metavar="1…5",
        help="of the corrupted images",
    )
    group.add_argument(
        "--frost_dir",
        metavar="DIR",
        help="the original frost photographs; without it a procedural texture stands in",
    )


def add_pretrained(group: argparse._ActionsContainer) -> None:
    """--pretrained [FILE], --pretrained_path FILE."""
    group.add_argument(
        "--pretrained",
        nargs="?",
        const=IMAGENET,
        metavar="FILE",
        help="θ_pre, the pretrained weights; without a file torchvision's ImageNet weights",
    )
    group.add_argument("--pretrained_path", metavar="FILE", help="the file of --pretrained")


def pretrained_source(args: argparse.Namespace) -> str | None:
    """The checkpoint file that the two flags name, IMAGENET for torchvision's, None for neither."""
    named = args.pretrained if args.pretrained != IMAGENET else None
    if named and args.pretrained_path and named != args.pretrained_path:
        raise InputError(
            f"--pretrained {named} and --pretrained_path {args.pretrained_path} name two files"
        )
    return args.pretrained_path or args.pretrained


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device, --amp/--no-amp."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="bf16 autocast; by itself on where the hardware has bf16",
    )


def check_corruptions(names: Iterable[str]) -> None:
    """Raise InputError for an unknown or repeated --corruption."""
    names = list(names)
    for name in names:
        if name not in CORRUPTIONS:
            raise InputError(
                f"--corruption {name}: unknown{suggest(name, CORRUPTIONS)}; "
                f"known: {', '.join(CORRUPTIONS)}"
            )
        if names.count(name) > 1:
            raise InputError(f"--corruption names {name} twice")


def check_severity(severity: int) -> None:
    """Raise InputError unless `severity` is 1 … 5."""
    if severity not in range(1, 6):
        raise InputError(f"--severity {severity}: must be 1, 2, 3, 4 or 5")


def check_seed(seed: int) -> None:
    """Raise InputError unless torch takes `seed`."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed {seed}: must be 0 to 2**63 − 1")


def check_frost(frost_dir: str | None) -> None:
    """Raise InputError for a --frost_dir that is no folder."""
    if frost_dir is not None and not Path(frost_dir).is_dir():
        raise InputError(f"--frost_dir {frost_dir}: no such folder")


def check_at_least(args: argparse.Namespace, **lowest: float) -> None:
    """Raise InputError for a flag whose value is below its `lowest`, infinite or not a number."""
    for flag, low in lowest.items():
        if not low <= getattr(args, flag) < float("inf"):
            raise InputError(f"--{flag} {getattr(args, flag)}: must be at least {low}, and finite")


def frost_note(corruptions: Iterable[str], frost_dir: str | None) -> dict[str, str]:
    """A header line saying which frost texture is used, where frost is among the corruptions."""
    if "frost" not in corruptions:
        return {}
    return {"frost": f"photographs in {frost_dir}" if frost_dir else "procedural texture"}
