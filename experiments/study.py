"""A study: which models it needs, where they lie, how they are trained, ready to be patched.

    runs/<data>_<arch>_<length>/seed0/standard, robust/<corruption>, union/<corruptions>, updated

A model is reused by every experiment whose settings name it.
"""

from __future__ import annotations

import argparse
import copy
import functools
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import datasets
import train_corruption
from datasets.corrupted import load_published
from datasets.flags import load_images, union_name
from datasets.images import fingerprint
from experiments.pretrain import make_pretrained
from experiments.settings import PRESETS, Preset, data_tag, recipe
from experiments.tables import BATCHNORM_ONLY, ROBUST, STANDARD, Table, distinct
from model_patching import Patching
from utils import checkpoint as ckpt
from utils import report
from utils.engine import choose_device, free_memory
from utils.errors import InputError
from utils.files import write_text
from utils.measurements import Measurements
from utils.signature import Method, RobustWeightSignature


@dataclass(frozen=True)
class Job:
    """One model: train_corruption.py with `settings` trains it into `folder`.

    A job of stage 1 starts from a model of stage 0.
    """

    title: str
    folder: Path
    settings: dict
    stage: int = 0

    @property
    def done(self) -> bool:
        return (self.folder / "results.json").exists()

    @property
    def best(self) -> Path:
        """The checkpoint that validation images choose."""
        return self.folder / (ckpt.BEST_RA if "corruption" in self.settings else ckpt.BEST_SA)

    def command(self, force: bool = False) -> list[str]:
        """What train_corruption.py is told; unless forced it goes on from what is there."""
        told = []
        for name, value in self.settings.items():
            if name == "amp" and value is False:
                told.append("--no_amp")
            elif value is not None and value is not False:
                bare = value is True or value == ckpt.IMAGENET
                values = value if isinstance(value, list) else [value]
                told += [f"--{name}", *([] if bare else map(str, values))]
        return [*told, "--save_dir", str(self.folder), "--overwrite" if force else "--resume"]


