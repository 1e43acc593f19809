"""One command per experiment of the paper.

    python reproduce.py demo        the main job on the embedded data set, minutes on a CPU
    python reproduce.py keep-num --dataset cifar10 --data data/cifar10 --arch vgg16 \\
        --pretrained vgg16.pth --corruptions gaussian_noise motion_blur --preset quick
    python reproduce.py quantization ...

Checkpoints go to --runs, by what determines them, and are reused; a killed run goes on from its
last epoch. Results (table.md, results.json, figures) go to --out.

keep-num: accuracy of the patched model over the number of layers kept.
quantization: accuracy over the bytes of a signature, bits × layers kept.
demo: pretrain a small VGG on twenty classes of the synthetic set; fine-tune it on ten others,
clean (standard model) and under two corruptions (robust models); take the Robust Weight Signature
of each, patch the standard model with it, and compare. Ends in a table and a figure.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import matplotlib
import torch

import datasets
import model_patching
import train_corruption
from datasets import synthetic
from datasets.corrupted import corrupted_set
from datasets.corruptions import CORRUPTIONS
from datasets.images import ImageSet
from datasets.loader import BatchLoader, augmentation_for
from datasets.normalization import normalization
from models import ARCHS, build_model
from models.layers import depth_order, layer_keys
from models.vgg import add_batchnorm, fold_batchnorm
from utils import arguments, report
from utils import checkpoint as ckpt
from utils.atomic import check_writable, replacing, write_text
from utils.engine import choose_device, to_device, train_epoch, use_amp
from utils.errors import InputError, script_errors
from utils.quantize import METHODS, check_levels
from utils.signature import RobustWeightSignature

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Readable in grey print and by colour-blind readers (Okabe & Ito).
GREY, BLUE, ORANGE = "#999999", "#0072B2", "#E69F00"
COLOURS = [  # and markers, for one curve each
    *(("#000000", "*"), (BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#CC79A7", "D")),
    *(("#D55E00", "v"), ("#56B4E9", "P"), ("#F0E442", "X")),
]


def pretrain(
    arch: str, images: ImageSet, epochs: int, device: torch.device, amp: bool, path: Path
) -> None:
    """Train `arch` from random weights on `images` and write θ_pre to `path`.

    SGD, momentum 0.9, weight decay 5e-4, batch 64, one cycle up to lr 0.05. A VGG trains with
    batch norm, which is folded into its convolutions at the end.
    """
    torch.manual_seed(0)
    model = build_model(arch, len(images.classes), *normalization(images.name, images))
    if arch.startswith("vgg"):
        add_batchnorm(model, arch)
    model = to_device(model, device)
    loader = BatchLoader(
        images, 64, augment=augmentation_for(images.name), device=device, shuffle=True
    )
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.05, total_steps=epochs * len(loader)
    )
    for epoch in range(1, epochs + 1):
        title = f"pretraining {epoch}"
        stats = train_epoch(model, loader, optimizer, amp=amp, title=title, schedule=schedule)
        print(f"pretraining {epoch}/{epochs}  loss {stats.loss:.4f}  train {stats.accuracy:.2f}")
    if arch.startswith("vgg"):
        fold_batchnorm(model, arch)
    ckpt.save({"state_dict": model.state_dict(), "arch": arch}, path)


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

    if args.force or not pretrained.exists():
        images = synthetic.load("pretrain")
        count = f"{len(images):,} images of {len(images.classes)} other classes"
        print(f"θ_pre: {DEMO_ARCH} on {count}")
        amp = use_amp(device, None)
        pretrain(DEMO_ARCH, images, DEMO_PRETRAIN_EPOCHS, device, amp, pretrained)

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


def finetune(argv: Sequence[str]) -> dict:
    """train_corruption.py with these arguments, in this process."""
    return train_corruption.train(train_corruption.parse_args(argv))


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
    save_figure(figure, path)


# ---- experiments over one study ---------------------------------------------------------------

# epochs, epochs after which lr × 0.1
PRESETS = {"paper": (50, "20,40"), "quick": (3, "2"), "smoke": (1, "1")}


def train_models(args: argparse.Namespace, seed: int) -> Path:
    """θ_std and every θ_c of a seed, trained unless they are there; gives their folder."""
    epochs, decreasing_lr = PRESETS[args.preset]
    folder = Path(args.runs) / f"{args.dataset}_{args.arch}_{args.preset}" / f"seed{seed}"
    common = [*dataset_flags(args), "--epochs", str(epochs), "--decreasing_lr", decreasing_lr]
    common += ["--seed", str(seed), "--severity", str(args.severity)]
    common += pretrained_flags(args)
    θ_pre = ckpt.pretrained_state_dict(args.pretrained, args.arch)
    for name in (None, *args.corruptions):
        save_dir = folder / ("standard" if name is None else f"robust/{name}")
        flags = [*common, "--save_dir", str(save_dir), *(["--corruption", name] if name else [])]
        if args.force or not (save_dir / "results.json").exists():
            finetune(flags + ([] if args.force else ["--resume"]))
        else:
            check_same_run(save_dir, flags, ckpt.backbone_hash(θ_pre))
    return folder


def check_same_run(save_dir: Path, flags: Sequence[str], pretrained_hash: str) -> None:
    """Raise InputError when the finished run in `save_dir` had other settings than `flags`."""
    saved = ckpt.read(save_dir / ckpt.LAST)
    wanted = train_corruption.identity(train_corruption.parse_args(flags))
    wanted["pretrained_hash"] = pretrained_hash
    for name, value in wanted.items():
        if name in saved and saved[name] != value:
            raise InputError(
                f"{save_dir} holds a run with {name} {saved[name]}, wanted is {value}: "
                "name other --runs, or train again with --force"
            )


def pretrained_flags(args: argparse.Namespace) -> list[str]:
    """θ_pre as the scripts take it."""
    return ["--pretrained", *([args.pretrained] if args.pretrained != ckpt.IMAGENET else [])]


def dataset_flags(args: argparse.Namespace) -> list[str]:
    """The flags of data, architecture and device that every script shares."""
    flags = ["--dataset", args.dataset, "--arch", args.arch, "--device", args.device]
    for name in ("data", "image_size", "frost_dir"):
        if getattr(args, name) is not None:
            flags += [f"--{name}", str(getattr(args, name))]
    return flags


def load_study(args: argparse.Namespace, seed: int) -> model_patching.Study:
    """The models of a seed and the test images, ready to patch and measure."""
    folder = train_models(args, seed)
    flags = [*dataset_flags(args), "--severity", str(args.severity), "--seed", str(seed)]
    flags += ["--base_model", str(folder / "standard" / ckpt.BEST_SA)]
    flags += ["--corruption_model_root", str(folder / "robust"), "--keep_num", "1"]
    flags += [*pretrained_flags(args), "--corruption", *args.corruptions]
    return model_patching.load_study(model_patching.parse_args(flags))


def identity(row: dict) -> tuple:
    """What a row measures: two rows with the same identity have the same accuracies."""
    names = ("models", "corruption", "keep_num", "bits", "levels", "per_channel", "seed")
    return tuple(row.get(name) for name in names)


class Rows:
    """The measurements of an experiment, kept in results.json as they come.

    What an earlier run left there is reused where it was measured on the same models.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.path = args, Path(args.out) / "results.json"
        check_writable(args.out)
        self.all: list[dict] = []
        self.old: list[dict] = []
        if self.path.exists() and not args.force:
            try:
                self.old = json.loads(self.path.read_text(encoding="utf-8"))["rows"]
            except (ValueError, KeyError) as error:
                raise InputError(
                    f"{self.path} is not of this script: name another --out"
                ) from error

    def measure(
        self, row: dict, study: model_patching.Study, signature: RobustWeightSignature
    ) -> dict[str, float]:
        """TA and RA, in percent, of the standard model with `signature` on it.

        `row` says what is measured; "models" is added to it, the hashes of θ_std and θ_c.
        """
        name = signature.name
        row["models"] = f"{signature.standard} {signature.robust[0]}"
        for old in self.old:
            if identity(old) == identity(row):
                return old["patched"]
        title = ", ".join(f"{key} {row[key]}" for key in row if key not in ("seed", "models"))
        with model_patching.patched(study, [signature], [1.0]):
            result = study.measure(title, [name])
        return {"TA": result["TA"], "RA": result["RA"][name]}

    def add(self, row: dict) -> None:
        """Keep one more row, in the file too."""
        self.all.append(row)
        self.write()

    def write(self) -> None:
        """Write the rows of this run, and after them those of earlier runs with other settings."""
        measured = {identity(row) for row in self.all}
        rows = self.all + [old for old in self.old if identity(old) not in measured]
        device = choose_device(self.args.device)
        content = {"rows": rows, "arguments": vars(self.args), **report.provenance(device)}
        report.write_json(self.path, content)

    def finish(self, columns: Sequence[str], lines: Sequence[Sequence]) -> None:
        """Print the table and write it beside the rows."""
        table = report.markdown_table(columns, lines)
        print(f"\n{table}\n\n{self.args.out}")
        write_text(Path(self.args.out) / "table.md", table + "\n")
        self.write()


