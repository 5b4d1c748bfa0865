"""Read Space Ranger's table of positions: CSV with or without a header, or parquet, rows in any order.

Pixel positions are (x, y) = (pxl_col, pxl_row) at level 0 and come from the pixel columns only: nothing is derived from
array positions, whose columns may run against image x.
"""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from preprocessing.errors import InputError, first_few
from preprocessing.hd_barcodes import as_bytes, as_text

COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
PARSE_ERRORS = (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, pa.ArrowException)


@dataclass(frozen=True)
class Positions:
    """One row a position of the capture array, in the file's order."""

    path: Path
    barcodes: np.ndarray          # (P,) `S`, unique
    in_tissue: np.ndarray         # (P,) bool
    array_row: np.ndarray         # (P,) int64
    array_col: np.ndarray         # (P,) int64
    centre_xy_px: np.ndarray      # (P, 2) float64


def read_positions(path: Path) -> Positions:
    """Read and check a table of positions."""
    columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    barcodes = columns.pop("barcode")
    if len(barcodes) == 0:
        raise InputError(path, "rows", "one row a position", "none")
    if (barcodes == b"").any():
        raise InputError(path, "barcode", "a barcode in every row", f"{int((barcodes == b'').sum()):,} rows without one")
    require_unique(path, "barcode", barcodes)
    numbers = {name: _whole(path, name, columns[name]) for name in ("in_tissue", "array_row", "array_col")}
    if not np.isin(numbers["in_tissue"], (0, 1)).all():
        raise InputError(path, "in_tissue", "0 or 1", first_few(np.unique(numbers["in_tissue"]).tolist()))
    in_tissue = numbers["in_tissue"] == 1
    if not in_tissue.any():
        raise InputError(path, "in_tissue", "positions in tissue", f"none of {len(in_tissue):,}")
    pixels = np.column_stack([_floats(path, name, columns[name]) for name in ("pxl_col_in_fullres", "pxl_row_in_fullres")])
    nowhere = in_tissue & ~np.isfinite(pixels).all(axis=1)
    if nowhere.any():
        raise InputError(path, "pxl_row_in_fullres, pxl_col_in_fullres", "a place for every position in tissue",
                         f"{int(nowhere.sum()):,} without, first {first_few(as_text(barcodes[nowhere][:5]))}")
    return Positions(path, barcodes, in_tissue, numbers["array_row"], numbers["array_col"], pixels)


def require_unique(path: Path, field: str, barcodes: np.ndarray) -> None:
    """Refuse a repeated barcode, naming five."""
    ordered = np.sort(barcodes)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    if len(repeated):
        raise InputError(path, field, "every barcode once", f"repeated {first_few(as_text(repeated[:5]))}" if len(repeated) <= 5 else
                         f"{len(repeated):,} repeated, first {first_few(as_text(repeated[:5]))}")


def _read_csv(path: Path) -> dict[str, np.ndarray]:
    """Columns by name; a first line whose second field is no number is a header."""
    try:
        with open(path, encoding="utf-8-sig") as stream:
            first = stream.readline().rstrip("\r\n").split(",")
        has_header = len(first) > 1 and not first[1].strip().isdigit()
        table = pd.read_csv(path, header=0 if has_header else None, names=None if has_header else _headerless(path, first),
                            encoding="utf-8-sig", dtype={0: str, "barcode": str}, skipinitialspace=True)
    except PARSE_ERRORS as error:
        raise _unreadable(path, error) from error
    _require_columns(path, list(table.columns))
    columns = {name: table[name].to_numpy() for name in COLUMNS}
    columns["barcode"] = as_bytes(table["barcode"].fillna("").to_numpy(object))
    return columns


def _headerless(path: Path, first: list[str]) -> list[str]:
    if len(first) != len(COLUMNS):
        raise InputError(path, "columns", f"{len(COLUMNS)}: {', '.join(COLUMNS)}", f"{len(first)}: {','.join(first)[:80]!r}")
    return list(COLUMNS)


def _read_parquet(path: Path) -> dict[str, np.ndarray]:
    try:
        file = pq.ParquetFile(path)
        _require_columns(path, file.schema_arrow.names)
        table = file.read(columns=list(COLUMNS))
        columns = {name: table[name].to_numpy() for name in COLUMNS[1:]}
        columns["barcode"] = _fixed_width(table["barcode"])
    except PARSE_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise _unreadable(path, error) from error
    return columns


def _fixed_width(column: pa.ChunkedArray) -> np.ndarray:
    """Strings of one length as an `S` array over their bytes: no Python object a row."""
    lengths = pc.binary_length(column.cast(pa.large_binary()))
    shortest, longest = pc.min(lengths).as_py(), pc.max(lengths).as_py()
    if column.null_count or not shortest or shortest != longest:
        return as_bytes(column.fill_null("").to_numpy())
    parts = [chunk.cast(pa.large_binary()) for chunk in column.chunks if len(chunk)]
    first_bytes = [np.frombuffer(part.buffers()[1], np.int64, count=1, offset=8 * part.offset)[0] for part in parts]
    return np.concatenate([np.frombuffer(part.buffers()[2], f"S{longest}", count=len(part), offset=int(first))
                           for part, first in zip(parts, first_bytes, strict=True)])


def _require_columns(path: Path, names: list) -> None:
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise InputError(path, "columns", ", ".join(COLUMNS), f"no {', '.join(missing)} among {first_few(names, 8)}")


def _whole(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    values = _floats(path, name, values) if values.dtype.kind not in "iub" else values
    if values.dtype.kind == "f":
        broken = ~np.isfinite(values) | (values != np.rint(values))
        if broken.any():
            raise InputError(path, name, "whole numbers", f"{int(broken.sum()):,} gaps or fractions")
    return values.astype(np.int64)


def _floats(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    try:
        return values.astype(np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(path, name, "numbers", f"words ({error})") from error


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(path, "file", "a table of positions", "nothing at this path")
    return InputError(path, "file", "a table of positions", f"one that cannot be read ({str(error).strip()})")
