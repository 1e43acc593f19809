"""Fine-tune one model: standard (clean images), or robust to one or more corruptions.

The paper's recipe: SGD, 50 epochs, lr 0.01 × 0.1 at epochs 20 and 40, batch 128.

    # the standard model θ_std
    python train_corruption.py --pretrained --data data/cifar10 --save_dir runs/vgg16/standard
    # a robust model θ_c; the corrupted copy is read from --data, or made without it
    python train_corruption.py --pretrained --dataset cifar10-c --corruption gaussian_noise \\
        --data data/cifar10-c --std_data data/cifar10 --save_dir runs/vgg16/robust/gaussian_noise
    # one model on several GPUs, each taking its part of every batch
    torchrun --nproc_per_node=4 train_corruption.py --pretrained --dataset tinyimagenet …

Writes to --save_dir: checkpoint.pth.tar (last epoch), model_SA_best.pth.tar (best on clean
validation images: θ_std), model_RA_best.pth.tar (best on corrupted ones: θ_c), results.json (of a
finished run). One process at a time; --resume after an interruption ends as if there were none.
"""

import contextlib
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

import datasets
from datasets import cache, flags
from datasets.corrupted import Copies, corrupted_set, mixed_training_set
from datasets.images import ImageSet, fingerprint, stable_seed
from datasets.loader import BatchLoader, augmentation_for, evaluation_batches, fits
from datasets.normalization import normalization
from models import build_model
from utils import arguments, distributed, engine, report
from utils import checkpoint as ckpt
from utils.errors import InputError, script_errors, warn
from utils.files import check_writable, hold


def parse_args(argv: Sequence[str] | None = None) -> Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    data = parser.add_argument_group("data")
    arguments.add(data, "dataset image_size classes train_images test_images", flags.FLAGS)
    arguments.add(data, "data", flags.FLAGS, help="the clean or the corrupted set")
    arguments.add(data, "std_data", flags.FLAGS)
    arguments.add(data, "corruption", flags.FLAGS, help="for a robust model, one on each image")
    arguments.add(data, "severity frost_dir resample_corruption workers", flags.FLAGS)
    model = parser.add_argument_group("model")
    arguments.add(model, "arch pretrained pretrained_path checkpoint_key keep_head")
    recipe = parser.add_argument_group("recipe")
    arguments.add(recipe, "lr momentum weight_decay batch_size epochs decreasing_lr seed")
    arguments.add(parser, "save_dir resume overwrite print_freq device amp compile deterministic")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: Namespace) -> None:
    """Raise InputError for flags that ask for others."""
    if args.dataset.endswith("-c") and not args.corruption:
        raise InputError(f"--dataset {args.dataset} is a corrupted set: name a --corruption")
    if args.data and args.std_data and not args.corruption:
        raise InputError(f"--std_data {args.std_data}: beside --data it asks for a --corruption")
    if args.resample_corruption and not args.corruption:
        raise InputError("--resample_corruption draws a --corruption anew; name one")
    if args.resume == "":
        raise InputError("--resume names no file; without a value it goes on in --save_dir")
    if arguments.pretrained_source(args) is None and args.keep_head:
        raise InputError("--keep_head keeps the head of --pretrained; name that")


# ---- data and model -------------------------------------------------------------------------


def load_data(args: Namespace, device: torch.device) -> tuple[ImageSet, ImageSet, dict, dict]:
    """The training images, the same ones clean, and those for validation and for the test.

    The last two are dicts by name: "clean", and each --corruption.
    """
    cache.WORKERS = args.workers
    root = args.std_data or args.data
    try:
        with distributed.rank_0_first():
            train, val, test = (flags.load_images(args, root, s) for s in ("train", "val", "test"))
    except InputError as error:
        said = str(error).replace("--data", "--std_data", 1) if args.std_data else str(error)
        hint = "; --std_data names the clean set" if args.corruption and not args.std_data else ""
        raise InputError(said + hint) from error
    warn_of_overlap(val, test)
    named = args.std_data is not None  # --data is the clean set else
    how = Copies(args.severity, args.seed, args.data, args.frost_dir, device, named, resident=True)
    images = train
    if args.corruption:
        # A published copy would be the same in every epoch.
        drawn = replace(how, root=None) if args.resample_corruption else how
        images = mixed_training_set(train, args.corruption, drawn)
    of_val = {c: corrupted_set(val, c, "val", how) for c in args.corruption}
    later = replace(how, resident=False)  # the test comes when training is done
    of_test = {c: corrupted_set(test, c, "test", later) for c in args.corruption}
    return images, train, {"clean": val, **of_val}, {"clean": test, **of_test}


