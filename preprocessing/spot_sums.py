"""Add up the counts of every spot's members, exactly, in blocks of spots and bounded memory.

A Visium spot is its own only member. The bins of a pseudo-spot are a window of the array; neighbouring windows share most of
their columns, so a window is its left neighbour less the columns that leave and plus those that enter (`sliding_sums.py`), over
bins put into array order once (`bin_bands.py`). Touches no files but a temporary one.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from preprocessing.bin_bands import Band, BinBands, counts_source, whole_counts
from preprocessing.errors import InputError
from preprocessing.pseudo_spots import take_spots
from preprocessing.sample import INT32_MAX, Sample, Spots
from preprocessing.sliding_sums import sum_windows

BLOCK_SPOTS = 1024        # of `sum_spots`
PART_WINDOWS = 256        # windows summed by one call: 40 MB of room for 19,000 genes


def sum_spots(sample: Sample, spots: Spots) -> sp.csr_matrix:
    """(P, G) int32 sums of all spots, in any order, held in memory: for small samples."""
    order = np.lexsort((spots.array_col, spots.array_row))
    blocks = [slice(start, min(start + BLOCK_SPOTS, len(spots))) for start in range(0, len(spots), BLOCK_SPOTS)]
    sums = list(sum_blocks(sample, take_spots(spots, order, {}), blocks))
    if not sums:
        return sp.csr_matrix((0, len(sample.gene_names)), dtype=np.int32)
    return sp.csr_matrix(sp.vstack(sums, format="csr"))[np.argsort(order)]


def sum_blocks(sample: Sample, spots: Spots, blocks: Sequence[slice], *, workers: int = 1, memory_gb: float = 2.0,
               folder: Path | None = None) -> Iterator[sp.csr_matrix]:
    """Yield one CSR (rows of the block, G) int32 a block: sums over each spot's members, columns sorted, zeros not stored.

    `blocks` are ascending, consecutive slices of the spots, and may start late. Pseudo-spots must be ordered by array row, as
    `group_bins` makes them. Memory stays below `memory_gb` whatever the sample's size, beside the `workers` + 2 blocks under way;
    what does not fit goes to a temporary file in `folder` (by default the system's).
    """
    if len(blocks) == 0:
        return
    if spots.bins_per_side == 1 and sp.issparse(sample.counts):
        counts = whole_counts(counts_source(sample), sample.counts)
        counts.resize(len(sample.barcodes), counts.shape[1])                 # rows beyond the matrix have no counts
        for block in blocks:
            yield _canonical(counts[spots.sample_rows[block]])
        return
    half, n_genes, source = spots.bins_per_side // 2, sample.counts.shape[1], counts_source(sample)
    covered = slice(blocks[0].start, blocks[-1].stop)
    tops, lefts = (place[covered].astype(np.int64) - half for place in (spots.array_row, spots.array_col))
    assert (np.diff(tops) >= 0).all(), "pseudo-spots are ordered by array row"
    with BinBands(sample, tops, lefts, spots.bins_per_side, memory_gb, folder) as bands, ThreadPoolExecutor(workers) as pool:
        bands.fill()
        pending: deque[Future] = deque()
        for parts in _block_parts(bands, tops, blocks):
            sums = [pool.submit(_sum_part, band, tops[part], lefts[part], spots.bins_per_side, n_genes, source) for band, part in parts]
            pending.append(pool.submit(_joined, sums, n_genes))      # jobs are begun in this order, so none waits for one behind it
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _block_parts(bands: BinBands, tops: np.ndarray, blocks: Sequence[slice]) -> Iterator[list[tuple[Band, slice]]]:
    """For every block its runs of at most `PART_WINDOWS` windows of one band; `part` counts from the first block's start."""
    number, band = -1, None
    band_of_window = bands.of_top(tops)
    for block in blocks:
        start, parts = block.start - blocks[0].start, []
        while start < block.stop - blocks[0].start:
            if band_of_window[start] != number:
                number = band_of_window[start]
                band = bands.load(number)
            stop = min(start + PART_WINDOWS, block.stop - blocks[0].start, int(np.searchsorted(band_of_window, number, side="right")))
            parts.append((band, slice(start, stop)))
            start = stop
        yield parts


def _sum_part(band: Band, tops: np.ndarray, lefts: np.ndarray, side: int, n_genes: int,
              source: Path | str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Columns, values and the end of each row of the windows' CSR. `source` names the counts in errors."""
    columns, values = np.empty((2, len(tops) * n_genes + 1), dtype=np.int32)
    ends = np.empty(len(tops), dtype=np.int64)
    fits = sum_windows(band.pointers, band.genes, band.counts, band.width, tops - band.first_row, lefts - band.first_col, side, n_genes,
                       columns, values, ends)
    if not fits:
        raise InputError(source, "counts", f"sums of {side * side:,} bins up to {INT32_MAX:,}", "a larger one: these are not UMI counts")
    return columns[:ends[-1]].copy(), values[:ends[-1]].copy(), ends


def _joined(parts: list[Future], n_genes: int) -> sp.csr_matrix:
    """The CSR of a block from its parts, as they are done."""
    columns, values, ends = zip(*(part.result() for part in parts), strict=True)
    lengths = np.concatenate([np.diff(of_part, prepend=0) for of_part in ends])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    arrays = np.concatenate(values), np.concatenate(columns), indptr.astype(np.int32 if indptr[-1] <= INT32_MAX else np.int64)
    joined = sp.csr_matrix(arrays, shape=(len(lengths), n_genes), copy=False)
    joined.has_canonical_format = True
    return joined


def _canonical(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Columns sorted and unique, no stored zeros; changes `counts`."""
    counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts
