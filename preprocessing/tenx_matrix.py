"""Read a 10x feature-barcode matrix: HDF5 (versions 1.0 to 4.x of Space Ranger) or MTX folder, gzipped or not.

10x stores (features, barcodes) by column, which is (barcodes, features) by row: the arrays of the file are those of our CSR.
Only features of the type "Gene Expression" are kept.
"""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata.utils import make_index_unique

from preprocessing.errors import InputError
from preprocessing.hd_barcodes import as_text
from preprocessing.hdf5_output import HDF5_ERRORS
from preprocessing.mtx_folder import matrix_files, read_columns, read_mtx
from preprocessing.sample import INT32_MAX

GENE_EXPRESSION = "Gene Expression"
CHECK_BLOCK = 1 << 24            # counts checked at once
LOADED_ENTRIES = 1 << 26         # entries read at once where all are loaded: more than a Visium sample has


@dataclass(frozen=True, eq=False)
class StoredCounts:
    """Raw counts of a 10x HDF5 file, left on disk. What a slice holds is checked when it is read."""

    path: Path
    indptr: np.ndarray            # (B + 1,) int64 of the file, other features included
    gene_of_feature: np.ndarray   # (features of the file,) int32 column of our counts, -1 for what is no gene

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.indptr) - 1, int(np.count_nonzero(self.gene_of_feature >= 0))

    @property
    def nnz(self) -> int:
        """Entries of the file, other features included."""
        return int(self.indptr[-1])

    def slices(self, max_entries: int) -> Iterator[tuple[int, sp.csr_matrix]]:
        """(first row, CSR int32 of the rows from there on): rows of at most `max_entries` entries together, or one row.

        Indices are sorted and unique. A matrix without a single count is refused once all of it was read.
        """
        any_count = False
        with _tenx_file(self.path) as file:
            for first, stop in runs_of_rows(self.indptr, max_entries):
                with _whole_file(self.path):
                    entries = slice(int(self.indptr[first]), int(self.indptr[stop]))
                    data, features = (file["matrix"][name][entries] for name in ("data", "indices"))
                counts = self._checked(first, stop, data, features)
                any_count = any_count or bool(counts.data.any())
                yield first, counts
        if not any_count:
            raise _no_count(self.path, self.shape)

    def _checked(self, first: int, stop: int, data: np.ndarray, features: np.ndarray) -> sp.csr_matrix:
        indptr = (self.indptr[first:stop + 1] - self.indptr[first]).astype(np.int32)
        n_features = len(self.gene_of_feature)
        if not len(data) == len(features) == indptr[-1]:
            raise InputError(self.path, "matrix/data", f"{indptr[-1]:,} counts from barcode {first:,} on", f"{len(data):,} (damaged)")
        if len(features) and (features.min() < 0 or features.max() >= n_features):
            raise InputError(self.path, "matrix/indices", f"features 0 to {n_features - 1:,}",
                             f"{features.min()} to {features.max()} (damaged)")
        counts = sp.csr_matrix((as_int32(self.path, data), features.astype(np.int32, copy=False), indptr),
                               shape=(stop - first, n_features), copy=False)
        if (self.gene_of_feature < 0).any():
            counts = counts[:, np.flatnonzero(self.gene_of_feature >= 0)]
        counts.sum_duplicates()                                   # also sorts indices: some writers leave them as they came
        return counts

    def load(self) -> sp.csr_matrix:
        """All counts (B, G) int32."""
        parts = [counts for _, counts in self.slices(LOADED_ENTRIES)]
        return parts[0] if len(parts) == 1 else sp.csr_matrix(sp.vstack(parts, format="csr"))


@dataclass(frozen=True)
class TenxMatrix:
    """Counts as they stand in the file; row order is the file's."""

    path: Path
    counts: sp.csr_matrix | StoredCounts   # (B, G) int32, indices sorted
    barcodes: np.ndarray          # (B,) `S` or `U`
    gene_names: np.ndarray        # (G,) str, made unique by AnnData's rule
    gene_ids: np.ndarray          # (G,) str
    software: str                 # "spaceranger-1.0.0", or "" where the file does not say


def read_matrix(path: Path) -> TenxMatrix:
    """Read a `.h5` file or an MTX folder whole; refuse a matrix without a single count."""
    if not path.is_dir():
        stored = open_matrix(path)
        return replace(stored, counts=stored.counts.load())
    matrix = _read_folder(path)
    if not matrix.counts.data.any():
        raise _no_count(path, matrix.counts.shape)
    return matrix


def open_matrix(path: Path) -> TenxMatrix:
    """As `read_matrix` of a `.h5` file, with the counts left on disk: only their structure is checked."""
    with _tenx_file(path) as file, _whole_file(path):
        if "matrix" not in file:
            raise InputError(path, "matrix", "the group of a Space Ranger matrix", f"groups {', '.join(file) or 'none'}")
        group, features = file["matrix"], file["matrix/features"]
        shape = tuple(int(length) for length in group["shape"][:])
        indptr = group["indptr"][:].astype(np.int64, copy=False)
        barcodes = _strings(group["barcodes"])
        ids, names, types = (as_text(_strings(features[key])) for key in ("id", "name", "feature_type"))
        software = file.attrs.get("software_version", "")
        software = software.decode() if isinstance(software, bytes) else str(software)
        if not len(ids) == len(names) == len(types):
            raise ValueError(f"{len(ids)} ids, {len(names)} names and {len(types)} types of features")
        _check_structure(path, shape, group["data"], group["indices"], indptr, len(ids), len(barcodes))
    is_gene, unique_names = _genes(path, names, types)
    counts = StoredCounts(path, indptr, np.where(is_gene, np.cumsum(is_gene) - 1, -1).astype(np.int32))
    if counts.nnz == 0:
        raise _no_count(path, counts.shape)
    return TenxMatrix(path, counts, barcodes, unique_names, ids[is_gene], software)


