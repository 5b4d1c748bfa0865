"""Ask five times whether generated patches follow their genes, each beside a ceiling (real patches) and floors (shuffled prompts).

retrieval: a judging CLIP finds the patch of a profile. readout: expression read off the patches. clusters: cluster read off the patches.
nuclei: number, area and stain of nuclei, spot by spot. spatial: whether these make the section's pattern (Moran's I).
Shuffled: every generated patch is held against another spot. Intervals are 95 % bootstraps over spots.
Real patches are brought to the size of the generated ones. Letters: N spots of the section, n of them prompts, k seeds.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import nn

from evaluation.features import resize_by_area
from evaluation.nuclei import STATISTICS, fit_nuclei, measure_nuclei
from evaluation.readout import (
    CrossFitted,
    balanced_accuracy,
    explained_by_column,
    fit_clusters,
    fit_expression,
    mean_log_likelihood,
    pearson_by_column,
    read_expression,
    read_likelihoods,
    variable_genes,
)
from evaluation.sections import FeatureBank, Generated, Section, exchange, score_faithfulness
from evaluation.spatial import folds_of, morans_i, neighbours
from networks.clip import CLIP
from preprocessing.errors import InputError

N_SHUFFLES, LEAST_SPOTS = 5, 20
N_BOOTSTRAP, SHUFFLE_BOOTSTRAP = 300, 60     # draws behind an interval; behind that of each of the shuffles, which are averaged


@dataclass(frozen=True)
class PatchSet:
    """What is known of the patches of n prompts, of k seeds each."""

    features: np.ndarray      # (k, n, F)
    statistics: np.ndarray    # (k, n, 5), see nuclei.STATISTICS

    def shuffled(self, order: np.ndarray) -> PatchSet:
        """Every patch at the place of another."""
        return PatchSet(self.features[:, order], self.statistics[:, order])


@dataclass(frozen=True)
class Yardstick:
    """What the real patches of a section say, and the models fitted to them."""

    rows: np.ndarray               # (n,) spots that were prompts
    targets: np.ndarray            # (n, T) expression of the variable genes
    genes: CrossFitted
    clusters: CrossFitted | None
    cluster_names: np.ndarray      # (K,)
    cluster_of: np.ndarray         # (n,) numbers them; -1 = the spot has none
    statistics: np.ndarray         # (n, 5) of the real patches
    near: np.ndarray | None        # (n, 6) neighbours among the n spots


def score_all(section: Section, generated: Generated, encoder: nn.Module, bank: FeatureBank, *, judge: CLIP | None = None,
              um_per_px: float, null: np.ndarray | None = None, workers: int = 1, seed: int = 0) -> dict[str, object]:
    """All five numbers for `generated`, `shuffled`, `real`, and `null` if there are patches of the null prompt, uint8 (m, px, px, 3).

    `um_per_px` is the scale of the generated patches. Without a judge there is no retrieval, without clusters no cluster agreement,
    without places no Moran's I.
    """
    if len(generated.rows) < LEAST_SPOTS:
        raise InputError(section.sample_id, "prompts", f"patches of at least {LEAST_SPOTS} spots", str(len(generated.rows)))
    real = resize_by_area(section.images, generated.px)
    settings = fit_nuclei(real, um_per_px, seed)

    def patch_set(name: str, images: np.ndarray, n: int) -> PatchSet:
        features = bank.features(f"{section.sample_id}, {name}", images, encoder)
        measured = measure_nuclei(images, settings, workers=workers, progress=bank.progress)
        return PatchSet(*(part.reshape(n, -1, part.shape[1]).swapaxes(0, 1) for part in (features, measured)))

    everywhere = patch_set(f"real at {generated.px}", real, len(real))
    yardstick = fit_yardstick(section, generated.rows, everywhere, seed)
    sets = {"generated": patch_set("generated", generated.flat, len(generated.rows)),
            "real": PatchSet(everywhere.features[:, generated.rows], everywhere.statistics[:, generated.rows])}
    if null is not None:
        drawn = null[np.random.default_rng(seed).integers(len(null), size=len(generated.rows))]
        sets["null"] = patch_set("null prompt", drawn, len(drawn))
    scores = score_sets(sets, yardstick, seed)
    if judge is not None:
        scores = {"retrieval": _retrieval(section, generated, judge, bank, seed), **scores}
    return {**scores, "cluster_names": yardstick.cluster_names.tolist(), "n_prompts": len(generated.rows),
            "n_seeds": len(generated.seeds), "n_spots": len(section.barcodes), "um_per_px": um_per_px,
            "haematoxylin_threshold": settings.threshold}


def fit_yardstick(section: Section, rows: np.ndarray, real: PatchSet, seed: int = 0) -> Yardstick:
    """`real`: of all N spots, one patch each."""
    xy = section.centre_xy_px if section.centre_xy_px is not None and np.isfinite(section.centre_xy_px).all() else None
    folds, features = folds_of(xy, len(section.barcodes), seed), real.features[0]
    targets = section.expression[:, variable_genes(section.expression)].toarray()
    labels = np.full(len(section.barcodes), "") if section.clusters is None else section.clusters
    names = np.unique(labels[labels != ""])
    known = np.flatnonzero(labels != "")
    recogniser = None
    if len(names) > 1:
        fitted = fit_clusters(features[known], labels[known], folds[known])
        recogniser = None if fitted is None or set(folds) != set(fitted.models) else CrossFitted(folds, fitted.models)
    numbers = np.where(labels != "", np.searchsorted(names, labels), -1)
    return Yardstick(rows, targets[rows], fit_expression(features, targets, folds), recogniser, names, numbers[rows],
                     real.statistics[0, rows], None if xy is None else neighbours(xy[rows]))


def score_sets(sets: dict[str, PatchSet], yardstick: Yardstick, seed: int = 0) -> dict[str, dict]:
    """`readout`, `clusters`, `nuclei`, `spatial`, each with an entry a set and one for the shuffled generated patches."""
    rng = np.random.default_rng(seed)
    orders = [exchange(len(yardstick.rows), rng) for _ in range(N_SHUFFLES)]
    measures: dict[str, Callable[[PatchSet, Yardstick, int, int], dict]] = {"readout": _readout}
    if yardstick.clusters is not None and (yardstick.cluster_of >= 0).any():
        measures["clusters"] = _clusters
    measures["nuclei"] = _nuclei
    if yardstick.near is not None:
        measures["spatial"] = _spatial
    scores = {}
    for name, measure in measures.items():
        found = {label: measure(patches, yardstick, seed, N_BOOTSTRAP) for label, patches in sets.items()}
        found["shuffled"] = _mean([measure(sets["generated"].shuffled(order), yardstick, seed, SHUFFLE_BOOTSTRAP) for order in orders])
        scores[name] = {**found, "share_of_ceiling": share_of_ceiling(found)}
    return scores


def share_of_ceiling(found: dict[str, dict]) -> float | None:
    """How far `score` of the generated patches lies on the way from shuffled to real ones; None where the way is no way up."""
    floor, ceiling = found["shuffled"]["score"], found["real"]["score"]
    return float((found["generated"]["score"] - floor) / (ceiling - floor)) if ceiling - floor > 1e-6 else None


def _mean(runs: list[dict]) -> dict:
    """Entry by entry, of numbers, lists and dictionaries alike."""
    if isinstance(runs[0], dict):
        return {name: _mean([run[name] for run in runs]) for name in runs[0]}
    return np.mean(runs, axis=0).tolist()


def _bootstrap(score: Callable[[np.ndarray], float], n: int, seed: int, draws: int) -> list[float]:
    """95 % interval of `score(rows)` over spots drawn with replacement."""
    rng = np.random.default_rng(seed)
    return np.quantile([score(rng.integers(n, size=n)) for _ in range(draws)], [0.025, 0.975]).tolist()


# ---- the five numbers: `score` is what is put between floor and ceiling ----------------------------------------------

def _retrieval(section: Section, generated: Generated, judge: CLIP, bank: FeatureBank, seed: int) -> dict[str, object]:
    """R@1/5/10 and median rank by the judge, under the names of the other numbers; `score` is R@10."""
    paired = score_faithfulness(section, generated, judge, bank, seed)
    names = {"own_genes": "generated", "shuffled_genes": "shuffled", "real_patches": "real"}
    found = {ours: {**paired[theirs], "score": paired[theirs]["r10"], "score_ci95": paired[theirs]["r10_ci95"]}
             for theirs, ours in names.items()}
    return {**found, "share_of_ceiling": share_of_ceiling(found)}


def _readout(patches: PatchSet, yardstick: Yardstick, seed: int, draws: int) -> dict[str, object]:
    """`score`: mean Pearson over the variable genes, seeds averaged. `explained`: share of their variance, which sees the level too."""
    read = np.stack([read_expression(yardstick.genes, features, yardstick.rows) for features in patches.features])    # (k, n, T)

    def correlation(rows: np.ndarray) -> float:
        return float(np.mean([pearson_by_column(run[rows], yardstick.targets[rows]).mean() for run in read]))

    everyone = np.arange(len(yardstick.rows))
    by_gene = np.mean([pearson_by_column(run, yardstick.targets) for run in read], axis=0)
    return {"score": correlation(everyone), "score_ci95": _bootstrap(correlation, len(everyone), seed, draws),
            "pearson_by_gene": by_gene.tolist(),
            "explained": float(np.mean([explained_by_column(run, yardstick.targets).mean() for run in read]))}


def _clusters(patches: PatchSet, yardstick: Yardstick, seed: int, draws: int) -> dict[str, object]:
    """`score`: balanced accuracy; `confusion` (K, K) counts patches, rows are the prompts' clusters."""
    known = np.flatnonzero(yardstick.cluster_of >= 0)
    truth, names = yardstick.cluster_of[known], yardstick.cluster_names
    likelihoods = np.stack([read_likelihoods(yardstick.clusters, features[known], yardstick.rows[known], names)
                            for features in patches.features])                                                        # (k, n, K)

    def accuracy(rows: np.ndarray) -> float:
        return float(np.mean([balanced_accuracy(run[rows], truth[rows]) for run in likelihoods]))

    confusion = np.zeros((len(names), len(names)), int)
    for run in likelihoods:
        np.add.at(confusion, (truth, run.argmax(axis=1)), 1)
    return {"score": accuracy(np.arange(len(truth))), "score_ci95": _bootstrap(accuracy, len(truth), seed, draws),
            "accuracy": float((likelihoods.argmax(axis=2) == truth).mean()),
            "log_likelihood": float(np.mean([mean_log_likelihood(run, truth) for run in likelihoods])),
            "chance": 1 / len(np.unique(truth)), "confusion": confusion.tolist()}


