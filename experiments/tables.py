"""From rows to tables and verdicts: pivots, mean ± standard deviation over seeds, shares recovered.

A row is {"seed", "corruption", "model", "TA", "RA", **knobs}, accuracies in percent; experiments on
weights have "value" in place of TA and RA.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from utils.report import recovered

STANDARD, PATCHED, ROBUST = "standard", "patched", "robust"
UNION = "data augmentation"  # one model trained on several corruptions
BATCHNORM_ONLY = "batch norm re-estimated only"

HOLDS, PARTLY, FAILS = "holds", "holds partly", "does not hold"
UNTOLD = "cannot be told"
Verdict = tuple[str, str]  # one of the four, and in words what was measured
NO_GAIN: Verdict = (FAILS, "no robust model gains RA here, so there is nothing to recover")


@dataclass
class Table:
    """Columns, lines of cells, and a note for the caption."""

    columns: list[str]
    lines: list[list]
    note: str = ""


def select(rows: Iterable[dict], **knobs: object) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in knobs.items())]


def distinct(rows: Iterable[dict], key: str) -> list:
    """The values of `key`, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows if key in row))


def spread(values: Iterable[float | None], digits: int = 1) -> str | None:
    """Mean of the values, with ± standard deviation where there are several; None where none is."""
    values = [value for value in values if value is not None]
    if not values:
        return None
    sd = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{sd}"


def pivot(rows: Sequence[dict], index: str, columns: str, digits: int = 2) -> list[list]:
    """A line for each value of `index`: it, and mean ± sd over seeds of "value" in each column."""
    lines = []
    for i in distinct(rows, index):
        cells = [select(rows, **{index: i, columns: c}) for c in distinct(rows, columns)]
        lines.append([i, *(spread((row["value"] for row in cell), digits) for cell in cells)])
    return lines


def whole_seeds(rows: Sequence[dict]) -> list[int]:
    """The seeds that have every corruption."""
    every = set(distinct(rows, "corruption"))
    return [
        s
        for s in distinct(rows, "seed")
        if {r["corruption"] for r in select(rows, seed=s)} == every
    ]


def shares(rows: Sequence[dict], of: Iterable[dict]) -> list[float]:
    """Share of the robust model's gain in RA that each row of `of` recovers, in percent.

    Compared with the standard and the robust model of its seed and corruption in `rows`; rows for
    which the robust model gains nothing are left out.
    """
    ra = {(r["model"], r["seed"], r["corruption"]): r["RA"] for r in rows if "RA" in r}
    found = []
    for row in of:
        standard, robust = (ra[m, row["seed"], row["corruption"]] for m in (STANDARD, ROBUST))
        found.append(recovered(standard, row["RA"], robust))
    return [share for share in found if share is not None]


def accuracies(
    rows: Sequence[dict],
    head: Sequence[str] = ("model",),
    label: Callable[[dict], tuple[str, ...]] = lambda row: (row["model"],),
    extra: Mapping[str, Callable[[list[dict]], object]] | None = None,
    recovers: bool = True,
) -> Table:
    """A line for each label: TA, RA, the share recovered, RA under each corruption.

    head: the names of what `label` gives; extra: further columns behind it, each from the rows of a
    line. Means over corruptions take the seeds that have every corruption of the line.
    """
    names, extra = distinct(rows, "corruption"), extra or {}
    lines = []
    kinds = {label(row): row["model"] for row in rows}
    cases = list(dict.fromkeys(key[:-1] for key in kinds))
    # Of each case the upper bound comes last.
    for key in sorted(kinds, key=lambda key: (cases.index(key[:-1]), kinds[key] == ROBUST)):
        of_line = [row for row in rows if label(row) == key]
        whole = [select(of_line, seed=seed) for seed in whole_seeds(of_line)]
        line = [*key, *(cell(of_line) for cell in extra.values())]
        line += [spread(fmean(r[m] for r in of_seed) for of_seed in whole) for m in ("TA", "RA")]
        if recovers:
            bound = of_line[0]["model"] in (STANDARD, ROBUST)
            each = [] if bound else [shares(rows, of_seed) for of_seed in whole]
            line.append(spread(fmean(s) for s in each if s))
        line += [spread(r["RA"] for r in select(of_line, corruption=c)) for c in names]
        lines.append(line)
    columns = [*head, *extra, "TA, %", "RA, %", *(["recovered, %"] if recovers else [])]
    return Table([*columns, *(f"RA {c}, %" for c in names)], lines)


def knob(name: str, text: str = "") -> Callable[[dict], tuple[str]]:
    """A label for `accuracies`: the model, with the value of a knob where the row has it."""
    text = text or name
    return lambda row: (f"{row['model']}, {text} {row[name]:g}" if name in row else row["model"],)


def graded(share: float, holds: float, partly: float) -> str:
    """HOLDS from `holds` on, PARTLY from `partly` on."""
    return HOLDS if share >= holds else PARTLY if share >= partly else FAILS