def measure_bounds(rows: Rows, study: model_patching.Study) -> dict[str, dict]:
    """Per corruption: TA and RA of the standard and of its robust model, in percent."""
    bounds: dict[str, dict] = {}
    standard = ckpt.backbone_hash(study.states["standard"])
    for name in study.args.corruption:
        models = f"{standard} {ckpt.backbone_hash(study.states[name])}"
        seed = study.args.seed
        for old in rows.old:
            if [old.get(key) for key in ("corruption", "seed", "models")] == [name, seed, models]:
                bounds[name] = {kind: old[kind] for kind in ("standard", "robust")}
    missing = [name for name in study.args.corruption if name not in bounds]
    if missing:
        standard = study.measure("standard", missing)
    for name in missing:
        robust = model_patching.upper_bound(study, [name])
        bounds[name] = {
            "standard": {"TA": standard["TA"], "RA": standard["RA"][name]},
            "robust": {"TA": robust["TA"], "RA": robust["RA"][name]},
        }
    return bounds


def each_signature(
    rows: Rows,
) -> Iterator[tuple[dict, model_patching.Study, RobustWeightSignature, dict]]:
    """Over seeds, numbers of layers and corruptions: what it is, study, signature, its bounds."""
    args = rows.args
    for seed in args.seeds:
        study = load_study(args, seed)
        bounds = measure_bounds(rows, study)
        for k in args.keep_nums:
            for signature in model_patching.extract(study, k):
                name = signature.name
                yield (
                    {"corruption": name, "keep_num": k, "seed": seed},
                    study,
                    signature,
                    bounds[name],
                )


