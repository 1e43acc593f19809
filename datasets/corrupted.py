"""Corrupted copies of a clean set: read from a published layout, or generated in memory.

Layouts (root is the folder given, or a CIFAR-10-C, CIFAR-100-C or Tiny-ImageNet-C folder in it):
    NAME.npy, labels.npy                     CIFAR-10-C: test, severity s in rows N(s-1) to Ns of 5N
    train/NAME.npy, test/NAME.npy            one severity, each with a labels.npy beside it
    [train/|val/|test/]NAME/SEVERITY/CLASS/* Tiny-ImageNet-C: image files; without a part, test
"train" holds train and val together, in the order of the clean set's split "all", and is split by
the clean set's rows, so both share one split.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datasets.cache import list_images, read_images
from datasets.corruptions import CORRUPTIONS, corrupt, corrupt_chunks
from datasets.image_folder import labels_of, short_names
from datasets.images import ImageSet, check_split, stable_seed
from datasets.tiny_imagenet import in_published_order
from utils.errors import InputError, suggest

_PUBLISHED_NAMES = ("CIFAR-10-C", "CIFAR-100-C", "Tiny-ImageNet-C")
SEVERITIES = 5
RECORDS = ".made"  # in a folder that make_corruptions.py wrote: how each file was made


def corrupted_set(
    clean: ImageSet,
    corruption: str,
    severity: int,
    split: str,
    seed: int,
    root: str | Path | None = None,
    frost_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> ImageSet:
    """The `corruption` copy of `clean`, image for image; its `source` says where it comes from.

    clean: the `split` ("train", "val", "test" or "all") of a clean set, or a subset of it.
    Read from `root` where that holds the part in a published layout, else generated on `device`
    with draws seeded by (seed, corruption, severity, split): the same images for the same seed.
    Raises InputError for unknown names, and for a published part that is damaged or doesn't fit;
    warns when published labels differ from the clean set's.
    """
    _check(corruption, severity, split)
    if root is not None:
        found = load_published(clean, root, corruption, severity, split)
        if found is not None:
            if clean.half:
                raise InputError(f"{found.source} holds all classes; --classes generates its copy")
            return found
    return generate(clean, corruption, severity, split, seed, frost_dir, device)


def mixed_training_set(
    clean: ImageSet,
    corruptions: Sequence[str],
    severity: int,
    seed: int,
    split: str = "train",
    root: str | Path | None = None,
    frost_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    draw_seed: int | None = None,
) -> ImageSet:
    """`clean` with each image under exactly one of `corruptions`, by a fixed random partition.

    The parts differ in size by at most one image and depend on `seed` alone; the draws depend on
    `draw_seed` (default: `seed`). Only the images needed are generated. With one corruption this
    is its `corrupted_set`.
    Raises InputError as `corrupted_set` does.
    """
    if not corruptions:
        raise InputError("--corruption: name at least one")
    draw = (severity, split, seed if draw_seed is None else draw_seed, root, frost_dir, device)
    if len(corruptions) == 1:
        return corrupted_set(clean, corruptions[0], *draw)
    generator = torch.Generator().manual_seed(stable_seed("partition", seed))
    order = torch.randperm(len(clean), generator=generator)
    images, labels, sources = torch.empty_like(clean.images), clean.labels.clone(), []
    for k, corruption in enumerate(corruptions):
        chosen = order[k :: len(corruptions)].sort().values
        part = corrupted_set(clean.subset(chosen), corruption, *draw)
        images[chosen] = part.images
        labels[chosen] = part.labels
        sources.append(part.source)
    return replace(clean, images=images, labels=labels, source="; ".join(dict.fromkeys(sources)))


def generate(
    clean: ImageSet,
    corruption: str,
    severity: int,
    split: str,
    seed: int,
    frost_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> ImageSet:
    """Corrupt `clean` in memory, on `device`, with draws seeded by the arguments."""
    _check(corruption, severity, split)
    generator = draws_of(seed, corruption, severity, split)
    images = corrupt(clean.images.to(device), corruption, severity, generator, frost_dir)
    return replace(clean, images=images.cpu(), source=f"generated, seed {seed}")


def generate_chunks(
    clean: ImageSet,
    corruption: str,
    severity: int,
    split: str,
    seed: int,
    frost_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[slice, torch.Tensor]]:
    """The images of `generate` a chunk at a time and in order: (rows, uint8 images on `device`)."""
    _check(corruption, severity, split)
    generator = draws_of(seed, corruption, severity, split)
    yield from corrupt_chunks(clean.images, corruption, severity, generator, frost_dir, device)


def draws_of(seed: int, corruption: str, severity: int, split: str) -> torch.Generator:
    """The generator of all draws for one corrupted copy of one split."""
    return torch.Generator().manual_seed(stable_seed(seed, corruption, severity, split))


def copy_names(clean: ImageSet) -> list[str]:
    """ "<class>/<file>", without suffix, of each image in a copy kept as image files.

    The file's name in the clean set where that is kept as files too, else its row.
    """
    if clean.files:
        return [_stem(name.replace("/images/", "/", 1)) for name in clean.files]
    places = zip(clean.labels.tolist(), clean.rows.tolist(), strict=True)
    return [f"{clean.classes[label]}/row{row:06d}" for label, row in places]


def load_published(
    clean: ImageSet, root: str | Path, corruption: str, severity: int, split: str
) -> ImageSet | None:
    """The copy of `clean` in a published layout under `root`; None where that part is not there.

    Raises InputError where it is there but damaged, of another size or number of images than the
    clean part, or with labels out of range. Labels are the published ones; a difference from
    the clean set's is a warning.
    """
    _check(corruption, severity, split)
    for base in (Path(root), *(Path(root) / name for name in _PUBLISHED_NAMES)):
        for place, in_front in _arrays(base, corruption, split):
            if place.is_file():
                if not in_front:
                    _check_recorded(base, place, severity)
                return _from_array(clean, place, severity if in_front else None)
        for place in _folders(base, corruption, severity, split):
            if place.is_dir():
                return _from_folders(clean, place)
    return None


def _check_recorded(base: Path, place: Path, severity: int) -> None:
    """Raise InputError where make_corruptions.py's record of a one-severity file names another."""
    record = base / RECORDS / f"{place.relative_to(base).as_posix()}.json"
    made = None
    with contextlib.suppress(OSError, ValueError, AttributeError, KeyError):
        made = json.loads(record.read_text(encoding="utf-8"))["settings"]["severity"]
    if made not in (None, [severity]):
        raise InputError(f"{place} holds severity {made}, --severity is {severity}")


