"""Bring the rows of a count matrix larger than memory into random order.

Every row goes to a bucket drawn for it, buckets lie in temporary files, and each is shuffled when it is read back: every
order of the rows is equally likely, and one bucket is in memory at a time.
"""
from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from preprocessing.progress import ProgressBar

BUCKET_ROWS = 400_000


def in_random_order(blocks: Iterable[tuple[np.ndarray, sp.csr_matrix]], *, rows: int, rng: np.random.Generator, scratch: Path,
                    progress: bool = False) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
    """The rows of all blocks of (barcodes, counts (N, G)) in random order, in new blocks of about BUCKET_ROWS.

    `rows` is about how many there are; temporary files lie in `scratch`. Reads all blocks before it gives the first.
    """
    buckets = rows // BUCKET_ROWS + 1
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        paths, written, genes = [Path(folder) / f"bucket{k}" for k in range(buckets)], 0, 0
        with ExitStack() as stack:
            streams = [stack.enter_context(open(path, "wb")) for path in paths]
            for barcodes, counts in blocks:
                _deal(np.asarray(barcodes, dtype="S"), counts, rng.integers(buckets, size=counts.shape[0]), streams)
                written, genes = written + 1, counts.shape[1]
        for path in ProgressBar(paths, desc="matrix", unit="part", disable=not progress):
            barcodes, counts = _read(path, written, genes)
            path.unlink()
            order = rng.permutation(len(barcodes))
            yield barcodes[order].astype(str), counts[order]


def _deal(barcodes: np.ndarray, counts: sp.csr_matrix, bucket: np.ndarray, streams: list) -> None:
    """Append each row to its bucket's file."""
    order = np.argsort(bucket, kind="stable")
    barcodes, counts = barcodes[order], counts[order]
    edges = np.searchsorted(bucket[order], np.arange(len(streams) + 1))
    for stream, first, end in zip(streams, edges[:-1], edges[1:], strict=True):
        entries = slice(counts.indptr[first], counts.indptr[end])
        for part in (barcodes[first:end], np.diff(counts.indptr[first:end + 1]), counts.indices[entries], counts.data[entries]):
            np.save(stream, part, allow_pickle=False)


def _read(path: Path, parts: int, genes: int) -> tuple[np.ndarray, sp.csr_matrix]:
    """A bucket's barcodes and counts, of `parts` blocks."""
    with open(path, "rb") as stream:
        read = [[np.load(stream, allow_pickle=False) for _ in range(4)] for _ in range(parts)]
    barcodes, lengths, indices, data = (np.concatenate(column) for column in zip(*read, strict=True))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    return barcodes, sp.csr_matrix((data, indices, indptr), shape=(len(barcodes), genes))
