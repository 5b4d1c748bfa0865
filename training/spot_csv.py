"""A CSV that tells something of every spot: labels, a mask."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import InputError, first_few
from preprocessing.inputs import require_unique

BARCODES = ("barcode", "spot", "cell", "bin")      # names of columns, in any spelling, that hold barcodes
SAMPLES = ("sample_id", "sample")


def last_column(table: pd.DataFrame, obs: pd.DataFrame | None, path: Path, data: Path | str) -> np.ndarray:
    """The last column, in the order of `obs` where another column holds its barcodes (with or without `sample__`, or with the sample in a
    column of its own): one named so, else one that names every spot. Without such a column, or without `obs`, line by line."""
    if obs is None:
        return table.iloc[:, -1].to_numpy()
    keys = [str(key) for key in obs.index]
    for column in table.columns[:-1]:
        named_so, names = str(column).strip().lower() in BARCODES, _names(table, column, keys)
        lines = _lines(names, keys)
        missing = [key for key, line in zip(keys, lines, strict=True) if line is None]
        numbers = pd.to_numeric(table[column], errors="coerce").notna().all()       # most often of rows: no barcodes
        if missing and named_so and not numbers:
            raise InputError(path, str(column), f"every spot of {data}", f"no line for {first_few(missing)}")
        if not missing and (named_so or not numbers):
            taken = {names[line] for line in lines}
            require_unique(path, str(column), [name for name in names if name in taken])
            return table.iloc[lines, -1].to_numpy()
    return table.iloc[:, -1].to_numpy()


def _names(table: pd.DataFrame, column: str, keys: list[str]) -> list[str]:
    """A column as barcodes, each with its sample where another column names that and the spots do too."""
    names = table[column].astype(str).tolist()
    samples = next((table[other].astype(str).tolist() for other in table.columns if str(other).strip().lower() in SAMPLES), None)
    if samples is None or not any("__" in key for key in keys):
        return names
    return [name if "__" in name else f"{sample}__{name}" for sample, name in zip(samples, names, strict=True)]


def _lines(names: list[str], keys: list[str]) -> list[int | None]:
    """The line of every key, None where there is none."""
    line_of = {name: line for line, name in enumerate(names)}
    bare = len({key.split("__", 1)[-1] for key in keys}) == len(keys)      # else a barcode alone does not tell whose it is
    return [line_of.get(key, line_of.get(key.split("__", 1)[-1]) if bare else None) for key in keys]
