"""Fine-tune one model: standard (clean images), or robust to one or more corruptions.

The paper's recipe: SGD, 50 epochs, lr 0.01 × 0.1 at epochs 20 and 40, batch 128.

    # the standard model θ_std
    python train_corruption.py --pretrained --lr 0.01 --dataset cifar10 --arch vgg16 \\
        --data data/cifar10 --save_dir runs/vgg16/standard
    # a robust model θ_c; the corrupted copy is made in memory unless --data holds one
    python train_corruption.py --pretrained --lr 0.01 --dataset cifar10-c --arch vgg16 \\
        --corruption gaussian_noise --data data/cifar10-c --std_data data/cifar10 \\
        --save_dir runs/vgg16/robust/gaussian_noise
    # one model on several GPUs, each taking its part of every batch
    torchrun --nproc_per_node=4 train_corruption.py --pretrained --dataset tinyimagenet …

Writes to --save_dir: checkpoint.pth.tar (last epoch), model_SA_best.pth.tar (best on clean
validation images: θ_std), model_RA_best.pth.tar (best on corrupted ones: θ_c), results.json (of a
finished run). One process at a time; --resume after an interruption ends as if there were none.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
from datasets import cache
from datasets.corrupted import corrupted_set, mixed_training_set
from datasets.images import ImageSet, fingerprint, stable_seed
from datasets.loader import BatchLoader, augmentation_for, fits
from datasets.normalization import normalization
from models import ARCHS, build_model
from models.vgg import MIN_SIDE, VGGS
from utils import arguments, distributed, report
from utils import checkpoint as ckpt
from utils.atomic import check_writable
from utils.engine import (
    TrainStep,
    be_deterministic,
    choose_device,
    compile_model,
    evaluate,
    to_device,
    train_epoch,
    use_amp,
)
from utils.errors import InputError, script_errors
from utils.lock import hold


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    data = parser.add_argument_group("data")
    arguments.add_dataset(data)
    arguments.add_subset(data)
    data.add_argument(
        "--data",
        metavar="DIR",
        help="the data set; for a robust model the corrupted set in a published layout, "
        "or the clean one: what is not there is generated",
    )
    data.add_argument("--std_data", metavar="DIR", help="the clean set, if --data is corrupted")
    data.add_argument(
        "--corruption",
        nargs="+",
        default=[],
        metavar="NAME",
        help="train a robust model; of several corruptions each image is under one",
    )
    arguments.add_corruption(data)
    data.add_argument(
        "--resample_corruption",
        action="store_true",
        help="draw the corruption of the training images anew in every epoch",
    )

    model = parser.add_argument_group("model")
    model.add_argument("--arch", default="vgg16", choices=ARCHS, help="architecture")
    arguments.add_pretrained(model)
    model.add_argument(
        "--keep_head",
        action="store_true",
        help="start from the head of --pretrained too: a model of these classes trains on",
    )

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--lr", type=float, default=0.01, help="initial learning rate")
    recipe.add_argument("--momentum", type=float, default=0.9, help="of SGD")
    recipe.add_argument("--weight_decay", type=float, default=5e-4, help="of all parameters")
    recipe.add_argument("--batch_size", type=int, default=128, help="images per step")
    recipe.add_argument("--epochs", type=int, default=50, help="passes over the training images")
    recipe.add_argument(
        "--decreasing_lr",
        default="20,40",
        metavar="E,E",
        help="epochs after which the learning rate is multiplied by 0.1",
    )
    recipe.add_argument(
        "--seed", type=int, default=0, help="of head, order, augmentation and corruption draws"
    )

    data.add_argument(
        "--workers", type=int, metavar="N", help="threads that decode images (default: all cores)"
    )
    parser.add_argument("--save_dir", required=True, metavar="DIR", help="for the checkpoints")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="FILE",
        help="go on from FILE, or from --save_dir if it holds a checkpoint, else start",
    )
    parser.add_argument(
        "--print_freq", type=int, default=100, metavar="STEPS", help="between loss updates"
    )
    arguments.add_device(parser)
    parser.add_argument(
        "--compile", action="store_true", help="let torch.compile make the model's kernels"
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="same seed, same bits on CUDA too, which is slower; on a CPU it is so anyway",
    )
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Raise InputError for every value that can be judged before anything is read."""
    dataset = datasets.base_name(args.dataset)
    if args.dataset.endswith("-c") and not args.corruption:
        raise InputError(
            f"--dataset {args.dataset} is a corrupted set: name a --corruption, "
            f"or train a standard model on {dataset}"
        )
    arguments.check_corruptions(args.corruption)
    if args.resample_corruption and not args.corruption:
        raise InputError("--resample_corruption draws a --corruption anew; name one")
    if args.keep_head and arguments.pretrained_source(args) is None:
        raise InputError("--keep_head keeps the head of --pretrained; name that")
    arguments.check_severity(args.severity)
    arguments.check_at_least(
        args, batch_size=1, epochs=1, print_freq=1, lr=0, momentum=0, weight_decay=0
    )
    arguments.check_seed(args.seed)
    arguments.check_frost(args.frost_dir)
    if args.workers is not None:
        arguments.check_at_least(args, workers=1)
    arguments.pretrained_source(args)
    milestones(args.decreasing_lr)


