"""Find the row of each barcode in another list, eleven million at a time.

Bins of Visium HD are looked up by their place in a grid, all other barcodes by bisection. Touches no files.
"""
from __future__ import annotations

import numpy as np

from preprocessing.hd_barcodes import HdBarcodes

GRID_CELLS_PER_BIN, SMALL_GRID = 16, 1 << 24       # sparser bins (a damaged barcode names row 99,999) are looked up by bisection


def match(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index in `keys` of each of `wanted`, -1 where absent; both integers or bytes, `keys` unique."""
    if keys.dtype.kind == "S":
        width = max(keys.dtype.itemsize, wanted.dtype.itemsize)
        keys, wanted = keys.astype(f"S{width}", copy=False), wanted.astype(f"S{width}", copy=False)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    slot = np.minimum(np.searchsorted(ordered, wanted), len(ordered) - 1)
    return np.where(ordered[slot] == wanted, order[slot], -1)


def match_bins(bins: HdBarcodes, wanted: HdBarcodes) -> np.ndarray:
    """As `match`; `bins` are of any size or several."""
    height, width = int(bins.array_row.max()) + 1, int(bins.array_col.max()) + 1
    if (bins.bin_um != bins.bin_um[0]).any() or height * width > max(GRID_CELLS_PER_BIN * len(bins.array_row), SMALL_GRID):
        return match(bins.key, wanted.key)
    grid = np.full((height, width), -1, dtype=np.int32)
    grid[bins.array_row, bins.array_col] = np.arange(len(bins.array_row), dtype=np.int32)
    inside = (wanted.bin_um == bins.bin_um[0]) & (wanted.array_row < height) & (wanted.array_col < width)
    if inside.all():
        return grid[wanted.array_row, wanted.array_col]
    found = np.full(len(inside), -1, dtype=np.int32)
    found[inside] = grid[wanted.array_row[inside], wanted.array_col[inside]]
    return found
