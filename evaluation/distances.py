"""Distances between two sets of image features: Frechet (FID) and kernel (KID), by torch-fidelity's definitions.

Touches no files. Features are (N, D), float32 or float64, N and M may differ. Neither distance sees which image belongs
to which prompt, and both depend on n: compare only at equal n, beside the distance of real to real.
Frechet: Heusel et al. 2017; kernel: Binkowski et al. 2018, polynomial kernel (x.y / D + 1)^3, unbiased.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

ROWS_A_BLOCK = 2048
INFINITE_SHARES = (1, 2, 4)    # of the images, as 1/share: places of the line that is followed to infinite n
LEAST_INFINITE = 8             # images a side: two in a quarter
RELIABLE_N = 2048          # below this many images a Frechet distance of 2048 numbers is mostly bias


def frechet_distance(a: np.ndarray, b: np.ndarray) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) of the Gaussians fitted to (N, D) and (M, D)."""
    return frechet_of_gaussians(*gaussian(a), *gaussian(b))


def gaussian(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,) and a factor F (min(N, D), D) of the covariance, C = F'F (divisor N - 1). Float64, read in blocks."""
    n, width = features.shape
    if n < 2:
        raise ValueError(f"a covariance needs at least 2 images; found {n}")
    mean = sum(np.asarray(features[start:start + ROWS_A_BLOCK], np.float64).sum(axis=0) for start in range(0, n, ROWS_A_BLOCK)) / n
    if n <= width:                                               # fewer images than numbers: the centred rows are a factor
        return mean, (np.asarray(features, np.float64) - mean) / np.sqrt(n - 1)
    covariance = np.zeros((width, width))
    for start in range(0, n, ROWS_A_BLOCK):
        block = np.asarray(features[start:start + ROWS_A_BLOCK], np.float64) - mean
        covariance += block.T @ block
    return mean, factor_of(covariance / (n - 1))


def factor_of(covariance: np.ndarray) -> np.ndarray:
    """F (D, D) with F'F = covariance: Cholesky, or by eigenvalues where the covariance is singular."""
    try:
        return np.linalg.cholesky(covariance).T
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(covariance)
        return (vectors * np.sqrt(np.maximum(values, 0))).T


def frechet_of_gaussians(mean_a: np.ndarray, factor_a: np.ndarray, mean_b: np.ndarray, factor_b: np.ndarray) -> float:
    """Frechet distance of two Gaussians given as mean (D,) and factor (R, D) of the covariance.

    tr (C_a C_b)^(1/2) is the sum of the singular values of F_a F_b': exact for singular covariances too.
    """
    shared = np.linalg.svd(factor_a @ factor_b.T, compute_uv=False).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + (factor_a ** 2).sum() + (factor_b ** 2).sum() - 2 * shared
    return max(float(distance), 0.0)


def kernel_distance(a: np.ndarray, b: np.ndarray, subset_size: int = 1000, n_subsets: int = 100,
                    seed: int = 0) -> tuple[float, float]:
    """Mean and deviation over random subsets of the unbiased squared MMD of (N, D) and (M, D).

    A subset is never larger than the smaller set; where it is all of both, every subset is the same and one is enough.
    """
    smaller = min(len(a), len(b))
    if smaller < 2:
        raise ValueError(f"a kernel distance needs at least 2 images a side; found {smaller}")
    size = min(subset_size, smaller)
    if size == len(a) == len(b):
        return squared_mmd(a, b), 0.0
    rng = np.random.RandomState(seed)                            # torch-fidelity's generator: the same subsets for the same seed
    subsets = [(rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)) for _ in range(n_subsets)]
    if max(len(a), len(b)) ** 2 > n_subsets * size ** 2:
        values = [squared_mmd(a[in_a], b[in_b]) for in_a, in_b in subsets]
    else:                                                        # every pair once is less work than every subset's pairs
        in_a, in_b = (membership([pair[side] for pair in subsets], len(x)) for side, x in enumerate((a, b)))
        values = unbiased(kernel_sums(a, a, in_a, in_a), in_a @ self_kernel(a), size, kernel_sums(b, b, in_b, in_b), in_b @ self_kernel(b),
                          size, kernel_sums(a, b, in_a, in_b))
    return float(np.mean(values)), float(np.std(values))


def squared_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased estimate of the squared maximum mean discrepancy of (N, D) and (M, D); may be negative."""
    all_a, all_b = np.ones((1, len(a))), np.ones((1, len(b)))
    return float(unbiased(kernel_sums(a, a, all_a, all_a), self_kernel(a).sum(), len(a), kernel_sums(b, b, all_b, all_b),
                          self_kernel(b).sum(), len(b), kernel_sums(a, b, all_a, all_b))[0])


def unbiased(sum_aa: np.ndarray, self_a: np.ndarray, n: int,
             sum_bb: np.ndarray, self_b: np.ndarray, m: int, sum_ab: np.ndarray) -> np.ndarray:
    """mean k(a, a') + mean k(b, b') - 2 mean k(a, b), pairs of an image with itself left out."""
    return (sum_aa - self_a) / (n * (n - 1)) + (sum_bb - self_b) / (m * (m - 1)) - 2 * sum_ab / (n * m)


def kernel_sums(a: np.ndarray, b: np.ndarray, in_a: np.ndarray, in_b: np.ndarray) -> np.ndarray:
    """Sum of k(x, y) over x in a's and y in b's subset, for every row of the memberships (S, N) and (S, M) -> (S,)."""
    sums = np.zeros(len(in_a))
    for start in range(0, len(a), ROWS_A_BLOCK):
        kernel = polynomial_kernel(a[start:start + ROWS_A_BLOCK], b)                 # (block, M)
        sums += ((in_a[:, start:start + ROWS_A_BLOCK] @ kernel) * in_b).sum(axis=1)
    return sums


def polynomial_kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(x.y / D + 1)^3 for every pair of rows -> float64 (N, M)."""
    kernel = (a @ b.T).astype(np.float64) / a.shape[1] + 1
    return kernel * kernel * kernel


