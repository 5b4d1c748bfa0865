"""The page of `perturb.py`: what changed, by how much, beside random gene sets; before, after and difference of some spots."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from evaluation import page
from evaluation.contact_sheet import contact_sheet
from evaluation.effects import Effect, difference_map
from evaluation.nuclei import SAID

SHOWN_SPOTS, SHOWN_SEEDS, CELL_PX = 8, 3, 80      # as wide as the page
FIGURE_DPI = 100


def write_perturbation_page(path: Path, title: str, changes: str, effects: Sequence[Effect], sheet: np.ndarray,
                            settings: Mapping[str, object]) -> None:
    """`sheet` is what `pairs_sheet` makes."""
    n_controls = len(effects[0].controls)
    rows = [[SAID[effect.name], effect.before, page.with_interval(effect.change, *effect.interval), in_spreads(effect),
             *([f"{page.number(effect.control_range[0])} to {page.number(effect.control_range[1])}", effect.p_value] if n_controls else [])]
            for effect in effects]
    columns = ["", "before", "change (95 %)", "in deviations", *(["random sets (95 %)", "share as large"] if n_controls else [])]
    beside = f"; {n_controls} random sets of as many genes of like expression" if n_controls else "; no random sets were asked for"
    parts = [page.paragraph(lead(effects), "lead"), page.paragraph(f"Changed: {changes}."), page.heading("Effects"),
             page.table(columns, rows, f"Means over spots and seeds; intervals over seeds{beside}"),
             page.picture(effects_figure(effects), "Changes in deviations of the patches before: the set with its interval over seeds "
                          f"(blue){', each random set (grey)' if n_controls else ''}.", shrinks=True),
             page.heading("Before, after, difference"),
             page.picture(sheet, "A row a spot; three patches a seed, of the same noise. Difference: blue is darker after the change, "
                          "orange lighter."),
             page.heading("How to read this"), page.paragraph(
                 "An effect counts if its interval leaves out 0, at most one in twenty random gene sets does as much, and it is a "
                 "twentieth of a deviation or more: a generator answers to any change of its input, so the question is whether it "
                 "answers to these genes. What is seen is what the generator has learnt from its training sections, not an experiment: "
                 "genes that went together there change together here."),
             page.heading("Settings, weights, versions"), page.facts(settings)]
    page.write_page(path, page.page(title, parts))


def lead(effects: Sequence[Effect]) -> str:
    """What stands out, in a sentence."""
    said = [f"{SAID[effect.name]} {'+' if effect.change > 0 else ''}{page.with_interval(effect.change, *effect.interval)}"
            for effect in effects if effect.stands_out]
    if not any(effect.has_interval for effect in effects):
        return "One seed cannot say how sure a change is: there are no intervals. Give several (--seeds 0-7)."
    if not said:
        return "No number of nuclei or stain changes more than with random gene sets." if len(effects[0].controls) else \
            "No number of nuclei or stain changes beyond what seeds do."
    beside = ", more than random gene sets of that size do" if len(effects[0].controls) else " (no random gene sets were asked for)"
    return f"Changes{beside}: {'; '.join(said)}."


def in_spreads(effect: Effect) -> float | None:
    return effect.change / effect.spread if effect.spread > 0 else None


def pairs_sheet(before: np.ndarray, after: np.ndarray, spots: Sequence[str], seeds: Sequence[int]) -> np.ndarray:
    """uint8 (n, k, px, px, 3) each -> one sheet: some spots down, before | after | difference of some seeds across."""
    n, k = min(len(spots), SHOWN_SPOTS), min(len(seeds), SHOWN_SEEDS)
    rows = [[patch for seed in range(k) for patch in (before[spot, seed], after[spot, seed],
             difference_map(before[spot, seed], after[spot, seed]))] for spot in range(n)]
    columns = [f"{name} {seed}" for seed in seeds[:k] for name in ("before", "after", "diff")]
    return contact_sheet(rows, list(spots[:n]), columns, cell_px=CELL_PX)


def effects_figure(effects: Sequence[Effect]) -> np.ndarray:
    """uint8 (H, W, 3): a line a statistic, in deviations before the change."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 0.42 * len(effects) + 0.8), dpi=FIGURE_DPI, layout="constrained")
    canvas, axes = FigureCanvasAgg(figure), figure.add_subplot()
    axes.axvline(0, color="#888", linewidth=1)
    for place, effect in enumerate(reversed(effects)):
        if not effect.spread > 0:
            continue
        axes.plot(effect.controls / effect.spread, np.full(len(effect.controls), place), "|", color="#999", markersize=14)
        low, high = (value / effect.spread for value in effect.interval)
        if np.isfinite(low):
            axes.plot([low, high], [place, place], color="#2563a8", linewidth=2.5, solid_capstyle="butt")
        axes.plot(effect.change / effect.spread, place, "o", color="#2563a8", markersize=7)
    axes.set_yticks(range(len(effects)), [SAID[effect.name] for effect in reversed(effects)], fontsize=9)
    axes.set_ylim(-0.6, len(effects) - 0.4)
    axes.set_xlabel("change, in deviations before")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
