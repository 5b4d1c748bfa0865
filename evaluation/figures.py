"""Figures of the notebooks: points in a plane by group, paths, bars. Each returns a small matplotlib figure and draws nothing else."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

DPI = 80
MOST_NAMED = 12            # groups in a legend; more are only coloured
COLOURS = ("#2563a8", "#e07b00", "#2a9d5c", "#b3315f", "#7b5cc4", "#5b6770", "#c9a400", "#00a3ad", "#8c4a1f",
           "#d45cb8", "#6a9a1f", "#1b1b4b")


def plane_figure(points: np.ndarray, groups: Mapping[str, np.ndarray], side: float = 3.2) -> Figure:
    """Points (N, 2) once for each grouping (N,) str, coloured by group."""
    figure = Figure(figsize=(side * len(groups), side), dpi=DPI, layout="constrained")
    for place, (title, labels) in enumerate(groups.items(), start=1):
        axes = figure.add_subplot(1, len(groups), place)
        names = [name for name in np.unique(labels) if name != ""]
        order = np.random.default_rng(0).permutation(len(points))        # no group lies on top of another
        colours = np.array([COLOURS[names.index(label) % len(COLOURS)] if label != "" else "#cccccc" for label in labels])
        axes.scatter(*points[order].T, c=colours[order], s=max(3.0, min(14.0, 4000 / len(points))), linewidths=0)
        if len(names) <= MOST_NAMED:
            for number, name in enumerate(names):
                axes.scatter([], [], color=COLOURS[number % len(COLOURS)], s=16, label=name)
            axes.legend(fontsize=7, frameon=False, loc="best", handletextpad=0.1, borderpad=0.1, labelspacing=0.2)
        _bare(axes, title)
    return figure


def path_figure(ways: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    """By title, the ways (S, 2) of genes and images: steps joined by lines, numbered, each gene step tied to its image step."""
    figure = Figure(figsize=(3.4 * len(ways), 3.2), dpi=DPI, layout="constrained")
    for place, (title, (way, other)) in enumerate(ways.items(), start=1):
        axes = figure.add_subplot(1, len(ways), place)
        for start, end in zip(way, other, strict=True):
            axes.plot(*np.stack([start, end]).T, color="#cccccc", linewidth=0.8)
        for path, colour, name in ((way, COLOURS[0], "genes"), (other, COLOURS[1], "images")):
            axes.plot(*path.T, "-o", color=colour, markersize=4, linewidth=1.4, label=name)
        for number, (x, y) in enumerate(way, start=1):
            axes.annotate(str(number), (x, y), fontsize=7, xytext=(3, 3), textcoords="offset points")
        axes.legend(fontsize=8, frameon=False)
        _bare(axes, title)
    return figure


def bars_figure(table: pd.DataFrame, title: str = "", width: float = 6.4) -> Figure:
    """A group of horizontal bars a row, a colour a column."""
    figure = Figure(figsize=(width, 0.6 + 0.3 * len(table) * max(1, len(table.columns) / 2)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / max(len(table.columns), 1)
    places = np.arange(len(table))
    for number, (name, values) in enumerate(table.items()):
        axes.barh(places + (number - (len(table.columns) - 1) / 2) * height, values.to_numpy(float), height, label=str(name),
                  color=COLOURS[number % len(COLOURS)])
    axes.set_yticks(places, [str(label) for label in table.index], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(0, color="#888888", linewidth=0.8)
    axes.tick_params(axis="x", labelsize=8)
    if len(table.columns) > 1:
        figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=len(table.columns))    # never over a bar
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    for edge in ("top", "right"):
        axes.spines[edge].set_visible(False)
    return figure


def heat_figure(table: pd.DataFrame, title: str = "") -> Figure:
    """A coloured cell a number, rows and columns named; white is 0."""
    figure = Figure(figsize=(1.6 + 0.42 * len(table.columns), 0.9 + 0.2 * len(table)), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(table.to_numpy(float), aspect="auto", cmap="Blues", vmin=0, interpolation="nearest")
    axes.set_yticks(range(len(table)), [str(label) for label in table.index], fontsize=7)
    axes.set_xticks(range(len(table.columns)), [str(label) for label in table.columns], fontsize=7, rotation=60, ha="right")
    axes.set_title(title, fontsize=9, loc="left")
    figure.colorbar(picture, ax=axes, shrink=0.6).ax.tick_params(labelsize=7)
    return figure


def _bare(axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xticks([])
    axes.set_yticks([])
    for edge in axes.spines.values():
        edge.set_color("#cccccc")
