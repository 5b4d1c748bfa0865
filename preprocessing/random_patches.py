"""Place squares at random in the tissue of a slide: patches without expression, for training image models.

Touches no files. Squares lie wholly inside the tissue and are spread uniformly over the places where that is possible,
whatever polygon they belong to; they may overlap.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.errors import InputError, OptionError

if TYPE_CHECKING:
    from shapely import MultiPolygon

TRIES_PER_PATCH = 500       # squares tried before a tissue counts as too small or too thin
FEWEST_TRIES = 100_000
BATCH = 8192                # squares tried at a time


def sample_squares(tissue: MultiPolygon, side_px: float, count: int, seed: int = 0, path: Path | str = "tissue",
                   accept: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Centres (count, 2) of squares of `side_px` inside `tissue`, float64 level-0 (x, y); same seed, same squares.

    `accept` maps centres (n, 2) to a bool (n,) that a square must also pass. The number of tries is bounded.
    """
    if count < 1:
        raise OptionError("--n-pts", "at least 1 patch", str(count))
    rng = np.random.default_rng(seed)
    corner, extent, polygons = _boxes_of_centres(tissue, side_px)
    room = extent.prod(axis=1)
    found, n_found, n_tried = [], 0, 0
    most_tries = max(FEWEST_TRIES, TRIES_PER_PATCH * count)
    while len(polygons) and n_found < count and n_tried < most_tries:
        chosen = rng.choice(len(polygons), BATCH, p=room / room.sum() if room.any() else None)
        centres = corner[chosen] + rng.random((BATCH, 2)) * extent[chosen]
        inside = _inside(polygons, chosen, centres, side_px)
        if accept is not None:
            inside[inside] = accept(centres[inside])
        found.append(centres[inside])
        n_found, n_tried = n_found + int(inside.sum()), n_tried + BATCH
    if n_found < count:
        raise InputError(path, "tissue", f"room for {count:,} squares of {side_px:.0f} px, wholly inside",
                         f"{n_found:,} in {n_tried:,} tries over {tissue.area:,.0f} px² of tissue",
                         "Ask for fewer (--n-pts) or smaller (--patch-sz-um) patches")
    return np.concatenate(found)[:count]


def _boxes_of_centres(tissue: MultiPolygon, side_px: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each polygon that could hold a square: the corner and extent (n, 2) of the box its centre must lie in."""
    import shapely

    polygons = np.array([part for part in tissue.geoms], dtype=object)
    bounds = shapely.bounds(polygons).reshape(-1, 4)
    extent = bounds[:, 2:] - bounds[:, :2] - side_px
    wide_enough = (extent >= 0).all(axis=1)
    polygons = polygons[wide_enough]
    shapely.prepare(polygons)
    return bounds[wide_enough, :2] + side_px / 2, extent[wide_enough], polygons


def _inside(polygons: np.ndarray, chosen: np.ndarray, centres: np.ndarray, side_px: float) -> np.ndarray:
    """Which squares (n,) their polygon covers; the centre is tested first because it is cheap."""
    import shapely

    inside = shapely.contains_xy(polygons[chosen], centres[:, 0], centres[:, 1])
    low, high = centres[inside] - side_px / 2, centres[inside] + side_px / 2
    inside[inside] = shapely.covers(polygons[chosen[inside]], shapely.box(low[:, 0], low[:, 1], high[:, 0], high[:, 1]))
    return inside
