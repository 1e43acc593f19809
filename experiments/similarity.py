"""Whether signatures tell corruptions apart: cosines, naming by the nearest mean (claim 2).

A signature is named by the mean signatures of the other seeds that have every corruption: a mean
over more seeds has less noise, and would be nearer whatever the corruption.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import torch

from datasets.corruptions import FAMILIES
from experiments import plots, tables
from experiments.tables import FAILS, PARTLY, UNTOLD, graded
from utils.errors import InputError
from utils.signature import RobustWeightSignature

CLAIM = "Signatures of similar corruptions are similar, of different ones different."
RULE = (
    "Cosines are higher within a family, and the nearest mean signature names ≥ 90 % right "
    "(partly: 50 %)."
)


def cosine(a: RobustWeightSignature, b: RobustWeightSignature) -> float:
    """Cosine between two signatures over all keys that both hold; 0 where one of them is zero.

    Raises InputError when they share no key, as random layers may.
    """
    keys = [key for key in a.tensors if key in b.tensors]
    if not keys:
        raise InputError(f"signatures of {a.name} and {b.name} have no tensor in common")
    x, y = (torch.cat([s.tensors[key].flatten() for key in keys]).double() for s in (a, b))
    return torch.cosine_similarity(x, y, dim=0).item()


def measure(study) -> Iterator[dict]:
    """The cosine of each pair in the first seed; then of each signature and its nearest mean."""
    every = set(study.args.corruptions)
    of_seed: dict[int, dict[str, RobustWeightSignature]] = {}
    for run in study.patchings():
        of_seed[run.args.seed] = {name: run.signature(name) for name in run.args.corruption}
    first = study.args.seeds[0]
    order = list(dict.fromkeys(FAMILIES.values()))
    names = sorted(of_seed[first], key=lambda name: order.index(FAMILIES[name]))
    for a, b in itertools.combinations_with_replacement(names, 2):
        value = cosine(of_seed[first][a], of_seed[first][b])
        yield {"seed": first, "a": a, "b": b, "value": value}
    for seed, signatures in of_seed.items():
        others = [o for s, o in of_seed.items() if s != seed and o.keys() == every]
        if not others or len(every) < 2:
            continue
        means = {c: sum(other[c] for other in others) for c in every}
        for name, signature in signatures.items():
            near = {c: cosine(signature, mean) for c, mean in means.items()}
            best = max(near, key=near.get)
            yield {"seed": seed, "corruption": name, "named": best, "value": near[best]}


def _matrix(rows: list[dict]) -> tuple[list[str], dict[str, list[float]]]:
    pairs = [row for row in rows if "a" in row]
    return tables.pivot([*pairs, *(r | {"a": r["b"], "b": r["a"]} for r in pairs)], "a", "b")


def _right(rows: list[dict]) -> tuple[int, list[dict]]:
    named = [row for row in rows if "named" in row]
    return sum(row["corruption"] == row["named"] for row in named), named


def table(rows: list[dict], study) -> tables.Table:
    right, named = _right(rows)
    told = f"{right} of {len(named)} right" if named else "needs a second seed"
    note = f"keep_num {study.method.keep_num}, first seed. "
    note += f"Named by the nearest mean signature of other seeds with every corruption: {told}."
    return tables.matrix("cosine", *_matrix(rows), note)


def figure(rows: list[dict], path: Path) -> None:
    names, lines = _matrix(rows)
    plots.heat_map(names, lines, path, groups=[FAMILIES[name] for name in names])


def verdict(rows: list[dict]) -> tables.Verdict:
    pairs = [row for row in rows if "a" in row and row["a"] != row["b"]]
    inside = [r["value"] for r in pairs if FAMILIES[r["a"]] == FAMILIES[r["b"]]]
    across = [r["value"] for r in pairs if FAMILIES[r["a"]] != FAMILIES[r["b"]]]
    right, named = _right(rows)
    words = f"mean cosine {fmean(across):.2f} between families" if across else ""
    if inside and across:
        words = f"mean cosine {fmean(inside):.2f} within families, {fmean(across):.2f} between them"
    closer = bool(inside and across) and fmean(inside) > fmean(across)
    if not named and not (inside and across):
        return UNTOLD, f"{words}; no two corruptions of one family, and one seed"
    if not named:
        return PARTLY if closer else FAILS, f"{words}; one seed, so nothing to name"
    which = ", ".join(tables.distinct(named, "corruption"))
    words += f"; the nearest mean signature of other seeds names {right} of {len(named)} ({which})"
    if closer or not inside:
        return graded(100 * right / len(named), 90, 50), words
    return PARTLY if right == len(named) else FAILS, words
