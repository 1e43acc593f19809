"""The figures of reproduce.py: curves, bars and heat maps, for print and for colour-blind readers.

Colours are Okabe and Ito's, each with a marker or hatch of its own; maps run from blue over white
to orange with the values written in. Every function saves a PNG, whole or not at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

from utils.atomic import replacing

GREY, BLUE, ORANGE = "#999999", "#0072B2", "#E69F00"
COLOURS = [  # and markers, for one curve each
    *((BLUE, "o"), (ORANGE, "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#D55E00", "v")),
    *(("#56B4E9", "P"), ("#000000", "*"), ("#F0E442", "X")),
]
DASHES = ["-", "--", ":"]  # of a second and third round through the colours
DIVERGING = LinearSegmentedColormap.from_list("diverging", [BLUE, "white", ORANGE])


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, atomically, and forget it."""
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150)
    plt.close(figure)


def panels(titles: Sequence[str], width: float, height: float, across: int = 3):
    """A figure with an axis per title, `across` in a row, each `width` × `height` inches."""
    columns = min(across, len(titles))
    rows = -(-len(titles) // columns)
    size = (width * columns, height * rows)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharey=True, squeeze=False, layout="constrained"
    )
    axes = grid.flatten()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(titles) :]:
        axis.set_axis_off()
    return figure, axes[: len(titles)]


def accuracy_panels(
    panel_of: Mapping[str, Sequence[dict]], over: str, label: str, path: Path
) -> None:
    """TA and RA over a swept value, a panel per corruption, between standard and robust model.

    panel_of: title → one dict for each point with `over`, and "standard", "patched" and "robust",
    each a dict of "TA" and "RA" in percent. Points with the same `over` are seeds: their mean is
    drawn, their range as a bar.
    """
    figure, axes = panels(list(panel_of), 3.6, 3.0)
    for axis, points in zip(axes, panel_of.values(), strict=True):
        xs = sorted({point[over] for point in points})
        for measure, colour, marker in (("RA", BLUE, "o"), ("TA", ORANGE, "s")):
            at = [[p["patched"][measure] for p in points if p[over] == x] for x in xs]
            means = np.array([np.mean(values) for values in at])
            bars = [[m - min(v), max(v) - m] for m, v in zip(means, at, strict=True)]
            axis.errorbar(
                xs,
                means,
                yerr=np.array(bars).T if any(len(v) > 1 for v in at) else None,
                color=colour,
                marker=marker,
                markersize=4,
                capsize=2,
                label=f"patched, {measure}",
            )
            for kind, style in (("standard", ":"), ("robust", "--")):
                level = np.mean([p[kind][measure] for p in points])
                label_of = f"{kind} model, {measure}"
                axis.axhline(level, color=colour, linestyle=style, linewidth=1, label=label_of)
        axis.set_xlabel(label)
        if all(isinstance(x, int) for x in xs) and len(xs) <= 14:
            axis.set_xticks(xs)
    for axis in axes[::3]:
        axis.set_ylabel("test accuracy, %")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower center", ncols=3)
    save(figure, path)