def milestones(text: str) -> list[int]:
    """The epochs in a --decreasing_lr value such as "20,40"."""
    wrong = InputError(f"--decreasing_lr {text}: epochs separated by commas, e.g. 20,40")
    try:
        epochs = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise wrong from None
    if any(epoch < 0 for epoch in epochs):
        raise wrong
    return epochs


# ---- data and model -------------------------------------------------------------------------


def load_data(args: argparse.Namespace, device: torch.device) -> dict[str, ImageSet]:
    """ "train" (corrupted for a robust model), the clean "val" and "test", and a "val NAME" and
    "test NAME" for each corruption NAME, all sharing one split."""
    cache.WORKERS = args.workers
    root = args.std_data or args.data
    parts = ("train", "val", "test")
    try:
        with distributed.rank_0_first():
            sets = {part: arguments.load_images(args, root, part) for part in parts}
    except InputError as error:
        if args.std_data:
            raise InputError(str(error).replace("--data", "--std_data", 1)) from error
        hint = "; --std_data names the clean set" if args.corruption else ""
        raise InputError(f"{error}{hint}") from error
    warn_of_overlap(sets["val"], sets["test"])
    draw = {
        "severity": args.severity,
        "seed": args.seed,
        "root": args.data,
        "frost_dir": args.frost_dir,
        "device": device,
    }
    for name in args.corruption:
        for part in ("val", "test"):
            sets[f"{part} {name}"] = corrupted_set(sets[part], name, split=part, **draw)
    sets["clean train"] = sets["train"]
    if args.corruption:
        if args.resample_corruption:
            draw["root"] = None  # a published copy would be the same in every epoch
        sets["train"] = mixed_training_set(sets["train"], args.corruption, split="train", **draw)
    return sets


def warn_of_overlap(val: ImageSet, test: ImageSet) -> None:
    """Warn of images in both, pixel by pixel: what chooses the model must not test it."""
    of_val, of_test = (
        {
            hashlib.blake2b(image, digest_size=16).digest()
            for image in part.images.flatten(1).contiguous().numpy()
        }
        for part in (val, test)
    )
    if both := len(of_val & of_test):
        warnings.warn(
            f"validation and test overlap: {both} of {len(of_val)} different validation images "
            "are test images too",
            stacklevel=2,
        )


def redraw(
    args: argparse.Namespace, clean: ImageSet, device: torch.device
) -> Callable[[int], Tensor]:
    """For --resample_corruption: epoch → its training images, each under the same corruption."""

    def images(epoch: int) -> Tensor:
        return mixed_training_set(
            clean,
            args.corruption,
            args.severity,
            args.seed,
            frost_dir=args.frost_dir,
            device=device,
            draw_seed=stable_seed("epoch", args.seed, epoch),
        ).images

    return images


def start_model(args: argparse.Namespace, clean: ImageSet) -> tuple[nn.Module, str | None]:
    """The model to fine-tune, and the hash of the pretrained weights in it (None: none).

    It normalizes as `clean`, the clean training set, asks for, whatever it is trained on.
    """
    mean, std = normalization(clean.name, clean)
    model = build_model(args.arch, len(clean.classes), mean, std)
    source = arguments.pretrained_source(args)
    if source is None:
        return model, None
    state = ckpt.pretrained_state_dict(source, args.arch)
    dropped = ckpt.load_pretrained(model, args.arch, state, source, args.keep_head)
    if dropped:
        print(
            f"{source}: {', '.join(dropped)} left out, a new head has {len(clean.classes)} classes"
        )
    return model, ckpt.backbone_hash(state)


def check_images(args: argparse.Namespace, train: ImageSet, device: torch.device) -> None:
    """Raise InputError where the architecture can't train on such images or batches."""
    side = min(train.images.shape[-2:])
    if args.arch in VGGS and side < MIN_SIDE:
        raise InputError(
            f"{args.arch} halves its input four times: images of {side} pixels are too "
            f"small, use --image_size {MIN_SIDE} or more, or a ResNet"
        )
    # Batch norm has the whole batch on CUDA, on a CPU each process its own part.
    ranks = distributed.ranks()
    parts = ranks if device.type == "cpu" else 1
    first, last = min(args.batch_size, len(train)), len(train) % args.batch_size
    fewest = min(first, last) if last >= max(2, ranks) else first
    if args.arch.startswith("resnet") and fewest // parts < 2:
        raise InputError(
            f"--batch_size {args.batch_size}: batch norm needs at least 2 images per step"
            + (f" in each of {ranks} processes" if parts > 1 else "")
        )