def warn_of_overlap(val: ImageSet, test: ImageSet) -> None:
    """Warn of images in both, pixel by pixel: what chooses the model must not test it."""
    of_val, of_test = ({hash(i.tobytes()) for i in part.images.numpy()} for part in (val, test))
    if both := len(of_val & of_test):
        said = f"validation and test overlap: {both} of {len(of_val)} different validation images"
        warn(f"{said} are test images too")


def redraw(args: Namespace, clean: ImageSet, device: torch.device) -> Callable[[int], Tensor]:
    """For --resample_corruption: epoch → its training images, each under the same corruption."""
    if fits(clean.images, device):
        clean = clean.to(device)

    def images(epoch: int) -> Tensor:
        seed = stable_seed("epoch", args.seed, epoch)
        how = Copies(args.severity, seed, None, args.frost_dir, device, resident=True)
        return mixed_training_set(clean, args.corruption, how, partition_seed=args.seed).images

    return images


def start_model(args: Namespace, clean: ImageSet) -> tuple[nn.Module, str | None]:
    """The model, which normalizes as `clean` asks for, and the hash of its pretrained weights."""
    model = build_model(args.arch, len(clean.classes), *normalization(clean.name, clean))
    source = arguments.pretrained_source(args)
    if source is None:
        return model, None
    state = ckpt.pretrained_state_dict(source, args.arch, args.checkpoint_key)
    dropped = ckpt.load_pretrained(model, args.arch, state, source, args.keep_head)
    if dropped:
        print(f"{source}: {', '.join(dropped)} left out, new head: {len(clean.classes)} classes")
    return model, ckpt.backbone_hash(state)


def check_images(args: Namespace, loader: BatchLoader) -> None:
    """Raise InputError where the architecture can't train on such images or batches."""
    engine.check_side(args.arch, loader.images)
    last = loader.whole_batch(len(loader) - 1)
    if last < loader.ranks:
        told = f"{len(loader.images)} training images are fewer than the {loader.ranks} processes"
        raise InputError(f"--nproc_per_node: {told}")
    # Batch norm has the whole batch on CUDA, on a CPU each process its own part.
    parts = loader.ranks if loader.device.type == "cpu" else 1
    if args.arch.startswith("resnet") and last // parts < 2:
        told = "batch norm needs at least 2 images per step"
        told += f" in each of {parts} processes" if parts > 1 else ""
        raise InputError(f"--batch_size {args.batch_size}: {told}")


# ---- training -------------------------------------------------------------------------------


def train(args: Namespace) -> dict:
    """Run the recipe of `args` (from `parse_args`); gives what it writes to results.json.

    Raises InputError while another process trains in --save_dir.
    """
    folder = Path(args.save_dir)
    check_writable(folder)
    first = distributed.rank() == 0
    with hold(folder / ".lock", f"--save_dir {folder}") if first else contextlib.nullcontext():
        goes_on = args.resume and resumed_from(args).parent.resolve() == folder.resolve()
        if (folder / "results.json").exists() and not (goes_on or args.overwrite):
            choice = "--resume goes on with it, --overwrite trains anew"
            raise InputError(f"--save_dir {folder}: a finished run lies there; {choice}")
        return fine_tune(args, folder)


