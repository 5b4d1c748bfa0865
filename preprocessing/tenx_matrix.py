"""Read a 10x feature-barcode matrix: HDF5 (versions 1.0 to 4.x of Space Ranger) or MTX folder, gzipped or not.

10x stores (features, barcodes) by column, which is (barcodes, features) by row: the arrays of the file are those of our CSR.
Only features of the type "Gene Expression" are kept.
"""
from __future__ import annotations

import csv
import gzip
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp
from anndata.utils import make_index_unique

from preprocessing.errors import InputError
from preprocessing.hd_barcodes import as_text

GENE_EXPRESSION = "Gene Expression"
CHECK_BLOCK = 1 << 24            # counts checked at once
GZIP_MAGIC = b"\x1f\x8b"


@dataclass(frozen=True)
class TenxMatrix:
    """Counts as they stand in the file; row order is the file's."""

    path: Path
    counts: sp.csr_matrix         # (B, G) int32, indices sorted
    barcodes: np.ndarray          # (B,) `S` or `U`
    gene_names: np.ndarray        # (G,) str, made unique by AnnData's rule
    gene_ids: np.ndarray          # (G,) str
    software: str                 # "spaceranger-1.0.0", or "" where the file does not say


def read_matrix(path: Path) -> TenxMatrix:
    """Read a `.h5` file or an MTX folder; refuse a matrix without a single count."""
    matrix = _read_folder(path) if path.is_dir() else _read_h5(path)
    if matrix.counts.nnz == 0 or not matrix.counts.data.any():
        raise InputError(path, "counts", "at least one count",
                         f"{matrix.counts.shape[0]:,} barcodes x {matrix.counts.shape[1]:,} genes without a non-zero count")
    return matrix


