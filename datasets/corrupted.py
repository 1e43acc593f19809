"""Corrupted copies of a clean set: read from a published layout, or generated in memory.

Layouts (root is the folder given, or one in it; names may differ in case and in - _ or spaces):
    NAME.npy, labels.npy                     CIFAR-10-C: test, severity s in rows N(s-1) to Ns of 5N
    train/NAME.npy, test/NAME.npy            one severity, each with a labels.npy beside it
    [train/|val/|test/]NAME/SEVERITY/CLASS/* Tiny-ImageNet-C: image files; without a part, test
"train" holds train and val together, in the order of the clean set's split "all", and is split by
the clean set's rows, so both share one split.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.cache import decode, folders_in, is_debris, list_images
from datasets.corruptions import SEVERITIES, check, constants_for, corrupt, corrupt_chunks
from datasets.image_folder import labels_of
from datasets.images import SPLITS, ImageSet, stable_seed
from datasets.loader import fits
from datasets.tiny_imagenet import published_order, short_name
from utils.errors import InputError, check_known, warn

MADE = ".made.json"  # in a folder that make_corruptions.py wrote: {place in it: settings}


@dataclass(frozen=True)
class Copies:
    """How corrupted copies are come by: read from `root` if they are there, else generated.

    root: a folder in a published layout; seed: of the draws; frost_dir: the original frost
    photographs; device: where images are corrupted; named: whether `root` was named for corrupted
    images, so that it is worth a warning where one is generated; resident: whether what is made
    stays on the device if it fits, or goes to host memory.
    """

    severity: int = 5
    seed: int = 0
    root: str | Path | None = None
    frost_dir: str | Path | None = None
    device: str | torch.device = "cpu"
    named: bool = True
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
    warns when published labels differ from the clean set's, when nothing is read from a root that
    was named, and when images of this size have no constants of their own.
    """
    check(corruption, how.severity)
    check_known("split", split, SPLITS)
    if how.root is not None:
        found = load_published(clean, how.root, corruption, how.severity, split)
        if found is not None and clean.class_parity:
            raise InputError(f"{found.source} holds all classes; --classes generates its copy")
        if found is not None:
            return found
        if how.named:
            there = sorted(p.name for p in Path(how.root).iterdir() if not is_debris(p.name))
            looked = ", ".join(_layouts(corruption, how.severity, split))
            told = f"{how.root} and the folders in it have none of {looked}"
            warn(f"{corruption} is generated: {told} (there: {', '.join(there[:9]) or 'nothing'})")
    draws = draws_of(how.seed, corruption, how.severity, split)
    out = how.room(clean.images)
    corrupt(clean.images, corruption, how.severity, draws, how.frost_dir, how.device, out)
    source = f"generated, seed {how.seed}, constants of {constants_for(out)}"
    return replace(clean, images=out, source=source)


def generate_chunks(clean: ImageSet, corruption: str, split: str, how: Copies) -> Iterator[Tensor]:
    """What `corrupted_set` generates, in order, by chunks: uint8 images on the device."""
    draws = draws_of(how.seed, corruption, how.severity, split)
    return corrupt_chunks(clean.images, corruption, how.severity, draws, how.frost_dir, how.device)


