"""From rows to tables and verdicts: means, with ± standard deviation over seeds, shares recovered.

A row is {"seed", "corruption", "model", "TA", "RA", **knobs}, accuracies in percent; experiments on
weights have "value" in place of TA and RA.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from datasets.corruptions import FAMILIES
from utils.report import recovered, spread

STANDARD, PATCHED, ROBUST = "standard", "patched", "robust"
UNION = "data augmentation"  # one model trained on several corruptions
BATCHNORM_ONLY = "batch norm re-estimated only"

HOLDS, PARTLY, FAILS = "holds", "holds partly", "does not hold"
UNTOLD = "cannot be told"
MANY = 8  # corruptions; more are told by family
Label = Callable[[dict], tuple[str, ...]]  # the line of a table that a row belongs to
Verdict = tuple[str, str]  # one of the four, and in words what was measured
NO_GAIN: Verdict = (FAILS, "no robust model gains RA here, so there is nothing to recover")


@dataclass
class Table:
    """Columns, lines of cells, and a note for the caption."""

    columns: list[str]
    lines: list[list]
    note: str = ""


def by_model(row: dict) -> tuple[str]:
    """The plainest label: the model."""
    return (row["model"],)


def knob(name: str, words: Callable[[object], str]) -> Label:
    """A label: the model, with the value of a knob in `words` where the row has it."""
    return lambda row: (row["model"] + (f", {words(row[name])}" if name in row else ""),)


def select(rows: Iterable[dict], **knobs: object) -> list[dict]:
    """The rows that have these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in knobs.items())]


def distinct(rows: Iterable[dict], key: str) -> list:
    """The values of `key`, in order of appearance."""
    return list(dict.fromkeys(row[key] for row in rows if key in row))


def mean(rows: Iterable[dict], measure: str, **knobs: object) -> float:
    """Mean of `measure` ("TA", "RA", "value", …) over the rows that have these values."""
    return fmean(row[measure] for row in select(rows, **knobs))


def grouped(rows: Iterable[dict], label: Label) -> dict[tuple[str, ...], list[dict]]:
    """The rows of each label, in order of appearance."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        groups.setdefault(label(row), []).append(row)
    return groups


def pivot(rows: Sequence[dict], index: str, columns: str) -> tuple[list, dict[object, list[float]]]:
    """The values of `columns`, and for each value of `index` mean "value" under each of them."""
    heads = distinct(rows, columns)
    return heads, {
        i: [mean(rows, "value", **{index: i, columns: c}) for c in heads]
        for i in distinct(rows, index)
    }


def matrix(corner: str, heads: list, lines: Mapping, note: str, digits: int = 2) -> Table:
    """What `pivot` gives as a table; corner: head of its first column."""
    cells = [[name, *(f"{value:.{digits}f}" for value in line)] for name, line in lines.items()]
    return Table([corner, *heads], cells, note)


def parts(rows: Sequence[dict]) -> dict[str, list[str]]:
    """Of which corruptions a table tells RA: of each; of families where there are MANY.

    Of many, those that more seeds have than others are told one by one, too: they have a spread.
    """
    seeds = {
        c: len(distinct(select(rows, corruption=c), "seed")) for c in distinct(rows, "corruption")
    }
    families: dict[str, list[str]] = {}
    if len(seeds) > MANY:
        for c in seeds:
            families.setdefault(FAMILIES[c], []).append(c)
    single = [c for c, n in seeds.items() if not families or n > min(seeds.values())]
    return families | {c: [c] for c in single}


def in_groups(rows: Sequence[dict], groups: Mapping[str, Sequence[str]]) -> list[dict]:
    """The rows of each group of corruptions (such as `parts`), with its name as their "group"."""
    of_group = ((name, r) for name, of in groups.items() for r in rows if r["corruption"] in of)
    return [row | {"group": name} for name, row in of_group]


def whole_seeds(rows: Sequence[dict]) -> list[list[dict]]:
    """The rows of each seed that has every corruption."""
    count = len(distinct(rows, "corruption"))
    of_seeds = [select(rows, seed=seed) for seed in distinct(rows, "seed")]
    return [of_seed for of_seed in of_seeds if len(distinct(of_seed, "corruption")) == count]


def of_whole_seeds(rows: Sequence[dict]) -> list[dict]:
    """`whole_seeds` in one list."""
    return [row for of_seed in whole_seeds(rows) for row in of_seed]


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
    label: Label = by_model,
    extra: Mapping[str, Callable[[list[dict]], object]] | None = None,
    recovers: bool = True,
) -> Table:
    """A line for each label: TA, RA, the share recovered, RA under each of `parts`.

    head: the names of what `label` gives; extra: further columns behind it, each from the rows of a
    line. Means over corruptions take the seeds that have every corruption of the line.
    """
    of_parts, extra, lines = parts(rows), extra or {}, []
    of_label = grouped(rows, label)
    cases = list(dict.fromkeys(key[:-1] for key in of_label))

    def place(key: tuple[str, ...]) -> tuple[int, bool]:
        """Cases in order; of each the upper bound comes last."""
        return cases.index(key[:-1]), of_label[key][0]["model"] == ROBUST

    for key in sorted(of_label, key=place):
        of_line = of_label[key]
        whole = whole_seeds(of_line)
        line = [*key, *(cell(of_line) for cell in extra.values())]
        line += [spread(mean(of_seed, m) for of_seed in whole) for m in ("TA", "RA")]
        if recovers:
            bound = of_line[0]["model"] in (STANDARD, ROBUST)
            each = [] if bound else [shares(rows, of_seed) for of_seed in whole]
            line.append(spread(fmean(s) for s in each if s))
        for names in of_parts.values():
            of_part = whole_seeds([row for row in of_line if row["corruption"] in names])
            line.append(spread(mean(of_seed, "RA") for of_seed in of_part))
        lines.append(line)
    columns = [*head, *extra, "TA, %", "RA, %", *(["recovered, %"] if recovers else [])]
    return Table([*columns, *(f"RA {part}, %" for part in of_parts)], lines)


def graded(share: float, holds: float, partly: float) -> str:
    """HOLDS from `holds` on, PARTLY from `partly` on."""
    return HOLDS if share >= holds else PARTLY if share >= partly else FAILS
