"""Several signatures on one model: against each alone, and a model trained on all (claim 6)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from experiments import plots, tables
from experiments.tables import BATCHNORM_ONLY, FAILS, PATCHED, STANDARD, UNION, graded
from utils.report import recovered

CLAIM = "Several signatures work at once."
RULE = "Composed patches get ≥ 80 % (partly: ≥ 40 %) of the gain of a model trained on all."
COMPOSED = "composed"  # with the weight "w" of each signature
OWN = "its own"  # each corruption under its own signature alone


def jobs(study) -> list:
    seed = study.args.seeds[0]
    return [study.robust_job(seed, group) for group in study.args.groups]


def measure(study) -> Iterator[dict]:
    run = study.patching()
    for group in study.args.groups:
        signatures, n = [run.signature(name) for name in group], len(group)
        models = [(STANDARD, run.standard(group), {})]
        if n == 2:
            for name, signature in zip(group, signatures, strict=True):
                alone = run.with_patch([signature], [1.0], group)
                models.append((PATCHED, alone, {"against": name}))
        if alone := run.batchnorm_only(group):
            models.append((BATCHNORM_ONLY, alone, {}))
        for w in (1 / n, 1.0):
            models.append((COMPOSED, run.with_patch(signatures, [w] * n, group), {"w": w}))
        models.append((UNION, run.other(study.robust_model(run.args.seed, group), group), {}))
        for i, name in enumerate(group):
            if n > 2:
                own = run.with_patch([signatures[i]], [1.0], [name])
                yield study.row(run, name, PATCHED, own, against=OWN, group="+".join(group))
            for model, result, knobs in models:
                yield study.row(run, name, model, result, **knobs, group="+".join(group))


def _label(row: dict) -> tuple[str, str]:
    model = "trained on all of them" if row["model"] == UNION else row["model"]
    model += f" against {row['against']}" if "against" in row else ""
    if "w" in row:
        model += ", w = 1" if row["w"] == 1 else ", w = 1/n"
    return row["group"].replace("+", " + "), model


def table(rows: list[dict], study) -> tables.Table:
    made = tables.accuracies(rows, ["signatures", "model"], _label, recovers=False)
    made.note = f"keep_num {study.method.keep_num}. RA: mean over the group."
    return made


def figure(rows: list[dict], path: Path) -> None:
    shown: dict[str, dict[str, list[float]]] = {}
    for group, model in dict.fromkeys(map(_label, rows)):
        names = group.split(" + ")
        title = " +\n".join(names) if len(names) < 4 else f"{len(names)} corruptions"
        ra = fmean(row["RA"] for row in rows if _label(row) == (group, model))
        shown.setdefault(title, {})[model] = [ra]
    plots.bars(shown, "RA, mean over the group, %", path)


def verdict(rows: list[dict]) -> tables.Verdict:
    shares, words = [], []
    for group in tables.distinct(rows, "group"):
        of: dict[str, list[dict]] = {}
        for row in tables.select(rows, group=group):
            of.setdefault(_label(row)[1], []).append(row)
        ra = {model: fmean(row["RA"] for row in each) for model, each in of.items()}
        ta = {model: fmean(row["TA"] for row in each) for model, each in of.items()}
        best = max((model for model in ra if model.startswith(COMPOSED)), key=ra.get)
        trained = ra["trained on all of them"]
        share = recovered(ra[STANDARD], ra[best], trained)
        shares += [] if share is None else [share]
        words.append(
            f"{len(of[STANDARD])} signatures: RA {ra[STANDARD]:.1f} → {ra[best]:.1f} ({best}; "
            f"TA {ta[STANDARD]:.1f} → {ta[best]:.1f}), a model trained on all of them {trained:.1f}"
        )
    return graded(min(shares), 80, 40) if shares else FAILS, "; ".join(words)
