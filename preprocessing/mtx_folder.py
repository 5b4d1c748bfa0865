"""The MTX folder of a 10x matrix: features, barcodes and counts, each gzipped or not."""
from __future__ import annotations

import csv
import gzip
import io
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp

from preprocessing.errors import InputError
from preprocessing.sample import INT32_MAX

GZIP_MAGIC = b"\x1f\x8b"


def matrix_files(path: Path) -> tuple[Path, ...]:
    """The `.h5` file itself, or features, barcodes and matrix of an MTX folder."""
    if not path.is_dir():
        return (path,)
    return _member(path, "features.tsv", "genes.tsv"), _member(path, "barcodes.tsv"), _member(path, "matrix.mtx")


def barcodes_file(path: Path) -> Path:
    """The `.h5` file itself, or the barcodes of an MTX folder."""
    return matrix_files(path)[1] if path.is_dir() else path


def read_mtx(path: Path) -> sp.coo_matrix:
    """The counts (features, barcodes) of a Matrix Market file, gzipped or not."""
    try:
        with _open(path) as stream:
            return _parse_mtx(stream)
    except (OSError, EOFError, ValueError, OverflowError, zlib.error) as error:      # pandas' own are ValueErrors
        raise InputError(path, "file", "a whole Matrix Market file", f"one that cannot be read ({error})") from error


def _parse_mtx(stream: io.BufferedIOBase) -> sp.coo_matrix:
    """A general coordinate matrix as Space Ranger writes it. (scipy's reader ends the whole process over some damaged files.)"""
    header = stream.readline(200).lower().split()
    if header[:3] != [b"%%matrixmarket", b"matrix", b"coordinate"] or header[3:] not in ([b"integer", b"general"], [b"real", b"general"]):
        raise ValueError("its first line is not: %%MatrixMarket matrix coordinate integer general")
    line = stream.readline()
    while line.startswith(b"%"):
        line = stream.readline()
    n_rows, n_columns, n_entries = map(int, line.split())
    if min(n_rows, n_columns, n_entries) < 0 or max(n_rows, n_columns) > INT32_MAX:
        raise ValueError(f"it announces {n_rows} x {n_columns} with {n_entries} entries")
    if n_entries == 0:
        return sp.coo_matrix((n_rows, n_columns), dtype=np.int32)
    table = pd.read_csv(stream, sep=r"\s+", header=None, names=["row", "column", "value"], dtype={"row": np.int64, "column": np.int64})
    if len(table) != n_entries or not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{len(table):,} lines for the {n_entries:,} entries that it announces")
    row, column = table["row"].to_numpy() - 1, table["column"].to_numpy() - 1
    if row.min() < 0 or row.max() >= n_rows or column.min() < 0 or column.max() >= n_columns:
        raise ValueError("entries outside the matrix")
    return sp.coo_matrix((table["value"].to_numpy(), (row, column)), shape=(n_rows, n_columns))


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


def read_columns(path: Path) -> list[np.ndarray]:
    """The columns of a tab-separated list without a header, each (n,) `U`."""
    try:
        with _open(path) as stream:
            table = pd.read_csv(stream, sep="\t", header=None, dtype=str, keep_default_na=False, quoting=csv.QUOTE_NONE)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(path, "file", "a tab-separated list", f"one that cannot be read ({error})") from error
    return [table[column].to_numpy(str) for column in table.columns]
