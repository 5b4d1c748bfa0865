"""Rank each query's own partner in a pool of embeddings: R@k and the median rank, with chance and an interval.

Row i of the queries belongs to row i of the pool. Cosine similarity, so the lengths of the rows do not matter.
Ties are fair: of t equal candidates, each place is equally likely, so a collapsed model scores chance and not 1.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

TIE = 1e-9              # similarities this close are equal: rounding must not decide a rank
QUERIES_A_BLOCK = 1024


def retrieval_metrics(queries: np.ndarray, pool: np.ndarray, *, ks: Sequence[int] = (1, 5, 10),
                      n_bootstrap: int = 1000, seed: int = 0) -> dict[str, float | list[float]]:
    """Queries and pool (N, D), paired by row. Returns `r1, r5, r10, median_rank`, each with `..._ci95` and `chance_...`, for ks 1, 5, 10.

    The 95 % intervals are a bootstrap over queries; chance of R@k is k over N.
    """
    return summarise_places([places(queries, pool)], ks=ks, n_bootstrap=n_bootstrap, seed=seed)


def both_ways(genes: np.ndarray, images: np.ndarray, *, n_bootstrap: int = 1000, seed: int = 0) -> dict[str, dict]:
    """`retrieval_metrics` from genes to images and back; (N, D) each."""
    return {"gene_to_image": retrieval_metrics(genes, images, n_bootstrap=n_bootstrap, seed=seed),
            "image_to_gene": retrieval_metrics(images, genes, n_bootstrap=n_bootstrap, seed=seed)}


def retrieval_by_sample(genes: np.ndarray, images: np.ndarray, sample_ids: Sequence[str], *, n_bootstrap: int = 1000,
                        seed: int = 0) -> dict[str, dict]:
    """Both ways, (N, D) each: `joint` among the spots of all samples, and by name in `samples` among those of each sample alone.

    A pool of many spots is harder than one of few: compare each with its own chance. How two models differ: `r10_difference`.
    """
    sample_ids = np.asarray(sample_ids).astype(str)
    groups = {name: np.flatnonzero(sample_ids == name) for name in np.unique(sample_ids)}

    def score(rows: np.ndarray) -> dict:
        return {"n_spots": len(rows), **both_ways(genes[rows], images[rows], n_bootstrap=n_bootstrap, seed=seed)}

    return {"joint": score(np.arange(len(genes))), "samples": {str(name): score(rows) for name, rows in groups.items()}}


def places(queries: np.ndarray, pool: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each query, how many of the pool lie above its partner, and how many others are level with it: two (N,) ints.

    A query or partner that is not finite has the whole pool above it.
    """
    if queries.shape != pool.shape or queries.ndim != 2 or not len(queries):
        raise ValueError(f"queries and pool are paired by row: expected two equal (N, D); found {queries.shape} and {pool.shape}")
    queries, pool = unit_rows(queries), unit_rows(pool)
    above = np.empty(len(queries), dtype=np.int64)
    level = np.empty(len(queries), dtype=np.int64)
    for start in range(0, len(queries), QUERIES_A_BLOCK):
        rows = np.arange(start, min(start + QUERIES_A_BLOCK, len(queries)))
        similarity = queries[rows] @ pool.T                            # (block, N)
        own = similarity[np.arange(len(rows)), rows][:, None]          # (block, 1)
        not_above = similarity <= own + TIE                            # False wherever a NaN takes part
        above[rows] = (~not_above).sum(axis=1)
        level[rows] = (not_above & (similarity >= own - TIE)).sum(axis=1) - np.isfinite(own[:, 0])
    return np.minimum(above, len(queries) - 1), level


def summarise_places(runs: Sequence[tuple[np.ndarray, np.ndarray]], *, ks: Sequence[int] = (1, 5, 10),
                     n_bootstrap: int = 1000, seed: int = 0) -> dict[str, float | list[float]]:
    """Metrics of one or more `places` of the same N queries (one per seed of a generator), averaged over the runs."""
    n = len(runs[0][0])
    hits = np.stack([np.mean([np.clip((k - above) / (level + 1), 0, 1) for above, level in runs], axis=0) for k in ks])   # (ks, N)
    ranks = np.stack([1 + above + level / 2 for above, level in runs])                                                   # (runs, N)
    rng = np.random.default_rng(seed)
    draws = (rng.integers(n, size=n) for _ in range(n_bootstrap))
    spread = np.array([[*hits[:, rows].mean(axis=1), np.median(ranks[:, rows])] for rows in draws])                       # (draws, ks + 1)
    names, low_high = [*(f"r{k}" for k in ks), "median_rank"], np.quantile(spread, [0.025, 0.975], axis=0)
    return {
        **dict(zip(names, [*map(float, hits.mean(axis=1)), float(np.median(ranks))], strict=True)),
        **{f"{name}_ci95": interval for name, interval in zip(names, low_high.T.tolist(), strict=True)},
        **{f"chance_r{k}": min(k / n, 1.0) for k in ks},
        "chance_median_rank": (n + 1) / 2,
    }


Pair = tuple[np.ndarray, np.ndarray]   # queries and pool, both (N, D)


def r10_difference(first: Pair | list[Pair], second: Pair | list[Pair], *, n_bootstrap: int = 1000,
                   seed: int = 0) -> dict[str, float | list[float]]:
    """R@10 of one (queries, pool) minus that of another on the same N spots: `mean`, and `ci95` of a bootstrap over the spots,
    which are drawn for both at once: what is hard for both does not widen the interval. A list is several seeds, averaged."""
    difference = _r10_hits(first) - _r10_hits(second)
    rng = np.random.default_rng(seed)
    means = [difference[rng.integers(len(difference), size=len(difference))].mean() for _ in range(n_bootstrap)]
    return {"mean": float(difference.mean()), "ci95": [float(value) for value in np.quantile(means, [0.025, 0.975])]}


def _r10_hits(runs: Pair | list[Pair]) -> np.ndarray:
    """(N,) share of the runs in which a spot finds its own among the first ten."""
    found = [places(*pair) for pair in (runs if isinstance(runs, list) else [runs])]
    return np.mean([np.clip((10 - above) / (level + 1), 0, 1) for above, level in found], axis=0)


def unit_rows(embeddings: np.ndarray) -> np.ndarray:
    """Float64 copy with rows of length 1; a zero row stays zero."""
    embeddings = np.asarray(embeddings, dtype=np.float64)
    length = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(length > 0, length, 1)
