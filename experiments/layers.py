"""Where robust and standard weights differ: ‖θ_c − θ_std‖ / ‖θ_std‖ per layer (claim 1)."""

from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median

import torch

from experiments import plots, tables
from experiments.tables import graded
from models.layers import depth_order
from utils.checkpoint import read_state_dict

CLAIM = "Robust and standard weights differ mostly in the shallow layers."
RULE = (
    "For ≥ 80 % of corruptions the shallow third differs more than the deep one (partly: 50 %), "
    "by a larger factor than another clean seed does where one was trained."
)
CONTROL = "another seed, clean"  # in place of a corruption


def measure(study) -> Iterator[dict]:
    first = read_state_dict(study.standard(study.args.seeds[0]))
    for seed, names in study.seeds:
        standard = read_state_dict(study.standard(seed))
        others = {name: read_state_dict(study.robust_job(seed, [name]).best) for name in names}
        if seed != study.args.seeds[0]:
            others[CONTROL] = first
        for name, state in others.items():
            for i, keys in enumerate(depth_order(study.args.arch), start=1):
                θ_std, θ_c = (torch.cat([s[k].flatten() for k in keys]) for s in (standard, state))
                value = ((θ_c - θ_std).norm() / θ_std.norm()).item()
                yield {"seed": seed, "corruption": name, "layer": i, "value": value}


def table(rows: list[dict], study) -> tables.Table:
    layers, means = tables.pivot(rows, "corruption", "layer")
    note = "Relative difference, mean over the seeds that have the corruption."
    return tables.matrix("corruption", [f"layer {i}" for i in layers], means, note, digits=3)


def figure(rows: list[dict], path: Path) -> None:
    labels = ("layer, shallowest first", "‖θ_c − θ_std‖ / ‖θ_std‖")
    groups = tables.parts([row for row in rows if row["corruption"] != CONTROL])
    shown = tables.in_groups(rows, groups | {CONTROL: [CONTROL]})
    plots.curves(*tables.pivot(shown, "group", "layer"), labels, path, CONTROL)


def verdict(rows: list[dict]) -> tables.Verdict:
    _, means = tables.pivot(rows, "corruption", "layer")
    control = means.pop(CONTROL, None)
    depth = len(next(iter(means.values())))
    third = max(1, depth // 3)

    def factor(each: list[float]) -> float:
        return fmean(each[:third]) / fmean(each[-third:])

    factors = {name: factor(each) for name, each in means.items()}
    own = factor(control) if control else 1.0
    above = sum(value > own for value in factors.values())
    words = (
        f"the shallowest {third} of {depth} layers differ {median(factors.values()):.1f} "
        f"times as much, relatively, as the deepest {third} (median over {len(means)} corruptions)"
    )
    if control:
        over = [str(i + 1) for i in range(depth) if all(c[i] > control[i] for c in means.values())]
        only = "every corruption differs more than two clean seeds do only in layer "
        words += f", two clean seeds {own:.1f} times; "
        words += only + ", ".join(over) if over else "no layer differs more for every corruption"
    else:
        words += "; no second clean seed to compare with"
    words += f"; the factor is above {own:.1f} for {above} of {len(means)}"
    return graded(100 * above / len(means), 80, 50), words