def panels(args: argparse.Namespace, width: float, height: float) -> tuple[Figure, Sequence]:
    """A figure of the given size, inches, per corruption, with an axis for each in a row."""
    count = len(args.corruptions)
    figure, axes = plt.subplots(
        1, count, figsize=(width * count, height), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], args.corruptions, strict=True):
        axis.set_title(name, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def keep_num(args: argparse.Namespace) -> None:
    """TA and RA over the number of shallow layers kept, one patch per corruption."""
    rows = Rows(args)
    for row, study, signature, bounds in each_signature(rows):
        rows.add(row | {"patched": rows.measure(row, study, signature)} | bounds)
    ks = list(dict.fromkeys(row["keep_num"] for row in rows.all))
    lines = [accuracies(args, rows.all, "standard")]
    for k in ks:
        of_k = [row for row in rows.all if row["keep_num"] == k]
        lines.append([f"patched, keep_num {k}", *accuracies(args, of_k, "patched")[1:]])
    lines.append(accuracies(args, rows.all, "robust"))
    rows.finish(accuracy_columns(args, "model"), lines)
    keep_num_figure(args, rows.all, Path(args.out) / "keep_num.png")


def accuracy_columns(args: argparse.Namespace, *first: str) -> list[str]:
    """The header of a table whose lines end as `accuracies` does."""
    names = args.corruptions
    return [*first, *(f"{c}: {m}" for c in names for m in ("TA, %", "RA, %", "recovered, %"))]


def accuracies(args: argparse.Namespace, rows: Sequence[dict], kind: str) -> list:
    """`kind` (standard, patched or robust), then its TA, RA and recovered share per corruption.

    Over several seeds: mean ± standard deviation.
    """
    line = [kind]
    for name in args.corruptions:
        of_name = {row["seed"]: row for row in rows if row["corruption"] == name}.values()
        line += [spread(row[kind][measure] for row in of_name) for measure in ("TA", "RA")]
        shares = [
            model_patching.recovered(*(row[k]["RA"] for k in ("standard", "patched", "robust")))
            for row in of_name
        ]
        line.append(spread(shares) if kind == "patched" else None)
    return line


def spread(values: Iterable[float | None]) -> str | None:
    """Mean of the values, with ± standard deviation where there are several; None where none is."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def keep_num_figure(args: argparse.Namespace, results: Sequence[dict], path: Path) -> None:
    """One panel per corruption: RA and TA over keep_num between standard and robust model."""
    figure, axes = panels(args, 4, 3.4)
    for axis, name in zip(axes, args.corruptions, strict=True):
        rows = [row for row in results if row["corruption"] == name]
        ks = sorted({row["keep_num"] for row in rows})

        def mean(kind: str, measure: str, k: int, rows: Sequence[dict] = rows) -> float:
            return report.mean(row[kind][measure] for row in rows if row["keep_num"] == k)

        for measure, colour, marker in (("RA", BLUE, "o"), ("TA", ORANGE, "s")):
            axis.plot(
                ks,
                [mean("patched", measure, k) for k in ks],
                color=colour,
                marker=marker,
                label=f"patched, {measure}",
            )
            for kind, style in (("standard", ":"), ("robust", "--")):
                level = mean(kind, measure, ks[0])
                axis.axhline(level, color=colour, linestyle=style, linewidth=1)
                axis.annotate(
                    f"{kind} {measure}",
                    (ks[-1], level),
                    fontsize=7,
                    color=colour,
                    ha="right",
                    va="bottom" if measure == "TA" else "top",  # apart where the levels are near
                )
        axis.set_xlabel("keep_num (shallowest layers patched)")
        axis.set_xticks(ks)
    axes[0].set_ylabel("test accuracy, %")
    axes[0].legend(fontsize=8, frameon=False, loc="lower right")
    save_figure(figure, path)


def quantization(args: argparse.Namespace) -> None:
    """RA and TA over the bytes on disk of a signature: bits × layers kept."""
    rows = Rows(args)
    for row, study, signature, bounds in each_signature(rows):
        for bits in (32, *args.bits):
            method = args.quantization_type if bits < 32 else None
            of_form = row | {"bits": bits, "levels": method}
            form = signature
            if method:
                form = signature.quantize(2**bits, method, per_channel=args.per_channel)
                of_form |= {"per_channel": True} if args.per_channel else {}
            measured = rows.measure(of_form, study, form)
            rows.add(of_form | {"bytes": bytes_on_disk(form), "patched": measured} | bounds)
    full = 4 * sum(t.numel() for t in study.states["standard"].values())
    robust = accuracies(args, rows.all, "robust")[1:]
    lines = [["full robust copy, fp32", f"{full:,}", "1", *robust]]
    for k, bits in dict.fromkeys((row["keep_num"], row["bits"]) for row in rows.all):
        of_form = [row for row in rows.all if (row["keep_num"], row["bits"]) == (k, bits)]
        size = round(report.mean(row["bytes"] for row in of_form))
        form = "fp32" if bits == 32 else f"{bits} bits"
        line = accuracies(args, of_form, "patched")[1:]
        lines.append([f"keep_num {k}, {form}", f"{size:,}", f"1/{full / size:,.0f}", *line])
    lines.append(["none (standard)", "0", None, *accuracies(args, rows.all, "standard")[1:]])
    rows.finish(accuracy_columns(args, "signature", "bytes", "of a full copy"), lines)
    storage_figure(args, rows.all, full, Path(args.out) / "storage.png")


def bytes_on_disk(signature: RobustWeightSignature) -> int:
    """The size of the signature's file."""
    with tempfile.TemporaryDirectory() as folder:
        return signature.save(Path(folder) / "size.rws")


def storage_figure(
    args: argparse.Namespace, results: Sequence[dict], full: int, path: Path
) -> None:
    """RA over bytes on disk, a curve per number of bits along keep_num, and their frontier."""
    figure, axes = panels(args, 4.4, 3.6)
    styles = dict(zip((32, *args.bits), itertools.cycle(COLOURS), strict=False))
    for axis, name in zip(axes, args.corruptions, strict=True):
        rows = [row for row in results if row["corruption"] == name]
        for bits, (colour, marker) in styles.items():
            points = sorted(
                (row["bytes"], row["patched"]["RA"]) for row in rows if row["bits"] == bits
            )
            axis.plot(
                *zip(*points, strict=True),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1,
                label="float32" if bits == 32 else f"{bits} bits",
            )
        best, frontier = -1.0, []
        for size, ra in sorted((row["bytes"], row["patched"]["RA"]) for row in rows):
            if ra > best:
                best = ra
                frontier.append((size, ra))
        axis.step(
            *zip(*frontier, strict=True),
            where="post",
            color="black",
            linewidth=0.8,
            linestyle=":",
            label="best at most so many bytes",
        )
        axis.scatter([full], [rows[0]["robust"]["RA"]], marker="*", s=80, color="black", zorder=3)
        robust, standard = rows[0]["robust"]["RA"], rows[0]["standard"]["RA"]
        axis.annotate("full copy", (full, robust + 1), fontsize=7, ha="right", va="bottom")
        axis.axhline(standard, color=GREY, linestyle="--", linewidth=1)
        place = {"xycoords": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axis.annotate("standard model", (0.99, standard), fontsize=7, **place)
        axis.set_xscale("log")
        axis.set_xlabel("bytes on disk per corruption")
    axes[0].set_ylabel("RA, %")
    axes[0].legend(fontsize=7, frameon=False)
    save_figure(figure, path)


# ---- results ----------------------------------------------------------------------------------


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and forget it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


EXPERIMENTS = {"demo": demo, "keep-num": keep_num, "quantization": quantization}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    experiments = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, function in EXPERIMENTS.items():
        purpose = function.__doc__.splitlines()[0]
        one = experiments.add_parser(name, help=purpose, description=purpose)
        one.add_argument("--out", default=f"results/{name}", metavar="DIR", help="for the results")
        one.add_argument("--runs", default="runs", metavar="DIR", help="for checkpoints; reused")
        one.add_argument("--force", action="store_true", help="redo what is there")
        one.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
        if name != "demo":
            add_study(one)
        if name == "quantization":
            bits = [8, 6, 4, 3, 2]
            one.add_argument("--bits", type=int, nargs="+", default=bits, help="of a value")
            one.add_argument(
                "--per_channel", action="store_true", help="a range of levels per output channel"
            )
            one.add_argument(
                "--quantization_type",
                default="linear",
                choices=METHODS,
                help="spacing of the levels",
            )
    args = parser.parse_args(argv)
    if args.experiment != "demo":
        check(args)
    return args


def add_study(parser: argparse.ArgumentParser) -> None:
    """Flags of the experiments that train a standard model and robust ones, and patch."""
    arguments.add_dataset(parser)
    parser.add_argument("--data", metavar="DIR", help="the clean data set")
    arguments.add_corruption(parser)
    parser.add_argument(
        "--corruptions", nargs="+", default=["all"], metavar="NAME", help="all, or these"
    )
    parser.add_argument("--arch", default="vgg16", choices=ARCHS, help="architecture")
    arguments.add_pretrained(parser)
    parser.add_argument(
        "--preset",
        default="paper",
        choices=PRESETS,
        help="epochs of fine-tuning: " + ", ".join(f"{k} {v[0]}" for k, v in PRESETS.items()),
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one study for each")
    parser.add_argument(
        "--keep_nums", type=int, nargs="+", metavar="K", help="layers kept (default: every number)"
    )


def check(args: argparse.Namespace) -> None:
    """Fill in what "all" means, and raise InputError for what can be judged before any work."""
    args.dataset = datasets.base_name(args.dataset)
    if args.corruptions == ["all"]:
        args.corruptions = list(CORRUPTIONS)
    args.pretrained = arguments.pretrained_source(args) or ckpt.IMAGENET
    args.keep_nums = args.keep_nums or list(range(1, len(depth_order(args.arch)) + 1))
    arguments.check_corruptions(args.corruptions)
    arguments.check_severity(args.severity)
    arguments.check_frost(args.frost_dir)
    for seed in args.seeds:
        arguments.check_seed(seed)
    for k in args.keep_nums:
        layer_keys(args.arch, k)
    for bits in getattr(args, "bits", ()):
        if not 1 <= bits <= 16:
            raise InputError(f"--bits {bits}: must be 1 to 16")
        check_levels(2**bits, args.quantization_type)
    for flag in ("seeds", "keep_nums", "bits"):
        values = getattr(args, flag, [])
        if len(set(values)) < len(values):
            raise InputError(f"--{flag} names a value twice")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        EXPERIMENTS[args.experiment](args)


if __name__ == "__main__":
    main()
