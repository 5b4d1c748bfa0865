"""Spots as places: neighbours, blocks to hold out, and how far a number is alike among neighbours (Moran 1950)."""
from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree
from sklearn.cluster import KMeans

NEIGHBOURS = 6             # of a Visium spot
FOLDS = 5


def neighbours(centre_xy: np.ndarray, count: int = NEIGHBOURS) -> np.ndarray:
    """int (N, count): the nearest other spots of each, nearest first; `centre_xy` (N, 2)."""
    count = min(count, len(centre_xy) - 1)
    _, found = cKDTree(centre_xy).query(centre_xy, k=count + 1)
    own = found == np.arange(len(centre_xy))[:, None]
    own[~own.any(axis=1), -1] = True                     # spots on one place may not name themselves first
    return found[~own].reshape(len(centre_xy), count)


def morans_i(values: np.ndarray, near: np.ndarray) -> float:
    """Moran's I with equal weights on the neighbours (N, k): 1 = neighbours are alike, about 0 = no pattern. NaN counts as the mean."""
    known = np.isfinite(values)
    z = np.where(known, values - (values[known].mean() if known.any() else 0.0), 0.0)
    total = float((z ** 2).sum())
    return float((z * z[near].mean(axis=1)).sum() / total) if total > 0 else 0.0


def folds_of(centre_xy: np.ndarray | None, n: int, seed: int = 0) -> np.ndarray:
    """int (N,) 0..4: parts to hold out in turn, compact in space where places are known, so that neighbours are held out together."""
    rng = np.random.default_rng(seed)
    if centre_xy is None or n < 2 * FOLDS:
        return rng.permutation(n) % min(FOLDS, n)
    return KMeans(FOLDS, n_init=3, random_state=seed).fit_predict(np.asarray(centre_xy, dtype=float))
