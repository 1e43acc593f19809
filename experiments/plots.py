"""The figures: curves, bars and heat maps, for print and for colour-blind readers.

Colours are Okabe and Ito's, each with a marker or hatch of its own; maps run from blue over white
to orange with the values written in. Every function saves a PNG, whole or not at all.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev

import matplotlib

matplotlib.use("Agg")
import numpy as np
from cycler import cycler
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform
from torch import Tensor

from experiments import tables
from experiments.tables import BATCHNORM_ONLY, PATCHED, ROBUST, STANDARD, Label
from utils.files import replacing

GREY, BLUE, ORANGE = "#999999", "#0072B2", "#E69F00"
COLOURS = [BLUE, ORANGE, "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#F0E442"]
HATCHES = ["", "", "//", "\\\\", "xx", "..", "--", "||", "++", "oo", "**"]
DIVERGING = LinearSegmentedColormap.from_list("diverging", [BLUE, "white", ORANGE])
LOOK = cycler(linestyle=["-", "--", ":"]) * cycler(color=COLOURS, marker=list("os^DvP*X"))
plt.rcParams |= {
    **{"axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True},
    **{"legend.frameon": False, "legend.fontsize": 8, "font.size": 8, "axes.titlesize": 10},
    **{"lines.markersize": 4, "lines.linewidth": 1.2, "errorbar.capsize": 2, "savefig.dpi": 150},
    "axes.prop_cycle": LOOK,
}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and forget it."""
    with replacing(path) as temporary:
        figure.savefig(temporary)
    plt.close(figure)


