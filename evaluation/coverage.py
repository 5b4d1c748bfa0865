"""How much of the real patches generated ones cover, and how close they lie to them: by balls around each image in a feature space.

Radius of a ball: the distance to the k-th nearest neighbour of its own set. Papers: Kynkaanniemi et al. (2019), precision and recall;
Naeem et al. (2020), density and coverage.
"""
from __future__ import annotations

import numpy as np
from sklearn.metrics import pairwise_distances_chunked
from sklearn.neighbors import NearestNeighbors

NEIGHBOURS = 5
BLOCK_MB = 64              # of distances at a time: memory does not grow with N x M


def coverage_metrics(real: np.ndarray, generated: np.ndarray, k: int = NEIGHBOURS) -> dict[str, float]:
    """Features (N, F) and (M, F) -> `precision` (share of generated images in a real ball), `recall` (of real ones in a generated
    ball), `density` (real balls a generated image lies in, over k: above 1 in crowded places), `coverage` (share of real balls that
    hold a generated image). Two sets of one distribution have coverage 1 - (1/2)^k where N = M."""
    if min(len(real), len(generated)) <= k:
        raise ValueError(f"more than k = {k} images a side; found {len(real)} and {len(generated)}")
    real_radius, generated_radius = own_radius(real, k), own_radius(generated, k)
    in_real = np.zeros(len(generated), dtype=np.int64)       # real balls each generated image lies in
    covered, recalled, start = [], [], 0
    for block in pairwise_distances_chunked(real, generated, working_memory=BLOCK_MB):
        rows = slice(start, start := start + len(block))
        inside = block <= real_radius[rows, None]
        in_real += inside.sum(axis=0)
        covered.append(inside.any(axis=1))
        recalled.append((block <= generated_radius).any(axis=1))
    return {"precision": float((in_real > 0).mean()), "recall": float(np.concatenate(recalled).mean()),
            "density": float(in_real.mean() / k), "coverage": float(np.concatenate(covered).mean())}


def own_radius(features: np.ndarray, k: int) -> np.ndarray:
    """(N,) distance of every image to its k-th nearest neighbour in the same set."""
    distances, _ = NearestNeighbors(n_neighbors=k).fit(features).kneighbors()
    return distances[:, -1]
