"""Several signatures on one model: against each alone, and a model trained on all (claim 6).

Beyond the paper: weights that are learnt on validation images (utils/learn.py), and where the
statistics of batch norm come from.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from experiments import plots, tables
from experiments.tables import BATCHNORM_ONLY, FAILS, PATCHED, STANDARD, UNION, graded
from utils import checkpoint as ckpt
from utils.batchnorm import has_batchnorm, running_statistics
from utils.learn import BATCH, LR
from utils.report import recovered

CLAIM = "Several signatures work at once."
RULE = (
    "Composed patches (w = 1/n or 1, the better of both by test RA) get ≥ 80 % (partly: ≥ 40 %) of "
    "the gain of a model trained on all."
)
COMPOSED = "composed"  # with the weight "w" of each signature
LEARNT = "learnt"  # in the way "by"
WAYS = {
    "one for each signature": ("signature", False),
    "one for each layer": ("layer", False),
    "one for each layer, unlabeled": ("layer", True),
}
STATISTICS = "w = 1/n, statistics of batch norm"  # from "where", put on in "seconds", of "bytes"
OWN = "its own"  # each corruption under its own signature alone


def jobs(study) -> list:
    return [study.robust_job(seed, group) for seed, group in _groups(study)]


def _groups(study) -> Iterator[tuple[int, list[str]]]:
    """(seed, group) where the seed has every corruption of the group."""
    for seed, names in study.seeds:
        yield from ((seed, group) for group in study.args.groups if set(group) <= set(names))


def measure(study) -> Iterator[dict]:
    for seed, group in _groups(study):
        run = study.patching(seed)
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
        for by, how in WAYS.items():
            learnt = run.learnt(signatures, *how, study.args.learn_steps)
            weights = {c: w.tolist() for c, w in learnt.weights.items()}
            result = run.with_patch([learnt], [1.0], group)
            models.append((LEARNT, result, {"by": by, "weights": weights}))
        if has_batchnorm(run.target):
            models += _statistics(study, run, signatures, group)
        union = study.robust_job(seed, group).best
        models.append((UNION, run.other(union, group), {}))
        for i, name in enumerate(group):
            if n > 2:
                own = run.with_patch([signatures[i]], [1.0], [name])
                yield study.row(run, name, PATCHED, own, against=OWN, group="+".join(group))
            for model, result, knobs in models:
                yield study.row(run, name, model, result, **knobs, group="+".join(group))


def _statistics(study, run, signatures: list, group: list[str]) -> Iterator[tuple]:
    """The composed patch with each way to come by the statistics of batch norm."""
    before, n = running_statistics(run.target), len(group)
    ways = {
        "θ_std's": [replace(s, statistics=before) for s in signatures],
        "pooled from files": [run.with_statistics(s) for s in signatures],
        "re-estimated from images": signatures,
    }
    for where, those in ways.items():
        start = time.perf_counter()
        with run.patched(those, [1 / n] * n) as model:
            knobs = {"where": where, "seconds": time.perf_counter() - start}
            result = run.measure(ckpt.tensors_hash(model.state_dict()), group, where)
        kept = those if where == "pooled from files" else signatures
        yield STATISTICS, result, knobs | {"bytes": sum(map(study.bytes_of, kept))}


def _label(row: dict) -> tuple[str, str]:
    model = "trained on all of them" if row["model"] == UNION else row["model"]
    model += f" against {row['against']}" if "against" in row else ""
    if "w" in row:
        model += ", w = 1" if row["w"] == 1 else ", w = 1/n"
    model += f" w, {row['by']}" if "by" in row else f" {row['where']}" if "where" in row else ""
    return row["group"].replace("+", " + "), model


def table(rows: list[dict], study) -> tables.Table:
    extra = {
        "MB": lambda of: f"{tables.mean(of, 'bytes') / 1e6:.2f}" if "bytes" in of[0] else None,
        "s": lambda of: f"{tables.mean(of, 'seconds'):.2f}" if "seconds" in of[0] else None,
    }
    extra = extra if tables.select(rows, model=STATISTICS) else {}
    made = tables.accuracies(rows, ["signatures", "model"], _label, extra, recovers=False)
    made.note = (
        f"keep_num {study.method.keep_num}. RA: mean over the group. Learnt weights: "
        f"{study.args.learn_steps} steps of Adam (lr {LR}) from 1/n, {BATCH} validation images in "
        "each, clean and each corruption in equal parts."
    )
    if extra:
        made.note += " MB: of the group's signature files; s: to put them on."
    return made


def figure(rows: list[dict], path: Path) -> None:
    def label(row: dict) -> tuple[str, str]:
        names = row["group"].split("+")
        title = " +\n".join(names) if len(names) < 4 else f"{len(names)} corruptions"
        return title, _label(row)[1]

    rows = [row for row in rows if row["model"] != STATISTICS]  # in the table
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
        learnt = [(by, model) for by in WAYS if (model := f"{LEARNT} w, {by}") in ra]
        told = [f"{by} RA {ra[model]:.1f}, TA {ta[model]:.1f}" for by, model in learnt]
        words[-1] += f" (learnt weights: {', '.join(told)})" if told else ""
    return graded(min(shares), 80, 40) if shares else FAILS, "; ".join(words)