def _check(corruption: str, severity: int, split: str) -> None:
    if corruption not in CORRUPTIONS:
        raise InputError(
            f"unknown corruption {corruption!r}{suggest(corruption, CORRUPTIONS)}; "
            f"known: {', '.join(CORRUPTIONS)}"
        )
    if severity not in range(1, SEVERITIES + 1):
        raise InputError(f"--severity {severity}: must be 1 to {SEVERITIES}")
    check_split(split)


def _arrays(base: Path, corruption: str, split: str) -> list[tuple[Path, bool]]:
    """Where NAME.npy may lie, and whether it holds all severities one after the other."""
    if split == "test":
        return [(base / f"{corruption}.npy", True), (base / "test" / f"{corruption}.npy", False)]
    return [(base / "train" / f"{corruption}.npy", False)]


def _folders(base: Path, corruption: str, severity: int, split: str) -> list[Path]:
    parts = ("val", "test", "") if split == "test" else ("train",)
    return [base / part / corruption / str(severity) for part in parts]


def _from_array(clean: ImageSet, place: Path, severity: int | None) -> ImageSet:
    """The rows of `clean` in NAME.npy; severity None: the file holds one severity only."""
    array = _load_npy(place)
    side = clean.images.shape[-1]
    count = clean.total * (1 if severity is None else SEVERITIES)
    expected = (count, side, side, 3)
    if array.dtype != np.uint8 or array.shape != expected:
        raise InputError(
            f"{place} holds {array.dtype} {array.shape}; for this {clean.name} it must be "
            f"uint8 {expected}"
        )
    labels_place = place.parent / "labels.npy"
    if not labels_place.is_file():
        raise InputError(f"{place} has no labels.npy beside it")
    labels = _load_npy(labels_place)
    if labels.dtype.kind not in "iu" or labels.shape != (count,):
        raise InputError(
            f"{labels_place} holds {labels.dtype} {labels.shape}; {place.name} needs integers "
            f"({count},)"
        )
    if labels.min() < 0 or labels.max() >= len(clean.classes):
        raise InputError(
            f"{labels_place}: labels from {labels.min()} to {labels.max()}, "
            f"{clean.name} has classes 0 to {len(clean.classes) - 1}"
        )
    rows = clean.rows.numpy() + (0 if severity is None else clean.total * (severity - 1))
    pixels = torch.from_numpy(np.ascontiguousarray(array[rows].transpose(0, 3, 1, 2)))
    return _published(clean, pixels, torch.from_numpy(labels[rows].astype(np.int64)), place)


def _from_folders(clean: ImageSet, place: Path) -> ImageSet:
    """The images of `clean` under NAME/SEVERITY/CLASS/, by name, else by their place in order."""
    files = in_published_order(list_images(place))
    if not len(files):
        raise InputError(f"{place} holds no images")
    labels = labels_of(files, clean.classes)
    # Formats may differ (JPEG copies of PNG images), so names are compared without suffix.
    row_of = {_stem(name): row for row, name in enumerate(short_names(files))}
    names = copy_names(clean)
    rows = [row_of.get(name, -1) for name in names]
    if rows and max(rows) >= 0:
        if min(rows) < 0:
            raise InputError(
                f"{place} lacks {rows.count(-1)} of {len(rows)} images of the clean set, "
                f"the first is {(clean.files or names)[rows.index(-1)]}"
            )
        chosen = torch.tensor(rows)
    elif len(files) == clean.total:
        chosen = clean.rows
    else:
        raise InputError(
            f"{place} holds {len(files)} images, not the {clean.total} of the clean set, and "
            "under other names"
        )
    pixels = read_images(files, chosen, None, None, place.parent.name)
    side = clean.images.shape[-1]
    if pixels.shape[-1] != side:
        raise InputError(
            f"{place} holds {pixels.shape[-1]}-pixel images, the clean set {side}-pixel ones"
        )
    return _published(clean, pixels, labels[chosen], place)


def _published(
    clean: ImageSet, pixels: torch.Tensor, labels: torch.Tensor, place: Path
) -> ImageSet:
    differing = int((labels != clean.labels).sum())
    if differing:
        warnings.warn(
            f"{place}: {differing} of {len(labels)} labels differ from the clean set's, so its "
            "images stand in another order; train and validation may overlap across the two",
            stacklevel=4,
        )
    return replace(clean, images=pixels, labels=labels, source=str(place))


def _load_npy(place: Path) -> np.ndarray:
    try:
        array = np.load(place, mmap_mode="r", allow_pickle=False)
    # A damaged header leads NumPy's parser to anything from ValueError to tokenize.TokenError.
    except Exception as error:
        raise InputError(f"{place} is not a readable .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{place} is not a .npy array")
    return array


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
