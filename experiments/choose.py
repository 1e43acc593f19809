"""Beyond the paper: a bank of signatures that chooses for itself, by fingerprints of corruptions.

One, 4 or 16 images at a time are given to a corruption of the bank, or to none; beside the standard
model, the oracle (who knows each image's corruption and patches with its own signature at α = 1)
and a model trained on all, where there is one. Strengths and margins are set on validation images.
Further, on fewer images: lower severities; each corruption with its signature left out of the bank;
what is named on a second data set, by the fingerprints of the first.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from datasets import bank
from datasets.flags import load_images
from datasets.images import spaced
from experiments import plots, tables
from experiments.tables import FAILS, HOLDS, PARTLY, STANDARD, UNION, graded
from utils.fingerprint import SEVERITIES, SignatureBank
from utils.report import recovered

CLAIM = "A bank of signatures chooses by itself, image by image, which of them to put on."
RULE = (
    "One image at a time gets ≥ 95 % (partly: ≥ 80 %) of the oracle's gain in RA, and TA falls by "
    "1 point at most (partly: 3)."
)
CHOSEN = "chosen"  # with the number of images "together"
ORACLE = "oracle"
NUMBERS = (1, 4, 16)
FEW = 1000  # test images for what goes beyond the table


def jobs(study) -> list:
    job = study.robust_job(study.args.seeds[0], study.args.corruptions)
    return [job] if job.done and len(study.args.corruptions) > 1 else []


def chosen(run, numbers: Sequence[int]) -> tuple[SignatureBank, list[tuple], list[dict]]:
    """The bank of a study's signatures, its ways (`bank.calibrated`), and what it does in each."""
    made = [run.fingerprinted(run.signature(name)) for name in run.args.corruption]
    chooser = SignatureBank(made)
    with run.autocast:
        ways = bank.calibrated(chooser, run.target, run.validation, numbers)
        found = bank.measure(chooser, run.target, run.sets, ways)
    return chooser, ways, [{"TA": one["RA"]["clean"], **one} for one in found]


def measure(study) -> Iterator[dict]:
    run = study.patching()
    names, (chooser, ways, found) = run.args.corruption, chosen(run, NUMBERS)
    standard = run.standard(names)
    own = {c: run.with_patch([run.signature(c)], [1.0], [c])["RA"][c] for c in names}
    yield from (study.row(run, name, STANDARD, standard) for name in names)
    for n, one in zip(NUMBERS, found, strict=True):
        for c in names:
            named = one["named"][c]
            right = {"right": named[c], "family": bank.of_family(named, c)}
            yield study.row(run, c, CHOSEN, one, together=n, **right)
    for a, named in found[0]["named"].items():
        for b, share in named.items():
            yield {"seed": run.args.seed, "a": a, "b": b, "value": share / 100}
    bounds = [(ORACLE, {"TA": standard["TA"], "RA": own})]
    bounds += [(UNION, run.other(job.best, names)) for job in jobs(study)]
    for model, result in bounds:
        yield from (study.row(run, name, model, result) for name in names)
    few = spaced(run.sets["clean"].to("cpu"), FEW)
    for severity in range(1, SEVERITIES + 1):
        for model, ra in _beside_standard(run, chooser, ways, few, names, severity):
            told = {"model": model, "severity": severity, "value": fmean(ra.values())}
            yield {"seed": run.args.seed, **told}
    for i, name in enumerate(names if len(names) > 1 else ()):
        rest = SignatureBank(chooser.signatures[:i] + chooser.signatures[i + 1 :])
        with run.autocast:
            its = bank.calibrated(rest, run.target, run.validation, [1])
        for model, ra in _beside_standard(run, rest, its, few, [name], run.args.severity[0]):
            yield {"seed": run.args.seed, "model": model, "left_out": name, "value": ra[name]}
    if study.target:
        args, where = study.target.args, {"seed": run.args.seed, "set": study.target.data_name}
        few = spaced(load_images(args, args.data, "test"), FEW)
        chooser.margin = ways[0][1]
        for a in names if tuple(few.images.shape[2:]) == chooser.size else ():
            images = run.corrupted(few, a, "test", run.args.severity[0], published=False)
            for b, share in bank.named(chooser, images, run.device).items():
                yield {**where, "a": a, "b": b, "value": share / 100}


