"""The paper, one command per table or figure.

    python reproduce.py demo        the main job on the embedded data set, minutes on a CPU
    python reproduce.py main --dataset cifar10 --data data/cifar10 --arch vgg16 \\
        --pretrained vgg16.pth --preset paper
    python reproduce.py all --preset smoke --dataset synthetic        everything, in miniature

main          standard, data augmentation, robust models and patches: storage, TA, RA
layers        relative weight difference between robust and standard model per layer
similarity    cosine between the signatures of all pairs of corruptions
consistency   cosine between the signatures of two data sets
keep-num      accuracy over the number of layers kept
quantization  accuracy over the bytes of a signature, bits × layers kept
alpha         accuracy over the strength of a patch
compose       several signatures at once, against one and against a model trained on all
transfer      signatures on a standard model of another data set, and on an updated backbone
all           these, in this order
report        what the results under --out say about each claim of the paper
pretrain      only θ_pre, where this script is to make it (--pretrain-classes, synthetic)

Models go to --runs, by what determines them, and are reused, as is every accuracy once measured; a
killed run goes on where it was. Results (table.md, table.csv, results.json, a figure) go to --out.
--list prints the commands that train what is missing, one line each, for a cluster's queue.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import itertools
import json
import os
import queue
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt

import datasets
import model_patching
import train_corruption
from datasets import synthetic
from datasets.corrupted import corrupted_set
from datasets.corruptions import CORRUPTIONS, FAMILIES
from datasets.images import HALVES, ImageSet, fingerprint
from datasets.loader import BatchLoader, augmentation_for
from datasets.normalization import normalization
from models import ARCHS, build_model
from models.layers import depth_order, layer_keys
from models.vgg import add_batchnorm, fold_batchnorm
from utils import arguments, claims, figures, report
from utils import checkpoint as ckpt
from utils.atomic import check_writable, write_text
from utils.batchnorm import has_batchnorm
from utils.claims import BATCHNORM_ONLY
from utils.engine import TrainStep, choose_device, evaluate, to_device, train_epoch, use_amp
from utils.errors import InputError, script_errors
from utils.figures import BLUE, GREY, ORANGE
from utils.lock import hold
from utils.measurements import Measurements, tensors_hash
from utils.quantize import METHODS, check_levels
from utils.signature import RobustWeightSignature, cosine, patch


@dataclass(frozen=True)
class Preset:
    """How much of a study: length of the recipe, and defaults of --corruptions and of sweeps."""

    epochs: int
    decreasing_lr: str  # epochs after which lr × 0.1
    pretrain_epochs: int
    corruptions: tuple[str, ...]
    alphas: tuple[float, ...]
    bits: tuple[int, ...]
    train_images: int | None = None
    test_images: int | None = None


ALL_FAMILIES = (
    *("gaussian_noise", "impulse_noise", "motion_blur", "defocus_blur"),  # noise, blur
    *("fog", "contrast"),  # weather, digital
)
PRESETS = {
    "paper": Preset(
        epochs=50,
        decreasing_lr="20,40",
        pretrain_epochs=60,
        corruptions=tuple(CORRUPTIONS),
        alphas=(0, 0.2, 0.4, 0.6, 0.8, 1, 1.2, 1.4),
        bits=(8, 6, 4, 3, 2),
    ),
    "quick": Preset(
        epochs=3,
        decreasing_lr="2",
        pretrain_epochs=12,
        corruptions=ALL_FAMILIES,
        alphas=(0, 0.25, 0.5, 0.75, 1, 1.25),
        bits=(8, 4, 3, 2),
    ),
    "smoke": Preset(
        epochs=1,
        decreasing_lr="1",
        pretrain_epochs=1,
        corruptions=("gaussian_noise", "motion_blur", "fog"),
        alphas=(0, 1),
        bits=(4,),
        train_images=256,
        test_images=100,
    ),
}


# ---- models: what is trained, where it goes ----------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One model: `train_corruption.py` with `flags` trains it into `folder`.

    A job of stage 1 starts from a model of stage 0.
    """

    title: str
    folder: Path
    flags: tuple[str, ...]
    stage: int = 0

    @property
    def done(self) -> bool:
        return (self.folder / "results.json").exists()

    def command(self, resume: bool = True) -> list[str]:
        """The arguments of train_corruption.py; with `resume` it goes on from what is there."""
        return [*self.flags, "--save_dir", str(self.folder), *(["--resume"] if resume else [])]


def recipe(args: argparse.Namespace) -> tuple[int, str]:
    """Epochs, and those after which the learning rate falls: the preset's, or by --epochs."""
    if args.epochs is None:
        return PRESETS[args.preset].epochs, PRESETS[args.preset].decreasing_lr
    falls = dict.fromkeys(str(max(1, round(args.epochs * at))) for at in (0.4, 0.8))
    return args.epochs, ",".join(falls)


def data_tag(args: argparse.Namespace, classes: str | None) -> str:
    """The data set in a folder's name, e.g. "tinyimagenet-32-odd"."""
    parts = (args.dataset, args.image_size, classes)
    return "-".join(str(part) for part in parts if part is not None)


def study_folder(args: argparse.Namespace, seed: int) -> Path:
    """Where the models of a seed are kept."""
    length = args.preset if args.epochs is None else f"{args.epochs}ep"
    name = f"{data_tag(args, args.classes)}_{args.arch}_{length}"
    return Path(args.runs) / name / f"seed{seed}"


def standard_model(args: argparse.Namespace, seed: int) -> Path:
    """The checkpoint of θ_std."""
    return study_folder(args, seed) / "standard" / ckpt.BEST_SA


def robust_root(args: argparse.Namespace, seed: int) -> Path:
    """The folder with a folder for each θ_c."""
    severity = "" if args.severity == 5 else f"-severity{args.severity}"
    return study_folder(args, seed) / f"robust{severity}"