def curves(
    lines: Mapping[str, Sequence[float]],
    xs: Sequence[object],
    labels: tuple[str, str],
    path: Path,
    control: str | None = None,
) -> None:
    """A curve per entry of `lines` over `xs`; labels: of the two axes. `control` is drawn grey."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    rounds = itertools.product(DASHES, COLOURS)
    for name, values in lines.items():
        if name == control:
            style = {"color": GREY, "marker": ".", "linestyle": "--"}
        else:
            dash, (colour, marker) = next(rounds)
            style = {"color": colour, "marker": marker, "linestyle": dash}
        axis.plot(range(len(xs)), values, markersize=4, linewidth=1.2, label=name, **style)
    axis.set_xticks(range(len(xs)), xs, fontsize=8)
    axis.set_xlabel(labels[0])
    axis.set_ylabel(labels[1])
    axis.set_ylim(bottom=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False, ncols=2)
    save(figure, path)


def bars(
    groups: Mapping[str, Mapping[str, float]], label: str, path: Path, errors: Mapping | None = None
) -> None:
    """Bars side by side for each group: group → series → value; `errors` likewise: half lengths."""
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    width = 0.84 / len(series)
    inches = max(6.0, 0.16 * len(series) * len(groups) + 2)
    figure, axis = plt.subplots(figsize=(min(inches, 14), 4.2), layout="constrained")
    looks = itertools.cycle(
        zip(
            [GREY, BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#D55E00"],
            ["", "", "//", "\\\\", "xx", "..", "--"],
            strict=True,
        )
    )
    for k, (name, (colour, hatch)) in enumerate(zip(series, looks, strict=False)):
        at = [i for i, values in enumerate(groups.values()) if name in values]
        heights = [values[name] for values in groups.values() if name in values]
        yerr = None
        if errors:  # NaN draws none
            yerr = [errors.get(g, {}).get(name, np.nan) for g in groups if name in groups[g]]
        places = [i + width * (k - (len(series) - 1) / 2) for i in at]
        axis.bar(
            places,
            heights,
            width * 0.95,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name,
            yerr=yerr,
            capsize=2,
        )
    axis.set_xticks(range(len(groups)), list(groups), fontsize=8, rotation=20 if inches > 8 else 0)
    axis.set_ylabel(label)
    axis.spines[["top", "right"]].set_visible(False)
    entry = 0.07 * max(map(len, series)) + 0.5  # inches
    ncols = max(1, min(len(series), int(figure.get_figwidth() / entry)))
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=ncols)
    save(figure, path)


def heat_map(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    path: Path,
    axes_names: tuple[str, str] = ("", ""),
    groups: Sequence[str] = (),
) -> None:
    """A matrix of cosines with its values written in, colours symmetric about 0.

    groups: of the rows and columns of a square matrix; lines are drawn between them. A square
    matrix of three or more also gets the tree of average linkage over 1 − cosine beside it.
    """
    diagonal = list(rows) == list(columns)
    square = diagonal and len(rows) > 2
    side = 0.62 * max(len(rows), len(columns)) + 2
    figure, axes = plt.subplots(
        1,
        2 if square else 1,
        figsize=(side + (3 if square else 1.5), 0.53 * len(rows) + 1.7),
        width_ratios=[side, 2.6] if square else [1],
        squeeze=False,
        layout="constrained",
    )
    axis = axes[0][0]
    extent = max(0.5 if diagonal else 0.2, float(np.abs(values[values < 0.999]).max(initial=0.2)))
    image = axis.imshow(values, cmap=DIVERGING, vmin=-extent, vmax=extent)
    for i, j in itertools.product(range(len(rows)), range(len(columns))):
        axis.text(j, i, f"{values[i, j]:.2f}", ha="center", va="center", fontsize=7)
    axis.set_xticks(range(len(columns)), columns, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)
    axis.set_xlabel(axes_names[1])
    axis.set_ylabel(axes_names[0])
    for i in range(1, len(groups)):
        if groups[i] != groups[i - 1]:
            axis.axhline(i - 0.5, color="black", linewidth=1)
            axis.axvline(i - 0.5, color="black", linewidth=1)
    beyond = "max" if diagonal else "neither"  # the 1s of the diagonal
    figure.colorbar(image, ax=axis, label=label, shrink=0.7, extend=beyond)
    if square:
        tree = axes[0][1]
        hierarchy.dendrogram(
            linkage(values), labels=list(rows), orientation="right", ax=tree, color_threshold=0
        )
        tree.set_xlabel("1 − cosine")
        tree.tick_params(labelsize=7)
        tree.spines[["top", "right", "left"]].set_visible(False)
    save(figure, path)


def linkage(cosines: np.ndarray) -> np.ndarray:
    """Average linkage over 1 − cosine of a symmetric matrix, as SciPy gives it."""
    distances = np.clip(1 - (cosines + cosines.T) / 2, 0, None)
    np.fill_diagonal(distances, 0)
    return hierarchy.linkage(squareform(distances, checks=False), "average")


def mean_of_seeds(points: Sequence[dict]) -> list[dict]:
    """One point for each "keep_num" and "bits": "bytes" and "RA" of the models as means."""
    of: dict[tuple, list[dict]] = {}
    for point in points:
        of.setdefault((point["keep_num"], point["bits"]), []).append(point)
    return [
        {
            "bits": bits,
            "bytes": np.mean([p["bytes"] for p in same]),
            **{
                kind: {"RA": float(np.mean([p[kind]["RA"] for p in same]))}
                for kind in ("standard", "patched", "robust")
            },
        }
        for (_, bits), same in of.items()
    ]


def storage(panel_of: Mapping[str, Sequence[dict]], full: int, path: Path) -> None:
    """RA over bytes on disk, a curve per number of bits along keep_num, and their frontier.

    panel_of: corruption → one dict for each point with "bytes", "keep_num", "bits", and "standard",
    "patched", "robust" as in `accuracy_panels`, seeds averaged; full: bytes of a full copy.
    """
    figure, axes = panels(list(panel_of), 4.2, 3.4)
    for axis, every in zip(axes, panel_of.values(), strict=True):
        points = mean_of_seeds(every)
        forms = sorted({point["bits"] for point in points}, reverse=True)
        for bits, (colour, marker) in zip(forms, itertools.cycle(COLOURS), strict=False):
            line = sorted((p["bytes"], p["patched"]["RA"]) for p in points if p["bits"] == bits)
            axis.plot(
                *zip(*line, strict=True),
                color=colour,
                marker=marker,
                markersize=4,
                linewidth=1,
                label="float32" if bits == 32 else f"{bits} bits",
            )
        best, frontier = -1.0, []
        for size, ra in sorted((p["bytes"], p["patched"]["RA"]) for p in points):
            if ra > best:
                best = ra
                frontier.append((size, ra))
        axis.step(
            *zip(*frontier, strict=True),
            where="post",
            color="black",
            linewidth=0.8,
            linestyle=":",
            label="best at most so many bytes",
        )
        robust, standard = points[0]["robust"]["RA"], points[0]["standard"]["RA"]
        axis.scatter([full], [robust], marker="*", s=80, color="black", zorder=3)
        axis.annotate("full copy", (full, robust + 1), fontsize=7, ha="right", va="bottom")
        axis.axhline(standard, color=GREY, linestyle="--", linewidth=1)
        place = {"xycoords": axis.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axis.annotate("standard model", (0.99, standard), fontsize=7, **place)
        axis.set_xscale("log")
        axis.set_xlabel("bytes on disk per corruption")
    for axis in axes[::3]:
        axis.set_ylabel("RA, %")
    axes[0].legend(fontsize=7, frameon=False)
    save(figure, path)
