"""Say which genes carry the distance between two places of the CLIP space: Integrated Gradients and SmoothGrad, by Captum.

Touches no files. What is attributed is f(x) = |E(x) - target|^2, E the gene encoder with its unit rows, x normalised expression (G,).
Integrated Gradients (Sundararajan et al. 2017): along the straight line from a baseline to the query; the values add up to
f(query) - f(baseline), and how far they do not is the convergence delta. They cannot where the encoder jumps: one that reads the most
expressed genes alone does, each time two genes change places. SmoothGrad (Smilkov et al. 2017): the gradient at the query, averaged over
noise, times query - baseline; it is local and has no such sum.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Method = Literal["ig", "sg"]
FIRST_STEPS, MAX_STEPS = 64, 1024     # of the integral: doubled until the delta is small
MAX_DELTA = 0.01                      # of the difference that the attributions must add up to
NOTHING = 1e-10                       # a squared distance that is rounding alone: unit rows in float32
NOISE_SAMPLES, NOISE_SHARE = 64, 0.1  # of SmoothGrad; deviation of the noise in shares of the query's range


@dataclass(frozen=True)
class Attribution:
    """One query against one baseline."""

    query: str                # name
    other: str                # name of the baseline, or of the picture whose distance it is
    values: np.ndarray        # (G,) float64; sum = change, with Integrated Gradients
    change: float             # f(query) - f(baseline)
    delta: float | None       # |sum - change| as a share of |change|; 0 where there is no change; None of SmoothGrad

    @property
    def column(self) -> str:
        return f"{self.query} vs. {self.other}"


@dataclass(frozen=True)
class Attributer:
    """How attributions are made. `encode`: (N, G) -> (N, D), differentiable in its input."""

    encode: Callable[[Tensor], Tensor]
    method: Method = "ig"
    batch_size: int = 64          # rows that go through the encoder at once
    seed: int = 0                 # of SmoothGrad's noise

    def between_clusters(self, means: Tensor, names: list[str]) -> Iterator[Attribution]:
        """Every ordered pair of clusters; `means` (K, G). What is attributed is the distance to the baseline cluster's own embedding."""
        for i, j in permutations(range(len(names)), 2):
            yield self.attribute(means[i], means[j], self._embed(means[j]), names[i], names[j])

    def to_targets(self, means: Tensor, names: list[str], middle: Tensor, targets: Tensor,
                   target_names: list[str]) -> Iterator[Attribution]:
        """Every cluster (K, G) against every target embedding (T, D); the baseline is `middle` (G,), the average spot."""
        for i, name in enumerate(names):
            for target, target_name in zip(targets, target_names, strict=True):
                yield self.attribute(means[i], middle, target, name, target_name)

    def attribute(self, query: Tensor, baseline: Tensor, target: Tensor, name: str, other: str) -> Attribution:
        """`query` and `baseline` (G,), `target` (D,)."""
        def distance(rows: Tensor) -> Tensor:
            return (self.encode(rows) - target).square().sum(dim=1)

        with torch.no_grad():
            at_query, at_baseline = (float(distance(row[None])) for row in (query, baseline))
        change = at_query - at_baseline
        if self.method == "sg":
            slope, difference = self._smooth_gradient(distance, query), (query - baseline).double().cpu().numpy()
            return Attribution(name, other, slope * difference, change, None)
        values, delta = self._integrated_gradients(distance, query, baseline, change)
        return Attribution(name, other, values, change, delta)

    @torch.no_grad()
    def _embed(self, row: Tensor) -> Tensor:
        return self.encode(row[None])[0]

    def _integrated_gradients(self, distance, query: Tensor, baseline: Tensor, change: float) -> tuple[np.ndarray, float]:
        """Values (G,) and their relative delta; the line is walked in more steps until that is small."""
        from captum.attr import IntegratedGradients

        integral, steps = IntegratedGradients(distance), FIRST_STEPS
        while True:
            values = integral.attribute(query[None], baselines=baseline[None], n_steps=steps, internal_batch_size=self.batch_size)
            values = values[0].detach().double().cpu().numpy()
            delta = 0.0 if abs(change) < NOTHING else abs(values.sum() - change) / abs(change)
            if delta < MAX_DELTA or steps >= MAX_STEPS:
                return values, float(delta)
            steps *= 2

    def _smooth_gradient(self, distance, query: Tensor) -> np.ndarray:
        """(G,) gradient averaged over noise; the process' own random numbers stay as they were."""
        from captum.attr import NoiseTunnel, Saliency

        deviation = NOISE_SHARE * float(query.max() - query.min())
        devices = [query.device] if query.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed)
            gradient = NoiseTunnel(Saliency(distance)).attribute(query[None].clone().requires_grad_(), nt_type="smoothgrad",
                                                                 nt_samples=NOISE_SAMPLES, stdevs=max(deviation, 1e-12), abs=False,
                                                                 nt_samples_batch_size=min(self.batch_size, NOISE_SAMPLES))
        return gradient[0].detach().double().cpu().numpy()


def higher_genes_only(attribution: Attribution, query: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """(G,) absolute values of the genes that the query shows more of than the baseline, both (G,); 0 for the others."""
    return np.where(query > baseline, np.abs(attribution.values), 0.0)
