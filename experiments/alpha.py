"""Adjustable in place: TA and RA over the strength α; whether taking off restores every bit."""

import itertools
from collections.abc import Iterator
from pathlib import Path

from experiments import plots, tables
from experiments.tables import FAILS, PATCHED, UNTOLD, graded
from utils.checkpoint import tensors_hash
from utils.signature import patch

CLAIM = "A patch can be put on, scaled by α, and taken off, back to the intact model."
RULE = (
    "Taking off restores every bit, and RA rises with α from 0 to 1 (a point of slack) for ≥ 80 % "
    "of corruptions (partly: 50 %)."
)
TAKEN_OFF = "taken off"  # a row with "value": 1 where every bit is back


def measure(study) -> Iterator[dict]:
    for run in study.patchings():
        for name in run.args.corruption:
            signature = run.signature(name)
            yield from study.bounds(run, name)
            for a in study.args.alphas:
                result = run.with_patch([signature], [a], [name])
                yield study.row(run, name, PATCHED, result, alpha=a)
            before = tensors_hash(run.target.state_dict())
            with patch(run.target, signature):
                pass
            back = tensors_hash(run.target.state_dict()) == before
            row = {"seed": run.args.seed, "corruption": name, "model": TAKEN_OFF}
            yield row | {"value": int(back)}


def table(rows: list[dict], study) -> tables.Table:
    of_models = [row for row in rows if row["model"] != TAKEN_OFF]
    made = tables.accuracies(of_models, label=tables.knob("alpha", "α {:g}".format))
    back = all(row["value"] for row in tables.select(rows, model=TAKEN_OFF))
    made.note = f"keep_num {study.method.keep_num}. Taken off again, every patch left the standard "
    made.note += f"model {'bit for bit' if back else 'CHANGED'}."
    return made


def figure(rows: list[dict], path: Path) -> None:
    plots.accuracy_panels(rows, "alpha", "α", path)


def verdict(rows: list[dict]) -> tables.Verdict:
    patched = tables.select(rows, model=PATCHED)
    alphas = sorted(a for a in tables.distinct(patched, "alpha") if a <= 1)
    if len(alphas) < 2:
        return UNTOLD, "no two α from 0 to 1 were measured"
    names, rising = tables.distinct(patched, "corruption"), 0
    for name in names:
        ras = [tables.mean(patched, "RA", corruption=name, alpha=a) for a in alphas]
        rising += all(b >= a - 1 for a, b in itertools.pairwise(ras)) and ras[-1] > ras[0]
    back = all(row["value"] for row in tables.select(rows, model=TAKEN_OFF))
    words = f"taking a patch off {'restores every bit' if back else 'does NOT restore the model'}"
    words += f"; RA rises with α from {alphas[0]:g} to {alphas[-1]:g} for {rising} of {len(names)}"
    return graded(100 * rising / len(names), 80, 50) if back else FAILS, words