def fine_tune(args: Namespace, folder: Path) -> dict:
    """`train`, writing to `folder`, which is this run's alone."""
    if args.deterministic:
        engine.be_deterministic()
    device = engine.choose_device(args.device)
    amp = engine.use_amp(device, args.amp)
    torch.manual_seed(args.seed)
    images, clean, val, test = load_data(args, device)
    model, pretrained_hash = start_model(args, clean)
    resample = redraw(args, clean, device) if args.resample_corruption else None
    options = {"augment": augmentation_for(images.name), "shuffle": True, "resample": resample}
    options |= {"seed": args.seed, "rank": distributed.rank(), "ranks": distributed.ranks()}
    loader = BatchLoader(images, args.batch_size, device=device, **options)
    clean_print, data_print = fingerprint(clean), fingerprint(images)
    sources = {"train": images.source, **{name: part.source for name, part in test.items()}}
    known = flags.data_facts(args, clean)
    check_images(args, loader)
    sets = {"train": images, "val": val["clean"], "test": test["clean"]}
    print_header(args, sets, sources, pretrained_hash, loader, amp)
    del clean, images, sets  # all but what the loader keeps

    model = distributed.synchronized(engine.to_device(model, device, amp))
    if args.compile:
        engine.compile_model(model, device)
    optimizer = engine.sgd(model, args.lr, args.momentum, args.weight_decay)
    milestones = [int(epoch) for epoch in args.decreasing_lr.split(",") if epoch.strip()]
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    progress = {"epoch": 0, "best_sa": -1.0, "best_ra": -1.0, "history": []}
    parts = {"state_dict": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    run = {**identity(args), "pretrained_hash": pretrained_hash, "data": clean_print, **known}
    run |= {"corrupted_data": data_print} if args.corruption else {}
    saved_amp = resume(args, run, parts, progress) if args.resume else None
    if args.amp is None and saved_amp is not None and saved_amp != amp:
        began, ours = (engine.arithmetic(device, a, a) for a in (saved_amp, amp))
        print(f"goes on as it began, in {began}; this machine would have chosen {ours}")
        amp = saved_amp
        engine.to_device(model, device, amp)
    choosing = {name: evaluation_batches(part, device) for name, part in val.items()}  # copied once

    step = engine.TrainStep(model, optimizer, amp=amp)
    for epoch in range(progress["epoch"] + 1, args.epochs + 1):
        title, start = f"epoch {epoch}/{args.epochs}", time.perf_counter()
        how = {"amp": amp, "print_freq": args.print_freq, "title": title, "step": step}
        stats = engine.train_epoch(model, loader, optimizer, **how)
        scheduler.step()
        speed = len(loader.images) / (time.perf_counter() - start)
        sa, ras = accuracies(model, choosing, amp, "validation")
        ra = statistics.fmean(ras.values()) if ras else None
        val_said = f"val clean {sa:.2f}" + (f"  corrupted {ra:.2f}" if ras else "")
        said = f"loss {stats.loss:.4f}  train {stats.accuracy:.2f}  {val_said}"
        print(f"{title}  {said}  {speed:,.0f} images/s", flush=True)
        better = []
        for name, best, accuracy in ((ckpt.BEST_SA, "best_sa", sa), (ckpt.BEST_RA, "best_ra", ra)):
            if accuracy is not None and accuracy > progress[best]:
                progress[best] = accuracy
                better.append(name)
        progress["epoch"] = epoch
        entry = {"epoch": epoch, "loss": stats.loss, "train": stats.accuracy, "val_clean": sa}
        entry |= {"val_corrupted": ras, "images_per_second": round(speed, 1)}
        progress["history"].append(entry)
        if distributed.rank() == 0:
            states = {name: part.state_dict() for name, part in parts.items()}
            content = {**states, "rng": torch.get_rng_state(), "amp": amp, **progress, **run}
            remove_earlier(folder, everything=epoch == 1)
            ckpt.save(content, *(folder / name for name in (*better, ckpt.LAST)))

    # Validation has chosen; the test images are read once, by the chosen model.
    path = folder / (ckpt.BEST_RA if args.corruption else ckpt.BEST_SA)
    distributed.wait_for_all()
    chosen = ckpt.read(path)
    ckpt.load_model_weights(model, args.arch, ckpt.state_dict_of(chosen, path), path)
    for_test = {name: evaluation_batches(part, device) for name, part in test.items()}
    ta, ras = accuracies(model, for_test, amp, "test")
    result = {"model": path.name, "epoch": chosen["epoch"], "TA": ta, "RA": ras}
    result |= {"sources": sources, "history": progress["history"], "arguments": vars(args)}
    result |= {"data": data_print, **report.provenance(device)}
    if distributed.rank() == 0:
        report.write_json(folder / "results.json", result)
    row = [f"{path.name} (epoch {chosen['epoch']})", ta, *ras.values()]
    columns = ["test accuracy, %", "TA", *(f"RA {c} ({report.origin([c], sources)})" for c in ras)]
    print(f"\n{report.markdown_table(columns, [row])}")
    return result


def accuracies(model: nn.Module, batches: Mapping, amp: bool, title: str) -> tuple[float, dict]:
    """TA on the "clean" batches (BatchLoaders), and by name RA on those of each corruption."""
    found = {
        name: engine.evaluate(model, part, amp=amp, title=f"{name} {title}")
        for name, part in batches.items()
    }
    return found.pop("clean"), found


def identity(args: Namespace) -> dict:
    """What makes a run this run; kept in its checkpoints and compared on --resume."""
    names = ("arch", "corruption", "resample_corruption", "image_size", "classes", "train_images")
    names += ("test_images", "frost_dir") if "frost" in args.corruption else ("test_images",)
    names += ("keep_head", "seed", "lr", "momentum", "weight_decay", "batch_size", "decreasing_lr")
    severity = {"severity": args.severity} if args.corruption else {}
    dataset = {"dataset": datasets.base_name(args.dataset)}
    return dataset | {name: getattr(args, name) for name in names} | severity


def resumed_from(args: Namespace) -> Path:
    """The checkpoint that --resume names."""
    return Path(args.save_dir) / ckpt.LAST if args.resume == "auto" else Path(args.resume)


def resume(args: Namespace, run: dict, parts: dict, progress: dict) -> bool | None:
    """Continue a run of `train`: weights, optimizer, schedule, random states, best scores.

    Gives whether it ran in bf16, None where that isn't known.
    """
    folder = Path(args.save_dir)
    path = resumed_from(args)
    if args.resume == "auto" and not path.exists():
        return None
    saved = ckpt.read(path)
    if missing := {*parts, *progress, "rng"} - saved.keys():
        raise InputError(f"--resume {path}: not written by this script ({sorted(missing)} missing)")
    for name, value in run.items():
        if saved.get(name, value) == value:
            continue
        if name == "corrupted_data":
            said = "that run began on other corrupted training images than these"
            warn(f"--resume {path}: {said}")
        else:
            raise InputError(f"--resume {path}: that run has {name} {saved[name]}, not {value}")
    saved["state_dict"] = ckpt.state_dict_of(saved, path)
    try:
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["rng"])
    except Exception as error:  # torch raises many types for states that don't fit
        raise InputError(f"--resume {path}: its state does not fit this run ({error})") from error
    progress.update({key: saved[key] for key in progress})
    if progress["epoch"] > args.epochs:
        said = f"--epochs {args.epochs}: {progress['epoch']} are done already"
        warn(f"{said} in {path}, nothing is trained")
    if path.parent.resolve() != folder.resolve() and distributed.rank() == 0:
        remove_earlier(folder, everything=True)
        for name in (ckpt.BEST_SA, ckpt.BEST_RA):  # what later epochs have to beat
            if (path.parent / name).is_file():
                ckpt.save(ckpt.read(path.parent / name), folder / name)
        ckpt.save(saved, folder / ckpt.LAST)
    for name, best in ((ckpt.BEST_SA, "best_sa"), (ckpt.BEST_RA, "best_ra")):
        known = progress[best] < 0 or (path.parent / name).is_file()
        if not known and progress["epoch"] < args.epochs:
            said = f"{path.parent} has no {name}: the best of the epochs to come is taken"
            warn(said)
            progress[best] = -1.0
    print(f"resumed {path} after epoch {progress['epoch']}")
    return saved.get("amp")


