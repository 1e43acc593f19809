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

What is finished is whole, and is skipped when the command is given again; records of it lie in
OUT/.made/. Several processes may write to one OUT: they take turns at each file or folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import datasets
from datasets.cache import list_images
from datasets.corrupted import RECORDS, SEVERITIES, copy_names, draws_of, generate_chunks
from datasets.corruptions import CORRUPTIONS, corrupt
from datasets.corruptions.frost_texture import PHOTOGRAPHS
from datasets.images import ImageSet, fingerprint, stable_seed
from utils import arguments, report
from utils.atomic import check_writable, replacing
from utils.engine import choose_device
from utils.errors import InputError, script_errors
from utils.lock import hold

ALL_SEVERITIES = list(range(1, SEVERITIES + 1))
# The split that each part holds, and the folder that the RWS code reads its images from.
SPLIT_OF = {"train": "all", "test": "test"}
FOLDER_OF = {"train": "train", "test": "val"}
JPEG = {"format": "JPEG", "quality": 85, "optimize": True}
CELL = 128  # pixels of a picture on the sheet, about


@dataclass(frozen=True)
class Output:
    """One file (.npy) or folder of images under --out, the unit that is whole or absent."""

    place: str
    part: str
    corruption: str
    severities: tuple[int, ...]


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    arguments.add_dataset(parser)
    parser.add_argument("--data", metavar="DIR", help="the clean data set")
    parser.add_argument(
        "--corruption", nargs="+", default="all", metavar="NAME", help="all, or some by name"
    )
    parser.add_argument(
        "--severity",
        type=int,
        nargs="+",
        metavar="1…5",
        help="of the corrupted images; by itself 1 2 3 4 5, for --layout rws 5",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=list(SPLIT_OF),
        help="parts of the data set; by itself train test, for --layout cifar-c test",
    )
    parser.add_argument(
        "--layout", choices=("rws", "cifar-c", "folders"), default="rws", help="see above"
    )
    parser.add_argument("--out", metavar="DIR", help="the folder to write to")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what is there and was made otherwise; what these settings made stays",
    )
    parser.add_argument(
        "--preview",
        metavar="IMAGE",
        help="write a sheet of one image under each corruption and severity, and nothing else",
    )
    parser.add_argument(
        "--frost_dir",
        metavar="DIR",
        help="the original frost photographs; without it a procedural texture stands in",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all draws")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Fill in what depends on other flags; InputError for what can be judged before reading."""
    datasets.base_name(args.dataset)
    if args.corruption in ("all", ["all"]):
        args.corruption = list(CORRUPTIONS)
    arguments.check_corruptions(args.corruption)
    arguments.check_at_least(args, seed=0)
    rws, cifar_c = args.layout == "rws", args.layout == "cifar-c"
    if args.severity is None:
        args.severity = [5] if rws and not args.preview else ALL_SEVERITIES
    if args.split is None:
        args.split = ["test"] if cifar_c or args.preview else list(SPLIT_OF)
    for severity in args.severity:
        arguments.check_severity(severity)
    args.severity = sorted(set(args.severity))
    args.split = list(dict.fromkeys(args.split))
    if args.preview:
        if Path(args.preview).suffix.lower() not in Image.registered_extensions():
            raise InputError(f"--preview {args.preview}: name an image file, e.g. sheet.png")
        if len(args.split) > 1:
            raise InputError("--preview shows one image: name one --split")
        return
    if not args.out:
        raise InputError("--out is missing: the folder to write to (or give --preview)")
    if cifar_c and args.severity != ALL_SEVERITIES:
        raise InputError(
            "--layout cifar-c keeps severities 1 to 5 in one file, each at its place: leave "
            "--severity out, or use --layout rws (one severity) or folders (any)"
        )
    if cifar_c and "train" in args.split:
        raise InputError("--layout cifar-c has the test set only: use --layout rws for train")
    if rws and len(args.severity) > 1:
        raise InputError(
            "--layout rws holds one severity: name one, with an --out for each, or use "
            "--layout folders"
        )


# ---- what is to be made, and what is there --------------------------------------------------


def outputs_of(args: argparse.Namespace) -> list[Output]:
    """Every file or folder that the settings ask for, in the order in which they are made."""
    wanted = []
    for part in args.split:
        for name in args.corruption:
            if args.layout == "folders":
                wanted += [
                    Output(f"{FOLDER_OF[part]}/{name}/{severity}", part, name, (severity,))
                    for severity in args.severity
                ]
            else:
                folder = "" if args.layout == "cifar-c" else f"{part}/"
                wanted.append(Output(f"{folder}{name}.npy", part, name, tuple(args.severity)))
    return wanted


def settings_of(output: Output, args: argparse.Namespace, prints: dict[str, str]) -> dict:
    """What an output's images follow from; `prints` are fingerprints of the clean parts.

    The device isn't among them: a run may go on elsewhere.
    """
    settings = {
        "dataset": datasets.base_name(args.dataset),
        "clean images": prints[output.part],
        "corruption": output.corruption,
        "severity": list(output.severities),
        "seed": args.seed,
    }
    if output.corruption == "frost":
        settings["frost texture"] = prints["frost"]
    return settings


def frost_print(frost_dir: str | None) -> str:
    """Which texture frost uses: "procedural", or 16 digits of the photographs' SHA-256."""
    if frost_dir is None:
        return "procedural"
    digest = hashlib.sha256()
    for name in PHOTOGRAPHS:
        digest.update((Path(frost_dir) / name).read_bytes())
    return digest.hexdigest()[:16]


def is_finished(output: Output, out: Path, settings: dict, overwrite: bool) -> bool:
    """Whether the output is there as `settings` make it.

    Raises InputError where something else has its place, unless that may be overwritten.
    """
    path = out / output.place
    if not os.path.lexists(path):
        return False
    problem = "not made by this script"
    # A record may be missing or damaged in any way.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        made = json.loads(record_of(output, out).read_text(encoding="utf-8"))
        other = [key for key, value in settings.items() if made["settings"].get(key) != value]
        if not other and made["bytes"] == bytes_in(path):
            return True
        problem = "changed since it was made"
        if other:
            theirs = made["settings"].get(other[0], "none")
            problem = f"made with {other[0]} {theirs}, not {settings[other[0]]}"
    if overwrite:
        return False
    raise InputError(
        f"{path} is there already, {problem}: give another --out, or --overwrite to replace it"
    )


def record_of(output: Output, out: Path) -> Path:
    """Where the record of a finished output lies; one each, so that runs may share an --out."""
    return out / RECORDS / f"{output.place}.json"


def write_record(
    output: Output, out: Path, made: Path, settings: dict, device: torch.device
) -> None:
    """Record `made`, which is whole and about to be renamed to its place.

    What is replaced goes first: an output that is in its place, with a record, is finished.
    """
    remove(out / output.place)
    content = {"settings": settings, "bytes": bytes_in(made), **report.provenance(device)}
    report.write_json(record_of(output, out), content)


def bytes_in(path: Path) -> int:
    """Size of a file, or of all images in a folder; 0 where there is nothing.

    As well where another process takes it away meanwhile.
    """
    try:
        if path.is_dir():
            return sum(size for size, _ in list_images(path).stats)
        return path.stat().st_size if path.exists() else 0
    except FileNotFoundError:
        return 0
    except InputError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return 0
        raise


def remove(path: Path) -> None:
    """Delete a file or a folder, a folder in one step as far as its name is concerned."""
    if path.is_dir() and not path.is_symlink():
        aside = path.with_name(temporary_name(path.name))
        path.rename(aside)
        shutil.rmtree(aside)
    else:
        path.unlink(missing_ok=True)


def temporary_name(name: str) -> str:
    return f".{name}.{secrets.token_hex(4)}.tmp"


def remove_leftovers(output: Output, out: Path) -> None:
    """Delete what a killed run left of this output under its temporary name.

    Only while its lock is held: nobody else is writing it then.
    """
    path = out / output.place
    for old in path.parent.glob(f".{path.name}.*.tmp*"):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def lock_of(output: Output, out: Path) -> Path:
    """The lock of who makes this output."""
    return out / RECORDS / f"{output.place}.lock"


# ---- space ----------------------------------------------------------------------------------


def bytes_for(output: Output, clean: ImageSet) -> int:
    """Bytes on disk of a finished output, at most."""
    count, channels, height, width = clean.images.shape
    if output.place.endswith(".npy"):
        return 128 + len(output.severities) * count * channels * height * width
    # At quality 85 uniform noise, the worst case, takes 0.8 bytes a pixel; a block is 4096.
    return count * -(-int(0.8 * height * width + 256) // 4096) * 4096


def check_space(out: Path, new: list[int], old: list[int]) -> tuple[int, int]:
    """(bytes needed, bytes free) for outputs of `new` bytes, each in place of one of `old` bytes.

    Raises InputError where the disk of `out` has less than that free.
    """
    # A replaced output stays until the new one is whole.
    needed = max(0, sum(new) - sum(old), *new) if new else 0
    there = out.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed > free:
        raise InputError(
            f"--out {out}: {in_bytes(needed)} to write, {in_bytes(free)} free there; make room, "
            "choose another disk, or fewer of --corruption, --severity and --split"
        )
    return needed, free


def in_bytes(count: int) -> str:
    """A size as people write it, e.g. "153.6 MB"."""
    size, unit = float(count), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.1f} {unit}" if unit != "bytes" else f"{count} bytes"


# ---- writing --------------------------------------------------------------------------------


def make(args: argparse.Namespace) -> None:
    """Write what `args` (from `parse_args`) ask for and is not there yet."""
    device = choose_device(args.device)
    out = Path(args.out)
    check_writable(out)
    sets = {
        part: datasets.load(args.dataset, args.data, SPLIT_OF[part], args.image_size)
        for part in args.split
    }
    check_images(args, sets, out, device)
    prints = {part: fingerprint(images) for part, images in sets.items()}
    if "frost" in args.corruption:
        prints["frost"] = frost_print(args.frost_dir)

    wanted = {output: settings_of(output, args, prints) for output in outputs_of(args)}
    pending = [o for o, s in wanted.items() if not is_finished(o, out, s, args.overwrite)]
    if args.layout != "folders":
        labels_to_write(args, sets, out)
    needed, free = check_space(
        out,
        [bytes_for(output, sets[output.part]) for output in pending],
        [bytes_in(out / output.place) for output in pending],
    )
    counts = {
        "finished": len(wanted) - len(pending),
        "to make": len(pending),
    }
    print_header(args, sets, device, counts, needed, free)

    if args.layout != "folders":
        with hold(out / RECORDS / "labels.lock"):
            for path, content in labels_to_write(args, sets, out).items():
                with replacing(path) as temporary:
                    np.save(temporary, content)
    total, others = sum(len(o.severities) * len(sets[o.part]) for o in pending), 0
    with tqdm(total=total, unit="img", disable=None) as bar:
        for output in pending:
            bar.set_description(output.place)
            write = write_array if output.place.endswith(".npy") else write_folder
            with hold(lock_of(output, out)):
                if is_finished(output, out, wanted[output], args.overwrite):
                    others += 1  # another process has made it meanwhile
                    continue
                remove_leftovers(output, out)
                write(output, out, sets[output.part], args, wanted[output], device, bar)
            bar.write(f"made {out / output.place}")
    if pending:
        print()
    finished = counts["finished"] + others
    print(f"{len(wanted) - finished} made, {finished} finished before or by another process")


def check_images(
    args: argparse.Namespace, sets: dict[str, ImageSet], out: Path, device: torch.device
) -> None:
    """Raise InputError now for what would end the run later: sizes, frost photographs, names."""
    for part, clean in sets.items():
        for name in args.corruption:
            corrupt(
                clean.images[:1].to(device), name, 5, draws_of(0, name, 5, part), args.frost_dir
            )
        if args.layout != "folders":
            continue
        folder = out / FOLDER_OF[part]
        if clean.files and folder.resolve() == Path(clean.source).resolve():
            raise InputError(f"--out {out}: {folder} holds the clean images; choose another folder")
        twice = [name for name, count in Counter(copy_names(clean)).items() if count > 1]
        if twice:
            raise InputError(
                f"{clean.source}: {twice[0]} names {Counter(copy_names(clean))[twice[0]]} images "
                "that differ in suffix only, and copies are all .JPEG: rename one"
            )


def labels_to_write(
    args: argparse.Namespace, sets: dict[str, ImageSet], out: Path
) -> dict[Path, np.ndarray]:
    """The labels.npy (int64) that are not there yet, beside the arrays of each part.

    Raises InputError where there is another one, unless that may be overwritten.
    """
    missing = {}
    for part, clean in sets.items():
        labels = clean.labels.numpy()
        path = out / part / "labels.npy"
        if args.layout == "cifar-c":
            path, labels = out / "labels.npy", np.tile(labels, SEVERITIES)
        try:
            same = np.array_equal(np.load(path, mmap_mode="r", allow_pickle=False), labels)
        except FileNotFoundError:
            missing[path] = labels
            continue
        except Exception:  # whatever NumPy's parser meets in a damaged file
            same = False
        if not same and not args.overwrite:
            raise InputError(
                f"{path} is there already and holds other labels than {clean.name}: give another "
                "--out, or --overwrite to replace it"
            )
        if not same:
            missing[path] = labels
    return missing


def write_array(
    output: Output,
    out: Path,
    clean: ImageSet,
    args: argparse.Namespace,
    settings: dict,
    device: torch.device,
    bar: tqdm,
) -> None:
    """NAME.npy: uint8 (severities × N, H, W, 3), one severity after the other."""
    count, channels, height, width = clean.images.shape
    shape = (len(output.severities) * count, height, width, channels)
    with replacing(out / output.place) as temporary:
        array = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        if hasattr(os, "posix_fallocate"):
            # On a disk that fills up, writing to a hole in a mapped file would kill the process.
            with open(temporary, "rb+") as file:
                os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
        for k, severity in enumerate(output.severities):
            for rows, pixels in chunks(output, severity, clean, args, device):
                array[k * count + rows.start : k * count + rows.stop] = pixels
                bar.update(len(pixels))
        array.flush()
        del array
        write_record(output, out, temporary, settings, device)


def write_folder(
    output: Output,
    out: Path,
    clean: ImageSet,
    args: argparse.Namespace,
    settings: dict,
    device: torch.device,
    bar: tqdm,
) -> None:
    """NAME/SEVERITY: <class>/<file>.JPEG for each image."""
    names = [f"{name}.JPEG" for name in copy_names(clean)]
    workers = min(16, os.cpu_count() or 1)
    with replacing_folder(out / output.place) as temporary, ThreadPoolExecutor(workers) as pool:
        for folder in sorted({os.path.dirname(name) for name in names}):
            (temporary / folder).mkdir(parents=True, exist_ok=True)

        def save(pixels: np.ndarray, name: str) -> None:
            Image.fromarray(pixels).save(temporary / name, **JPEG)

        for rows, pixels in chunks(output, output.severities[0], clean, args, device):
            for _ in pool.map(save, pixels, names[rows]):
                bar.update()
        write_record(output, out, temporary, settings, device)


def chunks(
    output: Output,
    severity: int,
    clean: ImageSet,
    args: argparse.Namespace,
    device: torch.device,
) -> Iterator[tuple[slice, np.ndarray]]:
    """The corrupted images in order: (rows, uint8 (n, H, W, 3)), a chunk at a time."""
    split = SPLIT_OF[output.part]
    for rows, images in generate_chunks(
        clean, output.corruption, severity, split, args.seed, args.frost_dir, device
    ):
        yield rows, images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """`utils.atomic.replacing` for a folder of files; `path` must be gone when the block ends."""
    temporary = path.with_name(temporary_name(path.name))
    try:
        temporary.mkdir(parents=True)
        yield temporary
        if hasattr(os, "sync"):
            os.sync()  # for tens of thousands of small files cheaper than a sync of each
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- preview --------------------------------------------------------------------------------


def preview(args: argparse.Namespace) -> None:
    """Write the sheet that `args` (from `parse_args`) ask for."""
    path = Path(args.preview)
    if path.exists() and not args.overwrite:
        raise InputError(f"--preview {path}: there already; --overwrite replaces it")
    device = choose_device(args.device)
    split = SPLIT_OF[args.split[0]]
    clean = datasets.load(args.dataset, args.data, split, args.image_size)
    chosen = stable_seed("preview", args.seed) % len(clean)
    sample = clean.images[chosen : chosen + 1]
    rows = {}
    for name in args.corruption:
        rows[name] = [sample[0]]
        for severity in args.severity:
            draws = draws_of(args.seed, name, severity, split)
            rows[name].append(
                corrupt(sample.to(device), name, severity, draws, args.frost_dir)[0].cpu()
            )
    with replacing(path) as temporary:
        sheet(rows, ["clean", *(f"severity {s}" for s in args.severity)]).save(temporary)
    facts = {
        **facts_of(args, {args.split[0]: clean}, device),
        "image": f"row {int(clean.rows[chosen])}, {clean.classes[int(clean.labels[chosen])]}",
        "wrote": path,
    }
    report.header("make_corruptions.py --preview", facts)


def sheet(rows: dict[str, list[torch.Tensor]], columns: list[str]) -> Image.Image:
    """Pictures, uint8 (3, H, W) and all of one size, with the name of each row and column."""
    font = ImageFont.load_default()
    height, width = next(iter(rows.values()))[0].shape[-2:]
    scale = max(1, round(CELL / max(height, width)))
    height, width = height * scale, width * scale
    gap = 4
    left = max(int(font.getbbox(name)[2]) for name in rows) + 4 * gap
    top = 6 * gap
    size = (left + len(columns) * (width + gap), top + len(rows) * (height + gap))
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for k, column in enumerate(columns):
        draw.text((left + k * (width + gap), 2 * gap), column, "black", font)
    for r, (name, pictures) in enumerate(rows.items()):
        y = top + r * (height + gap)
        draw.text((2 * gap, y + height // 2 - gap), name, "black", font)
        for k, picture in enumerate(pictures):
            image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
            image = image.resize((width, height), Image.Resampling.NEAREST)
            page.paste(image, (left + k * (width + gap), y))
    return page


# ---- header ---------------------------------------------------------------------------------


def facts_of(
    args: argparse.Namespace, sets: dict[str, ImageSet], device: torch.device
) -> dict[str, object]:
    """The lines of the header that files and sheets share."""
    first = next(iter(sets.values()))
    height, width = first.images.shape[-2:]
    counts = ", ".join(f"{len(images):,} {part}" for part, images in sets.items())
    everything = args.corruption == list(CORRUPTIONS)
    named = f"all {len(CORRUPTIONS)}" if everything else ", ".join(args.corruption)
    return {
        "data": f"{first.name}, {height}×{width}, {len(first.classes)} classes: {counts}",
        "corruptions": named,
        "severity": " ".join(map(str, args.severity)),
        **arguments.frost_note(args.corruption, args.frost_dir),
        "seed": args.seed,
        "device": report.device_name(device),
    }


def print_header(
    args: argparse.Namespace,
    sets: dict[str, ImageSet],
    device: torch.device,
    counts: dict[str, int],
    needed: int,
    free: int,
) -> None:
    """Say what is about to be written, where, and how much of it."""
    facts = {
        **facts_of(args, sets, device),
        "layout": args.layout,
        "writes": args.out,
        **counts,
        "size": f"{in_bytes(needed)}, {in_bytes(free)} free",
    }
    report.header("make_corruptions.py", facts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        if args.preview:
            preview(args)
        else:
            make(args)


if __name__ == "__main__":
    main()