def _read_h5(path: Path) -> TenxMatrix:
    try:
        with h5py.File(path, "r") as file:
            if "matrix" not in file:
                raise InputError(path, "matrix", "the group of a Space Ranger matrix", f"groups {', '.join(file) or 'none'}")
            group, features = file["matrix"], file["matrix/features"]
            shape = tuple(int(length) for length in group["shape"][:])
            index_dtype = np.int64 if len(group["indices"]) > np.iinfo(np.int32).max else np.int32
            arrays = group["data"][:], group["indices"].astype(index_dtype)[:], group["indptr"].astype(index_dtype)[:]
            barcodes = _strings(group["barcodes"])
            ids, names, types = (as_text(_strings(features[key])) for key in ("id", "name", "feature_type"))
            software = file.attrs.get("software_version", "")
    except (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        if isinstance(error, FileNotFoundError):
            raise InputError(path, "file", "a 10x HDF5 matrix", "nothing at this path") from error
        raise InputError(path, "file", "a whole 10x HDF5 matrix", f"one that cannot be read ({error})") from error
    _check_structure(path, shape, arrays, len(ids), len(barcodes))
    data, indices, indptr = arrays
    counts = sp.csr_matrix((_as_int32(path, data), indices, indptr), shape=(shape[1], shape[0]), copy=False)
    return _matrix(path, counts, barcodes, ids, names, types, software.decode() if isinstance(software, bytes) else str(software))


def _strings(dataset: h5py.Dataset) -> np.ndarray:
    """Fixed- or variable-length strings as an `S` array where they are ASCII, else `U`."""
    strings = dataset[:]
    return strings if strings.dtype.kind == "S" else np.array(strings.tolist(), dtype="S") if len(strings) else np.empty(0, "S1")


def _check_structure(path: Path, shape: tuple[int, ...], arrays, n_features: int, n_barcodes: int) -> None:
    data, indices, indptr = arrays
    if data.dtype.kind not in "iuf" or {array.ndim for array in arrays} != {1}:
        raise InputError(path, "matrix/data", "a list of numbers", f"{data.dtype} of {data.ndim} dimensions")
    if shape != (n_features, n_barcodes) or len(indptr) != n_barcodes + 1:
        raise InputError(path, "matrix/shape", f"{n_features:,} features x {n_barcodes:,} barcodes, as many as are named",
                         f"{' x '.join(f'{length:,}' for length in shape)}, {len(indptr) - 1:,} columns")
    pointers = indptr.astype(np.int64)
    if len(data) != len(indices) or pointers[0] != 0 or pointers[-1] != len(data) or (np.diff(pointers) < 0).any():
        raise InputError(path, "matrix/indptr", f"pointers into {len(data):,} counts", "pointers that lead outside them (damaged)")
    if len(indices) and (indices.min() < 0 or indices.max() >= n_features):
        raise InputError(path, "matrix/indices", f"features 0 to {n_features - 1:,}", f"{indices.min()} to {indices.max()} (damaged)")


def _as_int32(path: Path, data: np.ndarray) -> np.ndarray:
    """Counts as int32; refuses what is not a whole number from 0 up. Space Ranger 1.0 files exist with float64 counts."""
    for start in range(0, len(data), CHECK_BLOCK):
        block = data[start:start + CHECK_BLOCK]
        wrong = block < 0
        if block.dtype.kind == "f":
            wrong |= ~np.isfinite(block) | (block != np.rint(block))
        if wrong.any() or block.max() > np.iinfo(np.int32).max:
            example = block[wrong | (block == block.max())][0]
            raise InputError(path, "counts", "raw UMI counts, whole numbers from 0 up", f"values like {example}")
    return data.astype(np.int32, copy=False)


def _matrix(path: Path, counts: sp.csr_matrix, barcodes, ids, names, types, software: str) -> TenxMatrix:
    is_gene = types == GENE_EXPRESSION
    if not is_gene.any():
        found = ", ".join(sorted(set(types.tolist())))
        raise InputError(path, "feature_type", f"features of type {GENE_EXPRESSION!r}", f"only {found}" if found else "no feature")
    if not is_gene.all():
        counts = counts[:, np.flatnonzero(is_gene)]
    counts.sum_duplicates()                                       # also sorts indices: some writers leave them as they came
    unique_names = make_index_unique(pd.Index(names[is_gene].astype(object)))
    return TenxMatrix(path, counts, barcodes, unique_names.to_numpy(str), ids[is_gene], software)


def matrix_files(path: Path) -> tuple[Path, ...]:
    """The `.h5` file itself, or features, barcodes and matrix of an MTX folder."""
    if not path.is_dir():
        return (path,)
    return _member(path, "features.tsv", "genes.tsv"), _member(path, "barcodes.tsv"), _member(path, "matrix.mtx")


def _read_folder(path: Path) -> TenxMatrix:
    features_tsv, barcodes_tsv, mtx = matrix_files(path)
    features, barcodes = _read_columns(features_tsv), _read_columns(barcodes_tsv)[0]
    try:
        with _open(mtx) as stream:
            by_feature = scipy.io.mmread(stream)
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:
        raise InputError(mtx, "file", "a whole Matrix Market file", f"one that cannot be read ({error})") from error
    if by_feature.shape != (len(features[0]), len(barcodes)):
        raise InputError(mtx, "shape", f"{len(features[0]):,} features x {len(barcodes):,} barcodes, as many as are named",
                         " x ".join(f"{length:,}" for length in by_feature.shape))
    counts = sp.csr_matrix(by_feature.T)
    counts.data = _as_int32(mtx, counts.data)
    ids = features[0]
    names = features[1] if len(features) > 1 else ids
    types = features[2] if len(features) > 2 else np.full(len(ids), GENE_EXPRESSION)         # Cell Ranger 2 had no types
    return _matrix(path, counts, barcodes, ids, names, types, software="")


def _member(folder: Path, *names: str) -> Path:
    for name in names:
        for candidate in (folder / name, folder / f"{name}.gz"):
            if candidate.is_file():
                return candidate
    raise InputError(folder, "MTX folder", f"{' or '.join(names)}, gzipped or not", "neither" if len(names) == 1 else "none of them")


def _open(path: Path) -> io.BufferedIOBase:
    """A binary stream, unpacked if the content is gzip, whatever the name says."""
    with open(path, "rb") as stream:
        is_gzip = stream.read(2) == GZIP_MAGIC
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")


def _read_columns(path: Path) -> list[np.ndarray]:
    """The columns of a tab-separated list without a header, each (n,) `U`."""
    try:
        with _open(path) as stream:
            table = pd.read_csv(stream, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(path, "file", "a tab-separated list", f"one that cannot be read ({error})") from error
    return [table[column].to_numpy(str) for column in table.columns]
