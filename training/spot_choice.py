"""Which spots a run is trained on and which it shows: a mask, cluster names, a random subset; applied in this order."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import InputError, first_few
from preprocessing.npy_file import load_array
from training.patch_images import random_subset
from training.spot_csv import last_column

TRUTHS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}


@dataclass(frozen=True)
class SpotChoice:
    """What was said; rows are numbers in h5ad order, sample after sample (without expression: in the patches' order)."""

    mask: str | None = None             # .npy of booleans or row numbers, CSV of booleans, or an obs column of booleans
    train_clusters: str | None = None   # names in obs['cluster'], comma-separated
    val_clusters: str | None = None
    n_train: int | None = None          # at most this many, drawn with the run's seed

    def training_rows(self, n_spots: int, obs: pd.DataFrame | None, name: str, seed: int) -> np.ndarray:
        """Ascending row numbers; `obs` of all spots where there is one, `name` names the data in errors."""
        chosen = np.ones(n_spots, bool)
        if self.mask is not None:
            chosen &= read_mask(self.mask, n_spots, obs, name)
        if self.train_clusters is not None:
            chosen &= in_clusters(self.train_clusters, obs, name, "--train-clusters")
        rows = _require_some(np.flatnonzero(chosen), name, "--mask and --train-clusters")
        return rows if self.n_train is None else rows[random_subset(len(rows), self.n_train, seed, "--n-train")]

    def validation_rows(self, n_spots: int, obs: pd.DataFrame | None, name: str) -> np.ndarray:
        if self.val_clusters is None:
            return np.arange(n_spots)
        return _require_some(np.flatnonzero(in_clusters(self.val_clusters, obs, name, "--val-clusters")), name, "--val-clusters")

    @property
    def record(self) -> dict:
        """What was said, plain JSON; empty for all spots."""
        return {option: value for option, value in asdict(self).items() if value is not None}


def _require_some(rows: np.ndarray, name: str, option: str) -> np.ndarray:
    if not len(rows):
        raise InputError(name, option, "some spots", "none")
    return rows


def in_clusters(names: str, obs: pd.DataFrame | None, data: str, option: str) -> np.ndarray:
    """bool (N,): spots whose obs['cluster'] is one of the comma-separated names; an unknown name is refused."""
    if obs is None or "cluster" not in obs:
        raise InputError(data, option, "clusters in obs['cluster']", "none: " + ("no expression" if obs is None else "no such column"))
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    labels = obs["cluster"].astype(object)
    texts = labels.astype(str)
    known = sorted(texts[labels.notna()].unique())
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise InputError(data, option, f"names among {', '.join(known)}", ", ".join(unknown) or "no name")
    return (texts.isin(wanted) & labels.notna()).to_numpy()


def read_mask(mask: str, n_spots: int, obs: pd.DataFrame | None, data: str) -> np.ndarray:
    """bool (N,) from a file of that name, else from an obs column. A CSV's last column counts, its first line is a header;
    where another column has the spots' barcodes, values are joined by these, else line by line."""
    path = Path(mask)
    if path.is_file() and path.suffix == ".npy":
        values = load_array(path, "an array of booleans or row numbers")
        if values.dtype.kind in "iu":
            return _from_row_numbers(values, n_spots, path)
        if values.dtype.kind != "b":
            raise InputError(path, "--mask", "booleans, or whole row numbers", f"{values.dtype}")
    elif path.is_file():
        try:
            table = pd.read_csv(path, dtype=str, keep_default_na=False)
        except ValueError as error:
            raise InputError(path, "--mask", "a CSV with a header line and true or false on every line", str(error)) from error
        values = _truths(last_column(table, obs, path, data), path)
    elif obs is not None and mask in obs:
        values = _truths(obs[mask], data)
    else:
        columns = "none" if obs is None else ", ".join(map(str, obs.columns)) or "none"
        raise InputError(data, "--mask", "an .npy or CSV file, or an obs column", f"{mask}; columns: {columns}")
    if values.shape != (n_spots,):
        raise InputError(path, "--mask", f"one value for each of the {n_spots:,} spots", str(values.shape))
    return values


def _truths(values: Sequence[object], where: Path | str) -> np.ndarray:
    """true, false, 1 and 0 in any spelling -> bool (N,)."""
    texts = [str(value).strip().lower() for value in values]
    strangers = sorted({text for text in texts if text not in TRUTHS})
    if strangers:
        raise InputError(where, "--mask", "true or false (1 or 0) for every spot", f"other values: {first_few(strangers)}")
    return np.array([TRUTHS[text] for text in texts], bool)


def _from_row_numbers(rows: np.ndarray, n_spots: int, path: Path) -> np.ndarray:
    if rows.ndim != 1 or len(np.unique(rows)) < rows.size or (rows.size and (rows.min() < 0 or rows.max() >= n_spots)):
        found = f"{rows.dtype} {rows.shape}" + (f", {rows.min()} up to {rows.max()}" if rows.size else "")
        raise InputError(path, "--mask", f"row numbers 0 up to {n_spots - 1:,}, every one once; or booleans", found)
    chosen = np.zeros(n_spots, bool)
    chosen[rows] = True
    return chosen