def mixed_training_set(
    clean: ImageSet, corruptions: Sequence[str], how: Copies, partition_seed: int | None = None
) -> ImageSet:
    """`clean` with each image under exactly one of `corruptions`, by a fixed random partition.

    The parts differ in size by at most one image and depend on `partition_seed` alone (default:
    the seed of `how`). Only the images needed are generated. With one corruption this is its
    `corrupted_set`. Raises InputError as `corrupted_set` does.
    """
    if not corruptions:
        raise InputError("--corruption: name at least one")
    if len(corruptions) == 1:
        return corrupted_set(clean, corruptions[0], "train", how)
    seed = how.seed if partition_seed is None else partition_seed
    generator = torch.Generator().manual_seed(stable_seed("partition", seed))
    order = torch.randperm(len(clean), generator=generator)
    images, labels, sources = how.room(clean.images), clean.labels.clone(), []
    how = replace(how, resident=images.is_cuda)  # its parts too
    for k, corruption in enumerate(corruptions[: len(clean)]):  # of more, some get no image
        chosen = order[k :: len(corruptions)].sort().values
        part = corrupted_set(clean.subset(chosen), corruption, "train", how)
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
        return [short_name(name).rpartition(".")[0] for name in clean.files]
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
    root = Path(root)
    if not root.is_dir():
        raise InputError(
            f"{root}: no such folder of corrupted images; without it they are generated"
        )
    wanted = _layouts(corruption, severity, split)
    inside = [p for p in folders_in(root) if p.name.lower() not in ("train", "val", "test")]
    of_this_set = [p for p in inside if _letters(p.name) == f"{clean.name}c"]
    for bases in ([root], of_this_set, inside):
        each = [[_alike(base, path) for path in wanted] for base in bases]
        found = [place for places in each for place in next(filter(None, places), [])]
        if found:
            break
    else:
        return None
    place = found[0]
    if len(found) > 1:
        there = ", ".join(map(str, found))
        raise InputError(f"{root}: several copies of {corruption}, name the folder of one: {there}")
    if place not in [root / path for path in wanted]:
        warn(f"{corruption} is read from {place}")
    if place.is_dir():
        pixels, labels = _from_folders(clean, place)
    else:
        alone = place.parent not in bases  # train/ or test/, of one severity only
        base = place.parent.parent if alone else place.parent
        _check_recorded(base, place, clean.name, severity if alone else None)
        pixels, labels = _from_array(clean, place, None if alone else severity)
    if differing := int((labels != clean.labels).sum()):
        warn(
            f"{place}: {differing} of {len(labels)} labels differ from the clean set's, so its "
            "images stand in another order; train and validation may overlap across the two"
        )
    return replace(clean, images=pixels, labels=labels, source=str(place))


def _layouts(c: str, s: int, split: str) -> list[str]:
    """Where the copy of corruption `c` and severity `s` may lie, as paths below the root."""
    if split != "test":
        return [f"train/{c}.npy", f"train/{c}/{s}"]
    return [f"{c}.npy", f"test/{c}.npy", f"val/{c}/{s}", f"test/{c}/{s}", f"{c}/{s}"]


def _alike(folder: Path, path: str) -> list[Path]:
    """`path` below `folder`, or else all with the same letters; a file for .npy, else a folder."""
    found = [folder]
    for name in path.split("/"):
        inside = [p for place in found if place.is_dir() for p in sorted(place.iterdir())]
        found = [p for p in inside if _letters(p.name) == _letters(name) and not is_debris(p.name)]
    found = [p for p in found if p.is_file() == path.endswith(".npy")]
    return [folder / path] if folder / path in found else found


def _letters(name: str) -> str:
    """`name` without what spellings differ in: "Gaussian-Noise", "severity_5", "CIFAR-10-C"."""
    return re.sub(r"[\W_]|severity", "", name.lower())


def made_in(base: Path) -> dict[str, dict]:
    """What make_corruptions.py wrote to `base`: {place in it: settings}; {} if nobody can tell."""
    try:
        made = json.loads((base / MADE).read_text(encoding="utf-8"))
        return {place: settings for place, settings in made.items() if isinstance(settings, dict)}
    except (OSError, ValueError, AttributeError):
        return {}


def changed(root: str) -> str:
    """`root` and when something there was last made, for keys of what its images determine."""
    places = [Path(root), *Path(root).glob("*"), *Path(root).glob("*/*"), *Path(root).glob("*/*/*")]
    return f"{root} {max(place.lstat().st_mtime_ns for place in places)}"


