"""How much patches of one prompt differ from each other, in features or in grey levels 0..255: a generator that ignores z scores 0.

In grey levels, the deviation of a group is the root of its mean variance over pixels and channels (unbiased, so groups of any size
compare); groups are then averaged. Real patches of one cluster are the yardstick: about 45 on H&E.
"""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from scipy.spatial.distance import pdist

PAIRS = 2000               # of different prompts: enough for a mean


def within_prompt_diversity(images: np.ndarray) -> float:
    """Images (prompts, k, ...) in grey levels 0..255, k >= 2 draws of z for each prompt -> mean pixel deviation over z."""
    return mean_group_deviation(images)


def prompt_distances(features: np.ndarray, prompts: np.ndarray, seed: int = 0) -> dict[str, float]:
    """Mean Euclidean distance of the features (N, F) of two patches: `within_prompt`, of one of the prompts (N,), averaged over prompts;
    `between_prompts`, of different ones (of at most `PAIRS` random pairs). NaN where there are no such pairs."""
    groups = [np.flatnonzero(prompts == name) for name in np.unique(prompts)]
    within = [float(pdist(np.asarray(features[rows], dtype=np.float64)).mean()) for rows in groups if len(rows) > 1]
    first, second = np.random.default_rng(seed).integers(len(features), size=(2, PAIRS))
    apart = prompts[first] != prompts[second]
    between = np.linalg.norm(np.asarray(features[first[apart]], np.float64) - features[second[apart]], axis=1)
    return {"within_prompt": float(np.mean(within)) if within else float("nan"),
            "between_prompts": float(between.mean()) if len(between) else float("nan")}


def mean_group_deviation(groups: Iterable[np.ndarray]) -> float:
    """As above for groups (k_i, ...) of different sizes; groups of fewer than 2 say nothing. NaN if no group does."""
    deviations = [group_deviation(group) for group in groups if len(group) > 1]
    return float(np.mean(deviations)) if deviations else float("nan")


def group_deviation(group: np.ndarray) -> float:
    """Pixel deviation within one group (k, ...), k >= 2."""
    total = np.zeros(np.shape(group)[1:], dtype=np.float64)
    squares = np.zeros_like(total)
    first = np.asarray(group[0], dtype=np.float64)
    for image in group:                        # one image at a time: a cluster may hold thousands
        shifted = np.asarray(image, dtype=np.float64) - first
        total += shifted
        squares += shifted ** 2
    k = len(group)
    variance = (squares - total ** 2 / k) / (k - 1)
    return float(np.sqrt(np.maximum(variance, 0).mean()))
