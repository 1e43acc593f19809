"""Several signatures on one model: against each alone, and a model trained on all (claim 6)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

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
        union = study.robust_job(run.args.seed, group).best
        models.append((UNION, run.other(union, group), {}))
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
    def label(row: dict) -> tuple[str, str]:
        names = row["group"].split("+")
        title = " +\n".join(names) if len(names) < 4 else f"{len(names)} corruptions"
        return title, _label(row)[1]

    plots.bars(rows, label, "RA, mean over the group, %", path)


def verdict(rows: list[dict]) -> tables.Verdict:
    shares, words = [], []
    for group in tables.distinct(rows, "group"):
        of = tables.grouped(tables.select(rows, group=group), _label)
        ra, ta = ({k: tables.mean(each, m) for (_, k), each in of.items()} for m in ("RA", "TA"))
        best = max((model for model in ra if model.startswith(COMPOSED)), key=ra.get)
        trained = ra["trained on all of them"]
        share = recovered(ra[STANDARD], ra[best], trained)
        shares += [] if share is None else [share]
        words.append(
            f"{group.count('+') + 1} signatures: RA {ra[STANDARD]:.1f} → {ra[best]:.1f} ({best}; "
            f"TA {ta[STANDARD]:.1f} → {ta[best]:.1f}), a model trained on all of them {trained:.1f}"
        )
    return graded(min(shares), 80, 40) if shares else FAILS, "; ".join(words)
