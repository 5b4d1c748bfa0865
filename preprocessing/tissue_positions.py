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
from preprocessing.sample import INT32_MAX

ROWS_AT_ONCE = 1 << 20            # of a parquet file: a Visium HD table has eleven million
COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
PARSE_ERRORS = (OSError, ValueError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError, pa.ArrowException)


@dataclass(frozen=True)
class Positions:
    """One row a position of the capture array, in the file's order."""

    path: Path
    barcodes: np.ndarray          # (P,) `S`, unique
    in_tissue: np.ndarray         # (P,) bool
    array_row: np.ndarray         # (P,) int32
    array_col: np.ndarray         # (P,) int32
    centre_xy_px: np.ndarray      # (P, 2) float64


def read_positions(path: Path) -> Positions:
    """Read and check a table of positions."""
    columns = _read_parquet(path) if path.suffix == ".parquet" else _read_csv(path)
    barcodes = columns.pop("barcode")
    if len(barcodes) == 0:
        raise InputError(path, "rows", "one row a position", "none")
    if (barcodes == b"").any():
        raise InputError(path, "barcode", "a barcode in every row", f"{int((barcodes == b'').sum()):,} rows without one")
    require_barcodes_once(path, "barcode", barcodes)
    numbers = {name: _whole(path, name, columns.pop(name)) for name in ("in_tissue", "array_row", "array_col")}
    in_tissue = numbers["in_tissue"] == 1
    if not (in_tissue | (numbers["in_tissue"] == 0)).all():
        raise InputError(path, "in_tissue", "0 or 1", first_few(np.unique(numbers["in_tissue"]).tolist()))
    if not in_tissue.any():
        raise InputError(path, "in_tissue", "positions in tissue", f"none of {len(in_tissue):,}")
    pixels = np.column_stack([_floats(path, name, columns.pop(name)) for name in ("pxl_col_in_fullres", "pxl_row_in_fullres")])
    nowhere = in_tissue & ~np.isfinite(pixels).all(axis=1)
    if nowhere.any():
        raise InputError(path, "pxl_row_in_fullres, pxl_col_in_fullres", "a place for every position in tissue",
                         f"{int(nowhere.sum()):,} without, first {first_few(as_text(barcodes[nowhere][:5]))}")
    return Positions(path, barcodes, in_tissue, numbers["array_row"], numbers["array_col"], pixels)


def require_barcodes_once(path: Path, field: str, barcodes: np.ndarray) -> None:
    """Refuse a repeated barcode, naming five."""
    if (barcodes[1:] > barcodes[:-1]).all():
        return
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
        parts: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(COLUMNS)):
            parts["barcode"].append(_fixed_width(batch["barcode"]))
            for name in COLUMNS[1:]:
                parts[name].append(batch[name].to_numpy(zero_copy_only=False).copy())        # let go of the file's own memory
    except PARSE_ERRORS as error:
        if isinstance(error, InputError):
            raise
        raise _unreadable(path, error) from error
    return {name: np.concatenate(parts.pop(name) or [np.empty(0, "S1")]) for name in COLUMNS}


def _fixed_width(column: pa.Array) -> np.ndarray:
    """Strings of one length as an `S` array over their bytes: no Python object a row."""
    binary = column.cast(pa.large_binary())
    lengths = pc.binary_length(binary)
    shortest, longest = pc.min(lengths).as_py(), pc.max(lengths).as_py()
    if column.null_count or not shortest or shortest != longest:
        return as_bytes(column.fill_null("").to_numpy(zero_copy_only=False))
    first = np.frombuffer(binary.buffers()[1], np.int64, count=1, offset=8 * binary.offset)[0]
    return np.frombuffer(binary.buffers()[2], f"S{longest}", count=len(binary), offset=int(first)).copy()


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
    if len(values) and not -INT32_MAX <= values.min() <= values.max() <= INT32_MAX:
        raise InputError(path, name, f"whole numbers up to {INT32_MAX:,}", f"{values.min()} to {values.max()}")
    return values.astype(np.int32, copy=False)


def _floats(path: Path, name: str, values: np.ndarray) -> np.ndarray:
    try:
        return values.astype(np.float64, copy=False)
    except (TypeError, ValueError) as error:
        raise InputError(path, name, "numbers", f"words ({error})") from error


def _unreadable(path: Path, error: Exception) -> InputError:
    if isinstance(error, FileNotFoundError):
        return InputError(path, "file", "a table of positions", "nothing at this path")
    return InputError(path, "file", "a table of positions", f"one that cannot be read ({str(error).strip()})")
