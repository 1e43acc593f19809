"""What a script prints and writes: the header, result tables, JSON with its provenance."""

import contextlib
import csv
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from statistics import fmean, stdev

import torch
import torchvision

from utils.errors import InputError, warn
from utils.files import AnyPath, write_text


def header(title: str, facts: Mapping[str, object]) -> None:
    """Print what a run is about to do, a fact per line."""
    print(title)
    width = max(map(len, facts))
    for name, fact in facts.items():
        print(f"  {name:<{width}}  {fact}")
    print(flush=True)


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table, aligned in plain text too; floats with one decimal, None as a dash."""
    lines = [list(columns), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    for line in lines:
        first, *rest = zip(line, widths, strict=True)
        line[:] = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.1f}" if isinstance(value, float) else str(value)


def device_name(device: torch.device) -> str:
    """A device as people name it, e.g. "NVIDIA H100 80GB HBM3" or "cpu, AMD EPYC, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        model = next(line for line in file if line.startswith("model name")).split(":")[1].strip()
    return ", ".join(filter(None, [device.type, model, f"{torch.get_num_threads()} threads"]))


def provenance(device: torch.device) -> dict[str, str]:
    """Command, versions and device that every results file carries."""
    return {
        "command": shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": device_name(device),
    }


def write_json(path: AnyPath, content: Mapping) -> None:
    """Write `content` to `path` as JSON, atomically."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def spread(values: Iterable[float | None], digits: int = 1) -> str | None:
    """Mean of the values, with ± standard deviation where there are several; None where none is."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    sd = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{sd}"


def recovered(standard: float, patched: float, robust: float) -> float | None:
    """Share of the robust model's gain in RA that a patch recovers, in percent; None without one.

    The three are the RA of the standard, the patched and the robust model, in percent.
    """
    return 100 * (patched - standard) / (robust - standard) if robust > standard else None


def mean_corruption_error(
    ra: Mapping[str, float], baseline: Mapping[str, float], labels: Mapping[str, Sequence[str]]
) -> float | None:
    """mCE in percent: errors summed over severities, relative to the baseline's; their mean.

    ra, baseline: RA in percent by label; labels: those of each corruption. None where `ra` lacks
    one. Raises InputError where the baseline does, or makes no error.
    """
    if lacking := [x for of_one in labels.values() for x in of_one if x not in baseline]:
        raise InputError(f"--baseline_log: no RA of {', '.join(lacking)}; measure it likewise")
    if any(label not in ra for of_one in labels.values() for label in of_one):
        return None
    sums = [[sum(100 - of[x] for x in xs) for of in (ra, baseline)] for xs in labels.values()]
    if any(theirs == 0 for _, theirs in sums):
        raise InputError("--baseline_log: a baseline without errors has no mCE")
    return 100 * fmean(ours / theirs for ours, theirs in sums)


def write_csv(path: AnyPath, rows: Sequence[Mapping]) -> None:
    """Write `rows` to `path` as CSV, atomically: a column per key that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def add_means(rows: Sequence[dict], own: Collection[str], bound: dict | None, mixed: bool) -> None:
    """Add to each row its mean RA under `own`, to patched ones the share of `bound` recovered.

    bound: the row of the robust models, if there is one; mixed: add the mean of TA and RA, too.
    """
    for row in rows:
        row["RA_mean"] = fmean(row["RA"][c] for c in own)
        if mixed:
            row["mixture"] = fmean([row["TA"], *(row["RA"][c] for c in own)])
        if bound and row["model"].startswith("patched"):
            ras = rows[0]["RA_mean"], row["RA_mean"], fmean(bound["RA"].values())
            row["recovered"] = recovered(*ras)


def patching_table(rows: Sequence[dict], own: Sequence[str], sources: Mapping[str, str]) -> str:
    """The Markdown table of a run: TA, RA per corruption, mean RA, share recovered.

    sources: where the images of each corruption come from, which each column of RA says in short.
    """
    count = len(rows[0]["RA"])
    extra = [f"RA all {count} ({origin(rows[0]['RA'], sources)}), %"] if count > len(own) else []
    extra += ["clean and these mixed, %"] if "mixture" in rows[0] else []
    single = [f"RA {c} ({origin([c], sources)}), %" for c in own]
    mce = ["mCE, %"] if "mCE" in rows[0] else []
    columns = ["model", "TA, %", *single, "RA mean, %", *extra, *mce]
    lines = []
    for row in rows:
        every = fmean(row["RA"].values()) if len(row["RA"]) == count else None
        line = [row["model"], row["TA"], *(row["RA"].get(c) for c in own), row["RA_mean"]]
        line += [every] * (count > len(own)) + [row[k] for k in ("mixture", "mCE") if k in row]
        lines.append([*line, row.get("recovered")])
    return markdown_table([*columns, "recovered, %"], lines)


def origin(names: Collection[str], sources: Mapping[str, str]) -> str:
    """In short, whether the images of `names` were generated, by their `sources` in words."""
    made = sum(sources[name].startswith("generated, seed ") for name in names)
    if made in (0, len(names)):
        return "generated" if made else "from files"
    return f"{made} generated"


def warn_below_chance(rows: Sequence[dict], classes: int) -> None:
    """Warn of each patched row with an accuracy below that of guessing."""
    for row in rows:
        lowest, chance = min(row["TA"], *row["RA"].values()), 100 / classes
        if row["model"].startswith("patched") and lowest < chance:
            said = f"{row['model']}: an accuracy of {lowest:.1f} % is below chance, {chance:.1f} %"
            said += "; do model, signatures and data set belong together?"
            warn(said)