def _nuclei(patches: PatchSet, yardstick: Yardstick, seed: int, draws: int) -> dict[str, object]:
    """`score`: Pearson with the real patch of the spot, mean over `STATISTICS`, seeds averaged; 1 for the real patches themselves."""
    def correlation(rows: np.ndarray) -> float:
        return float(np.mean([pearson_by_column(run[rows], yardstick.statistics[rows]).mean() for run in patches.statistics]))

    everyone = np.arange(len(yardstick.rows))
    by_name = np.mean([pearson_by_column(run, yardstick.statistics) for run in patches.statistics], axis=0)
    means = [float(column[np.isfinite(column)].mean()) if np.isfinite(column).any() else float("nan")
             for column in patches.statistics.reshape(-1, len(STATISTICS)).T]
    return {"score": correlation(everyone), "score_ci95": _bootstrap(correlation, len(everyone), seed, draws),
            "explained": float(np.mean([explained_by_column(run, yardstick.statistics).mean() for run in patches.statistics])),
            "pearson": dict(zip(STATISTICS, by_name.tolist(), strict=True)), "mean": dict(zip(STATISTICS, means, strict=True))}


def _spatial(patches: PatchSet, yardstick: Yardstick, _seed: int, _draws: int) -> dict[str, object]:
    """`score`: Moran's I over the spots of the prompts, mean over `STATISTICS`, seeds averaged."""
    by_name = [float(np.mean([morans_i(run[:, column], yardstick.near) for run in patches.statistics]))
               for column in range(len(STATISTICS))]
    return {"score": float(np.mean(by_name)), "morans_i": dict(zip(STATISTICS, by_name, strict=True))}

