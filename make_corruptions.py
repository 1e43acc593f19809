"""Write corrupted copies of a data set in the published layouts, or preview them.

    # rws, the layout of the RWS code: train/NAME.npy, test/NAME.npy, labels.npy in each
    python make_corruptions.py --dataset cifar10 --data data/cifar10 --out data/cifar10-c
    # cifar-c, as CIFAR-10-C: NAME.npy, the test set at severities 1 to 5 one after the other
    python make_corruptions.py --dataset cifar10 --data data/cifar10 --layout cifar-c \\
        --out data/CIFAR-10-C
    # folders, as Tiny-ImageNet-C: train/NAME/SEVERITY/CLASS/*.JPEG and val/…, quality 85
    python make_corruptions.py --dataset tinyimagenet --data data/tiny-imagenet-200 \\
        --layout folders --corruption fog snow --severity 5 --out data/tiny-imagenet-c
    # corruptions × severities on one sheet
    python make_corruptions.py --dataset cifar10 --data data/cifar10 --preview sheet.png

"train" is all training images, validation included, in published row order. The images depend on
--seed, corruption, severity, part and kind of device alone: those of "test" are the ones that
train_corruption.py makes in memory for the same seed; those of "train" are drawn for train and
validation together, in memory they are drawn for each.

OUT/.made.json lists what is finished, and from which settings. The same command again skips that;
what was made otherwise is an error, or replaced with --overwrite. Processes may share one OUT.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

import datasets
from datasets import flags
from datasets.corrupted import MADE, Copies, copy_names, corrupted_set, generate_chunks, made_in
from datasets.corruptions import CORRUPTIONS, SEVERITIES, constants_for
from datasets.corruptions.frost_texture import PHOTOGRAPHS
from datasets.images import ImageSet, fingerprint, stable_seed
from utils import report
from utils.arguments import Distinct, Parser, add, flag, several
from utils.engine import choose_device
from utils.errors import InputError, script_errors, thread_pool
from utils.files import check_writable, hold, replacing

ALL_SEVERITIES = list(range(1, SEVERITIES + 1))
SPLIT_OF = {"train": "all", "test": "test"}  # that each part holds
FOLDER_OF = {"train": "train", "test": "val"}  # of each part in --layout folders
# Of a sheet: pixels of a picture, about; between two pictures, in pixels of theirs; per inch.
CELL, GAP, DPI = 128, 1, 100
SHEETS = (".png", ".jpg", ".pdf", ".svg")

SOME = {"nargs": "+", "action": Distinct, "default": None}
SEVERITY_HELP = "of the corrupted images; default: 1 2 3 4 5, for --layout rws 5"
FLAGS = {
    "corruption": several("all (the default), or by name", "NAME", flags.corruption_or_all),
    "split": flag("default: train test, for --layout cifar-c test", choices=[*SPLIT_OF], **SOME),
    "layout": flag("see above", choices=("rws", "cifar-c", "folders"), default="rws"),
    "preview": flag("write a sheet, corruptions × severities of one image, and no more", "IMAGE"),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = Parser(__doc__)
    add(parser, "dataset data image_size frost_dir", flags.FLAGS)
    add(parser, "severity", flags.FLAGS, help=SEVERITY_HELP, **SOME)
    add(parser, "corruption split layout preview", FLAGS)
    add(parser, "out overwrite seed device")
    args = parser.parse_args(argv)
    resolve(args)
    check(args)
    return args


def resolve(args: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other flags."""
    if "all" in (args.corruption or ["all"]):
        args.corruption = list(CORRUPTIONS)
    one_severity = args.layout == "rws" and not args.preview
    args.severity = sorted(args.severity or ([5] if one_severity else ALL_SEVERITIES))
    one_part = args.layout == "cifar-c" or args.preview
    args.split = args.split or (["test"] if one_part else list(SPLIT_OF))


