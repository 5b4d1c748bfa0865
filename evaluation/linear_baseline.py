"""The linear model that a CLIP has to beat: expression -> PCA -> ridge -> PCA of the encoder's image features.

Everything is fitted in the training sections alone; the ridge strength is chosen there too, by leaving one section out
at a time (with a single section, one of five random parts). Expression is normalised (log1p), (N, G), sparse or dense.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.decomposition import PCA

from evaluation.retrieval import places

N_COMPONENTS = 50
STRENGTHS = tuple(10.0 ** power for power in np.arange(0, 6.5, 0.5))   # penalty on the squared weights
PARTS_OF_ONE_SECTION = 5
Expression = sp.csr_matrix | np.ndarray


@dataclass(frozen=True)
class LinearBaseline:
    """A fitted baseline; `predict` and `project` give (N, 50) rows to be compared by cosine."""

    expression_pca: PCA
    feature_pca: PCA
    weights: np.ndarray        # (components of expression, components of features)
    strength: float            # the chosen ridge penalty

    def predict(self, expression: Expression) -> np.ndarray:
        """Where the patches of these spots should lie."""
        return self.expression_pca.transform(expression) @ self.weights

    def project(self, features: np.ndarray) -> np.ndarray:
        """Where these patches' encoder features (N, F) do lie."""
        return self.feature_pca.transform(features)


def fit_linear_baseline(expression: Expression, features: np.ndarray, sections: Sequence[str], *, n_components: int = N_COMPONENTS,
                        strengths: Sequence[float] = STRENGTHS, rng: np.random.Generator) -> LinearBaseline:
    """Fit to training spots (N, G) and (N, F); `sections` (N,) names the section of each."""
    parts = held_out_parts(np.asarray(sections), rng)
    scores = np.zeros(len(strengths))
    for part in parts:
        kept, held = np.flatnonzero(~part), np.flatnonzero(part)
        models = fit_strengths(expression[kept], features[kept], n_components, strengths)
        scores += [mean_share_above(model.predict(expression[held]), model.project(features[held])) for model in models]
    best = strengths[int(np.argmin(scores))]
    return fit_strengths(expression, features, n_components, [best])[0]


def held_out_parts(sections: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Boolean (N,) masks, each held out once: the sections, or parts of the only one."""
    names = np.unique(sections)
    if len(names) > 1:
        return [sections == name for name in names]
    part = rng.permutation(len(sections)) % PARTS_OF_ONE_SECTION
    return [part == number for number in range(min(PARTS_OF_ONE_SECTION, len(sections)))]


def fit_strengths(expression: Expression, features: np.ndarray, n_components: int, strengths: Sequence[float]) -> list[LinearBaseline]:
    """One model a ridge strength; they share their PCAs."""
    expression_pca, feature_pca = fit_pca(expression, n_components), fit_pca(features, n_components)
    x, y = expression_pca.transform(expression), feature_pca.transform(features)       # centred: no intercept is needed
    gram = x.T @ x
    return [LinearBaseline(expression_pca, feature_pca, np.linalg.solve(gram + strength * np.eye(len(gram)), x.T @ y), float(strength))
            for strength in strengths]


def fit_pca(rows: Expression, n_components: int) -> PCA:
    """PCA of sparse or dense rows; ARPACK never makes a sparse matrix dense."""
    n_components = min(n_components, min(rows.shape) - 1)
    if n_components < 1:
        raise ValueError(f"a linear baseline needs at least 2 spots and 2 numbers a spot; found {rows.shape}")
    return PCA(n_components, svd_solver="arpack", random_state=0).fit(rows)


def mean_share_above(predicted: np.ndarray, projected: np.ndarray) -> float:
    """Mean share of the pool above the right patch: 0 = always first, 0.5 = chance. Steadier than R@10 for choosing."""
    above, level = places(predicted, projected)
    return float((above + level / 2).mean() / max(len(above) - 1, 1))
