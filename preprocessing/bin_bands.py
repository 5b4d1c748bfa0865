"""Put bins into array order, a band of array rows at a time, in one pass over a matrix of any size.

Visium HD matrices list their bins in no order. A band holds every bin of the windows whose top row lies in it: a bin near a border
is given to both sides, so no window needs two bands. Bands lie in memory while all of them together are small, else in one
temporary file; only those in use are loaded.
"""
from __future__ import annotations

import errno
import io
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from preprocessing.made_ahead import made_ahead
from preprocessing.outputs import require_free_space
from preprocessing.sample import Sample
from preprocessing.sliding_sums import gather_rows, place_cells
from preprocessing.tenx_matrix import as_int32, runs_of_rows

BAND_SHARE, ENTRY_BYTES = 8, 8             # a loaded band takes an eighth of the budget: two are in use, and one is being made
MEMORY_SHARE = 4                           # bands of up to a quarter of the budget stay in memory
SLICE_SHARE, SLICE_BYTES = 16, 64          # what reading and sorting a slice takes for each of its entries
STORED_BYTES, CELL_BYTES = 4, 8            # of an entry and of a bin in the temporary file, as a rule


@dataclass(frozen=True)
class Band:
    """Bins of some array rows in array order, as `sliding_sums.py` wants them."""

    first_row: int            # array position of cell (0, 0)
    first_col: int
    width: int                # cells a row
    pointers: np.ndarray      # (rows * width + 1,) int64
    genes: np.ndarray         # (entries,) uint16 or uint32
    counts: np.ndarray        # (entries,) int32