def _beside_standard(run, chooser, ways, few, names, severity) -> Iterator[tuple[str, dict]]:
    """RA under each of `names` where images choose, one at a time, and of the standard model."""
    sets = {c: run.corrupted(few, c, "test", severity, published=False) for c in names}
    with run.autocast:  # with a margin that is infinite none is chosen
        both = bank.measure(chooser, run.target, sets, [ways[0], (1, math.inf)])
    yield from ((model, one["RA"]) for model, one in zip((CHOSEN, STANDARD), both, strict=True))


_label = tables.knob("together", "{} at a time".format)


def _accuracies(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "RA" in row]


def table(rows: list[dict], study) -> tables.Table:
    extra: dict = {
        f"{what}, %": lambda of, key=key: tables.mean(of, key) if key in of[0] else None
        for what, key in (("named right", "right"), ("family right", "family"))
    }
    extra["clean and all mixed, %"] = lambda of: fmean([of[0]["TA"], *(row["RA"] for row in of)])
    made = tables.accuracies(_accuracies(rows), label=_label, extra=extra, recovers=False)
    beyond = "; ".join(["severities", *further(rows)])
    made.note = (
        f"keep_num {study.method.keep_num}. Oracle: each corruption under its own signature, clean "
        "images under none. Strengths and margins from validation images. On "
        f"{FEW:,} test images at most, corrupted here, one at a time: {beyond}."
    )
    return made


def further(rows: list[dict]) -> Iterator[str]:
    """What the rows say beyond the table, in words."""
    left_out = [row for row in rows if "left_out" in row]
    if left_out:
        ra = {(row["model"], row["left_out"]): row["value"] for row in left_out}
        each = [f"{c} {ra[CHOSEN, c]:.1f} ({ra[STANDARD, c]:.1f})" for m, c in ra if m == CHOSEN]
        yield f"RA under what the bank lacks (standard model): {', '.join(each)}"
    for name in dict.fromkeys(row["set"] for row in rows if "set" in row):
        of = [row for row in rows if row.get("set") == name]
        under = {
            a: {row["b"]: 100 * row["value"] for row in each}
            for (a,), each in tables.grouped(of, lambda row: (row["a"],)).items()
        }
        right = fmean(named.get(a, 0) for a, named in under.items())
        family = fmean(bank.of_family(named, a) for a, named in under.items())
        told = f"named right {right:.0f} %, family right {family:.0f} %"
        yield f"on {name}, by the same fingerprints, {told}"


def figure(rows: list[dict], path: Path) -> None:
    plots.accuracy_bars(_accuracies(rows), path, _label)
    one = [row for row in rows if "a" in row and "set" not in row]
    axes = "named, one image at a time", "images under"
    place = path.with_name(f"{path.stem}_confusion.png")
    plots.heat_map(*tables.pivot(one, "a", "b"), place, axes[::-1], label="share of images")
    of = [row for row in rows if "severity" in row]
    place = path.with_name(f"{path.stem}_severity.png")
    labels = "severity", "RA, mean, %"
    plots.curves(*tables.pivot(of, "model", "severity"), labels, place, control=STANDARD)


def verdict(rows: list[dict]) -> tables.Verdict:
    of = tables.grouped(_accuracies(rows), _label)
    ra, ta = ({k: tables.mean(each, m) for (k,), each in of.items()} for m in ("RA", "TA"))
    one = f"{CHOSEN}, 1 at a time"
    share = recovered(ra[STANDARD], ra[one], ra[ORACLE])
    if share is None:
        return FAILS, "the oracle gains no RA here, so there is nothing to choose"
    fall = ta[STANDARD] - ta[one]
    words = f"one image at a time gets {share:.0f} % of the oracle's gain, TA falls by {fall:.1f}; "
    words += ", ".join(f"{k}: RA {ra[k]:.1f}, TA {ta[k]:.1f}" for k in ra)
    words += f"; named right one at a time {tables.mean(of[one,], 'right'):.0f} %"
    held = {(row["model"], row["severity"]): row["value"] for row in rows if "severity" in row}
    above = [held[CHOSEN, s] > held[STANDARD, s] for m, s in held if m == CHOSEN]
    words += f"; above the standard model at {sum(above)} of {len(above)} severities"
    grades = graded(share, 95, 80), graded(-fall, -1, -3)
    return min(grades, key=(FAILS, PARTLY, HOLDS).index), words