# ---- training -------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> dict:
    """Run the recipe of `args` (from `parse_args`); gives what it writes to results.json.

    Raises InputError while another process trains in --save_dir.
    """
    folder = Path(args.save_dir)
    check_writable(folder)
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            stack.enter_context(hold(folder / ".lock", f"--save_dir {folder} is in use"))
        return fine_tune(args, folder)


def fine_tune(args: argparse.Namespace, folder: Path) -> dict:
    """`train`, writing to `folder`, which is this run's alone."""
    if args.deterministic:
        be_deterministic()
    device = choose_device(args.device)
    amp = use_amp(device, args.amp)
    torch.manual_seed(args.seed)
    sets = load_data(args, device)
    model, pretrained_hash = start_model(args, sets["clean train"])
    check_images(args, sets["train"], device)
    loader = BatchLoader(
        sets["train"],
        args.batch_size,
        augment=augmentation_for(sets["train"].name),
        device=device,
        shuffle=True,
        seed=args.seed,
        resample=redraw(args, sets["clean train"], device) if args.resample_corruption else None,
        rank=distributed.rank(),
        ranks=distributed.ranks(),
    )
    print_header(args, sets, pretrained_hash, loader, amp)

    model = distributed.synchronized(to_device(model, device))
    if args.compile:
        compile_model(model, device)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=args.lr,
        momentum=args.momentum,
        weight_decay=args.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, milestones(args.decreasing_lr), gamma=0.1
    )
    progress = {"epoch": 0, "best_sa": -1.0, "best_ra": -1.0, "history": []}
    parts = {"optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    run = {**identity(args), "pretrained_hash": pretrained_hash}
    if args.resume:
        resume(args, run, model, parts, progress)
    if not args.resample_corruption:
        del sets["clean train"]
    for part in sets:  # what every epoch evaluates is copied to the device once, if it fits
        if part.startswith("val") and fits(sets[part].images, device):
            sets[part] = sets[part].to(device)

    step = TrainStep(model, optimizer, amp=amp)
    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        start = time.perf_counter()
        stats = train_epoch(
            model,
            loader,
            optimizer,
            amp=amp,
            print_freq=args.print_freq,
            title=f"epoch {epoch}/{args.epochs}",
            step=step,
        )
        scheduler.step()
        speed = len(loader.images) / (time.perf_counter() - start)

        sa = evaluate(model, sets["val"], amp=amp, title="clean validation")
        ras = {
            name: evaluate(model, sets[f"val {name}"], amp=amp, title=f"{name} validation")
            for name in args.corruption
        }
        ra = report.mean(ras.values()) if ras else None
        print(
            f"epoch {epoch}/{args.epochs}  loss {stats.loss:.4f}  train {stats.accuracy:.2f}"
            f"  val clean {sa:.2f}{f'  corrupted {ra:.2f}' if ras else ''}  {speed:,.0f} images/s",
            flush=True,
        )
        better = []
        if sa > progress["best_sa"]:
            progress["best_sa"] = sa
            better.append(ckpt.BEST_SA)
        if ras and ra > progress["best_ra"]:
            progress["best_ra"] = ra
            better.append(ckpt.BEST_RA)
        progress["epoch"] = epoch
        progress["history"].append(
            {
                "epoch": epoch,
                "loss": stats.loss,
                "train": stats.accuracy,
                "val_clean": sa,
                "val_corrupted": ras,
                "images_per_second": round(speed, 1),
            }
        )
        content = {
            "state_dict": model.state_dict(),
            **{name: part.state_dict() for name, part in parts.items()},
            "rng": torch.get_rng_state(),
            **progress,
            **run,
        }
        if distributed.rank() == 0:
            remove_earlier(folder, everything=epoch == 1)
            for name in (*better, ckpt.LAST):
                ckpt.save(content, folder / name)

    # Validation has chosen; the test images are read once, by the chosen model.
    best = folder / (ckpt.BEST_RA if args.corruption else ckpt.BEST_SA)
    distributed.wait_for_all()
    chosen = ckpt.read(best)
    ckpt.load_model_weights(model, args.arch, ckpt.state_dict_of(chosen, best), best)
    ta = evaluate(model, sets["test"], amp=amp, title="clean test")
    ras = {
        name: evaluate(model, sets[f"test {name}"], amp=amp, title=f"{name} test")
        for name in args.corruption
    }
    result = {
        "model": best.name,
        "epoch": chosen["epoch"],
        "TA": ta,
        "RA": ras,
        "history": progress["history"],
        "arguments": vars(args),
        "data": fingerprint(sets["train"]),
        **report.provenance(device),
    }
    if distributed.rank() == 0:
        report.write_json(folder / "results.json", result)
    row = [f"{best.name} (epoch {chosen['epoch']})", ta, *ras.values()]
    print()
    print(report.markdown_table(["test accuracy, %", "TA", *(f"RA {c}" for c in ras)], [row]))
    return result


def identity(args: argparse.Namespace) -> dict:
    """What makes a run this run; kept in its checkpoints and compared on --resume."""
    names = ("arch", "corruption", "resample_corruption", "image_size", "classes", "train_images")
    names += ("keep_head", "seed", "lr", "momentum", "weight_decay", "batch_size", "decreasing_lr")
    severity = {"severity": args.severity} if args.corruption else {}
    dataset = {"dataset": datasets.base_name(args.dataset)}
    return dataset | {name: getattr(args, name) for name in names} | severity


def resume(args: argparse.Namespace, run: dict, model: nn.Module, parts: dict, progress: dict):
    """Continue a run of `train`: weights, optimizer, schedule, random states, best scores."""
    path = Path(args.save_dir) / ckpt.LAST if args.resume == "auto" else Path(args.resume)
    if args.resume == "auto" and not path.exists():
        return
    saved = ckpt.read(path)
    missing = {*parts, *progress, "rng"} - saved.keys()
    if missing:
        raise InputError(f"--resume {path}: not written by this script ({sorted(missing)} missing)")
    for name, value in run.items():
        if name in saved and saved[name] != value:
            raise InputError(
                f"--resume {path}: that run has {name} {saved[name]}, this one {value}"
            )
    ckpt.load_model_weights(model, args.arch, ckpt.state_dict_of(saved, path), path)
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
    except Exception as error:  # torch raises many types for states that don't fit
        raise InputError(f"--resume {path}: its state does not fit this run ({error})") from error
    progress.update({key: saved[key] for key in progress})
    folder = Path(args.save_dir)
    if path.parent.resolve() != folder.resolve() and distributed.rank() == 0:
        remove_earlier(folder, everything=True)
        for name in (ckpt.BEST_SA, ckpt.BEST_RA):  # what later epochs have to beat
            if (path.parent / name).is_file():
                ckpt.save(ckpt.read(path.parent / name), folder / name)
        ckpt.save(saved, folder / ckpt.LAST)
    print(f"resumed {path} after epoch {progress['epoch']}")


def remove_earlier(folder: Path, everything: bool) -> None:
    """Delete what no longer holds once an epoch is about to be saved in `folder`.

    results.json, which says that a run is finished, and, where it begins anew, `everything` of an
    earlier run: first what it would be resumed from, so that two runs never mix.
    """
    checkpoints = (ckpt.LAST, ckpt.BEST_SA, ckpt.BEST_RA) if everything else ()
    for name in ("results.json", *checkpoints):
        (folder / name).unlink(missing_ok=True)


def print_header(
    args: argparse.Namespace,
    sets: dict[str, ImageSet],
    pretrained_hash: str | None,
    loader: BatchLoader,
    amp: bool,
) -> None:
    """Say what is about to be trained, on what, and how."""
    images = sets["train"]
    counts = ", ".join(f"{len(sets[part]):,} {part}" for part in ("train", "val", "test"))
    height, width = images.images.shape[-2:]
    kind = f"robust to {' + '.join(args.corruption)}" if args.corruption else "standard"
    facts = {
        "model": f"{args.arch}, {kind}",
        "data": f"{images.name}, {height}×{width}, {len(images.classes)} classes: {counts}",
    }
    if args.corruption:
        source = "drawn anew in every epoch" if args.resample_corruption else images.source
        facts["corrupted"] = f"severity {args.severity}, {source}"
    how = [report.device_name(loader.device), "bf16" if amp else "float32"]
    how += [name for name in ("compile", "deterministic") if getattr(args, name)]
    how += [f"{loader.ranks} processes"] if loader.ranks > 1 else []
    facts |= {
        **arguments.frost_note(args.corruption, args.frost_dir),
        "start": f"pretrained weights {pretrained_hash}" if pretrained_hash else "random weights",
        "recipe": f"{args.epochs} epochs, batch {args.batch_size}, lr {args.lr:g} × 0.1 after "
        f"{args.decreasing_lr}, momentum {args.momentum:g}, weight decay {args.weight_decay:g}",
        "seed": args.seed,
        "device": ", ".join(how),
        "images": loader.residence,
        "writes": args.save_dir,
    }
    report.header("train_corruption.py", facts)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        with distributed.session(args.device):
            train(args)


if __name__ == "__main__":
    main()
