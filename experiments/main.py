"""The paper's main table: standard, data augmentation, robust models, patches: storage, TA, RA.

The standard model and the one trained on all corruptions are measured on each; robust models and
patches on their own, with TA as the mean over them. Patching a model with batch norm re-estimates
its statistics; what that alone does has a line of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from experiments import choose, plots, tables
from experiments.tables import BATCHNORM_ONLY, HOLDS, PARTLY, PATCHED, ROBUST, STANDARD, UNION

CLAIM = (
    "Patching a standard model with a signature makes it nearly as robust as the robust model, for "
    "a fraction of the storage, and keeps clean accuracy."
)
RULE = "Patches recover ≥ 80 % of the gain (partly: ≥ 50 %) and TA falls by 5 points at most."


def jobs(study) -> list:
    return [study.robust_job(seed, study.args.corruptions) for seed in study.union_seeds]


def measure(study) -> Iterator[dict]:
    for run in study.patchings():
        names, full = run.args.corruption, study.full_copy(run)
        union = None
        if run.args.seed in study.union_seeds:
            union = run.other(study.robust_job(run.args.seed, names).best, names)
        for name in names:
            for row in study.bounds(run, name):
                yield row | {"bytes": full if row["model"] == ROBUST else 0}
            if union:
                yield study.row(run, name, UNION, union, bytes=full)
            signature = run.signature(name)
            for bits, form in ((32, signature), (4, signature.quantize(16, per_channel=True))):
                result = run.with_patch([form], [1.0], [name])
                size = study.bytes_of(form)
                yield study.row(run, name, PATCHED, result, bits=bits, bytes=size)
        if study.args.preset == "demo":
            chooser, _, (found,) = choose.chosen(run, [1])
            size = study.bytes_of(chooser.signatures[0])
            for name in names:
                yield study.row(run, name, "patched, each image chooses", found, bytes=size)


_label = tables.knob("bits", plots.bits_words)


def table(rows: list[dict], study) -> tables.Table:
    n = len(tables.distinct(rows, "corruption"))

    def megabytes(of_line: list[dict], times: int = 1) -> str:
        return f"{times * tables.mean(of_line, 'bytes') / 1e6:.2f}"

    def for_all(of_line: list[dict]) -> str:
        return megabytes(of_line, 1 if of_line[0]["model"] == UNION else n)

    extra = {"MB each": megabytes, f"MB for {n}": for_all}
    made = tables.accuracies(rows, label=_label, extra=extra)
    made.note = (
        f"keep_num {study.method.keep_num}. MB on disk beside the standard model, for one "
        "corruption and for all. 4 bits: 16 linear levels, a range per output channel. TA and mean "
        "RA: of the seeds with every corruption."
    )
    return made


def figure(rows: list[dict], path: Path) -> None:
    plots.accuracy_bars(rows, path, _label)
    if len(tables.distinct(rows, "corruption")) > tables.MANY:
        ra = [{"c": r["corruption"], "of": _label(r)[0], "value": r["RA"] / 100} for r in rows]
        place = path.with_name(f"{path.stem}_corruptions.png")
        plots.heat_map(*tables.pivot(ra, "c", "of"), place, label="RA, share of images")


def verdict(rows: list[dict]) -> tables.Verdict:
    rows = [row for row in tables.of_whole_seeds(rows) if row.get("bits") != 4]
    each = tables.shares(rows, tables.select(rows, model=PATCHED))
    if not each:
        return tables.NO_GAIN

    def mean(measure: str, model: str) -> float:
        return tables.mean(rows, measure, model=model)

    fall = mean("TA", STANDARD) - mean("TA", PATCHED)
    size = mean("bytes", PATCHED) / mean("bytes", ROBUST)
    size = f"{100 * size:.0f} %" if size > 0.4 else f"1/{1 / size:.0f}"
    words = (
        f"patches recover {fmean(each):.0f} % of the robust models' gain in RA on average "
        f"({min(each):.0f} to {max(each):.0f} %), at {size} of their size in float32; "
        f"TA falls by {fall:.1f} points (robust models: "
        f"{mean('TA', STANDARD) - mean('TA', ROBUST):.1f})"
    )
    if alone := tables.select(rows, model=BATCHNORM_ONLY):
        words += (
            "; re-estimating batch norm, which is part of patching, gets "
            f"{fmean(tables.shares(rows, alone)):.0f} % of the gain with no signature at all"
        )
    if tables.select(rows, model=UNION):
        for name, model in ((UNION, UNION), ("patches", PATCHED)):
            words += f"; {name}: RA {mean('RA', model):.1f}, TA {mean('TA', model):.1f}"
    grade = tables.graded(fmean(each), 80, 50)
    return (PARTLY if grade == HOLDS and fall > 5 else grade), words
