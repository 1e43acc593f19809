"""The flags that say which data, clean and corrupted, and the images they name."""

import argparse
from collections.abc import Callable, Iterable, Sequence

import datasets
from datasets import corruptions
from datasets.corruptions import CORRUPTIONS, SEVERITIES
from datasets.images import CLASS_PARITIES, ImageSet
from utils.arguments import count, flag, folder, several, switch
from utils.errors import InputError


def checked(check: Callable[[str], object]) -> Callable[[str], str]:
    """A type: a text that `check` accepts; it raises InputError for others."""

    def parse(text: str) -> str:
        try:
            check(text)
        except InputError as error:
            raise argparse.ArgumentTypeError(f"{text}: {error}") from None
        return text

    return parse


corruption_name = checked(lambda name: corruptions.check(name, 1))


def corruption_or_all(text: str) -> str:
    """A type: one of the 19 corruptions, or "all"."""
    return text if text == "all" else corruption_name(text)


FLAGS = {
    "dataset": flag(
        f"{', '.join(datasets.DATASETS)}; -c at the end names the corrupted set",
        "NAME",
        type=checked(datasets.base_name),
        default="cifar10",
    ),
    "image_size": flag(
        "resize images to this side at decoding", "PIXELS", type=count(1, datasets.MAX_SIDE)
    ),
    "classes": flag(
        "use every other class only, from the first or second on", choices=CLASS_PARITIES
    ),
    "train_images": flag("train on so many, evenly spaced", "N", type=count()),
    "test_images": flag("validate and test on so many each", "N", type=count()),
    "data": flag("the clean set", "DIR"),
    "std_data": flag("the clean set, if --data is corrupted", "DIR"),
    "corruption_data": flag(
        "the corrupted set in a published layout; what is not there is generated, with a warning",
        "DIR",
    ),
    "corruption": several("corruptions by name", "NAME", corruption_name, default=[]),
    "severity": flag(
        "of the corrupted images",
        f"1…{SEVERITIES}",
        also=("--serverity",),  # the original's spelling
        type=count(1, SEVERITIES),
        default=5,
    ),
    "resample_corruption": switch("corrupt the training images anew in every epoch"),
    "frost_dir": flag(
        "the original frost photographs; without it a procedural texture stands in",
        "DIR",
        type=folder,
    ),
    "workers": flag("threads that decode images (default: all cores)", "N", type=count()),
}


def load_images(args: argparse.Namespace, root: str | None, split: str) -> ImageSet:
    """The clean split "train", "val" or "test" at `root`, as the flags in `args` say."""
    limit = args.train_images if split == "train" else args.test_images
    return datasets.load(args.dataset, root, split, args.image_size, args.classes, limit)


def union_name(corruptions: Sequence[str]) -> str:
    """The name of the folder of a model trained on all of these."""
    return "all" if set(corruptions) == set(CORRUPTIONS) else "+".join(corruptions)


def data_facts(args: argparse.Namespace, images: ImageSet) -> dict:
    """What checkpoints record of their clean data, by names of `utils.checkpoint.FACTS`."""
    dataset, side = datasets.base_name(args.dataset), images.images.shape[-1]
    facts = {"dataset": dataset, "side": side, "classes": args.classes}
    return facts | {"class_names": list(images.classes)}


def frost_note(corruptions: Iterable[str], frost_dir: str | None) -> dict[str, str]:
    """A header line saying which frost texture is used, where frost is among the corruptions."""
    if "frost" not in corruptions:
        return {}
    return {"frost": f"photographs in {frost_dir}" if frost_dir else "procedural texture"}
