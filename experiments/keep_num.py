"""How many layers are enough: TA and RA over the number of shallow layers kept (claim 4)."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

from experiments import plots, tables
from experiments.tables import BATCHNORM_ONLY, FAILS, HOLDS, PARTLY, PATCHED
from models.layers import depth_order

CLAIM = "The shallow layers of a signature are enough."
RULE = (
    "Half of the layers or fewer recover ≥ 50 %, within 5 points of the best number of layers "
    "(partly: more layers do)."
)


def measure(study) -> Iterator[dict]:
    layers = len(depth_order(study.args.arch))
    for run in study.patchings():
        for name in run.args.corruption:
            yield from study.bounds(run, name)
            for k in study.args.keep_nums:
                result = run.with_patch([run.signature(name, keep_num=k)], [1.0], [name])
                yield study.row(run, name, PATCHED, result, keep_num=k, layers=layers)


def table(rows: list[dict], study) -> tables.Table:
    return tables.accuracies(rows, label=tables.knob("keep_num", "keep_num {:g}".format))


def figure(rows: list[dict], path: Path) -> None:
    plots.accuracy_panels(rows, "keep_num", "keep_num: layers patched", path)


def verdict(rows: list[dict]) -> tables.Verdict:
    rows = tables.of_whole_seeds(rows)
    patched = tables.select(rows, model=PATCHED)
    layers = max(row.get("layers", row["keep_num"]) for row in patched)
    recovered = {}
    for k in sorted(tables.distinct(patched, "keep_num")):
        if each := tables.shares(rows, tables.select(patched, keep_num=k)):
            recovered[k] = fmean(each)
    if not recovered:
        return tables.NO_GAIN
    best = max(recovered.values())
    enough = min(k for k, share in recovered.items() if share >= best - 5)
    words = (
        f"{enough} of {layers} layers recover {recovered[enough]:.0f} % of the gain in RA, "
        f"the best number of layers {best:.0f} %"
    )
    if alone := tables.shares(rows, tables.select(rows, model=BATCHNORM_ONLY)):
        words += f", re-estimating batch norm alone {fmean(alone):.0f} %"
    if best < 50:
        return FAILS, words
    return (HOLDS if enough <= layers / 2 else PARTLY), words
