"""Beyond the paper: a bank of signatures that chooses for itself, by fingerprints of corruptions.

One, 4 or 16 images at a time are given to a corruption of the bank, or to none; beside the standard
model, the oracle (who knows each image's corruption and patches with its own signature at α = 1)
and a model trained on all, where there is one. Strengths and margins are set on validation images.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from datasets import bank
from datasets.images import spaced
from experiments import plots, tables
from experiments.tables import STANDARD, UNION, graded
from utils.fingerprint import SEVERITIES, SignatureBank
from utils.report import recovered

CLAIM = "A bank of signatures chooses by itself, image by image, which of them to put on."
RULE = (
    "One image at a time, the choice gets ≥ 95 % (partly: ≥ 80 %) of the oracle's gain in RA and TA "
    "falls by 1 point at most (partly: 3)."
)
CHOSEN = "chosen"  # with the number of images "together"
ORACLE = "oracle"
NUMBERS = (1, 4, 16)
FEW = 1000  # test images at other severities than the study's


def jobs(study) -> list:
    job = study.robust_job(study.args.seeds[0], study.args.corruptions)
    return [job] if job.done else []


def make_bank(run) -> SignatureBank:
    """The bank of the study's signatures."""
    return SignatureBank([run.fingerprinted(run.signature(name)) for name in run.args.corruption])


def measure(study) -> Iterator[dict]:
    run = study.patching()
    names, chooser, model = run.args.corruption, make_bank(run), run.target
    with run.autocast:
        ways = bank.calibrated(chooser, model, run.validation, NUMBERS)
        found = bank.measure(chooser, model, run.sets, ways)
    standard = run.standard(names)
    own = {c: run.with_patch([run.signature(c)], [1.0], [c])["RA"][c] for c in names}
    models = [(STANDARD, standard, {})]
    for (n, _), one in zip(ways, found, strict=True):
        models.append((CHOSEN, {"TA": one["RA"]["clean"], **one}, {"together": n}))
    models.append((ORACLE, {"TA": standard["TA"], "RA": own}, {}))
    models += [(UNION, run.other(job.best, names), {}) for job in jobs(study)]
    for model_name, result, knobs in models:
        for name in names:
            yield study.row(run, name, model_name, result, **knobs)
    for (n, _), one in zip(ways, found, strict=True):
        for a, of in one["named"].items():
            family = bank.of_family(of, a)
            for b, share in of.items():
                row = {"seed": run.args.seed, "together": n, "a": a, "b": b, "value": share / 100}
                yield row | {"family": family}
    few = spaced(run.sets["clean"].to("cpu"), FEW)
    for severity in range(1, SEVERITIES + 1):
        sets = {c: run.corrupted(few, c, "test", severity) for c in names}
        with run.autocast:  # a margin that is infinite chooses none
            chosen, none = bank.measure(chooser, model, sets, [ways[0], (1, math.inf)])
        for model_name, one in ((STANDARD, none), (CHOSEN, chosen)):
            row = {"seed": run.args.seed, "model": model_name, "severity": severity}
            yield row | {"value": fmean(one["RA"].values())}


def _label(row: dict) -> tuple[str]:
    return (row["model"] + (f", {row['together']} at a time" if "together" in row else ""),)
