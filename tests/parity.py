"""Compare every corruption with what the original per-image generators produced.

    python tests/parity.py ORACLE_DIR --frost_dir FROST_DIR --out results/corruptions/parity.md

ORACLE_DIR holds corruptions_cifar32.npz and corruptions_tiny64.npz: `clean` (images, H, W, 3),
`severities`, and per corruption (severity, draw, image, H, W, 3), all uint8; one draw for the eight
corruptions without randomness, three for the eleven others.

Without randomness: mean absolute difference ≤ 0.5 of 255 and ≤ 1 % of the values off by more than
3 (jpeg_compression: 2.0 and 10 %). With: for statistics of (corrupted − clean) per image and
channel, |mean over the n images of (mean of k fresh draws − mean of the three draws)| ≤
5·s·√((1/k + 1/3)/n), s² the variance between the three draws of an image, averaged over images;
the row shows the channel that comes nearest to its bound.

Exit status 1 if any row is out of bounds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from datasets.corruptions import CORRUPTIONS, corrupt
from utils.errors import InputError, script_errors
from utils.files import write_text

FILES = {32: "corruptions_cifar32.npz", 64: "corruptions_tiny64.npz"}
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)
BANDS = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1)  # cycles per pixel


def statistics(corrupted: np.ndarray, clean: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics of (corrupted − clean): uint8 (…, n, H, W, 3) to float (…, n, 3) each."""
    d = corrupted.astype(np.float64) - clean
    values = {"mean": d.mean((-3, -2)), "std": d.std((-3, -2))}
    for q in QUANTILES:
        # Differences are whole numbers: each is spread over ±½, or the medians of all draws would
        # be one number, with no variance to judge by.
        v = np.quantile(d, q, axis=(-3, -2), method="inverted_cdf", keepdims=True)
        below, at = (d < v).mean((-3, -2)), (d == v).mean((-3, -2))
        values[f"quantile {q}"] = v[..., 0, 0, :] - 0.5 + (q - below) / at
    height, width = d.shape[-3:-1]
    power = np.abs(np.fft.fft2(d, axes=(-3, -2), norm="forward")) ** 2
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    for low, high in itertools.pairwise(BANDS):
        band = (low < radius) & (radius <= high)
        values[f"spectrum {low:.3g} to {min(high, 0.707):.3g}"] = np.sqrt(
            power[..., band, :].sum(-2)
        )
    values["share touched"] = (d != 0).mean((-3, -2))
    return values


def compare_exact(name: str, ours: np.ndarray, theirs: np.ndarray) -> list[tuple]:
    """Rows (statistic, ours, theirs, bound, share of the bound)."""
    d = np.abs(ours.astype(int) - theirs)
    bounds = (2.0, 10.0) if name == "jpeg_compression" else (0.5, 1.0)
    found = d.mean(), 100 * (d > 3).mean()
    labels = "mean absolute difference", "% off by more than 3"
    return [(*row, row[1] / row[3]) for row in zip(labels, found, (0.0, 0.0), bounds, strict=True)]


def compare_random(ours: np.ndarray, theirs: np.ndarray, clean: np.ndarray) -> list[tuple]:
    """The same for k fresh draws (k, n, H, W, 3) and the oracle's three (3, n, H, W, 3)."""
    rows = []
    fresh, draws = statistics(ours, clean), statistics(theirs, clean)
    for label in fresh:
        value, reference = fresh[label].mean(0), draws[label].mean(0)
        s = np.sqrt(draws[label].var(0, ddof=1).mean(0))
        bound = 5 * s * np.sqrt((1 / len(ours) + 1 / len(theirs)) / len(clean))
        away = np.abs((value - reference).mean(0))
        share = np.divide(away, bound, out=np.where(away > 1e-9, np.inf, 0.0), where=bound > 1e-9)
        k = int(share.argmax())
        rows.append((label, value.mean(0)[k], reference.mean(0)[k], bound[k], share[k]))
    return rows


def parity(folder: Path, frost_dir: str | None, draws: int, device: str) -> list[tuple]:
    """Rows (name, severity, size, statistic, ours, theirs, bound, share of the bound).

    The fresh draws are those of seeds 0 … draws − 1.
    """
    rows = []
    for size, file in FILES.items():
        try:
            oracle = np.load(folder / file)
        except OSError as error:
            raise InputError(f"cannot read {folder / file}: {error.strerror or error}") from error
        clean = oracle["clean"]
        images = torch.from_numpy(clean).permute(0, 3, 1, 2).to(device)
        for name in CORRUPTIONS:
            if name == "frost" and frost_dir is None:
                continue
            for theirs, severity in zip(oracle[name], oracle["severities"].tolist(), strict=True):
                random, ours = len(theirs) > 1, []
                for seed in range(draws if random else 1):
                    generator = torch.Generator().manual_seed(seed)
                    fresh = corrupt(images, name, severity, generator, frost_dir)
                    ours.append(fresh.permute(0, 2, 3, 1).cpu().numpy())
                ours = np.stack(ours)
                if random:
                    found = compare_random(ours, theirs, clean)
                else:
                    found = compare_exact(name, ours[0], theirs[0])
                rows += [(name, severity, size, *row) for row in found]
    return rows


def report(rows: list[tuple], command: str, device: str) -> str:
    """The worst row of each corruption, and every row out of bounds, as Markdown."""
    failed = [row for row in rows if row[-1] > 1]
    lines = [
        "# Parity with the original generators",
        "",
        f"`{command}`, torch {torch.__version__}, {device}. Criteria: see tests/parity.py.",
        f"{len(rows) - len(failed)} of {len(rows)} rows are within their bounds.",
        "",
        "| corruption | rows | out of bounds | nearest to its bound, as a share of it |",
        "| --- | ---: | ---: | --- |",
    ]
    for name in CORRUPTIONS:
        own = [row for row in rows if row[0] == name]
        if not own:
            lines.append(f"| {name} | 0 | | not compared: needs --frost_dir |")
            continue
        worst = max(own, key=lambda row: row[-1])
        lines.append(
            f"| {name} | {len(own)} | {sum(row[-1] > 1 for row in own)} | {worst[-1]:.2f} "
            f"({worst[3]}, severity {worst[1]}, {worst[2]}×{worst[2]}) |"
        )
    for name, severity, size, statistic, ours, theirs, bound, _ in failed:
        lines += [
            "",
            f"Out of bounds: {name}, severity {severity}, {size}×{size}, {statistic}: {ours:.4g} "
            f"instead of {theirs:.4g} ± {bound:.3g}.",
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("oracle_dir", type=Path, help="folder with the two npz files")
    parser.add_argument("--frost_dir", help="the frost photographs; without them frost is left out")
    parser.add_argument("--out", type=Path, help="write the summary there too")
    parser.add_argument("--draws", type=int, default=3, help="fresh draws to average (default 3)")
    parser.add_argument("--device", default="cpu", help="where to corrupt (default cpu)")
    args = parser.parse_args()
    with script_errors():
        rows = parity(args.oracle_dir, args.frost_dir, args.draws, args.device)
        frost = " --frost_dir FROST_DIR" if args.frost_dir else ""
        command = f"python tests/parity.py ORACLE_DIR{frost} --draws {args.draws}"
        text = report(rows, command, args.device)
        if args.out:
            write_text(args.out, text)
    print(text)
    return int(any(row[-1] > 1 for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