def self_kernel(a: np.ndarray) -> np.ndarray:
    """k(x, x) of every row -> (N,)."""
    return (np.einsum("nd,nd->n", a, a, dtype=np.float64) / a.shape[1] + 1) ** 3


def membership(subsets: list[np.ndarray], n: int) -> np.ndarray:
    """Index lists -> 0/1 float64 (S, n)."""
    inside = np.zeros((len(subsets), n))
    for row, members in zip(inside, subsets, strict=True):
        row[members] = 1
    return inside


def full_kernel_distance(a: np.ndarray, b: np.ndarray, limit: int = 2000) -> float:
    """Squared MMD of two whole sets, of their first `limit` rows at most: what the splits below compare."""
    return squared_mmd(a[:limit], b[:limit])


Distance = Callable[[np.ndarray, np.ndarray], float]


def distances_to_halves(real: np.ndarray, others: Mapping[str, np.ndarray], distance: Distance, *,
                        rng: np.random.Generator, n_splits: int = 20) -> dict[str, np.ndarray]:
    """Distances at equal n of real and generated features to random halves of the real ones.

    In every split the real features (N, D) fall into two halves of h; `real_vs_real` is the distance between them, and
    each other set (M, D) sends h random rows against the first half. h is smaller where a set has fewer. -> name -> (n_splits,).
    """
    h = half_size(len(real), [len(features) for features in others.values()])
    values: dict[str, list[float]] = {"real_vs_real": [], **{name: [] for name in others}}
    for _ in range(n_splits):
        order = rng.permutation(len(real))
        half, other_half = real[order[:h]], real[order[-h:]]
        values["real_vs_real"].append(distance(other_half, half))
        for name, features in others.items():
            values[name].append(distance(features[rng.choice(len(features), h, replace=False)], half))
    return {name: np.array(column) for name, column in values.items()}


def half_size(n_real: int, n_others: list[int]) -> int:
    """Images a side in `distances_to_halves`."""
    return min([n_real // 2, *n_others])


def half_sample_interval(a: np.ndarray, b: np.ndarray, distance: Distance, value: float, *,
                         rng: np.random.Generator, n_splits: int = 20) -> tuple[float, float]:
    """95 % interval about `value`, the distance of all of (N, D) to all of (M, D).

    Delete-half jackknife: the deviation over random halves, drawn without replacement, estimates that of the whole. (A plain
    bootstrap repeats images, which by itself raises a Frechet distance.)
    """
    values = [distance(a[rng.choice(len(a), max(len(a) // 2, 2), replace=False)], b[rng.choice(len(b), max(len(b) // 2, 2), replace=False)])
              for _ in range(n_splits)]
    margin = 1.96 * float(np.std(values, ddof=1))
    return value - margin, value + margin


def frechet_at_infinity(a: np.ndarray, b: np.ndarray, *, rng: np.random.Generator) -> float:
    """The Frechet distance that infinitely many images of both kinds would have, of (N, D) and (M, D) (Chong & Forsyth 2020).

    The distance at n images a side lies above it by about c / n, so it is the intercept of a straight line in 1 / n, through the
    distances at 1, 1/2 and 1/4 of the images; at 1/2 and 1/4 of two disjoint subsets. Not cut at 0: of equal kinds it falls either way.
    The line is straight where n is well above D; below, it still lies nearer to the truth than the distance at n, but above it.
    """
    n = min(len(a), len(b))
    if n < LEAST_INFINITE:
        raise ValueError(f"a distance at infinite n needs at least {LEAST_INFINITE} images a side; found {n}")
    order_a, order_b = rng.permutation(len(a))[:n], rng.permutation(len(b))[:n]
    sizes, values = [], []
    for share in INFINITE_SHARES:
        size = n // share
        for number in range(min(share, 2)):
            rows = slice(number * size, (number + 1) * size)
            sizes.append(size)
            values.append(frechet_distance(a[order_a[rows]], b[order_b[rows]]))
    return float(np.polyfit(1 / np.array(sizes), values, 1)[1])


def mean_and_interval(values: np.ndarray) -> dict[str, float | list[float]]:
    """`{"mean", "ci95": [2.5 %, 97.5 %]}` of the values of the splits."""
    low, high = np.quantile(values, [0.025, 0.975])
    return {"mean": float(np.mean(values)), "ci95": [float(low), float(high)]}