def check(args: argparse.Namespace) -> None:
    """Raise InputError for flags that don't go together."""
    if args.preview:
        if Path(args.preview).suffix.lower() not in SHEETS:
            raise InputError(f"--preview {args.preview}: name an image file, e.g. sheet.png")
        if len(args.split) > 1:
            raise InputError("--preview shows one image: name one --split")
    elif not args.out:
        raise InputError("--out is missing: the folder to write to (or give --preview)")
    elif args.layout == "cifar-c" and args.severity != ALL_SEVERITIES:
        raise InputError("--layout cifar-c keeps severities 1 to 5 in one file: no --severity")
    elif args.layout == "cifar-c" and "train" in args.split:
        raise InputError("--layout cifar-c has the test set only: use --layout rws for train")
    elif args.layout == "rws" and len(args.severity) > 1:
        raise InputError("--layout rws holds one severity: name one, or use --layout folders")


# ---- what is to be made, and what is there --------------------------------------------------


def wanted(args: argparse.Namespace, sets: dict[str, ImageSet]) -> dict[str, dict]:
    """What the flags ask for: {place of each array or folder under --out: its settings}.

    Settings are what the content follows from, but for the device: a run may go on elsewhere.
    """
    outputs = {}
    for part, clean in sets.items():
        shared = {"dataset": clean.name, "part": part, "clean images": fingerprint(clean)}
        folder = "" if args.layout == "cifar-c" else f"{part}/"
        for name in args.corruption:
            settings = shared | {"corruption": name, "seed": args.seed}
            if name == "frost":
                settings["frost texture"] = frost_print(args.frost_dir)
            places = {f"{folder}{name}.npy": args.severity}
            if args.layout == "folders":
                places = {f"{FOLDER_OF[part]}/{name}/{s}": [s] for s in args.severity}
            outputs |= {place: settings | {"severity": s} for place, s in places.items()}
    return outputs


def frost_print(frost_dir: str | None) -> str:
    """Which texture frost uses: "procedural", or 16 digits of the photographs' SHA-256."""
    if frost_dir is None:
        return "procedural"
    photographs = [(Path(frost_dir) / name).read_bytes() for name in PHOTOGRAPHS]
    return hashlib.sha256(b"".join(photographs)).hexdigest()[:16]


def is_finished(args: argparse.Namespace, place: str, settings: dict) -> bool:
    """Whether OUT/place is there and was made from `settings`.

    Raises InputError where something else is there, unless that may be overwritten.
    """
    path = Path(args.out) / place
    if not os.path.lexists(path):
        return False
    made = made_in(Path(args.out)).get(place, {})
    other = next((key for key in settings if made.get(key) != settings[key]), None)
    if other and not args.overwrite:
        how = f"made with {other} {made.get(other)}, not {settings[other]}"
        how = how if made else "not made by this script"
        raise refusal(f"{path} is there already, {how}")
    return not other


def refusal(what: str) -> InputError:
    """The error for an output that is there and may not be replaced."""
    return InputError(f"{what}: give another --out, or --overwrite to replace it")


def check_images(args: argparse.Namespace, sets: dict[str, ImageSet], device: torch.device) -> None:
    """Raise InputError now for what would end the run later: sizes, frost photographs, names."""
    for part, clean in sets.items():
        for name in args.corruption:
            how = Copies(frost_dir=args.frost_dir, device=device)
            corrupted_set(clean.subset([0]), name, SPLIT_OF[part], how)
        if args.layout == "folders":
            folder = Path(args.out) / FOLDER_OF[part]
            if clean.files and folder.resolve() == Path(clean.source).resolve():
                raise InputError(f"--out: {folder} holds the clean images; choose another folder")
            name, count = Counter(copy_names(clean)).most_common(1)[0]
            if count > 1:
                raise InputError(f"{clean.source}: {name} names {count} images; rename all but one")


def check_space(out: Path, sizes: dict[Path, int]) -> str:
    """How much is written and how much is free, in words; InputError if that is too little.

    sizes: bytes of each output. What is replaced stays until the new one is whole.
    """
    needed = sum(size for path, size in sizes.items() if not path.exists())
    needed += max((size for path, size in sizes.items() if path.exists()), default=0)
    there = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free
    size = f"{needed / 1e6:,.2f} MB to write, {free / 1e6:,.2f} MB free"
    if needed > free:
        raise InputError(f"--out {out}: {size} there; make room, or choose another disk")
    return size


