"""Whether two data sets give one signature: cosines between those of both (claim 3)."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from experiments import plots, tables
from experiments.similarity import cosine
from experiments.tables import FAILS, UNTOLD, graded

CLAIM = "For one corruption, signatures of different data sets agree."
RULE = (
    "Of all signatures of the other data set, that of the same corruption is the nearest for all "
    "(partly: half of them), and the mean cosine is higher for the same corruption."
)


def jobs(study) -> list:
    return study.target.base_jobs()


def measure(study) -> Iterator[dict]:
    here, there = study.patching(), study.target.patching()
    sets = {"set_a": study.data_name, "set_b": study.target.data_name}
    for b, a in itertools.product(there.args.corruption, here.args.corruption):
        value = cosine(here.signature(a), there.signature(b))
        yield {"seed": here.args.seed, "a": a, "b": b, "value": value, **sets}


def table(rows: list[dict], study) -> tables.Table:
    here, other = study.data_name, study.target
    note = f"keep_num {study.method.keep_num}. Lines: {other.data_name}, {other.recipe}. "
    note += f"Columns: {here}."
    return tables.matrix(f"{other.data_name} \\ {here}", *tables.pivot(rows, "b", "a"), note)


def figure(rows: list[dict], path: Path) -> None:
    plots.heat_map(*tables.pivot(rows, "b", "a"), path, (rows[0]["set_b"], rows[0]["set_a"]))


def verdict(rows: list[dict]) -> tables.Verdict:
    nearest, same, other = [], [], []
    for b in tables.distinct(rows, "b"):
        of = {row["a"]: row["value"] for row in tables.select(rows, b=b)}
        if b in of:
            nearest.append(max(of, key=of.get) == b)
            same.append(of.pop(b))
            other += of.values()
    if not same or not other:
        return UNTOLD, "no corruption of both data sets, or no other to compare with"
    words = (
        f"mean cosine {fmean(same):.2f} for the same corruption, {fmean(other):.2f} for others; "
        f"the same one is the nearest for {sum(nearest)} of {len(nearest)}"
    )
    holds = graded(100 * sum(nearest) / len(nearest), 100, 50)
    return holds if fmean(same) > fmean(other) else FAILS, words