def remove_earlier(folder: Path, everything: bool) -> None:
    """Delete results.json, the sign of a finished run, and with `everything` all checkpoints."""
    # First what a run would be resumed from, so that two runs never mix.
    checkpoints = (ckpt.LAST, ckpt.BEST_SA, ckpt.BEST_RA) if everything else ()
    for name in ("results.json", *checkpoints):
        (folder / name).unlink(missing_ok=True)


def print_header(
    args: Namespace, sets: dict, sources: dict, start: str | None, loader: BatchLoader, amp: bool
) -> None:
    """Say what is about to be trained, on what, and how; `start`: hash of pretrained weights."""
    images = sets["train"]
    height, width = images.images.shape[-2:]
    counts = ", ".join(f"{len(part):,} {name}" for name, part in sets.items())
    kind = f"robust to {' + '.join(args.corruption)}" if args.corruption else "standard"
    size = f"{height}×{width}, {len(images.classes)} classes"
    facts = {"model": f"{args.arch}, {kind}", "data": f"{images.name}, {size}: {counts}"}
    if args.corruption:
        for_training = sources["train"] + ", drawn anew in every epoch" * args.resample_corruption
        for_test = "; ".join(dict.fromkeys(sources[c] for c in args.corruption))
        facts["corrupted"] = f"severity {args.severity}; training {for_training}; test {for_test}"
    how = [report.device_name(loader.device), engine.arithmetic(loader.device, amp, args.amp)]
    how += [name for name in ("compile", "deterministic") if getattr(args, name)]
    how += [f"{loader.ranks} processes"] if loader.ranks > 1 else []
    facts |= {
        **flags.frost_note(args.corruption, args.frost_dir),
        "start": f"pretrained weights {start}" if start else "random weights",
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