def bytes_for(place: str, settings: dict, clean: ImageSet) -> int:
    """Bytes on disk of a finished output, at most."""
    count, channels, height, width = clean.images.shape
    if place.endswith(".npy"):
        return 128 + len(settings["severity"]) * count * channels * height * width
    # At quality 85 uniform noise, the worst case, takes 0.8 bytes a pixel; a block is 4096.
    return count * -(-int(0.8 * height * width + 256) // 4096) * 4096


# ---- writing --------------------------------------------------------------------------------


def make(args: argparse.Namespace) -> None:
    """Write what `args` (from `parse_args`) ask for and is not there yet."""
    device, out = choose_device(args.device), Path(args.out)
    check_writable(out)
    sets = {part: load(args, part) for part in args.split}
    check_images(args, sets, device)
    outputs = wanted(args, sets)
    pending = {place: s for place, s in outputs.items() if not is_finished(args, place, s)}
    sizes = {out / place: bytes_for(place, s, sets[s["part"]]) for place, s in pending.items()}
    facts = facts_of(args, sets, device) | {
        "layout": f"{args.layout}, in {out}",
        "to make": f"{len(pending)} of {len(outputs)} outputs",
        "size": check_space(out, sizes),
    }
    report.header("make_corruptions.py", facts)

    if args.layout != "folders":
        for part, clean in sets.items():
            folder = out if args.layout == "cifar-c" else out / part
            write_labels(folder / "labels.npy", clean, len(args.severity), args.overwrite)
    made = 0
    for place, settings in pending.items():
        path, clean = out / place, sets[settings["part"]]
        with hold(path.with_name(f".{path.name}.lock")):
            if is_finished(args, place, settings):  # another process has made it meanwhile
                continue
            write(args, place, settings, clean, device)
        made += 1
        print(f"made {path}", flush=True)
    print(f"{made} made, {len(outputs) - made} finished before or by another process")


def load(args: argparse.Namespace, part: str) -> ImageSet:
    """The clean images of "train" or "test"."""
    return datasets.load(args.dataset, args.data, SPLIT_OF[part], args.image_size)


def write(
    args: argparse.Namespace, place: str, settings: dict, clean: ImageSet, device: torch.device
) -> None:
    """Make an output in a folder beside OUT/place, list it as made, and move it there.

    A file or folder that is there stays until then. Raises InputError where the disk refuses.
    """
    out, path = Path(args.out), Path(args.out) / place
    work = path.with_name(f".{path.name}.tmp")
    try:
        shutil.rmtree(work, ignore_errors=True)  # what a killed run left
        work.mkdir()
        write_images = write_array if path.suffix == ".npy" else write_folder
        write_images(work / path.name, clean, settings, chunks(clean, settings, args, device))
        if hasattr(os, "sync"):
            os.sync()  # for tens of thousands of small files cheaper than a sync of each
        with replacing(out / MADE) as listing:  # others wait, so that no entry is lost
            made = made_in(out) | {place: settings}
            listing.write_text(json.dumps(made, indent=1, ensure_ascii=False), encoding="utf-8")
            # Taken away before the new one is listed: a kill leaves no old one listed as new.
            if os.path.lexists(path):
                path.rename(work / "old")
        (work / path.name).rename(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def chunks(
    clean: ImageSet, settings: dict, args: argparse.Namespace, device: torch.device
) -> Iterator[np.ndarray]:
    """The corrupted images, uint8 (n, H, W, 3) at a time, one severity after the other."""
    name, severities = settings["corruption"], settings["severity"]
    total = len(severities) * len(clean)
    with tqdm(total=total, desc=name, unit="img", leave=False, disable=None) as bar:
        for severity in severities:
            how = Copies(severity, args.seed, None, args.frost_dir, device)
            for images in generate_chunks(clean, name, SPLIT_OF[settings["part"]], how):
                yield images.permute(0, 2, 3, 1).contiguous().cpu().numpy()
                bar.update(len(images))


def write_labels(path: Path, clean: ImageSet, copies: int, overwrite: bool) -> None:
    """labels.npy, int64 (copies × N), if it is not there.

    Raises InputError where it is there with other labels, unless that may be overwritten.
    """
    labels, same = np.tile(clean.labels, copies), False
    with contextlib.suppress(Exception):  # whatever NumPy's parser meets in a damaged file
        same = np.array_equal(np.load(path, allow_pickle=False), labels)
    if path.exists() and not same and not overwrite:
        raise refusal(f"{path} is there already and holds other labels than {clean.name}")
    if not same:
        with replacing(path) as temporary:
            np.save(temporary, labels)


def write_array(path: Path, clean: ImageSet, settings: dict, chunks: Iterator[np.ndarray]) -> None:
    """NAME.npy: uint8 (severities × N, H, W, 3)."""
    count, channels, height, width = clean.images.shape
    shape = (len(settings["severity"]) * count, height, width, channels)
    with open(path, "wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for pixels in chunks:
            file.write(pixels)


def write_folder(path: Path, clean: ImageSet, settings: dict, chunks: Iterator[np.ndarray]) -> None:
    """NAME/SEVERITY: <class>/<file>.JPEG for each image."""
    names = iter(copy_names(clean))
    with thread_pool() as pool:
        for pixels in chunks:
            list(pool.map(save_jpeg, pixels, (path / f"{next(names)}.JPEG" for _ in pixels)))


def save_jpeg(pixels: np.ndarray, path: Path) -> None:
    """Write one image, uint8 (H, W, 3), as Tiny-ImageNet-C has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="JPEG", quality=85, optimize=True)


# ---- preview --------------------------------------------------------------------------------


def preview(args: argparse.Namespace) -> None:
    """Write the sheet that `args` (from `parse_args`) ask for."""
    path, device = Path(args.preview), choose_device(args.device)
    if path.exists() and not args.overwrite:
        raise InputError(f"--preview {path}: there already; --overwrite replaces it")
    (part,) = args.split
    clean = load(args, part)
    sample = clean.subset([stable_seed("preview", args.seed) % len(clean)])
    hows = [Copies(s, args.seed, None, args.frost_dir, device) for s in args.severity]
    pictures = []
    for name in args.corruption:
        copies = [corrupted_set(sample, name, SPLIT_OF[part], how) for how in hows]
        pictures += [shown.images for shown in (sample, *copies)]
    columns = ["clean", *(f"severity {severity}" for severity in args.severity)]
    figure = sheet(torch.cat(pictures), args.corruption, columns)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=DPI, bbox_inches="tight")
    label = clean.classes[int(sample.labels)]
    facts = {"image": f"row {int(sample.rows)}, {label}", "wrote": path}
    report.header("make_corruptions.py --preview", facts_of(args, {part: clean}, device) | facts)


def sheet(pictures: torch.Tensor, rows: list[str], columns: list[str]) -> Figure:
    """Pictures, uint8 (rows × columns, 3, H, H), row by row, with the names of rows and columns."""
    side = pictures.shape[-1] + GAP
    grid = make_grid(pictures, len(columns), padding=GAP, pad_value=255).permute(1, 2, 0)
    pixels = max(1, round(CELL / side))  # of the sheet for each of a picture
    figure = Figure([pixels * length / DPI for length in (grid.shape[1], grid.shape[0])])
    axis = figure.add_axes((0, 0, 1, 1), frame_on=False)
    axis.imshow(grid.numpy(), interpolation="nearest")
    axis.set_xticks([(k + 0.5) * side for k in range(len(columns))], columns)
    axis.set_yticks([(k + 0.5) * side for k in range(len(rows))], rows)
    axis.tick_params(length=0, labeltop=True, labelbottom=False)
    return figure


def facts_of(args: argparse.Namespace, sets: dict[str, ImageSet], device: torch.device) -> dict:
    """The lines of the header that files and sheets share."""
    return {
        part: f"{len(clean):,} images of {clean.name}, {clean.images.shape[-1]} pixels a side"
        for part, clean in sets.items()
    } | {
        "corruptions": ", ".join(args.corruption),
        "severity": " ".join(map(str, args.severity)),
        "constants": " ".join({constants_for(clean.images) for clean in sets.values()}),
        **flags.frost_note(args.corruption, args.frost_dir),
        "seed": args.seed,
        "device": report.device_name(device),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        preview(args) if args.preview else make(args)


if __name__ == "__main__":
    main()
