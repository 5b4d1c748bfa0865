"""A CSV that tells something of every spot: labels, a mask."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import InputError, first_few, require_unique


def last_column(table: pd.DataFrame, obs: pd.DataFrame | None, path: Path, data: Path | str) -> np.ndarray:
    """The last column, in the order of `obs` where a column before it names its barcodes (with or without `sample__`)."""
    keys = [] if obs is None else [str(key) for key in obs.index]
    place = {name: row for row, key in enumerate(keys) for name in (key, key.split("__", 1)[-1])}
    for column in table.columns[:-1]:
        names = table[column].astype(str).tolist()
        rows = [place.get(name, -1) for name in names]
        if not any(row >= 0 for row in rows):
            continue
        line_of = {row: line for line, row in enumerate(rows) if row >= 0}
        require_unique(path, f"{column}", [name for name, row in zip(names, rows, strict=True) if row >= 0])
        missing = [key for row, key in enumerate(keys) if row not in line_of]
        if missing:
            raise InputError(path, f"{column}", f"every spot of {data}", f"no line for {first_few(missing)}")
        return table.iloc[[line_of[row] for row in range(len(keys))], -1].to_numpy()
    return table.iloc[:, -1].to_numpy()
