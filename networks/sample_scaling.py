"""Centre or standardise each sample by its own genes or image features, so that what differs between whole samples - stain, scanner,
depth - does not reach the model.

Genes need the rows of the whole sample at once; expression stays sparse until a batch of it is made dense. Image features are
centred on the mean over at most `MEAN_PATCHES` patches of the sample, so that a slide can be streamed.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from networks.gene_encoders import MIN_DEVIATION
from preprocessing.errors import InputError

MEAN_PATCHES = 1000   # their mean is known to 3 % of the features' own deviation
MIN_SPOTS = 10        # of a sample that is scaled by its own genes or patches: a spot alone would become all zero


@dataclass(frozen=True)
class SampleScaling:
    """Means and factors of S samples."""

    mean: Tensor    # float32 (S, G)
    scale: Tensor   # float32 (S, G): 1, or 1 over deviation + floor

    def __call__(self, rows: Tensor, samples: Tensor) -> Tensor:
        """Dense rows (N, G) of the samples with these numbers (N,), scaled."""
        return (rows - self.mean[samples]) * self.scale[samples]


def fit_sample_scaling(expression: sp.csr_matrix, samples: np.ndarray, kind: str) -> SampleScaling | None:
    """Over all rows (N, G) of each sample; `samples` (N,) numbers from 0. None for kind "none"."""
    if kind == "none":
        return None
    mean, scale = [], []
    for number in range(int(samples.max()) + 1):
        rows = expression[samples == number].astype(np.float64)
        means = rows.mean(axis=0).A1
        variance = np.clip(rows.multiply(rows).mean(axis=0).A1 - means ** 2, 0, None)
        mean.append(means)
        scale.append(1 / (np.sqrt(variance) + MIN_DEVIATION) if kind == "standardise" else np.ones_like(means))
    return SampleScaling(*(torch.from_numpy(np.stack(part).astype(np.float32)) for part in (mean, scale)))


def require_whole_samples(samples: np.ndarray, names: Sequence[str] | None) -> None:
    """Refuse (exit 3) samples of fewer than `MIN_SPOTS` rows; `samples` (N,) numbers from 0, `names` (N,) theirs."""
    counts = np.bincount(samples)
    if len(counts) and counts.min() < MIN_SPOTS:
        name = "expression" if names is None else str(np.asarray(names)[samples == counts.argmin()][0])
        raise InputError(name, "spots of a sample", f"a whole sample, at least {MIN_SPOTS}: this CLIP scales every sample by its "
                         "own genes or patches", str(counts.min()), "Give the whole sample and choose among its spots afterwards")


def patches_for_mean(samples: np.ndarray, number: int) -> np.ndarray:
    """Ordered rows, at most `MEAN_PATCHES`, whose mean features stand for the sample of this number; `samples` (N,)."""
    rows = np.flatnonzero(samples == number)
    return np.sort(np.random.default_rng(0).choice(rows, min(len(rows), MEAN_PATCHES), replace=False))