class Study:
    """The models of one data set, architecture and recipe, over all seeds.

    args: the settings of reproduce.py, resolved.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.method = Method.from_args(args)
        self.data_name = data_tag(args, args.classes)
        self.recipe = f"{args.epochs} epoch{'s' if args.epochs > 1 else ''}"
        self._kept = Measurements(Path(args.runs) / "accuracies.json")
        self._ready = None  # the last Patching, for the next experiment

    # ---- which models, where ---------------------------------------------------------------

    @property
    def name(self) -> str:
        """Data, architecture and recipe in a folder's name; a preset's recipe by its name."""
        args, more = self.args, ("lr", "batch_size", "train_images")
        for name, preset in PRESETS.items():
            if all(getattr(preset, k) == getattr(args, k) for k in ("epochs", *more)):
                return f"{self.data_name}_{args.arch}_{name}"
        other = [f"{k}{getattr(args, k)}" for k in more if getattr(args, k) != getattr(Preset, k)]
        return "_".join([self.data_name, args.arch, f"{args.epochs}ep", *other])

    def folder(self, seed: int) -> Path:
        """Where the models of a seed are kept."""
        return Path(self.args.runs) / self.name / f"seed{seed}"

    def standard(self, seed: int) -> Path:
        """The checkpoint of θ_std."""
        return self.folder(seed) / "standard" / ckpt.BEST_SA

    def robust_root(self, seed: int, kind: str = "robust") -> Path:
        """The folder with a folder for each θ_c, or for each model of several corruptions."""
        severity = "" if self.args.severity == 5 else f"-severity{self.args.severity}"
        return self.folder(seed) / f"{kind}{severity}"

    @property
    def seeds(self) -> list[tuple[int, list[str]]]:
        """Every seed with its corruptions: after the first those of --repeat_corruptions."""
        every, repeated = self.args.corruptions, self.args.repeat_corruptions
        return [(s, repeated if i and repeated else every) for i, s in enumerate(self.args.seeds)]

    @property
    def union_seeds(self) -> list[int]:
        """The seeds of which one model is trained on all corruptions."""
        several = PRESETS[self.args.preset].union and len(self.args.corruptions) > 1
        every = self.args.corruptions if several else None
        return [seed for seed, names in self.seeds if names == every]

    @functools.cached_property
    def target(self) -> Study | None:
        """The study of the second data set (first seed); None where none is named."""
        if self.args.target_dataset is None:
            return None
        args = copy.copy(self.args)
        args.dataset, args.data = args.target_dataset, args.target_data
        args.image_size, args.classes = args.target_image_size, args.target_classes
        args.epochs, args.decreasing_lr = recipe(args.target_epochs or args.epochs)
        args.corruptions, args.repeat_corruptions = args.target_corruptions, None
        args.seeds, args.target_dataset, args.corruption_data = args.seeds[:1], None, None
        target = Study(args)
        if target.name == self.name:
            raise InputError("--target_dataset is --dataset itself; name another, or its classes")
        return target

    # ---- jobs ------------------------------------------------------------------------------

    def jobs(self, modules: Iterable[ModuleType]) -> list[Job]:
        """Every model that the experiments need, those that others start from first."""
        jobs = self.base_jobs()
        for module in modules:
            jobs += module.jobs(self) if hasattr(module, "jobs") else []
        return sorted({job.folder: job for job in jobs}.values(), key=lambda job: job.stage)

    def base_jobs(self) -> list[Job]:
        """θ_std and every θ_c of every seed."""
        jobs = []
        for seed, names in self.seeds:
            folder = self.standard(seed).parent
            jobs.append(Job("θ_std", folder, self._settings(seed)))
            jobs += [self.robust_job(seed, [name]) for name in names]
        return jobs

    def robust_job(self, seed: int, names: Sequence[str]) -> Job:
        """θ_c of one corruption, or the model trained on the union of several."""
        kind = "union" if len(names) > 1 else "robust"
        folder = self.robust_root(seed, kind) / union_name(names)
        title = f"θ_c, c = {' + '.join(names)}"
        return Job(title, folder, self._settings(seed) | {"corruption": list(names)})

    def update_job(self) -> Job:
        """Continue training θ_std of the first seed on clean images: epochs/3 at lr/10."""
        seed = self.args.seeds[0]
        epochs = max(1, self.args.epochs // 3)
        start = {"pretrained": str(self.standard(seed)), "keep_head": True}
        short = {"lr": self.args.lr / 10, "epochs": epochs, "decreasing_lr": str(epochs)}
        settings = self._settings(seed + 1000) | start | short
        return Job("θ_std, trained on", self.folder(seed) / "updated", settings, stage=1)

    def _settings(self, seed: int) -> dict:
        names = "dataset arch data image_size classes train_images test_images frost_dir device amp"
        names += " epochs decreasing_lr severity pretrained checkpoint_key lr batch_size"
        return {name: getattr(self.args, name) for name in names.split()} | {"seed": seed}

    def list_commands(self, jobs: Sequence[Job]) -> None:
        """Print a command line for each model that is missing."""
        force = self.args.force
        if self.args.pretrains and (force or not Path(self.args.pretrained).exists()):
            own = [arg for arg in self.args.command_line[1:] if arg != "--list"]
            print(shlex.join(["python", "reproduce.py", "pretrain", *own]))
            print("# when that is done:")
        for stage, of_stage in itertools.groupby(jobs, key=lambda job: job.stage):
            if stage > 0:
                print("# when these are done:")
            for job in of_stage:
                if force or not job.done:
                    command = ["python", "train_corruption.py", *job.command(force)]
                    print(shlex.join(command))

    def check_data(self) -> None:
        """Raise InputError for test images of --target_data or --corruption_data that don't fit."""
        args = self.args
        if self.target and args.target_dataset != "synthetic":
            try:
                load_images(self.target.args, self.target.args.data, "test")
            except InputError as error:
                raise InputError(f"the second data set: {error}") from error
        if args.corruption_data:
            clean = load_images(args, args.data, "test")
            for name in args.corruptions:
                load_published(clean, args.corruption_data, name, args.severity, "test")

    def train(self, jobs: Sequence[Job]) -> None:
        """Train the models that are missing, on --devices at once if several are named."""
        force, devices, start = self.args.force, self.args.devices, time.perf_counter()
        missing = [job for job in jobs if force or not job.done]
        pretrains = self.args.pretrains and (force or not Path(self.args.pretrained).exists())
        ahead = self.args.pretrain_epochs * pretrains
        total = ahead + sum(job.settings["epochs"] for job in missing)
        if total:
            names = ["θ_pre"] * pretrains + [job.title for job in missing]
            print(f"to train: {', '.join(names)}; {total} epochs in all", flush=True)

        def time_left(done: int) -> str:
            """In words, once `done` epochs are through; every one counted alike."""
            minutes = (time.perf_counter() - start) / done * (total - done) / 60
            return f"about {minutes:.0f} min left" if minutes > 1.5 else "about a minute left"

        if self.args.pretrains:
            make_pretrained(self.args, time_left)

        @functools.cache
        def start_hash(file: str) -> str:
            state = ckpt.pretrained_state_dict(file, self.args.arch, self.args.checkpoint_key)
            return ckpt.backbone_hash(state)

        images_print = functools.cache(lambda *which: fingerprint(datasets.load(*which)))
        for job in jobs:
            if job not in missing:
                check_same_run(job, start_hash, images_print)
        for _, of_stage in itertools.groupby(missing, key=lambda job: job.stage):
            left = list(of_stage)
            if len(devices) > 1:
                train_on(devices, left, force)
                continue
            for i, job in enumerate(left, start=1):
                told = f", {time_left(ahead)}" if ahead else ""
                print(f"\n[{i}/{len(left)}] {job.title}{told}", flush=True)
                train_corruption.train(train_corruption.parse_args(job.command(force)))
                ahead += job.settings["epochs"]

    # ---- ready to be patched ---------------------------------------------------------------

    def patching(self, seed: int | None = None, target: Path | None = None) -> Patching:
        """The models of a seed (default: the first), with its corruptions.

        target: the checkpoint of another θ_target than θ_std.
        """
        seed = self.args.seeds[0] if seed is None else seed
        if self._ready and self._ready[0] == (seed, target):
            return self._ready[1]
        args = copy.copy(self.args)
        args.seed, args.corruption = seed, dict(self.seeds)[seed]
        args.severity = [args.severity]
        args.base_model, args.patched_model = self.standard(seed), target
        args.corruption_model_root = self.robust_root(seed)
        args.signature, args.choose = [], None
        args.test_all_corruptions = False
        run = Patching(args, self.method, self._kept)
        if target is not None:  # its lineage is another by design, no reason to warn
            run.target.pretrained_hash = None
        self._ready = ((seed, target), run)
        return run

    def patchings(self) -> Iterator[Patching]:
        """`patching` of every seed."""
        return map(self.patching, self.args.seeds)

    def row(self, run: Patching, name: str, model: str, result: dict, **knobs: object) -> dict:
        """One row of an experiment: `result` of `model` under corruption `name`."""
        row = {"seed": run.args.seed, "corruption": name, "model": model, **knobs}
        return row | {"TA": result["TA"], "RA": result["RA"][name]}

    def bounds(self, run: Patching, name: str) -> Iterator[dict]:
        """The rows between which a patch against `name` lies; batch norm alone where there is."""
        yield self.row(run, name, STANDARD, run.standard([name]))
        if alone := run.batchnorm_only([name]):
            yield self.row(run, name, BATCHNORM_ONLY, alone)
        yield self.row(run, name, ROBUST, run.robust(name))

    def full_copy(self, run: Patching) -> int:
        """Bytes of all values of a model in float32."""
        return 4 * sum(tensor.numel() for tensor in run.states["standard"].values())

    def bytes_of(self, signature: RobustWeightSignature) -> int:
        """The size of the signature's file."""
        with tempfile.TemporaryDirectory() as folder:
            return signature.save(Path(folder) / "size.rws")

    # ---- results ---------------------------------------------------------------------------

    def title(self, seeds: Iterable[int]) -> str:
        """Data, architecture and recipe, for captions, and the seeds that were measured."""
        a = self.args
        classes = f", {a.classes} classes" if a.classes else ""
        rate = "" if a.lr == 0.01 else f", lr {a.lr:g}"
        rate += "" if a.batch_size == 128 else f", batch {a.batch_size}"
        rate += "" if a.train_images is None else f", {a.train_images} images"
        size = f" at {a.image_size}×{a.image_size}" if a.image_size else ""
        what = f"{a.title or a.dataset}{size}{classes}, {a.arch}, severity {a.severity}"
        what += f" of {Path(a.corruption_data).name}" if a.corruption_data else ""
        recipe = f"{self.recipe} of fine-tuning (lr × 0.1 after {a.decreasing_lr}{rate})"
        return f"{what}; {recipe}, seeds {' '.join(map(str, seeds))}"

    def write(self, name: str, rows: list[dict], table: Table, out: Path, seconds: float) -> None:
        """Print the table; write it (table.md), every row (table.csv), all about them (.json)."""
        text = report.markdown_table(table.columns, table.lines)
        ablation, title = self.method.ablation(), self.title(distinct(rows, "seed"))
        caption = ". ".join([*filter(None, (title, ablation)), table.note])
        write_text(out / "table.md", f"{text}\n\n{caption}\n")
        report.write_csv(out / "table.csv", rows)
        trained = [self.standard(s).with_name("results.json") for s in self.args.seeds]
        content = {
            "experiment": name,
            "study": title,
            "ablation": ablation,
            "note": table.note,
            "rows": rows,
            "sources": self._ready[1].sources if self._ready else {},
            "data": [json.loads(path.read_text(encoding="utf-8"))["data"] for path in trained],
            "seconds": round(seconds, 1),
            "arguments": vars(self.args),
            **report.provenance(choose_device(self.args.device)),
        }
        report.write_json(out / "results.json", content)
        print(f"\n{text}\n\n{caption}\n{out}")