def dataset_flags(args: argparse.Namespace) -> list[str]:
    """The flags of data and architecture that every script shares."""
    flags = ["--dataset", args.dataset, "--arch", args.arch]
    for name in ("data", "image_size", "classes", "train_images", "test_images", "frost_dir"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return flags


def pretrained_flags(args: argparse.Namespace) -> list[str]:
    """θ_pre as the scripts take it."""
    return ["--pretrained", *([args.pretrained] if args.pretrained != ckpt.IMAGENET else [])]


def training_flags(args: argparse.Namespace, seed: int) -> list[str]:
    epochs, decreasing_lr = recipe(args)
    flags = [*dataset_flags(args), "--device", args.device, "--epochs", str(epochs)]
    flags += ["--decreasing_lr", decreasing_lr, "--seed", str(seed)]
    return [*flags, "--severity", str(args.severity)]


def standard_job(args: argparse.Namespace, seed: int) -> Job:
    """θ_std."""
    flags = [*training_flags(args, seed), *pretrained_flags(args)]
    return Job("θ_std", standard_model(args, seed).parent, tuple(flags))


def robust_job(args: argparse.Namespace, seed: int, names: Sequence[str]) -> Job:
    """θ_c of one corruption, or the model trained on the union of several."""
    root, title = robust_root(args, seed), " + ".join(names)
    folder = root / names[0]
    if len(names) > 1:
        every = set(names) == set(CORRUPTIONS)
        folder = root.with_name(root.name.replace("robust", "union")) / (
            "all" if every else "+".join(names)
        )
    flags = [*training_flags(args, seed), *pretrained_flags(args), "--corruption", *names]
    return Job(f"θ_c, c = {title}", folder, tuple(flags))


def update_job(args: argparse.Namespace, seed: int) -> Job:
    """θ_std trained on, on clean images: a third of the epochs at a tenth of the rate."""
    flags = training_flags(args, seed + 1000)
    epochs = max(1, recipe(args)[0] // 3)
    flags += ["--pretrained", str(standard_model(args, seed)), "--keep_head", "--lr", "0.001"]
    flags += ["--epochs", str(epochs), "--decreasing_lr", str(epochs)]
    folder = study_folder(args, seed) / "updated"
    return Job("θ_std, trained on", folder, tuple(flags), stage=1)


def seeds(args: argparse.Namespace) -> list[tuple[int, list[str]]]:
    """Every seed with its corruptions: after the first those of --repeat_corruptions, if given."""
    repeated = args.repeat_corruptions or args.corruptions
    return [(seed, repeated if i else args.corruptions) for i, seed in enumerate(args.seeds)]


def target_study(args: argparse.Namespace) -> argparse.Namespace | None:
    """The settings of the second data set's models (first seed); None where none is named."""
    if args.target_dataset is None:
        return None
    target = copy.copy(args)
    target.dataset, target.data = args.target_dataset, args.target_data
    target.image_size, target.classes = args.target_image_size, args.target_classes
    target.epochs = args.target_epochs or args.epochs
    target.corruptions, target.repeat_corruptions = args.target_corruptions, None
    target.seeds = args.seeds[:1]
    return target


def jobs(args: argparse.Namespace) -> list[Job]:
    """Every model that the experiment needs, those that others start from first."""
    wanted = {name: args.experiment in (name, "all") for name in EXPERIMENTS}
    first = args.seeds[0]
    target = target_study(args) if wanted["consistency"] or wanted["transfer"] else None
    todo = []
    for study in filter(None, (args, target)):
        for seed, names in seeds(study):
            todo += [standard_job(study, seed), *(robust_job(study, seed, [c]) for c in names)]
    if wanted["main"]:
        todo += [robust_job(args, seed, args.corruptions) for seed in complete_seeds(args)]
    if wanted["compose"]:
        todo += [robust_job(args, first, group) for group in args.groups]
    if wanted["transfer"]:
        todo.append(update_job(args, first))
    todo = list({job.folder: job for job in todo}.values())
    return sorted(todo, key=lambda job: job.stage)


def complete_seeds(args: argparse.Namespace) -> list[int]:
    """The seeds that have every corruption."""
    return [seed for seed, names in seeds(args) if names == args.corruptions]


def missing(args: argparse.Namespace, todo: Sequence[Job]) -> list[Job]:
    """Those of the jobs that are still to be done; with --force all."""
    return [job for job in todo if args.force or not job.done]


def list_commands(args: argparse.Namespace, todo: Sequence[Job]) -> None:
    """Print a command line for each model that is missing."""
    todo = missing(args, todo)
    if args.pretrains and not Path(args.pretrained).exists():
        own = [arg for arg in args.command_line if arg not in ("--list", args.experiment)]
        print(shlex.join(["python", "reproduce.py", "pretrain", *own]))
        print("# when that is done:")
    for stage, group in itertools.groupby(todo, key=lambda job: job.stage):
        if stage:
            print("# when these are done:")
        for job in group:
            print(shlex.join(["python", "train_corruption.py", *job.command()]))


def train_all(args: argparse.Namespace, todo: Sequence[Job]) -> None:
    """Train the models that are missing, on --devices at once if several are named."""
    make_own_pretrained(args)
    pretrained_hash = {}
    left = missing(args, todo)
    for job in todo:
        if job not in left:
            check_same_run(job, pretrained_hash)
    for _, group in itertools.groupby(left, key=lambda job: job.stage):
        of_stage = list(group)
        if len(args.devices) > 1:
            train_on(args.devices, of_stage, args.force)
            continue
        for i, job in enumerate(of_stage, start=1):
            print(f"\n[{i}/{len(of_stage)}] {job.title}", flush=True)
            finetune(job.command(resume=not args.force))


def finetune(argv: Sequence[str]) -> dict:
    """train_corruption.py with these arguments, in this process."""
    return train_corruption.train(train_corruption.parse_args(argv))


def train_on(devices: Sequence[str], todo: Sequence[Job], force: bool) -> None:
    """Train each model in a process of its own, one at a time on each of `devices`.

    What a process prints goes to train.log in the model's folder. Raises InputError, after the
    others are done, where one fails.
    """
    waiting: queue.SimpleQueue[Job] = queue.SimpleQueue()
    for job in todo:
        waiting.put(job)
    started: list[subprocess.Popen] = []
    failed: list[str] = []
    environment = dict(os.environ)
    if set(devices) == {"cpu"}:
        share = max(1, (os.cpu_count() or 1) // len(devices))
        environment["OMP_NUM_THREADS"] = str(share)
    script = str(Path(train_corruption.__file__).resolve())

    def work(device: str) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            print(f"{device}: {job.title}", flush=True)
            job.folder.mkdir(parents=True, exist_ok=True)
            argv = [*job.command(resume=not force), "--device", device]
            log = job.folder / "train.log"
            with open(log, "w") as file:
                command = [sys.executable, script, *argv]
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
                started.append(process)
                code = process.wait()
            if code:
                last = log.read_text().strip().splitlines()[-1:] or ["no output"]
                failed.append(f"{job.title}: {last[0]} ({log})")

    threads = [threading.Thread(target=work, args=(device,)) for device in devices]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # interrupted: the next start goes on where the processes are now
        with contextlib.suppress(queue.Empty):
            while True:
                waiting.get_nowait()
        for process in started:
            process.terminate()
        raise
    if failed:
        raise InputError(f"{len(failed)} of {len(todo)} models failed: {'; '.join(failed)}")


def check_same_run(job: Job, pretrained_hash: dict[str, str]) -> None:
    """Raise InputError when the finished run in the job's folder had other settings.

    pretrained_hash: of each file already read, kept over calls.
    """
    args = train_corruption.parse_args(job.command())
    source = arguments.pretrained_source(args)
    if source not in pretrained_hash:
        state = ckpt.pretrained_state_dict(source, args.arch)
        pretrained_hash[source] = ckpt.backbone_hash(state)
    saved = ckpt.read(job.folder / ckpt.LAST)
    wanted = train_corruption.identity(args) | {"pretrained_hash": pretrained_hash[source]}
    for name, value in wanted.items():
        if name in saved and saved[name] != value:
            raise InputError(
                f"{job.folder} holds a run with {name} {saved[name]}, wanted is {value}: "
                "name other --runs, or train again with --force"
            )


# ---- θ_pre, where no file is at hand ------------------------------------------------------------


def pretraining_images(args: argparse.Namespace) -> ImageSet:
    """Training images of the other half of the classes (synthetic: its own set for that)."""
    if args.pretrain_classes:
        parts = copy.copy(args)
        parts.classes = args.pretrain_classes
        return arguments.load_images(parts, args.data, "train")
    images = synthetic.load("pretrain", args.image_size)
    return images if args.train_images is None else datasets.spaced(images, args.train_images)


def make_pretrained(
    args: argparse.Namespace,
    path: Path,
    arch: str,
    epochs: int,
    load: Callable[[], ImageSet],
) -> None:
    """Train θ_pre on the images of `load` into `path`, unless it is there and not to be redone.

    Of several processes that want it one trains, the others wait for it.
    """
    with hold(path.with_name(f".{path.name}.lock")):
        if path.exists() and not args.force:
            return
        images, device = load(), choose_device(args.device)
        count = f"{len(images):,} images of {len(images.classes)} other classes"
        print(f"θ_pre: {arch} on {count}", flush=True)
        pretrain(arch, images, epochs, device, use_amp(device, None), path)


def make_own_pretrained(args: argparse.Namespace) -> None:
    """Train θ_pre of a study where this script is to make it."""
    if args.pretrains:
        load = functools.partial(pretraining_images, args)
        make_pretrained(args, Path(args.pretrained), args.arch, args.pretrain_epochs, load)


def pretrain(
    arch: str, images: ImageSet, epochs: int, device: torch.device, amp: bool, path: Path
) -> None:
    """Train `arch` from random weights on `images` and write θ_pre to `path`.

    SGD, momentum 0.9, weight decay 5e-4, batch 64, one cycle up to lr 0.05. A VGG trains with
    batch norm, which is folded into its convolutions at the end. After every epoch its state is
    kept beside `path`, where a killed run goes on.
    """
    torch.manual_seed(0)
    model = build_model(arch, len(images.classes), *normalization(images.name, images))
    if arch.startswith("vgg"):
        add_batchnorm(model, arch)
    model = to_device(model, device)
    augment = augmentation_for(images.name)
    loader = BatchLoader(images, 64, augment=augment, device=device, shuffle=True)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=epochs * len(loader)
    )
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "loader": loader}
    settings = {"arch": arch, "epochs": epochs, "data": fingerprint(images)}
    unfinished = path.with_name(f"{path.name}.unfinished")
    if unfinished.exists():
        saved = ckpt.read(unfinished)
        if {name: saved.get(name) for name in settings} == settings:
            for name, part in parts.items():
                part.load_state_dict(saved[name])
    step = TrainStep(model, optimizer, amp=amp)
    for epoch in range(loader.epoch + 1, epochs + 1):
        title = f"pretraining {epoch}"
        stats = train_epoch(
            model, loader, optimizer, amp=amp, title=title, schedule=schedule, step=step
        )
        progress = f"loss {stats.loss:.4f}  train {stats.accuracy:.2f}"
        print(f"pretraining {epoch}/{epochs}  {progress}", flush=True)
        state = {name: part.state_dict() for name, part in parts.items()}
        ckpt.save(settings | state, unfinished)
    if arch.startswith("vgg"):
        fold_batchnorm(model, arch)
    ckpt.save({"state_dict": model.state_dict(), "arch": arch}, path)
    unfinished.unlink(missing_ok=True)


# ---- demo -----------------------------------------------------------------------------------

DEMO_ARCH, DEMO_KEEP_NUM = "vgg11", 4
DEMO_CORRUPTIONS = ("gaussian_noise", "motion_blur", "fog")
DEMO_PRETRAIN_EPOCHS, DEMO_EPOCHS = 5, 2
DEMO_LR = 0.002  # at the paper's 0.01 two short epochs drive θ_c too far from θ_std for patching


def demo(args: argparse.Namespace) -> None:
    """The paper's main job on the synthetic data set in miniature."""
    start = time.perf_counter()
    device = choose_device(args.device)
    runs, out = Path(args.runs) / "demo", Path(args.out)
    pretrained, root = runs / "pretrained.pth.tar", runs / "robust"
    common = ["--dataset", "synthetic", "--arch", DEMO_ARCH, "--device", args.device]

    load = functools.partial(synthetic.load, "pretrain")
    make_pretrained(args, pretrained, DEMO_ARCH, DEMO_PRETRAIN_EPOCHS, load)
    recipe = [
        "--pretrained_path",
        str(pretrained),
        "--epochs",
        str(DEMO_EPOCHS),
        "--lr",
        str(DEMO_LR),
    ]
    recipe += ["--decreasing_lr", str(DEMO_EPOCHS - 1), "--batch_size", "64"]
    recipe += [] if args.force else ["--resume"]
    print("\nθ_std")
    finetune([*common, *recipe, "--save_dir", str(runs / "standard")])
    base = runs / "standard" / ckpt.BEST_SA
    rows = []
    for name in DEMO_CORRUPTIONS:
        print(f"\nθ_c, c = {name}")
        finetune([*common, *recipe, "--corruption", name, "--save_dir", str(root / name)])
        print(f"\nRWS_c and patch, c = {name}")
        result = model_patching.run(
            model_patching.parse_args(
                [
                    *(*common, "--corruption", name, "--keep_num", str(DEMO_KEEP_NUM)),
                    *("--pretrained", str(pretrained), "--base_model", str(base)),
                    *("--corruption_model_root", str(root)),
                ]
            )
        )
        signature = RobustWeightSignature.extract(
            pretrained, base, root / name / ckpt.BEST_RA, DEMO_KEEP_NUM, corruption=name
        )
        size = signature.quantize(16).save(runs / f"{name}.rws")
        rows.append(demo_row(name, result["rows"], size))

    full = sum(4 * tensor.numel() for tensor in ckpt.read_state_dict(pretrained).values())
    table = report.markdown_table(list(rows[0]), [list(row.values()) for row in rows])
    text = (
        f"{table}\n\nAccuracy in % on the 2,000 test images of the synthetic set, severity 5, one "
        f"seed.\nA patch adds the signature of the {DEMO_KEEP_NUM} shallowest layers of "
        f"{DEMO_ARCH}; kB: its file at 16 levels\n(the model: {full / 1e3:,.0f} kB in float32).\n"
    )
    seconds = time.perf_counter() - start
    write_text(out / "table.md", text)
    report.write_json(
        out / "results.json", {"rows": rows, "seconds": seconds, **report.provenance(device)}
    )
    demo_figure(rows, out / "demo.png")
    print(f"\n{text}\n{out}: table.md, results.json, demo.png ({seconds:.0f} seconds in all)")


def demo_row(name: str, results: Sequence[dict], size: int) -> dict:
    """One line of the table from the rows of model_patching.py for one corruption."""
    standard, patched, robust = results
    return {
        "corruption": name,
        "RA standard": standard["RA_mean"],
        "RA patched": patched["RA_mean"],
        "RA robust": robust["RA_mean"],
        "recovered, %": patched["recovered"],
        "TA standard": standard["TA"],
        "TA patched": patched["TA"],
        "TA robust": robust["TA"],
        "kB": round(size / 1000),
    }


def demo_figure(rows: Sequence[dict], path: Path) -> None:
    """Bars: accuracy before and after patching, and the robust model's; below, sample images."""
    figure = plt.figure(figsize=(8, 6.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.25, 1])
    axes = top.subplots(1, 2, sharey=True, width_ratios=[1, 1])
    bars = (("standard", GREY, ""), ("patched", BLUE, ""), ("robust", ORANGE, "//"))
    for axis, measure, title in zip(
        axes, ("RA", "TA"), ("corrupted test images (RA)", "clean test images (TA)"), strict=True
    ):
        for k, (kind, colour, hatch) in enumerate(bars):
            places = [i + 0.27 * (k - 1) for i in range(len(rows))]
            label = {"robust": "robust model (upper bound)"}.get(kind, kind)
            drawn = axis.bar(
                places,
                [row[f"{measure} {kind}"] for row in rows],
                width=0.26,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=label,
            )
            axis.bar_label(drawn, fmt="%.1f", fontsize=6)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(rows)), [row["corruption"] for row in rows], fontsize=8)
        axis.set_ylim(0, 109)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    top.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)

    clean = synthetic.load("test").subset(range(12))
    names = ["clean", *(row["corruption"] for row in rows)]
    grid = bottom.subplots(len(names), 1)
    for axis, name in zip(grid, names, strict=True):
        images = clean if name == "clean" else corrupted_set(clean, name, 5, "test", 0)
        strip = images.images.permute(2, 0, 3, 1).flatten(1, 2).numpy()  # H × (N·W) × 3
        axis.imshow(strip, interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks([])
    figures.save(figure, path)


# ---- measuring ---------------------------------------------------------------------------------


ACCURACIES = "accuracies.json"  # in --runs: every accuracy measured


class Bench:
    """The models of one seed, ready to be patched and measured; no accuracy is measured twice.

    `target`: the checkpoint of another θ_target than θ_std.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        seed: int,
        names: Sequence[str],
        target: Path | None = None,
    ) -> None:
        self.args, self.seed, self.names = args, seed, list(names)
        flags = [*dataset_flags(args), "--device", args.device, "--seed", str(seed)]
        flags += ["--severity", str(args.severity), "--layers", args.layers]
        flags += [] if args.projection else ["--no-projection"]
        flags += ["--base_model", str(standard_model(args, seed)), *pretrained_flags(args)]
        flags += ["--corruption_model_root", str(robust_root(args, seed))]
        flags += [] if target is None else ["--patched_model", str(target)]
        self.study = model_patching.load_study(
            model_patching.parse_args([*flags, "--corruption", *names])
        )
        if target is not None:  # its lineage is another by design, no reason to warn
            self.study.target.pretrained_hash = None
        self.sets = {"clean": self.study.clean, **self.study.corrupted}
        self.kept = Measurements(Path(args.runs) / ACCURACIES)
        self.hashes = {name: fingerprint(images) for name, images in self.sets.items()}
        self.target = tensors_hash(self.study.target.state_dict())
        self.others: dict[Path, str] = {}  # hashes of other models
        self.signatures: dict[tuple[str, int], RobustWeightSignature] = {}

    def signature(self, name: str, keep_num: int | None = None) -> RobustWeightSignature:
        """RWS_c, with --keep_num layers unless told otherwise; with 0 a patch of zeros."""
        k = self.args.keep_num if keep_num is None else keep_num
        if (name, k) not in self.signatures:
            signature = model_patching.extract(self.study, k or self.args.keep_num, [name])[0]
            self.signatures[name, k] = signature if k else signature.scale(0.0)
        return self.signatures[name, k]

    def standard(self, names: Sequence[str]) -> dict:
        """TA and RA under `names`, in percent, of the target as it is: {"TA": …, "RA": {…}}."""
        return self._measure("standard", self.target, names, contextlib.nullcontext)

    def patched(
        self, signatures: Sequence[RobustWeightSignature], w: Sequence[float], names: Sequence[str]
    ) -> dict:
        """The same of the target with Σ_c w_c · RWS_c on it."""
        total = sum(s.scale(a) for s, a in zip(signatures, w, strict=True))
        key = f"{self.target} + {tensors_hash(total.tensors)}"
        if has_batchnorm(self.study.target):  # its statistics come from corrupted training images
            severities = [self.study.severities[c] for c in total.corruptions]
            key += f" {total.corruptions} {severities} {self.seed} {sum(w)}"
        title = f"patched against {total.name}"
        put_on = lambda: model_patching.patched(self.study, signatures, w)  # noqa: E731
        return self._measure(title, key, names, put_on)

    def batchnorm_only(self, names: Sequence[str]) -> dict[str, dict]:
        """BATCHNORM_ONLY: the same with statistics re-estimated under `names` and a patch of zeros.

        Empty for a model without batch norm.
        """
        if not has_batchnorm(self.study.target):
            return {}
        zeros, n = [self.signature(name, 0) for name in names], len(names)
        return {BATCHNORM_ONLY: self.patched(zeros, [1 / n] * n, names)}

    def model(self, path: Path, names: Sequence[str], state: dict | None = None) -> dict:
        """The same of another model of these classes, of the weights `state` where given."""
        state = ckpt.read_state_dict(path) if state is None else state
        if path not in self.others:
            self.others[path] = tensors_hash(state)
        put_on = lambda: model_patching.holding(self.study, state, path)  # noqa: E731
        return self._measure(str(path.parent.name), self.others[path], names, put_on)

    def robust(self, name: str) -> dict:
        """The same of θ_c, on its own corruption."""
        path = model_patching.find_robust(robust_root(self.args, self.seed), name)
        return self.model(path, [name], self.study.states[name])

    def _measure(
        self, title: str, key: str, names: Sequence[str], put_on: Callable[[], object]
    ) -> dict:
        study = self.study
        arithmetic = f"{study.device.type} {'bf16' if study.amp else 'float32'}"
        found = {}
        with contextlib.ExitStack() as stack:
            now_on = []

            def accuracy() -> float:
                if not now_on:
                    now_on.append(stack.enter_context(put_on()))
                images = self.sets[part]
                return evaluate(study.target, images, amp=study.amp, title=f"{title}: {part}")

            for part in ("clean", *names):
                found[part] = self.kept.get(f"{key} | {self.hashes[part]} {arithmetic}", accuracy)
        return {"TA": found.pop("clean"), "RA": found}

    def row(self, name: str, signature: RobustWeightSignature, w: float = 1.0) -> dict:
        """A patch against `name` between its bounds, each with its TA and RA under `name`."""
        results = {
            "standard": self.standard([name]),
            "patched": self.patched([signature], [w], [name]),
            "robust": self.robust(name),
        }
        flat = {kind: {"TA": r["TA"], "RA": r["RA"][name]} for kind, r in results.items()}
        return {"corruption": name, "seed": self.seed, **flat}


def benches(args: argparse.Namespace) -> Iterator[Bench]:
    """A bench for each seed; one lives at a time."""
    for seed, names in seeds(args):
        yield Bench(args, seed, names)


def full_copy(bench: Bench) -> int:
    """Bytes of all values of a model in float32."""
    return 4 * sum(tensor.numel() for tensor in bench.study.states["standard"].values())


def bytes_on_disk(signature: RobustWeightSignature) -> int:
    """The size of the signature's file."""
    with tempfile.TemporaryDirectory() as folder:
        return signature.save(Path(folder) / "size.rws")


# ---- tables ------------------------------------------------------------------------------------


def spread(values: Iterable[float | None]) -> str | None:
    """Mean of the values, with ± standard deviation where there are several; None where none is."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def accuracy_columns(args: argparse.Namespace, *first: str) -> list[str]:
    """The header of a table whose lines end as `accuracies` does."""
    return [*first, "TA, %", "RA, %", "recovered, %", *(f"RA {c}, %" for c in args.corruptions)]


def accuracies(args: argparse.Namespace, rows: Sequence[dict], kind: str) -> list[str | None]:
    """TA, RA and recovered share of `kind` (standard, patched, robust): means over corruptions.

    Then its RA for each corruption. Over several seeds: mean ± standard deviation; the means over
    corruptions take the seeds that have all of them.
    """

    def mean(value: Callable[[dict], float | None], seed: int) -> float | None:
        values = [value(row) for row in rows if row["seed"] == seed]
        values = [v for v in values if v is not None]
        return report.mean(values) if values else None

    whole = complete_seeds(args)
    measures = [lambda row: row[kind]["TA"], lambda row: row[kind]["RA"]]
    measures.append(claims.recovered_of if kind == "patched" else lambda row: None)
    line = [spread(mean(value, seed) for seed in whole) for value in measures]
    for name in args.corruptions:
        line.append(spread(row[kind]["RA"] for row in rows if row["corruption"] == name))
    return line


def sweep(args: argparse.Namespace, rows: Sequence[dict], knob: str, title: str) -> list[list]:
    """The lines of a table over the values of rows[…][knob]: a patch each, between its bounds."""
    values = list(dict.fromkeys(row[knob] for row in rows))
    of = {value: [row for row in rows if row[knob] == value] for value in values}
    bounds = of[values[0]]
    return [
        ["standard", *accuracies(args, bounds, "standard")],
        *([f"patched, {title} {v:g}", *accuracies(args, of[v], "patched")] for v in values),
        ["robust", *accuracies(args, bounds, "robust")],
    ]


def by_corruption(args: argparse.Namespace, rows: Sequence[dict]) -> dict[str, list[dict]]:
    """The rows of each corruption."""
    return {c: [row for row in rows if row["corruption"] == c] for c in args.corruptions}


def training_data(args: argparse.Namespace, seed: int) -> str:
    """The fingerprint of the clean images that θ_std of a seed was trained on."""
    path = standard_model(args, seed).with_name("results.json")
    return json.loads(path.read_text(encoding="utf-8"))["data"]


def in_epochs(epochs: int) -> str:
    """The number of epochs in words."""
    return f"{epochs} epoch{'s' if epochs != 1 else ''}"


def finish(
    args: argparse.Namespace,
    rows: Sequence[dict],
    columns: Sequence[str],
    lines: Sequence[Sequence],
    note: str = "",
    **more: object,
) -> None:
    """Print the table; write it (table.md), every row (table.csv) and all about them to --out."""
    epochs, decreasing_lr = recipe(args)
    classes = f", {args.classes} classes" if args.classes else ""
    data = args.title or args.dataset
    ablation = "" if args.projection else " No projection."
    ablation += "" if args.layers == "shallowest" else f" The {args.layers} layers are kept."
    caption = (
        f"{data}{classes}, {args.arch}, severity {args.severity}; {in_epochs(epochs)} of "
        f"fine-tuning (lr × 0.1 after {decreasing_lr}), seeds {' '.join(map(str, args.seeds))}."
        f"{ablation} {note}"
    ).strip()
    table = report.markdown_table(columns, lines)
    out = Path(args.out)
    write_text(out / "table.md", f"{table}\n\n{caption}\n")
    report.write_csv(out / "table.csv", rows)
    settings = {k: v for k, v in vars(args).items() if k not in ("started", "command_line")}
    content = {
        "experiment": args.experiment,
        "caption": caption,
        "rows": rows,
        **more,
        "epochs": epochs,
        "seeds": args.seeds,
        "data": {seed: training_data(args, seed) for seed in args.seeds},
        "seconds": round(time.perf_counter() - args.started, 1),
        "arguments": settings,
        **report.provenance(choose_device(args.device)),
    }
    report.write_json(out / "results.json", content)
    print(f"\n{table}\n\n{caption}\n{out}")


# ---- experiments -------------------------------------------------------------------------------


def main_table(args: argparse.Namespace) -> None:
    """Standard, data augmentation, robust models and RWS patches: storage, TA and RA.

    The standard model and the one trained on the union of all corruptions are measured on each;
    robust models and patches on their own, with TA as the mean over them. Patching a
    model with batch norm re-estimates its statistics; what that alone does has a line of its own.
    """
    rows = []
    kinds = (
        *("standard", "data augmentation", "robust models"),
        *(BATCHNORM_ONLY, "RWS, float32", "RWS, 4 bits"),
    )
    for bench in benches(args):
        standard = bench.standard(bench.names)
        one_for_all = [(kinds[0], standard, 0)]
        if bench.names == args.corruptions:
            path = robust_job(args, bench.seed, bench.names).folder / ckpt.BEST_RA
            one_for_all.append((kinds[1], bench.model(path, bench.names), full_copy(bench)))
        for name in bench.names:
            signature = bench.signature(name)
            coarse = signature.quantize(16, per_channel=True)
            of_name = [
                (kinds[2], bench.robust(name), full_copy(bench)),
                (kinds[4], bench.patched([signature], [1.0], [name]), bytes_on_disk(signature)),
                (kinds[5], bench.patched([coarse], [1.0], [name]), bytes_on_disk(coarse)),
            ]
            of_name += [(kind, result, 0) for kind, result in bench.batchnorm_only([name]).items()]
            for kind, result, size in (*one_for_all, *of_name):
                row = {"model": kind, "corruption": name, "seed": bench.seed, "TA": result["TA"]}
                rows.append(row | {"RA": result["RA"][name], "bytes": size})
    lines = []
    shown: dict[str, dict[str, float]] = {}
    errors: dict[str, dict[str, float]] = {}
    for kind in kinds:
        of_kind = [row for row in rows if row["model"] == kind]
        if not of_kind:  # no batch norm
            continue
        size = report.mean(row["bytes"] for row in of_kind) / 1e6
        count = 1 if kind == kinds[1] else len(args.corruptions)
        ta, ra = (
            [
                report.mean(row[measure] for row in of_kind if row["seed"] == seed)
                for seed in complete_seeds(args)
            ]
            for measure in ("TA", "RA")
        )
        of_name = {
            c: [row["RA"] for row in of_kind if row["corruption"] == c] for c in args.corruptions
        }
        each = [spread(values) for values in (ta, ra, *of_name.values())]
        lines.append([kind, f"{size:.2f}", f"{size * count:.2f}", *each])
        for group, values in {"all": ra, **of_name}.items():
            shown.setdefault(group, {})[kind] = report.mean(values)
            if len(values) > 1:
                errors.setdefault(group, {})[kind] = statistics.stdev(values)
    columns = ["model", "MB each", f"MB for {len(args.corruptions)}", "TA, %", "RA, %"]
    whole = " ".join(map(str, complete_seeds(args)))
    note = (
        f"MB on disk beside the standard model, for one corruption and for all. keep_num "
        f"{args.keep_num}; 4 bits: 16 linear levels, a range per output channel. TA and mean RA: "
        f"of seed {whole}, with every corruption."
    )
    columns += [f"RA {c}, %" for c in args.corruptions]
    finish(args, rows, columns, lines, note)
    figures.bars(shown, "RA, %", Path(args.out) / "main.png", errors)


def layers(args: argparse.Namespace) -> None:
    """‖θ_c − θ_std‖ / ‖θ_std‖ per layer and corruption; another seed's θ_std as the control."""
    order = depth_order(args.arch)
    control = "another seed, clean"
    rows, first = [], None
    for seed, names in seeds(args):
        states = {"": ckpt.read_state_dict(standard_model(args, seed))}
        for name in names:
            path = model_patching.find_robust(robust_root(args, seed), name)
            states[name] = ckpt.read_state_dict(path)
        first = first or states[""]
        if first is not states[""]:
            states[control] = first
        for i, keys in enumerate(order, start=1):
            θ_std = torch.cat([states[""][key].flatten() for key in keys])
            for name, state in states.items():
                if name:
                    θ_c = torch.cat([state[key].flatten() for key in keys])
                    value = ((θ_c - θ_std).norm() / θ_std.norm()).item()
                    row = {"layer": i, "corruption": name, "seed": seed, "difference": value}
                    rows.append(row)
    names = list(dict.fromkeys(row["corruption"] for row in rows))

    def of(name: str, i: int) -> list[float]:
        return [r["difference"] for r in rows if (r["corruption"], r["layer"]) == (name, i)]

    places = range(1, len(order) + 1)
    lines = [[name, *(f"{report.mean(of(name, i)):.3f}" for i in places)] for name in names]
    note = "Relative difference, mean over the seeds that have the corruption."
    finish(args, rows, ["corruption", *(f"layer {i}" for i in places)], lines, note)
    means = {name: [report.mean(of(name, i)) for i in places] for name in names}
    labels = ("layer, shallowest first", "‖θ_c − θ_std‖ / ‖θ_std‖")
    figures.curves(means, list(places), labels, Path(args.out) / "layers.png", control)


def similarity(args: argparse.Namespace) -> None:
    """Cosine between the signatures of all pairs of corruptions, and naming by nearest centroid."""
    of_seed: dict[int, dict[str, RobustWeightSignature]] = {}
    for bench in benches(args):
        of_seed[bench.seed] = {name: bench.signature(name) for name in bench.names}
    first = of_seed[args.seeds[0]]
    names = sorted(first, key=lambda c: list(dict.fromkeys(FAMILIES.values())).index(FAMILIES[c]))
    values = np.array([[cosine(first[a], first[b])["overall"] for b in names] for a in names])
    rows = [
        {"a": a, "b": b, "families": f"{FAMILIES[a]}, {FAMILIES[b]}", "cosine": values[i, j]}
        for (i, a), (j, b) in itertools.combinations(enumerate(names), 2)
    ]
    named = []
    for seed, signatures in of_seed.items():
        others = [of_seed[s] for s in of_seed if s != seed]
        centroids = {c: sum(o[c] for o in others if c in o) for o in others for c in o}
        for name, signature in signatures.items():
            if name in centroids and len(centroids) > 1:
                near = {c: cosine(signature, centre)["overall"] for c, centre in centroids.items()}
                best = max(near, key=near.get)
                ordered = sorted(near.values(), reverse=True)
                named.append(
                    {
                        "corruption": name,
                        "seed": seed,
                        "named": best,
                        "cosine": ordered[0],
                        "second": ordered[1] if len(ordered) > 1 else None,
                        "of": len(near),
                    }
                )
    right = sum(row["corruption"] == row["named"] for row in named)
    told = f"{right} of {len(named)} right" if named else "needs a second seed"
    lines = [[a, *(f"{v:.2f}" for v in line)] for a, line in zip(names, values, strict=True)]
    note = (
        f"Cosine of the signatures of keep_num {args.keep_num}, first seed. Named by the nearest "
        f"mean signature of the other seeds: {told}."
    )
    finish(args, rows, ["cosine", *names], lines, note, named=named)
    groups = [FAMILIES[name] for name in names]
    path = Path(args.out) / "similarity.png"
    figures.heat_map(values, names, names, "cosine", path, groups=groups)


def consistency(args: argparse.Namespace) -> None:
    """Cosine between the signatures of two data sets, for the same and for other corruptions."""
    target = target_study(args)
    first = args.seeds[0]
    here, there = Bench(args, first, args.corruptions), Bench(target, first, target.corruptions)
    rows = [
        {"a": a, "b": b, "cosine": cosine(here.signature(a), there.signature(b))["overall"]}
        for b in target.corruptions
        for a in args.corruptions
    ]
    shape = (len(target.corruptions), len(args.corruptions))
    values = np.array([row["cosine"] for row in rows]).reshape(shape)
    titles = [data_tag(study, study.classes) for study in (target, args)]
    lines = [
        [b, *(f"{v:.2f}" for v in line)] for b, line in zip(target.corruptions, values, strict=True)
    ]
    note = (
        f"Cosine between signatures of keep_num {args.keep_num}: {titles[0]} (lines; "
        f"{in_epochs(recipe(target)[0])}) and {titles[1]} (columns)."
    )
    finish(args, rows, [f"{titles[0]} \\ {titles[1]}", *args.corruptions], lines, note)
    path = Path(args.out) / "consistency.png"
    figures.heat_map(
        values, target.corruptions, args.corruptions, "cosine", path, (titles[0], titles[1])
    )


def keep_num(args: argparse.Namespace) -> None:
    """TA and RA over the number of shallow layers kept, one patch per corruption."""
    rows, note = [], ""
    for bench in benches(args):
        counts = args.keep_nums
        if has_batchnorm(bench.study.target):
            counts = [0, *counts]
            note = "keep_num 0: batch norm re-estimated only, no signature."
        for name, k in itertools.product(bench.names, counts):
            rows.append(bench.row(name, bench.signature(name, k)) | {"keep_num": k})
    lines = sweep(args, rows, "keep_num", "keep_num")
    finish(args, rows, accuracy_columns(args, "model"), lines, note)
    path = Path(args.out) / "keep_num.png"
    label = f"keep_num: {args.layers} layers patched"
    figures.accuracy_panels(by_corruption(args, rows), "keep_num", label, path)


def quantization(args: argparse.Namespace) -> None:
    """RA and TA over the bytes on disk of a signature: bits × layers kept."""
    rows = []
    for bench in benches(args):
        for name, k in itertools.product(bench.names, args.keep_nums):
            for bits in (32, *args.bits):
                form = bench.signature(name, k)
                if bits < 32:
                    form = form.quantize(
                        2**bits, args.quantization_type, per_channel=args.per_channel
                    )
                what = {"keep_num": k, "bits": bits, "bytes": bytes_on_disk(form)}
                rows.append(bench.row(name, form) | what)
        full = full_copy(bench)
    per_form = 1 + len(args.bits)
    bounds = rows[:: len(args.keep_nums) * per_form]
    robust = accuracies(args, bounds, "robust")
    lines = [["full robust copy, fp32", f"{full:,}", "1", *robust]]
    for k, bits in dict.fromkeys((row["keep_num"], row["bits"]) for row in rows):
        of_form = [row for row in rows if (row["keep_num"], row["bits"]) == (k, bits)]
        size = round(report.mean(row["bytes"] for row in of_form))
        form = "fp32" if bits == 32 else f"{bits} bits"
        line = accuracies(args, of_form, "patched")
        lines.append([f"keep_num {k}, {form}", f"{size:,}", f"1/{full / size:,.0f}", *line])
    lines.append(["none (standard)", "0", None, *accuracies(args, bounds, "standard")])
    ranges = "output channel" if args.per_channel else "tensor"
    note = f"Levels: {args.quantization_type}, a range per {ranges}."
    columns = accuracy_columns(args, "signature", "bytes", "of a full copy")
    judged = min(args.keep_nums, key=lambda k: abs(k - args.keep_num))
    finish(args, rows, columns, lines, note, full_copy=full, keep_num=judged)
    figures.storage(by_corruption(args, rows), full, Path(args.out) / "storage.png")


def alpha(args: argparse.Namespace) -> None:
    """TA and RA over the strength α of a patch; and whether taking it off restores every bit."""
    rows, restored = [], True
    for bench in benches(args):
        for name, a in itertools.product(bench.names, args.alphas):
            rows.append(bench.row(name, bench.signature(name), a) | {"alpha": a})
        for name in bench.names:
            with patch(bench.study.target, bench.signature(name)):
                pass
        restored &= tensors_hash(bench.study.target.state_dict()) == bench.target
    lines = sweep(args, rows, "alpha", "α")
    note = f"keep_num {args.keep_num}. Taken off again, every patch left the standard model "
    note += "bit for bit." if restored else "CHANGED."
    finish(args, rows, accuracy_columns(args, "model"), lines, note, restored=restored)
    path = Path(args.out) / "alpha.png"
    figures.accuracy_panels(by_corruption(args, rows), "alpha", "α", path)


def compose(args: argparse.Namespace) -> None:
    """Several signatures on one model: against each alone, and a model trained on all of them."""
    first = args.seeds[0]
    bench = Bench(args, first, args.corruptions)
    rows = []
    for group in args.groups:
        signatures = [bench.signature(name) for name in group]
        n = len(group)
        models = {"standard": bench.standard(group)}
        if n == 2:
            for name, signature in zip(group, signatures, strict=True):
                models[f"patched against {name}"] = bench.patched([signature], [1.0], group)
        else:
            alone = [bench.patched([s], [1.0], [c]) for c, s in zip(group, signatures, strict=True)]
            models["each patched against its own"] = {
                "TA": report.mean(result["TA"] for result in alone),
                "RA": {c: result["RA"][c] for c, result in zip(group, alone, strict=True)},
            }
        models |= bench.batchnorm_only(group)
        models["composed, w = 1/n"] = bench.patched(signatures, [1 / n] * n, group)
        models["composed, w = 1"] = bench.patched(signatures, [1.0] * n, group)
        path = robust_job(args, first, group).folder / ckpt.BEST_RA
        models["trained on all of them"] = bench.model(path, group)
        for model, result in models.items():
            row = {"group": "+".join(group), "n": n, "model": model, "TA": result["TA"]}
            rows.append(row | {"RA mean": report.mean(result["RA"].values()), "RA": result["RA"]})
    lines = [
        [
            *(row["group"].replace("+", " + "), row["model"], row["TA"], row["RA mean"]),
            ", ".join(f"{value:.1f}" for value in row["RA"].values()),
        ]
        for row in rows
    ]
    note = f"keep_num {args.keep_num}. RA of each corruption in the order of the group."
    columns = ["signatures", "model", "TA, %", "RA mean, %", "RA of each, %"]
    finish(args, rows, columns, lines, note)
    shown: dict[str, dict[str, float]] = {}
    for row in rows:
        title = row["group"].replace("+", " +\n") if row["n"] < 4 else f"{row['n']} corruptions"
        shown.setdefault(title, {})[row["model"]] = row["RA mean"]
    figures.bars(shown, "RA, mean over the group, %", Path(args.out) / "compose.png")


def transfer(args: argparse.Namespace) -> None:
    """Signatures on a standard model of another data set, and on a backbone trained on since."""
    target, first = target_study(args), args.seeds[0]
    here = Bench(args, first, args.corruptions)
    rows = []

    def add(case: str, model: str, name: str, result: dict) -> None:
        row = {"case": case, "model": model, "corruption": name, "TA": result["TA"]}
        rows.append(row | {"RA": result["RA"][name]})

    if target is not None:
        there = Bench(target, first, target.corruptions)
        case = f"{data_tag(args, args.classes)} → {data_tag(target, target.classes)}"
        for name in (c for c in target.corruptions if c in args.corruptions):
            add(case, "standard", name, there.standard([name]))
            of_a, of_b = here.signature(name), there.signature(name)
            add(case, "patched, other's signature", name, there.patched([of_a], [1.0], [name]))
            add(case, "patched, own signature", name, there.patched([of_b], [1.0], [name]))
            add(case, "robust", name, there.robust(name))
    updated = update_job(args, first).folder / ckpt.BEST_SA
    later = Bench(args, first, args.corruptions, updated)
    for name in args.corruptions:
        case = "updated backbone"
        add(case, "standard", name, later.standard([name]))
        signature = [here.signature(name)]
        for model, result in later.batchnorm_only([name]).items():
            add(case, model, name, result)
        add(case, "patched, old signature", name, later.patched(signature, [1.0], [name]))
        add("original backbone", "standard", name, here.standard([name]))
        add("original backbone", "patched", name, here.patched(signature, [1.0], [name]))
        add("original backbone", "robust", name, here.robust(name))
    lines = []
    for case, model in dict.fromkeys((row["case"], row["model"]) for row in rows):
        of_line = {r["corruption"]: r for r in rows if (r["case"], r["model"]) == (case, model)}
        means = [report.mean(r[m] for r in of_line.values()) for m in ("TA", "RA")]
        each = [of_line[c]["RA"] if c in of_line else None for c in args.corruptions]
        lines.append([case, model, *means, *each])
    columns = ["case", "model", "TA, %", "RA, %", *(f"RA {c}, %" for c in args.corruptions)]
    note = f"keep_num {args.keep_num}, α 1. Means are over the corruptions in the line."
    if target is not None:
        note += f" {data_tag(target, target.classes)}: {in_epochs(recipe(target)[0])}."
    finish(args, rows, columns, lines, note)
    shown: dict[str, dict[str, float]] = {}
    for case, model, _, ra, *_ in lines:
        shown.setdefault(case, {})["patched, own signature" if model == "patched" else model] = ra
    figures.bars(shown, "RA, mean over corruptions, %", Path(args.out) / "transfer.png")


def everything(args: argparse.Namespace) -> None:
    """Every experiment, in dependency order, over the same models; then the report."""
    for name, experiment in EXPERIMENTS.items():
        if name in ("demo", "all", "report", "pretrain"):
            continue
        if name == "consistency" and args.target_dataset is None:
            print("\nconsistency: left out, it needs a --target_dataset")
            continue
        print(f"\n==== {name} ====", flush=True)
        one = copy.copy(args)
        one.experiment, one.out = name, str(Path(args.out) / name)
        one.started = time.perf_counter()
        experiment(one)
    claims.report(Path(args.out))


def gather(args: argparse.Namespace) -> None:
    """What the results under --out say about each claim, into README.md there."""
    claims.report(Path(args.out))


def only_pretrain(args: argparse.Namespace) -> None:
    """θ_pre alone, where this script is to make it."""
    if not args.pretrains:
        raise InputError("nothing to pretrain: name --pretrain-classes, or --dataset synthetic")
    make_own_pretrained(args)
    print(args.pretrained)


EXPERIMENTS = {
    "demo": demo,
    "main": main_table,
    "layers": layers,
    "similarity": similarity,
    "consistency": consistency,
    "keep-num": keep_num,
    "quantization": quantization,
    "alpha": alpha,
    "compose": compose,
    "transfer": transfer,
    "all": everything,
    "report": gather,
    "pretrain": only_pretrain,
}


# ---- command line ------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, function in EXPERIMENTS.items():
        purpose = function.__doc__.splitlines()[0]
        one = experiments.add_parser(name, help=purpose, description=purpose)
        if name == "report":
            one.add_argument("--out", default="results", metavar="DIR", help="with the results")
            continue
        one.add_argument("--out", metavar="DIR", help="for the results (default: under results/)")
        one.add_argument("--runs", default="runs", metavar="DIR", help="for models; reused")
        one.add_argument("--force", action="store_true", help="redo what is there")
        one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
        if name != "demo":
            add_study(one)
    args = parser.parse_args(argv)
    args.command_line = list(sys.argv[1:] if argv is None else argv)
    args.started = time.perf_counter()
    if args.experiment == "demo":
        args.out = args.out or "results/demo"
    elif args.experiment != "report":
        check(args)
    return args


def add_study(parser: argparse.ArgumentParser) -> None:
    """Flags of the experiments that train a standard model and robust ones, and patch."""
    data = parser.add_argument_group("data")
    arguments.add_dataset(data)
    arguments.add_subset(data)
    data.add_argument("--data", metavar="DIR", help="the clean data set")
    data.add_argument("--title", help="what to call it in results (default: --dataset)")
    arguments.add_corruption(data)
    data.add_argument(
        "--corruptions", nargs="+", metavar="NAME", help="all, or these (default: the preset's)"
    )

    models = parser.add_argument_group("models")
    models.add_argument("--arch", default="vgg16", choices=ARCHS, help="architecture")
    arguments.add_pretrained(models)
    models.add_argument(
        "--pretrain-classes",
        choices=HALVES,
        help="make θ_pre here, on this half of the classes; the study is on the other half",
    )
    models.add_argument("--pretrain_epochs", type=int, metavar="N", help="of making θ_pre")
    models.add_argument(
        "--preset",
        default="paper",
        choices=PRESETS,
        help="paper: the full recipe; quick: about an hour on a laptop; smoke: a minute or two",
    )
    models.add_argument(
        "--epochs", type=int, metavar="N", help="of fine-tuning, instead of the preset's"
    )
    models.add_argument("--seeds", type=int, nargs="+", default=[0], help="one study for each")
    models.add_argument(
        "--repeat_corruptions", nargs="+", metavar="NAME", help="seeds after the first: only these"
    )
    models.add_argument(
        "--devices",
        nargs="+",
        metavar="D",
        help="train on these at once, a process each: 0 1 are cuda:0 cuda:1",
    )
    models.add_argument(
        "--list", action="store_true", help="print the commands that train what is missing"
    )

    target = parser.add_argument_group("second data set (consistency, transfer)")
    target.add_argument("--target_dataset", metavar="NAME", help="as --dataset")
    target.add_argument("--target_data", metavar="DIR", help="as --data")
    target.add_argument("--target_image_size", type=int, metavar="PIXELS", help="as --image_size")
    target.add_argument("--target_classes", choices=HALVES, help="as --classes")
    target.add_argument("--target_epochs", type=int, metavar="N", help="as --epochs")
    target.add_argument(
        "--target_corruptions",
        nargs="+",
        metavar="NAME",
        help="(default: the first, and one of another family)",
    )

    patching = parser.add_argument_group("patching")
    patching.add_argument(
        "--keep_num", type=int, metavar="K", help="layers kept where not swept (default: 7)"
    )
    patching.add_argument(
        "--keep_nums", type=int, nargs="+", metavar="K", help="swept (default: the preset's)"
    )
    patching.add_argument(
        "--alphas", type=float, nargs="+", metavar="A", help="swept (default: the preset's)"
    )
    patching.add_argument(
        "--bits", type=int, nargs="+", help="of a value, swept (default: the preset's)"
    )
    patching.add_argument(
        "--per_channel", action="store_true", help="a range of levels per output channel"
    )
    patching.add_argument(
        "--quantization_type", default="linear", choices=METHODS, help="spacing of the levels"
    )
    patching.add_argument(
        "--groups",
        nargs="+",
        metavar="A+B",
        help="signatures to compose (default: two of different families, and all)",
    )
    model_patching.add_ablations(patching)


def check(args: argparse.Namespace) -> None:
    """Fill in what the preset says, and raise InputError for what can be judged before any work."""
    preset = PRESETS[args.preset]
    args.dataset = datasets.base_name(args.dataset)
    if args.corruptions is None or args.corruptions == ["all"]:
        args.corruptions = list(CORRUPTIONS if args.corruptions else preset.corruptions)
    arguments.check_corruptions(args.corruptions)
    for name in args.repeat_corruptions or ():
        if name not in args.corruptions:
            raise InputError(f"--repeat_corruptions {name}: is not among --corruptions")
    args.train_images = args.train_images or preset.train_images
    args.test_images = args.test_images or preset.test_images
    fill_pretrained(args, preset)
    fill_target(args)

    count = len(depth_order(args.arch))
    middle = min(7, count)
    args.keep_num = middle if args.keep_num is None else args.keep_num
    if args.keep_nums is None:
        step = {"paper": 1, "quick": 2, "smoke": count}[args.preset]
        args.keep_nums = sorted({*range(1, count + 1, step), args.keep_num, count})
    args.alphas = list(preset.alphas) if args.alphas is None else args.alphas
    args.bits = list(preset.bits) if args.bits is None else args.bits
    both = [pair_of_families(args.corruptions), args.corruptions]
    named = [group.split("+") for group in args.groups or ()]
    both = [list(group) for group in dict.fromkeys(map(tuple, both)) if len(group) > 1]
    args.groups = named or both
    for group in args.groups:
        arguments.check_corruptions(group)
        if len(group) < 2 or not set(group) <= set(args.corruptions):
            raise InputError(f"--groups {'+'.join(group)}: two or more of --corruptions, as A+B")
    if args.experiment == "compose" and not args.groups:
        raise InputError("compose needs at least two --corruptions")

    arguments.check_severity(args.severity)
    arguments.check_frost(args.frost_dir)
    for seed in args.seeds:
        arguments.check_seed(seed)
    for k in (*args.keep_nums, args.keep_num):
        layer_keys(args.arch, k)
    for bits in args.bits:
        if not 1 <= bits <= 16:
            raise InputError(f"--bits {bits}: must be 1 to 16")
        check_levels(2**bits, args.quantization_type)
    if not all(0 <= a < float("inf") for a in args.alphas):
        raise InputError("--alphas: finite numbers from 0 on")
    for flag in ("epochs", "target_epochs", "pretrain_epochs", "train_images", "test_images"):
        if getattr(args, flag) is not None:
            arguments.check_at_least(args, **{flag: 1})
    for flag in ("seeds", "keep_nums", "bits", "alphas"):
        values = getattr(args, flag)
        if len(set(values)) < len(values):
            raise InputError(f"--{flag} names a value twice")
    args.devices = [f"cuda:{d}" if d.isdigit() else d for d in args.devices or [args.device]]
    for device in args.devices:
        choose_device(device)
    args.device = args.devices[0]
    fill_out(args)


def pair_of_families(names: Sequence[str]) -> list[str]:
    """The first corruption, and the next of another family (or just the next)."""
    others = sorted(names[1:], key=lambda name: FAMILIES.get(name) == FAMILIES.get(names[0]))
    return [*names[:1], *others[:1]]


def fill_pretrained(args: argparse.Namespace, preset: Preset) -> None:
    """Where θ_pre is: the file named, or one that this script makes."""
    named = arguments.pretrained_source(args)
    if args.pretrain_classes:
        if named:
            raise InputError("--pretrain-classes makes θ_pre; --pretrained names one: choose")
        other = next(half for half in HALVES if half != args.pretrain_classes)
        if args.classes == args.pretrain_classes:
            raise InputError(f"--classes {args.classes} is the half that θ_pre is trained on")
        args.classes = other
    args.pretrains = bool(args.pretrain_classes) or (args.dataset == "synthetic" and not named)
    args.pretrain_epochs = args.pretrain_epochs or preset.pretrain_epochs
    args.pretrained, args.pretrained_path = named or ckpt.IMAGENET, None
    if args.pretrains:
        tag = data_tag(args, args.pretrain_classes or "pretrain")
        few = "" if args.train_images is None else f"-{args.train_images}"
        name = f"{tag}{few}_{args.arch}_{args.pretrain_epochs}ep.pth.tar"
        args.pretrained = str(Path(args.runs) / "pretrained" / name)


def fill_target(args: argparse.Namespace) -> None:
    """The second data set; for the synthetic one, whose classes are few, its odd ones."""
    if args.target_dataset is None and args.dataset == "synthetic" and args.classes is None:
        args.target_dataset, args.target_classes = "synthetic", "odd"
    if args.experiment == "consistency" and args.target_dataset is None:
        raise InputError("consistency needs a second data set: name --target_dataset")
    args.target_corruptions = args.target_corruptions or pair_of_families(args.corruptions)
    if args.target_dataset is not None:
        args.target_dataset = datasets.base_name(args.target_dataset)
        arguments.check_corruptions(args.target_corruptions)
        if study_folder(args, 0) == study_folder(target_study(args), 0):
            raise InputError("--target_dataset is --dataset itself; name another, or its classes")


def fill_out(args: argparse.Namespace) -> None:
    """--out by default: results/ and what was studied, with its ablation."""
    ablation = "" if args.projection else "_no-projection"
    ablation += "" if args.layers == "shallowest" else f"_{args.layers}"
    if args.out is None:
        args.out = str(Path("results") / study_folder(args, 0).parent.name)
        if args.experiment != "all":
            args.out = str(Path(args.out) / args.experiment)
        args.out += ablation


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        if args.experiment not in ("demo", "report", "pretrain"):
            todo = jobs(args)
            if args.list:
                list_commands(args, todo)
                return
            check_writable(args.out)
            train_all(args, todo)
            if args.force:
                (Path(args.runs) / ACCURACIES).unlink(missing_ok=True)
        EXPERIMENTS[args.experiment](args)


if __name__ == "__main__":
    main()
