"""Sum windows of bins by sliding along the array: the compiled loops beneath `spot_sums.py`.

A band is a stretch of array rows whose counts stand in array order: the entries of cell (row, col) are
`pointers[row * width + col]` to `pointers[row * width + col + 1]`, so neighbouring cells of a row are one run of entries.
Nothing here checks its arguments; every loop leaves the interpreter free for other threads. Genes and places to write to are
unsigned, for which the compiler leaves out the test for negative indices: that makes the loops twice as fast.
"""
from __future__ import annotations

import numpy as np

from preprocessing.kernels import kernel
from preprocessing.sample import INT32_MAX


@kernel
def gather_rows(indptr, indices, data, rows, genes, counts):
    """Copy the entries of some `rows` of a CSR one after the other into `genes` and `counts`."""
    end = 0
    for row in rows:
        for entry in range(indptr[row], indptr[row + 1]):
            genes[end] = indices[entry]
            counts[end] = data[entry]
            end += 1


@kernel
def place_cells(cells, lengths, genes, counts, pointers, band_genes, band_counts):
    """Copy entries that come cell by cell, `lengths` of each, to where `pointers` says that the cell begins in the band."""
    read = 0
    for i in range(len(cells)):
        place = pointers[cells[i]]
        for entry in range(lengths[i]):
            band_genes[place + entry] = genes[read]
            band_counts[place + entry] = counts[read]
            read += 1


@kernel
def sum_windows(pointers, genes, counts, width, tops, lefts, side, n_genes, columns, values, ends):
    """Totals of windows of side × side cells as CSR rows: `columns` ascending, `values` without zeros, `ends` of every row.

    `tops`, `lefts` (n,) are cells of the band; `columns` and `values` need room for n * n_genes + 1. Returns False, with
    `values` cut off, if a total is larger than int32.
    """
    totals = np.zeros(n_genes, np.int64)
    end = np.uint64(0)
    bits = np.int64(0)                                                 # of all totals: beyond int32 if any total is
    for window in range(len(tops)):
        top, left = tops[window], lefts[window]
        step = side
        if window > 0 and tops[window - 1] == top and lefts[window - 1] < left:
            step = left - lefts[window - 1]
        if 2 * step < side:                                            # fewer columns change than stay
            _add_cells(totals, pointers, genes, counts, width, top, side, left - step, left, -1)
            _add_cells(totals, pointers, genes, counts, width, top, side, left + side - step, left + side, 1)
        else:
            totals[:] = 0
            _add_cells(totals, pointers, genes, counts, width, top, side, left, left + side, 1)
        for gene in range(n_genes):                                    # no branch: a zero is overwritten by what follows
            total = totals[gene]
            columns[end] = gene
            values[end] = total
            end += np.uint64(total != 0)
            bits |= total
        ends[window] = end
    return bits <= INT32_MAX


@kernel
def _add_cells(totals, pointers, genes, counts, width, top, n_rows, first_col, stop_col, sign):
    """Add to the totals, or with sign -1 take from them, cells `first_col` to `stop_col` of rows `top` to `top + n_rows`."""
    for row in range(top, top + n_rows):
        for entry in range(pointers[row * width + first_col], pointers[row * width + stop_col]):
            totals[genes[entry]] += sign * counts[entry]