@contextmanager
def _tenx_file(path: Path) -> Iterator[h5py.File]:
    with _whole_file(path):
        file = h5py.File(path, "r")
    with file:
        yield file


@contextmanager
def _whole_file(path: Path) -> Iterator[None]:
    """Whatever h5py makes of a damaged file is one error that names it."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(path, "file", "a 10x HDF5 matrix", "nothing at this path") from error
    except HDF5_ERRORS as error:
        raise InputError(path, "file", "a whole 10x HDF5 matrix", f"one that cannot be read ({error})") from error


def _no_count(path: Path, shape: tuple[int, int]) -> InputError:
    return InputError(path, "counts", "at least one count", f"{shape[0]:,} barcodes x {shape[1]:,} genes without a non-zero count")


def runs_of_rows(indptr: np.ndarray, max_entries: int) -> Iterator[tuple[int, int]]:
    """(first, stop) of consecutive rows that have at most `max_entries` entries together, or are one row."""
    first = 0
    while first < len(indptr) - 1:
        stop = max(first + 1, int(np.searchsorted(indptr, indptr[first] + max_entries, side="right")) - 1)
        yield first, stop
        first = stop


def _strings(dataset: h5py.Dataset) -> np.ndarray:
    """Fixed- or variable-length strings as an `S` array where they are ASCII, else `U`."""
    strings = dataset[:]
    if strings.ndim != 1 or strings.dtype.names:
        raise ValueError(f"{dataset.name} is no list of words")
    return strings if strings.dtype.kind == "S" else np.array(strings.tolist(), dtype="S") if len(strings) else np.empty(0, "S1")


def _check_structure(path: Path, shape: tuple[int, ...], data: h5py.Dataset, indices: h5py.Dataset, indptr: np.ndarray, n_features: int,
                     n_barcodes: int) -> None:
    if data.dtype.kind not in "iuf" or {data.ndim, indices.ndim, indptr.ndim} != {1}:
        raise InputError(path, "matrix/data", "a list of numbers", f"{data.dtype} of {data.ndim} dimensions")
    if indices.dtype.kind not in "iu":
        raise InputError(path, "matrix/indices", "a list of whole numbers", f"{indices.dtype}")
    if shape != (n_features, n_barcodes) or len(indptr) != n_barcodes + 1:
        raise InputError(path, "matrix/shape", f"{n_features:,} features x {n_barcodes:,} barcodes, as many as are named",
                         f"{' x '.join(f'{length:,}' for length in shape)}, {len(indptr) - 1:,} columns")
    if len(data) != len(indices) or indptr[0] != 0 or indptr[-1] != len(data) or (indptr[1:] < indptr[:-1]).any():
        raise InputError(path, "matrix/indptr", f"pointers into {len(data):,} counts", "pointers that lead outside them (damaged)")


def as_int32(path: Path | str, data: np.ndarray) -> np.ndarray:
    """Counts as int32; refuses what is not a whole number from 0 up. Space Ranger 1.0 files exist with float64 counts."""
    if data.dtype.kind not in "biuf":
        raise InputError(path, "counts", "raw UMI counts, whole numbers from 0 up", f"{data.dtype}")
    for start in range(0, len(data), CHECK_BLOCK):
        block = data[start:start + CHECK_BLOCK]
        wrong = block < 0
        if block.dtype.kind == "f":
            wrong |= ~np.isfinite(block) | (block != np.rint(block))
        if wrong.any():
            raise InputError(path, "counts", "raw UMI counts, whole numbers from 0 up", f"values like {block[wrong][0]}")
        if block.max() > INT32_MAX:
            raise InputError(path, "counts", f"raw UMI counts up to {INT32_MAX:,}", f"{block.max():,.0f}")
    return data.astype(np.int32, copy=False)


def _genes(path: Path, names: np.ndarray, types: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which features (features,) are genes, and the genes' unique names (G,)."""
    is_gene = types == GENE_EXPRESSION
    if not is_gene.any():
        found = ", ".join(sorted(set(types.tolist())))
        raise InputError(path, "feature_type", f"features of type {GENE_EXPRESSION!r}", f"only {found}" if found else "no feature")
    return is_gene, make_index_unique(pd.Index(names[is_gene].astype(object))).to_numpy(str)


def _read_folder(path: Path) -> TenxMatrix:
    features_tsv, barcodes_tsv, mtx = matrix_files(path)
    features, barcodes = read_columns(features_tsv), read_columns(barcodes_tsv)[0]
    by_feature = read_mtx(mtx)
    if by_feature.shape != (len(features[0]), len(barcodes)):
        raise InputError(mtx, "shape", f"{len(features[0]):,} features x {len(barcodes):,} barcodes, as many as {features_tsv} and "
                         f"{barcodes_tsv} name", " x ".join(f"{length:,}" for length in by_feature.shape))
    by_feature.data = as_int32(mtx, by_feature.data)
    counts = sp.csr_matrix(by_feature.T)                       # a pair that comes twice is summed
    ids = features[0]
    names = features[1] if len(features) > 1 else ids
    types = features[2] if len(features) > 2 else np.full(len(ids), GENE_EXPRESSION)         # Cell Ranger 2 had no types
    is_gene, unique_names = _genes(path, names, types)
    if not is_gene.all():
        counts = counts[:, np.flatnonzero(is_gene)]
    counts.sum_duplicates()
    return TenxMatrix(path, counts, barcodes, unique_names, ids[is_gene], software="")