class BinBands:
    """The bins in tissue that windows of side × side bins need, in bands; used in a `with`, which removes the temporary file.

    `tops`, `lefts` (P,) are the array positions of the windows' first bins, `tops` ascending.
    """

    def __init__(self, sample: Sample, tops: np.ndarray, lefts: np.ndarray, side: int, memory_gb: float, folder: Path | None = None):
        self.sample, self.budget = sample, int(memory_gb * 1e9)
        self.first_col = int(lefts.min())
        self.width = int(lefts.max()) + side - self.first_col
        self.gene_dtype = np.uint16 if sample.counts.shape[1] <= 1 << 16 else np.uint32
        entries = _entries_of_rows(sample, int(tops[0]), int(tops[-1]) + side)
        self.rows = _cut_bands(np.unique(tops), side, entries, max_entries=self.budget // BAND_SHARE // ENTRY_BYTES)
        self.tops = np.array([first for first, _ in self.rows])
        in_bands = sum(int(entries[first - tops[0]:stop - tops[0]].sum()) for first, stop in self.rows)
        stored = in_bands * STORED_BYTES + sum(stop - first for first, stop in self.rows) * self.width * CELL_BYTES
        self.folder = Path(folder or tempfile.gettempdir())
        if stored > self.budget // MEMORY_SHARE:
            require_free_space(self.folder, stored)
        self.stream = io.BytesIO() if stored <= self.budget // MEMORY_SHARE else tempfile.TemporaryFile(dir=self.folder)
        self.chunks: list[list[int]] = [[] for _ in self.rows]           # where in the stream the parts of each band begin

    def __enter__(self) -> BinBands:
        return self

    def __exit__(self, *error) -> None:
        with suppress(OSError):                                # of a full disk, which was said; the file goes in any case
            self.stream.close()

    def __len__(self) -> int:
        return len(self.rows)

    def of_top(self, top: np.ndarray) -> np.ndarray:
        """Number of the band that holds the windows of these top rows."""
        return np.searchsorted(self.tops, top, side="right") - 1

    def fill(self) -> None:
        """Read the counts once, and give every bin to its bands."""
        from preprocessing.progress import ProgressBar

        n_bins = self.sample.counts.shape[0]
        with ProgressBar(total=n_bins, desc="sorting bins", unit="bin", unit_scale=True) as progress:
            for first, counts in made_ahead(count_slices(self.sample, max(1, self.budget // SLICE_SHARE // SLICE_BYTES))):
                self._distribute(first, counts)
                progress.update(counts.shape[0])

    def _distribute(self, first: int, counts: sp.csr_matrix) -> None:
        rows = slice(first, first + counts.shape[0])
        array_row, col = self.sample.array_row[rows], self.sample.array_col[rows] - self.first_col
        wanted = np.flatnonzero(self.sample.in_tissue[rows] & (col >= 0) & (col < self.width))
        wanted = wanted[np.argsort(array_row[wanted], kind="stable")]
        ordered, lengths = array_row[wanted], np.diff(counts.indptr).astype(np.int32)
        for number, (first_row, stop_row) in enumerate(self.rows):
            chosen = wanted[np.searchsorted(ordered, first_row):np.searchsorted(ordered, stop_row)]
            if len(chosen):
                cells = (array_row[chosen] - first_row).astype(np.int64) * self.width + col[chosen]
                self._store(number, cells, lengths[chosen], counts, chosen)

    def _store(self, number: int, cells: np.ndarray, lengths: np.ndarray, counts: sp.csr_matrix, chosen: np.ndarray) -> None:
        n_entries = int(lengths.sum(dtype=np.int64))
        genes, values = np.empty(n_entries, self.gene_dtype), np.empty(n_entries, np.int32)
        gather_rows(counts.indptr, counts.indices, counts.data, chosen, genes, values)
        self.chunks[number].append(self.stream.tell())
        try:
            for part in (cells, lengths, genes, values.astype(np.min_scalar_type(int(values.max(initial=0))))):
                np.save(self.stream, part, allow_pickle=False)
            self.stream.flush()
        except OSError as error:                               # numpy's own, of a disk that fills up, has no number
            raise OSError(error.errno or errno.EIO, f"a temporary file of counts could not be written ({error.strerror or error})",
                          str(self.folder)) from error

    def load(self, number: int) -> Band:
        """The bins of one band in array order."""
        first_row, stop_row = self.rows[number]
        pointers = np.zeros((stop_row - first_row) * self.width + 1, dtype=np.int64)
        for start in self.chunks[number]:
            self.stream.seek(start)
            cells, lengths = self._next_array(), self._next_array()
            pointers[cells + 1] = lengths
        np.cumsum(pointers, out=pointers)
        genes, counts = np.empty(pointers[-1], self.gene_dtype), np.empty(pointers[-1], np.int32)
        for start in self.chunks[number]:
            self.stream.seek(start)
            cells, lengths, chunk_genes, chunk_counts = (self._next_array() for _ in range(4))
            place_cells(cells, lengths, chunk_genes, chunk_counts.astype(np.int32), pointers, genes, counts)
        return Band(first_row, self.first_col, self.width, pointers, genes, counts)

    def _next_array(self) -> np.ndarray:
        return np.load(self.stream, allow_pickle=False)


def _entries_of_rows(sample: Sample, first_row: int, stop_row: int) -> np.ndarray:
    """(stop_row - first_row,) int64: stored entries of the bins in tissue of every array row."""
    lengths = np.diff(sample.counts.indptr)
    array_row = sample.array_row[:len(lengths)]
    chosen = sample.in_tissue[:len(lengths)] & (array_row >= first_row) & (array_row < stop_row)
    found = np.bincount(array_row[chosen] - first_row, weights=lengths[chosen], minlength=stop_row - first_row)
    return found.astype(np.int64)


def _cut_bands(tops: np.ndarray, side: int, entries: np.ndarray, max_entries: int) -> list[tuple[int, int]]:
    """(first row, stop row) of bands that hold at most `max_entries`, or one row of windows. `tops` are unique and ascending."""
    before = np.concatenate([[0], np.cumsum(entries)])                       # before[i] = entries above row tops[0] + i
    bands: list[tuple[int, int]] = []
    for top in tops.tolist():
        stop = top + side
        if bands and before[stop - tops[0]] - before[bands[-1][0] - tops[0]] <= max_entries:
            bands[-1] = (bands[-1][0], stop)
        else:
            bands.append((top, stop))
    return bands


def count_slices(sample: Sample, max_entries: int) -> Iterator[tuple[int, sp.csr_matrix]]:
    """(first row, CSR int32) of consecutive rows of the sample's counts, in memory or left on disk."""
    if not sp.issparse(sample.counts):
        yield from sample.counts.slices(max_entries)
        return
    for first, stop in runs_of_rows(sample.counts.indptr, max_entries):
        yield first, whole_counts(counts_source(sample), sample.counts[first:stop])


def counts_source(sample: Sample) -> Path | str:
    """What to call a sample's counts in errors: their file where they are left in it, else the sample."""
    return sample.sample_id if sp.issparse(sample.counts) else sample.counts.path


def whole_counts(source: Path | str, counts: sp.csr_matrix) -> sp.csr_matrix:
    """The same counts as int32; what is no whole number from 0 up, or larger than int32, is refused. Shares the indices."""
    return sp.csr_matrix((as_int32(source, counts.data), counts.indices, counts.indptr), shape=counts.shape, copy=False)
