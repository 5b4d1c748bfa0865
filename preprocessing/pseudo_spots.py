"""Group 2 µm Visium HD bins into square pseudo-spots, one per patch; Visium spots pass through.

Touches no files. A pseudo-spot is n × n bins with n odd, so one bin is its centre and lends it barcode and position.
Bin positions are (row, col) on the capture array; pixel positions are (x, y) at level 0 and come from the sample's
pixel columns only: array columns may run against image x.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from preprocessing.errors import InputError, OptionError
from preprocessing.hd_barcodes import as_text
from preprocessing.sample import Sample, Spots


def bins_per_side(patch_um: float, bin_um: float) -> int:
    """floor(patch_um / bin_um), which must be odd so that one bin is the centre."""
    if not (math.isfinite(patch_um) and patch_um > 0):
        raise OptionError("--patch-sz-um", "a positive number of µm", f"{patch_um:g}")
    n = math.floor(patch_um / bin_um + 1e-6)     # 54 µm of 0.1 + 0.2 µm bins must not lose one to rounding
    if n % 2 == 0:
        valid = [k for k in (n - 1, n + 1) if k > 0]
        raise OptionError(
            "--patch-sz-um", f"an odd number of {bin_um:g} µm bins a side, nearest: "
            + " or ".join(f"{k * bin_um:g} µm ({k} bin{'s' if k > 1 else ''})" for k in valid),
            f"{patch_um:g} µm = {n} bins")
    return n


def group_bins(sample: Sample, patch_um: float = 55.0, stride_bins: int = 5) -> Spots:
    """Every n × n window of bins, stepping by `stride_bins` over the array from bin (0, 0), whose bins are all in tissue.

    Rows are ordered by the window's top row, then its left column. Does not touch the counts: `spot_sums.py` adds them up.
    """
    if sample.bin_um is None:
        raise InputError(sample.sample_id, "bin size", "a Visium HD sample, made of bins", sample.platform)
    if stride_bins < 1:
        raise OptionError("--stride", "at least 1 bin", str(stride_bins))
    n = bins_per_side(patch_um, sample.bin_um)
    row_of_bin = _index_grid(sample, margin=n)
    top, left, n_incomplete = _complete_windows(row_of_bin >= 0, n, stride_bins)
    centre = row_of_bin[top + n // 2, left + n // 2].astype(np.int64)
    return replace(_spots_of_rows(sample, centre, patch_um), bins_per_side=n,
                   dropped={"have a bin outside tissue": n_incomplete} if n_incomplete else {})


def _index_grid(sample: Sample, margin: int) -> np.ndarray:
    """(rows + margin, columns + margin) int32: array position -> row of the sample, -1 where no bin is in tissue."""
    rows_in_tissue = np.flatnonzero(sample.in_tissue)
    array_row, array_col = sample.array_row[rows_in_tissue], sample.array_col[rows_in_tissue]
    if len(rows_in_tissue) == 0:
        return np.full((margin, margin), -1, dtype=np.int32)
    if min(array_row.min(), array_col.min()) < 0:
        raise InputError(sample.sample_id, "array_row, array_col", "positions from 0 up", "a negative one")
    grid = np.full((array_row.max() + 1 + margin, array_col.max() + 1 + margin), -1, dtype=np.int32)
    grid[array_row, array_col] = rows_in_tissue
    if np.count_nonzero(grid >= 0) != len(rows_in_tissue):
        raise InputError(sample.sample_id, "array_row, array_col", "one bin at each position",
                         f"{len(rows_in_tissue) - np.count_nonzero(grid >= 0):,} positions taken twice")
    return grid


def _complete_windows(in_tissue: np.ndarray, n: int, stride: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Top row and left column of each window full of tissue, and the number of others whose centre is in tissue."""
    height, width = in_tissue.shape
    integral = np.zeros((height + 1, width + 1), dtype=np.int32)     # integral[i, j] = bins in tissue above i, left of j
    np.cumsum(np.cumsum(in_tissue, axis=0, dtype=np.int32), axis=1, out=integral[1:, 1:])
    tops, lefts = np.arange(0, height - n + 1, stride), np.arange(0, width - n + 1, stride)
    n_in_tissue = (integral[np.ix_(tops + n, lefts + n)] - integral[np.ix_(tops, lefts + n)]
                   - integral[np.ix_(tops + n, lefts)] + integral[np.ix_(tops, lefts)])
    complete = n_in_tissue == n * n
    centre_in_tissue = in_tissue[np.ix_(tops + n // 2, lefts + n // 2)]
    i, j = np.nonzero(complete)
    return tops[i], lefts[j], int(np.count_nonzero(centre_in_tissue & ~complete))


def as_spots(sample: Sample, patch_um: float) -> Spots:
    """In-tissue spots of a Visium or Spatial Transcriptomics sample, in the sample's order; each its own only member."""
    if not (math.isfinite(patch_um) and patch_um > 0):
        raise OptionError("--patch-sz-um", "a positive number of µm", f"{patch_um:g}")
    return _spots_of_rows(sample, np.flatnonzero(sample.in_tissue), patch_um)


def _spots_of_rows(sample: Sample, rows: np.ndarray, patch_um: float) -> Spots:
    return Spots(barcodes=as_text(sample.barcodes[rows]), centre_xy_px=sample.centre_xy_px[rows], array_row=sample.array_row[rows],
                 array_col=sample.array_col[rows], sample_rows=rows, patch_um=patch_um)


def take_spots(spots: Spots, rows: np.ndarray, dropped: Mapping[str, int]) -> Spots:
    """The spots of `rows` (indices or a mask), in that order; the reasons in `dropped` are added to those known."""
    of_rows = {name: getattr(spots, name)[rows] for name in ("barcodes", "centre_xy_px", "array_row", "array_col", "sample_rows")}
    return replace(spots, **of_rows, dropped={**spots.dropped, **{reason: count for reason, count in dropped.items() if count}})