def _check_recorded(base: Path, place: Path, dataset: str, severity: int | None) -> None:
    """Raise InputError where an array was made of another set, or of another severity.

    severity: that of a file of one severity, which is warned of where none is recorded.
    """
    letters = _letters(str(place.relative_to(base)))
    listed = (s for path, s in made_in(base).items() if _letters(path) == letters)
    recorded = next(listed, {})
    if (of := recorded.get("dataset", dataset)) != dataset:
        raise InputError(f"{place} is a copy of {of}, --dataset is {dataset}")
    if severity is None:
        return
    if (made := recorded.get("severity")) is None:
        said = f"no record of the severity of its arrays, taken as --severity {severity}"
        warn(f"{place.parent}: {said}")
    elif made != [severity]:
        raise InputError(f"{place} holds severity {made}, --severity is {severity}")


def _from_array(clean: ImageSet, place: Path, severity: int | None) -> tuple[Tensor, Tensor]:
    """The rows of `clean` in NAME.npy; severity None: the file holds one severity only."""
    count = clean.total * (1 if severity is None else SEVERITIES)
    side = clean.images.shape[-1]
    hint = "" if severity is None else f"; a single severity belongs in {place.parent / 'test'}"
    array = _load_npy(place, np.uint8, (count, side, side, 3), hint)
    labels_place = next(iter(_alike(place.parent, "labels.npy")), None)
    if labels_place is None:
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
    """The images of `clean` under NAME/SEVERITY/CLASS/: by name, by the numbers in it, by order."""
    listed = list_images(place)
    if clean.name == "tinyimagenet":
        listed = published_order(listed)
    labels = labels_of(place, listed, clean.classes)
    # Formats may differ (JPEG copies of PNG images), so names are compared without suffix.
    there = [short_name(name).rpartition(".")[0] for name in listed]
    names = copy_names(clean)
    rows = _rows(there, names)
    missing = int((rows < 0).sum())
    if missing == len(rows):  # other names altogether
        way, rows = "numbers", _rows(*([_numbers(n) for n in each] for each in (there, names)))
        if (rows < 0).any():
            way, rows = "order", clean.rows
        if len(listed) != clean.total:
            raise InputError(
                f"{place} holds {len(listed)} images, not the {clean.total} of the clean set, and "
                "under other names"
            )
        if clean.name != "tinyimagenet":  # whose published copy has other names
            said = f"{place}: other file names than the clean set's, taken by their {way}, e.g."
            warn(f"{said} {listed[rows[0]]} for {(clean.files or names)[0]}")
    elif missing:
        first = (clean.files or names)[int((rows < 0).int().argmax())]
        raise InputError(
            f"{place} lacks {missing} of {len(rows)} images of the clean set, the first is {first}"
        )
    wanted = [listed[row] for row in rows.tolist()]
    pixels = torch.from_numpy(decode(place, wanted, None, place.parent.name))
    side = clean.images.shape[-1]
    if pixels.shape[-1] != side:
        raise InputError(
            f"{place} holds {pixels.shape[-1]}-pixel images, the clean set {side}-pixel ones"
        )
    return pixels, labels[rows]


def _rows(there: list, wanted: list) -> Tensor:
    """Where in `there` each of `wanted` is; -1 where it is not, or not once."""
    row_of = {name: row for row, name in enumerate(there)}
    if len(row_of) < len(there):
        row_of = {}
    return torch.tensor([row_of.get(name, -1) for name in wanted])


def _numbers(name: str) -> tuple:
    """The class and the numbers in "class/name": those of cat/img_07 are those of cat/7_fog."""
    folder, _, name = name.rpartition("/")
    return folder, *map(int, re.findall(r"\d+", name))


def _load_npy(place: Path, dtype: type, shape: tuple[int, ...], hint: str = "") -> np.ndarray:
    """The array in a file, which must be of this shape and of this dtype or kind of dtypes."""
    try:
        array = np.load(place, mmap_mode="r", allow_pickle=False)
        fits = np.issubdtype(array.dtype, dtype) and array.shape == shape
    # A damaged header leads NumPy's parser to anything from ValueError to tokenize.TokenError.
    except Exception as error:
        raise InputError(f"{place} is not a readable .npy array: {error}") from error
    if not fits:
        must = f"it must be {dtype.__name__} {shape}"
        raise InputError(f"{place} holds {array.dtype} {array.shape}; {must}{hint}")
    return array