def check_same_run(job: Job, start_hash: Callable, images_print: Callable) -> None:
    """Raise InputError when the finished run in the job's folder had other settings.

    start_hash: gives the hash of the model that a file holds, where training starts;
    images_print: gives the fingerprint of the images that `datasets.load` loads.
    """
    args = train_corruption.parse_args(job.command())
    saved = ckpt.read(job.folder / ckpt.LAST)
    wanted = train_corruption.identity(args) | {"pretrained_hash": start_hash(args.pretrained)}
    if "data" in saved:
        which = args.image_size, args.classes, args.train_images
        wanted["data"] = images_print(args.dataset, args.data, "train", *which)
    for name, value in wanted.items():
        if name in saved and saved[name] != value:
            said = f"{job.folder} holds a run with {name} {saved[name]}, wanted is {value}"
            raise InputError(f"{said}: name other --runs, or train again with --force")


def train_on(devices: Sequence[str], jobs: Sequence[Job], force: bool) -> None:
    """Train each model in a process of its own, one at a time on each of `devices`.

    What a process prints goes to train.log in the model's folder. Raises InputError, after the
    others are done, where one fails.
    """
    environment = dict(os.environ)
    if set(devices) == {"cpu"}:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // len(devices)))
    free_memory()  # of making θ_pre
    free = list(devices)  # for as many threads
    started: list[subprocess.Popen] = []

    def work(job: Job) -> str | None:
        """Train one model; gives what went wrong."""
        device = free.pop(0)
        print(f"{device}: {job.title}", flush=True)
        job.folder.mkdir(parents=True, exist_ok=True)
        log, script = job.folder / "train.log", str(Path(train_corruption.__file__).resolve())
        command = [sys.executable, script, *job.command(force), "--device", device]
        with open(log, "w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        started.append(process)
        code = process.wait()
        free.append(device)
        last = log.read_text().strip().splitlines()[-1:] or ["no output"]
        return f"{job.title}: {last[0]} ({log})" if code else None

    with ThreadPoolExecutor(len(devices)) as pool:
        try:
            failed = [said for said in pool.map(work, jobs) if said]
        except BaseException:  # interrupted: the next start goes on where the processes are now
            pool.shutdown(wait=False, cancel_futures=True)
            for process in started:
                process.terminate()
            raise
    if failed:
        raise InputError(f"{len(failed)} of {len(jobs)} models failed: {'; '.join(failed)}")
