"""One command per experiment of the paper.

    python reproduce.py demo        the main job on the embedded data set, a few minutes on a CPU

demo: pretrain a small VGG on twenty classes of the synthetic set; fine-tune it on ten others,
clean (standard model) and under two corruptions (robust models); take the Robust Weight Signature
of each, patch the standard model with it, and compare. Ends in a table and a figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch

import model_patching
import train_corruption
from datasets import synthetic
from datasets.corrupted import corrupted_set
from datasets.images import ImageSet
from datasets.loader import BatchLoader, augmentation_for
from datasets.normalization import normalization
from models import build_model
from models.vgg import add_batchnorm, fold_batchnorm
from utils import arguments, report
from utils import checkpoint as ckpt
from utils.atomic import replacing, write_text
from utils.engine import choose_device, to_device, train_epoch, use_amp
from utils.errors import script_errors
from utils.signature import RobustWeightSignature

matplotlib.use("Agg")
from matplotlib import pyplot as plt

# Readable in grey print and by colour-blind readers (Okabe & Ito).
GREY, BLUE, ORANGE = "#999999", "#0072B2", "#E69F00"


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
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=epochs)
    for epoch in range(1, epochs + 1):
        stats = train_epoch(model, loader, optimizer, amp=amp, title=f"pretraining {epoch}")
        schedule.step()
        print(f"pretraining {epoch}/{epochs}  loss {stats.loss:.4f}  train {stats.accuracy:.2f}")
    if arch.startswith("vgg"):
        fold_batchnorm(model, arch)
    ckpt.save({"state_dict": model.state_dict(), "arch": arch}, path)


# ---- demo -----------------------------------------------------------------------------------

DEMO_ARCH, DEMO_KEEP_NUM = "vgg11", 4
DEMO_CORRUPTIONS = ("impulse_noise", "motion_blur", "fog")
DEMO_PRETRAIN_EPOCHS, DEMO_EPOCHS = 4, 3


def demo(args: argparse.Namespace) -> None:
    """The paper's main job on the synthetic data set (section 5.2 in miniature)."""
    start = time.perf_counter()
    device = choose_device(args.device)
    runs, out = Path(args.runs) / "demo", Path(args.out or "results/demo")
    pretrained, root = runs / "pretrained.pth.tar", runs / "robust"
    common = ["--dataset", "synthetic", "--arch", DEMO_ARCH, "--device", args.device]

    if args.force or not pretrained.exists():
        images = synthetic.load("pretrain")
        count = f"{len(images):,} images of {len(images.classes)} other classes"
        print(f"θ_pre: {DEMO_ARCH} on {count}")
        amp = use_amp(device, None)
        pretrain(DEMO_ARCH, images, DEMO_PRETRAIN_EPOCHS, device, amp, pretrained)

    recipe = ["--pretrained_path", str(pretrained), "--epochs", str(DEMO_EPOCHS), "--lr", "0.01"]
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
            axis.bar_label(drawn, fmt="%.0f", fontsize=7)
        axis.set_title(title, fontsize=10)
        axis.set_xticks(range(len(rows)), [row["corruption"] for row in rows], fontsize=8)
        axis.set_ylim(0, 109)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy, %")
    axes[1].legend(fontsize=8, frameon=False, loc="lower right").set_zorder(3)

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
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


EXPERIMENTS = {"demo": demo}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The settings of one run; `argv` as on the command line (default: sys.argv)."""
    parser = arguments.Parser(__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS, help="what to reproduce")
    parser.add_argument("--out", metavar="DIR", help="results; by default results/EXPERIMENT")
    parser.add_argument("--runs", default="runs", metavar="DIR", help="checkpoints; reused")
    parser.add_argument("--force", action="store_true", help="train again what is there")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with script_errors():
        args = parse_args(argv)
        EXPERIMENTS[args.experiment](args)


if __name__ == "__main__":
    main()
