"""Read expression and cluster off patches: models fitted to features of real patches, asked about generated ones.

HEST's protocol (Jaume et al. 2024): PCA to 256 numbers, ridge. Every spot is judged by a model that has seen neither its real patch
nor those of its part of the section, so that real patches are a fair ceiling. Letters: N spots, F features, T genes, K clusters.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

N_COMPONENTS, N_GENES = 256, 50
STRENGTHS = np.logspace(0, 6, 13)
LEAST_LIKELIHOOD = 1e-6


def variable_genes(expression: sp.csr_matrix, count: int = N_GENES) -> np.ndarray:
    """int (T,): columns of normalised expression (N, G) that vary most over the spots; those that do not vary are left out."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    variance = np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean ** 2
    order = np.argsort(-variance, kind="stable")[:count]
    return np.sort(order[variance[order] > 1e-8])


@dataclass(frozen=True)
class CrossFitted:
    """A model a fold, each fitted without that fold's spots."""

    folds: np.ndarray                  # (N,) of each spot
    models: dict[int, Pipeline]

    def answer(self, features: np.ndarray, rows: np.ndarray, ask: Callable[[Pipeline, np.ndarray], np.ndarray]) -> np.ndarray:
        """`ask(model, features)` of each patch (n, F), by the model that has not seen its spot; `rows` (n,) number the spots."""
        parts = {fold: ask(self.models[fold], features[self.folds[rows] == fold]) for fold in np.unique(self.folds[rows])}
        first = next(iter(parts.values()))
        answers = np.empty((len(rows), *first.shape[1:]), dtype=first.dtype)
        for fold, part in parts.items():
            answers[self.folds[rows] == fold] = part
        return answers


def fit_expression(features: np.ndarray, targets: np.ndarray, folds: np.ndarray) -> CrossFitted:
    """Ridge from features (N, F) to expression (N, T); the strength is chosen inside the fitting spots."""
    return _cross_fit(features, targets, folds, lambda: RidgeCV(STRENGTHS))


def fit_clusters(features: np.ndarray, clusters: np.ndarray, folds: np.ndarray) -> CrossFitted | None:
    """Logistic regression from features (N, F) to cluster names (N,). None where a fold leaves a single cluster to learn."""
    if any(len(np.unique(clusters[folds != fold])) < 2 for fold in np.unique(folds)):
        return None
    return _cross_fit(features, clusters, folds, lambda: LogisticRegression(C=0.1, max_iter=1000))


def _cross_fit(features, targets, folds, last_step) -> CrossFitted:
    models = {}
    for fold in np.unique(folds):
        kept = folds != fold
        pca = PCA(min(N_COMPONENTS, kept.sum() - 1, features.shape[1]), random_state=0)
        models[int(fold)] = make_pipeline(StandardScaler(), pca, last_step()).fit(features[kept], targets[kept])
    return CrossFitted(folds, models)


def read_expression(model: CrossFitted, features: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(n, T) expression that the patches (n, F) of these spots look like."""
    return model.answer(features, rows, lambda pipeline, part: pipeline.predict(part))


def read_likelihoods(model: CrossFitted, features: np.ndarray, rows: np.ndarray, names: np.ndarray) -> np.ndarray:
    """(n, K) probability of each of the clusters `names` (K,); one that a fold never saw has none there."""
    def ask(pipeline: Pipeline, part: np.ndarray) -> np.ndarray:
        known = pipeline.predict_proba(part)
        full = np.zeros((len(part), len(names)))
        full[:, np.searchsorted(names, pipeline.classes_)] = known
        return full
    return model.answer(features, rows, ask)


def pearson_by_column(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(T,) correlations of the columns of two (N, T); 0 where a column does not vary, or where fewer than 3 pairs are finite."""
    both, count = _finite_pairs(first, second)
    a, b = _centred(first, both, count), _centred(second, both, count)
    length = np.sqrt((a ** 2).sum(axis=0) * (b ** 2).sum(axis=0))
    return np.where((count > 2) & (length > 1e-12), (a * b).sum(axis=0) / np.maximum(length, 1e-12), 0.0)


def explained_by_column(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """(T,) share of the variance of `truth` (N, T) that `predicted` explains: 1 = all, 0 = as its mean does, below 0 = worse."""
    both, count = _finite_pairs(predicted, truth)
    spread = (_centred(truth, both, count) ** 2).sum(axis=0)
    error = np.where(both, predicted - truth, 0.0)
    return np.where(spread > 1e-12, 1 - (error ** 2).sum(axis=0) / np.maximum(spread, 1e-12), 0.0)


def _finite_pairs(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool (N, T): both are finite; int (T,): how many."""
    both = np.isfinite(first) & np.isfinite(second)
    return both, both.sum(axis=0)


def _centred(values: np.ndarray, kept: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(N, T) minus the mean of the kept ones of each column; 0 where not kept."""
    values = np.where(kept, values, 0.0)
    return np.where(kept, values - values.sum(axis=0) / np.maximum(count, 1), 0.0)


def balanced_accuracy(likelihoods: np.ndarray, truth: np.ndarray) -> float:
    """Mean over the clusters of the share of their patches that are recognised; `truth` (n,) numbers columns of (n, K)."""
    found = likelihoods.argmax(axis=1) == truth
    return float(np.mean([found[truth == number].mean() for number in np.unique(truth)]))


def mean_log_likelihood(likelihoods: np.ndarray, truth: np.ndarray) -> float:
    """Of each patch's own cluster; sees also patches that look like none."""
    return float(np.log(np.maximum(likelihoods[np.arange(len(truth)), truth], LEAST_LIKELIHOOD)).mean())
