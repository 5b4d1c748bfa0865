"""Write `.h5ad` expression block of rows by block of rows: the counts never stand in memory whole.

A block is packed once - its columns cut into HDF5 chunks and compressed - and may wait in a file (`parts.py`) until all are there;
putting them together copies bytes. X is CSR: int32 counts, int32 sorted column indices.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor
from pathlib import Path

import anndata as ad
import numpy as np
import scipy.sparse as sp

from preprocessing.compressed_chunks import GZIP, ChunkedColumn, pack, unpack, write_column
from preprocessing.hdf5_output import hdf5_output
from preprocessing.outputs import finished_file, require_free_space
from preprocessing.sample import INT32_MAX

CHUNK = 1 << 17                    # values in an HDF5 chunk: 512 KiB, within HDF5's cache
COLUMNS = ("indices", "data")
TAILS = tuple(f"{name}_tail" for name in COLUMNS)     # of a packed block: what the next one needs of it
Packed = Mapping[str, np.ndarray]  # what `CountsPacker.pack` returns of one block


class CountsPacker:
    """Packs blocks of rows in their order; `before` has the `TAILS` of the block before the first, where there is one."""

    def __init__(self, before: Packed | None = None):
        self._columns = {name: ChunkedColumn(before[f"{name}_tail"] if before else np.empty(0, np.int32), CHUNK) for name in COLUMNS}

    def pack(self, counts: sp.csr_matrix, pool: Executor) -> dict[str, np.ndarray]:
        """CSR (n, G) with sorted indices -> `row_lengths` (n,), and of indices and data the full chunks and the rest."""
        futures = {name: column.add(getattr(counts, name).astype(np.int32, copy=False), pool) for name, column in self._columns.items()}
        packed = {"row_lengths": np.diff(counts.indptr).astype(np.int32)}
        for name, column in self._columns.items():
            packed[f"{name}_streams"], packed[f"{name}_lengths"] = pack([future.result() for future in futures[name]])
            packed[f"{name}_tail"] = column.tail
        return packed


def write_expression_blocks(path: Path | str, about: ad.AnnData, blocks: Callable[..., Iterator[Packed]]) -> None:
    """Write what `about` says (obs, var, obsm, uns; no X) and the packed counts of all its rows.

    `blocks(*names)` iterates over the blocks with these arrays of each; it is called several times.
    """
    row_lengths = np.concatenate([np.empty(0, np.int32), *(block["row_lengths"] for block in blocks("row_lengths"))])
    if len(row_lengths) != about.n_obs:
        raise ValueError(f"{path}: {about.n_obs} rows were announced, {len(row_lengths)} came")
    entries = int(row_lengths.sum(dtype=np.int64))
    size = sum(int(block[f"{name}_lengths"].sum()) for name in COLUMNS for block in blocks(f"{name}_lengths"))
    require_free_space(Path(path).parent, size)
    with finished_file(path, validate=lambda temporary: _require_complete(temporary, path, about, entries)) as temporary:
        with hdf5_output(temporary) as file:
            ad.io.write_elem(file, "/", about, dataset_kwargs=GZIP)
            counts = file.create_group("X")
            counts.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(about.shape)})
            pointers = np.concatenate([[0], np.cumsum(row_lengths, dtype=np.int64)])
            counts.create_dataset("indptr", data=pointers.astype(np.int32 if entries <= INT32_MAX else np.int64),
                                  chunks=True, maxshape=(None,), shuffle=True, **GZIP)
            for name in COLUMNS:
                dataset = counts.create_dataset(name, (entries,), np.int32, chunks=(CHUNK,), maxshape=(None,), shuffle=True, **GZIP)
                write_column(dataset, _streams(name, blocks), _last_tail(name, blocks))


def _streams(name: str, blocks: Callable[..., Iterator[Packed]]) -> Iterator[memoryview]:
    for block in blocks(f"{name}_streams", f"{name}_lengths"):
        yield from unpack(block[f"{name}_streams"], block[f"{name}_lengths"])


def _last_tail(name: str, blocks: Callable[..., Iterator[Packed]]) -> np.ndarray:
    tail = np.empty(0, np.int32)
    for block in blocks(f"{name}_tail"):
        tail = block[f"{name}_tail"]
    return tail


def _require_complete(temporary: Path, path: Path | str, about: ad.AnnData, entries: int) -> None:
    written = ad.read_h5ad(temporary, backed="r")
    try:
        counts = written.X.group
        if (not written.obs_names.equals(about.obs_names) or not written.var_names.equals(about.var_names)
                or int(counts["indptr"][-1]) != entries or any(len(counts[name]) != entries for name in COLUMNS)):
            raise OSError(f"{path}: what was written is not what was meant")
    finally:
        written.file.close()