def panels(rows: Sequence[dict], draw: Callable, label: str, path: Path) -> None:
    """A panel per corruption, three side by side, by `draw`, which is told an axis and its rows.

    label: of the vertical axes.
    """
    names = tables.distinct(rows, "corruption")
    down, across = -(-len(names) // 3), min(3, len(names))
    size = (4 * across, 3.2 * down)
    figure, axes = plt.subplots(down, across, figsize=size, sharey=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        draw(axis, tables.select(rows, corruption=name))
        axis.set(title=name, ylabel=label if axis in axes[:, 0] else "")
    legend_below(figure, axes[0, 0], ncols=min(3, across + 1))
    save(figure, path)


def legend_below(figure: Figure, axis: Axes, ncols: int) -> None:
    """The legend of `axis` under the whole figure."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=ncols)


def accuracy_panels(rows: Sequence[dict], over: str, label: str, path: Path) -> None:
    """TA and RA over a swept value, a panel per corruption, between standard and robust model.

    Rows with the same `over` are seeds: their mean is drawn, their range as a bar.
    """

    def draw(axis: Axes, rows: list[dict]) -> None:
        patched = tables.select(rows, model=PATCHED)
        xs = sorted(tables.distinct(patched, over))
        for measure, colour, marker in (("RA", BLUE, "o"), ("TA", ORANGE, "s")):
            at = [[row[measure] for row in tables.select(patched, **{over: x})] for x in xs]
            means = np.array([fmean(values) for values in at])
            ends = means - [min(v) for v in at], [max(v) for v in at] - means
            look = {"color": colour, "marker": marker, "linestyle": "-"}
            axis.errorbar(xs, means, yerr=ends, label=f"patched, {measure}", **look)
            for model, style in ((STANDARD, ":"), (BATCHNORM_ONLY, "-."), (ROBUST, "--")):
                if level := tables.select(rows, model=model):
                    look = {"color": colour, "linestyle": style, "linewidth": 1}
                    axis.axhline(tables.mean(level, measure), label=f"{model}, {measure}", **look)
        axis.set_xlabel(label)
        if all(isinstance(x, int) for x in xs) and len(xs) <= 14:
            axis.set_xticks(xs)

    panels(rows, draw, "test accuracy, %", path)


def accuracy_bars(rows: Sequence[dict], path: Path, label: Label = tables.by_model) -> None:
    """RA of every line of a table (`tables.accuracies`): the mean, and each of `tables.parts`."""
    groups = {"all": tables.distinct(rows, "corruption"), **tables.parts(rows)}
    bars(tables.in_groups(rows, groups), lambda row: (row["group"], *label(row)), "RA, %", path)


def bars(rows: Sequence[dict], label: Label, axis_label: str, path: Path) -> None:
    """Mean RA ± sd over the seeds that are whole; `label` gives the group of bars and the bar."""
    groups: dict[str, dict[str, list[float]]] = {}
    for (group, name), each in tables.grouped(rows, label).items():
        whole = tables.whole_seeds(each)
        groups.setdefault(group, {})[name] = [tables.mean(of_seed, "RA") for of_seed in whole]
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.84 / len(series)
    inches = min(14.0, max(6.0, 0.16 * len(series) * len(groups) + 2))
    entry = 0.07 * max(map(len, series)) + 0.5  # of the legend, inches
    abreast = max(1, min(len(series), int(inches / entry)))
    figure, axis = plt.subplots(figsize=(inches, 3.8 + 0.2 * -(-len(series) // abreast)))
    looks = itertools.cycle([GREY, *COLOURS]), itertools.cycle(HATCHES)
    for k, (name, colour, hatch) in enumerate(zip(series, *looks, strict=False)):
        each = {i: of[name] for i, of in enumerate(groups.values()) if name in of}
        places = [i + width * (k - (len(series) - 1) / 2) for i in each]
        sd = [stdev(values) if len(values) > 1 else np.nan for values in each.values()]  # or none
        look = {"color": colour, "hatch": hatch, "edgecolor": "white", "label": name}
        axis.bar(places, [fmean(v) for v in each.values()], width * 0.95, yerr=sd, **look)
    axis.set_xticks(range(len(groups)), list(groups), rotation=20 if inches > 8 else 0)
    axis.set_ylabel(axis_label)
    legend_below(figure, axis, abreast)
    save(figure, path)


def samples(strips: Mapping[str, Tensor], path: Path) -> None:
    """A strip of images, uint8 (n, 3, H, W), under each name."""
    figure, axes = plt.subplots(len(strips), 1, figsize=(8, 0.75 * len(strips)), squeeze=False)
    for axis, (name, images) in zip(axes[:, 0], strips.items(), strict=True):
        axis.imshow(images.permute(2, 0, 3, 1).flatten(1, 2).cpu(), interpolation="nearest")
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[])
    save(figure, path)


def curves(
    xs: Sequence[object],
    lines: Mapping[str, Sequence[float]],
    labels: tuple[str, str],
    path: Path,
    control: str | None = None,
) -> None:
    """A curve per entry of `lines` over `xs`; labels: of the two axes. `control` is drawn grey."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2))
    for name, values in lines.items():
        look = {"color": GREY, "marker": ".", "linestyle": "--"} if name == control else {}
        axis.plot(range(len(xs)), values, label=name, **look)
    axis.set_xticks(range(len(xs)), xs)
    axis.set(xlabel=labels[0], ylabel=labels[1])
    axis.set_ylim(bottom=0)
    axis.legend(ncols=2)
    save(figure, path)


def heat_map(
    columns: Sequence[str],
    lines: Mapping[str, Sequence[float]],
    path: Path,
    axes_names: tuple[str, str] = ("", ""),
    groups: Sequence[str] = (),
    label: str = "cosine",
) -> None:
    """Values (`tables.pivot`) that are also written in, colours symmetric about 0.

    label: what they are; groups: of the lines and columns of a square matrix; a rule is drawn
    between them. A square matrix of three or more also gets the tree of average linkage over
    1 − cosine beside it.
    """
    rows, values = list(lines), np.array(list(lines.values()))
    square = bool(groups) and len(rows) > 2
    size = (0.62 * len(columns) + (5 if square else 3.5), 0.53 * len(rows) + 1.7)
    ratios = [size[0] - 3, 2.6] if square else [1]
    figure, panels = plt.subplots(1, len(ratios), figsize=size, width_ratios=ratios, squeeze=False)
    axis = panels[0, 0]
    extent = max(0.2, float(np.abs(values[values < 0.999]).max(initial=0.2)))
    image = axis.imshow(values, cmap=DIVERGING, vmin=-extent, vmax=extent)
    for (i, j), value in np.ndenumerate(values):
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right")
    axis.set_yticks(range(len(rows)), rows)
    axis.set(ylabel=axes_names[0], xlabel=axes_names[1])
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            axis.axhline(i - 0.5, color="black", linewidth=1)
            axis.axvline(i - 0.5, color="black", linewidth=1)
    beyond = "max" if groups else "neither"  # the 1s of the diagonal
    bar = figure.colorbar(image, ax=axis, label=label, shrink=0.7, extend=beyond)
    if values.min() >= 0:
        bar.ax.set_ylim(0, extent)
    if square:
        distances = np.clip(1 - (values + values.T) / 2, 0, None)
        np.fill_diagonal(distances, 0)
        linkage = hierarchy.linkage(squareform(distances, checks=False), "average")
        look = {"orientation": "right", "color_threshold": 0, "leaf_font_size": 8}
        hierarchy.dendrogram(linkage, labels=rows, ax=panels[0, 1], **look)
        panels[0, 1].set_xlabel("1 − cosine")
    save(figure, path)


def bits_words(bits: int) -> str:
    """Bits a value in words."""
    return "float32" if bits == 32 else f"{bits} bits"


def storage(rows: Sequence[dict], path: Path) -> None:
    """RA over bytes on disk, a curve per number of bits along keep_num, and their frontier.

    A panel per corruption; seeds are averaged.
    """

    def place(rows: Sequence[dict], **knobs: object) -> tuple[float, float]:
        return tables.mean(rows, "bytes", **knobs), tables.mean(rows, "RA", **knobs)

    def draw(axis: Axes, rows: list[dict]) -> None:
        patched, frontier = tables.select(rows, model=PATCHED), []
        for bits in sorted(tables.distinct(patched, "bits"), reverse=True):
            of_bits = tables.select(patched, bits=bits)
            ks = sorted(tables.distinct(of_bits, "keep_num"))
            line = [place(of_bits, keep_num=k) for k in ks]
            axis.plot(*zip(*line, strict=True), label=bits_words(bits))
            frontier += line
        sizes, ras = zip(*sorted(frontier), strict=True)
        look = {"color": "black", "linewidth": 0.8, "linestyle": ":", "marker": ""}
        look |= {"where": "post", "label": "best at most so many bytes"}
        axis.step(sizes, np.maximum.accumulate(ras), **look)
        full = place(rows, model=ROBUST)
        axis.plot(*full, "*", color="black", markersize=9, label="full copy")
        look = {"color": GREY, "linestyle": "--", "linewidth": 1, "label": "standard model"}
        axis.axhline(tables.mean(rows, "RA", model=STANDARD), **look)
        axis.set(xscale="log", xlabel="MB on disk per corruption")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter(lambda size, _: f"{size / 1e6:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())

    panels(rows, draw, "RA, %", path)
