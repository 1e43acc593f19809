"""Corrupted copies of a clean set: read from a published layout, or generated in memory.

Layouts (root is the folder given, or a CIFAR-10-C, CIFAR-100-C or Tiny-ImageNet-C folder in it):
    NAME.npy, labels.npy                     CIFAR-10-C: test, severity s in rows N(s-1) to Ns of 5N
    train/NAME.npy, test/NAME.npy            one severity, each with a labels.npy beside it
    [train/|val/|test/]NAME/SEVERITY/CLASS/* Tiny-ImageNet-C: image files; without a part, test
"train" holds train and val together, in the order of the clean set's split "all", and is split by
the clean set's rows, so both share one split.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.cache import list_images, read_images
from datasets.corruptions import SEVERITIES, check, corrupt, corrupt_chunks
from datasets.image_folder import labels_of
from datasets.images import ImageSet, check_split, stable_seed
from datasets.loader import fits
from datasets.tiny_imagenet import published_order, short_name
from utils.errors import InputError

_PUBLISHED_NAMES = ("CIFAR-10-C", "CIFAR-100-C", "Tiny-ImageNet-C")
MADE = ".made.json"  # in a folder that make_corruptions.py wrote: {place in it: settings}


@dataclass(frozen=True)
class Copies:
    """How corrupted copies are come by: read from `root` if they are there, else generated.

    root: a folder in a published layout; seed: of the draws; frost_dir: the original frost
    photographs; device: where images are corrupted; resident: whether what is generated stays there
    if it fits, or goes to host memory.
    """

    severity: int = 5
    seed: int = 0
    root: str | Path | None = None
    frost_dir: str | Path | None = None
    device: str | torch.device = "cpu"
    resident: bool = False

    def room(self, images: Tensor) -> Tensor:
        """A tensor, not filled, for a copy of `images`."""
        device = self.device if self.resident and fits(images, self.device) else "cpu"
        return torch.empty(images.shape, dtype=torch.uint8, device=device)


def corrupted_set(clean: ImageSet, corruption: str, split: str, how: Copies) -> ImageSet:
    """The `corruption` copy of `clean`, image for image; its `source` says where it comes from.

    clean: the `split` ("train", "val", "test" or "all") of a clean set, or a subset of it.
    Draws are seeded by (seed, corruption, severity, split): the same images for the same seed.
    Raises InputError for unknown names, and for a published part that is damaged or doesn't fit;
    warns when published labels differ from the clean set's.
    """
    check(corruption, how.severity)
    check_split(split)
    if how.root is not None:
        found = load_published(clean, how.root, corruption, how.severity, split)
        if found is not None and clean.class_parity:
            raise InputError(f"{found.source} holds all classes; --classes generates its copy")
        if found is not None:
            return found
    draws = draws_of(how.seed, corruption, how.severity, split)
    out = how.room(clean.images)
    corrupt(clean.images, corruption, how.severity, draws, how.frost_dir, how.device, out)
    return replace(clean, images=out, source=f"generated, seed {how.seed}")


def generate_chunks(
    clean: ImageSet, corruption: str, split: str, how: Copies
) -> Iterator[tuple[slice, Tensor]]:
    """What `corrupted_set` generates, in order, by chunks: (rows, uint8 images on the device)."""
    draws = draws_of(how.seed, corruption, how.severity, split)
    return corrupt_chunks(clean.images, corruption, how.severity, draws, how.frost_dir, how.device)


def mixed_training_set(
    clean: ImageSet,
    corruptions: Sequence[str],
    how: Copies,
    split: str = "train",
    partition_seed: int | None = None,
) -> ImageSet:
    """`clean` with each image under exactly one of `corruptions`, by a fixed random partition.

    The parts differ in size by at most one image and depend on `partition_seed` alone (default:
    the seed of `how`). Only the images needed are generated. With one corruption this is its
    `corrupted_set`. Raises InputError as `corrupted_set` does.
    """
    if not corruptions:
        raise InputError("--corruption: name at least one")
    if len(corruptions) == 1:
        return corrupted_set(clean, corruptions[0], split, how)
    seed = how.seed if partition_seed is None else partition_seed
    generator = torch.Generator().manual_seed(stable_seed("partition", seed))
    order = torch.randperm(len(clean), generator=generator)
    images, labels, sources = how.room(clean.images), clean.labels.clone(), []
    how = replace(how, resident=images.is_cuda)  # its parts too
    for k, corruption in enumerate(corruptions[: len(clean)]):  # of more, some get no image
        chosen = order[k :: len(corruptions)].sort().values
        part = corrupted_set(clean.subset(chosen), corruption, split, how)
        images[chosen] = part.images.to(images.device)
        labels[chosen] = part.labels
        sources.append(part.source)
    return replace(clean, images=images, labels=labels, source="; ".join(dict.fromkeys(sources)))


def draws_of(seed: int, corruption: str, severity: int, split: str) -> torch.Generator:
    """The generator of all draws for one corrupted copy of one split."""
    return torch.Generator().manual_seed(stable_seed(seed, corruption, severity, split))


def copy_names(clean: ImageSet) -> list[str]:
    """ "<class>/<file>", without suffix, of each image in a copy kept as image files.

    The file's name in the clean set where that is kept as files too, else its row.
    """
    if clean.files:
        return [_stem(short_name(name)) for name in clean.files]
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
    found = _find(clean, Path(root), corruption, severity, split)
    if found is None:
        return None
    pixels, labels, place = found
    differing = int((labels != clean.labels).sum())
    if differing:
        warnings.warn(
            f"{place}: {differing} of {len(labels)} labels differ from the clean set's, so its "
            "images stand in another order; train and validation may overlap across the two",
            stacklevel=2,
        )
    return replace(clean, images=pixels, labels=labels, source=str(place))


def _find(
    clean: ImageSet, root: Path, corruption: str, severity: int, split: str
) -> tuple[Tensor, Tensor, Path] | None:
    """Pixels and labels of the copy of `clean`, and the file or folder they are from."""
    for base in (root, *(root / name for name in _PUBLISHED_NAMES)):
        for part in ("", "test") if split == "test" else ("train",):
            place = base / part / f"{corruption}.npy"
            if place.is_file():
                if part:  # one severity only
                    _check_recorded(base, place, severity)
                return *_from_array(clean, place, None if part else severity), place
        for part in ("val", "test", "") if split == "test" else ("train",):
            place = base / part / corruption / str(severity)
            if place.is_dir():
                return *_from_folders(clean, place), place
    return None


def made_in(base: Path) -> dict[str, dict]:
    """What make_corruptions.py wrote to `base`: {place in it: settings}; {} if nobody can tell."""
    try:
        made = json.loads((base / MADE).read_text(encoding="utf-8"))
        return {place: settings for place, settings in made.items() if isinstance(settings, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def _check_recorded(base: Path, place: Path, severity: int) -> None:
    """Raise InputError where a one-severity file was made with another severity."""
    settings = made_in(base).get(place.relative_to(base).as_posix(), {})
    made = settings.get("severity", [severity])
    if made != [severity]:
        raise InputError(f"{place} holds severity {made}, --severity is {severity}")


def _from_array(clean: ImageSet, place: Path, severity: int | None) -> tuple[Tensor, Tensor]:
    """The rows of `clean` in NAME.npy; severity None: the file holds one severity only."""
    count = clean.total * (1 if severity is None else SEVERITIES)
    side = clean.images.shape[-1]
    array = _load_npy(place, np.uint8, (count, side, side, 3))
    labels_place = place.with_name("labels.npy")
    if not labels_place.is_file():
        raise InputError(f"{place} has no labels.npy beside it")
    labels = _load_npy(labels_place, np.integer, (count,))
    if labels.min() < 0 or labels.max() >= len(clean.classes):
        raise InputError(
            f"{labels_place}: labels from {labels.min()} to {labels.max()}, "
            f"{clean.name} has classes 0 to {len(clean.classes) - 1}"
        )
    rows = clean.rows.numpy() + (0 if severity is None else clean.total * (severity - 1))
    pixels = np.ascontiguousarray(array[rows].transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.from_numpy(labels[rows].astype(np.int64))


def _from_folders(clean: ImageSet, place: Path) -> tuple[Tensor, Tensor]:
    """The images of `clean` under NAME/SEVERITY/CLASS/, by name, else by their place in order."""
    listed = list_images(place)
    listed = [listed[i] for i in published_order(listed)]
    labels = labels_of(place, listed, clean.classes)
    # Formats may differ (JPEG copies of PNG images), so names are compared without suffix.
    row_of = {_stem(short_name(name)): row for row, name in enumerate(listed)}
    names = copy_names(clean)
    rows = torch.tensor([row_of.get(name, -1) for name in names])
    missing = int((rows < 0).sum())
    if missing == len(rows):  # other names altogether
        rows = clean.rows
        if len(listed) != clean.total:
            raise InputError(
                f"{place} holds {len(listed)} images, not the {clean.total} of the clean set, and "
                "under other names"
            )
    elif missing:
        first = (clean.files or names)[int((rows < 0).int().argmax())]
        raise InputError(
            f"{place} lacks {missing} of {len(rows)} images of the clean set, the first is {first}"
        )
    pixels = read_images(place, listed, rows, None, place.parent.name)
    side = clean.images.shape[-1]
    if pixels.shape[-1] != side:
        raise InputError(
            f"{place} holds {pixels.shape[-1]}-pixel images, the clean set {side}-pixel ones"
        )
    return pixels, labels[rows]


def _load_npy(place: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """The array in a file, which must be of this shape and of this dtype or kind of dtypes."""
    try:
        array = np.load(place, mmap_mode="r", allow_pickle=False)
        fits = np.issubdtype(array.dtype, dtype) and array.shape == shape
    # A damaged header leads NumPy's parser to anything from ValueError to tokenize.TokenError.
    except Exception as error:
        raise InputError(f"{place} is not a readable .npy array: {error}") from error
    if not fits:
        must = f"it must be {dtype.__name__} {shape}"
        raise InputError(f"{place} holds {array.dtype} {array.shape}; {must}")
    return array


def _stem(name: str) -> str:
    return name.rpartition(".")[0]
