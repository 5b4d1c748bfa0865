"""Measure a run's averaged generator at its snapshots: distances to real patches, and how well patches fit their genes.

Uses the validation patches where there are some, else the training ones; the prompts are those patches' own. Random numbers are its
own, weights are those of the average: nothing of the training state is touched. Several ranks share the images.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.generator import Generator
from networks.layers import images_to_float
from preprocessing.errors import OptionError
from training.gan_data import GanData
from training.gan_grids import generate
from training.gan_parts import TrainingData
from training.image_metrics import BATCH, CLIP_SCORE, ImageDistances, Metric
from training.ranks import gather_rows, own_rows


@dataclass
class SnapshotMetrics:
    """What `--metrics` asked for, with the real side computed once."""

    metrics: list[Metric]
    data: GanData
    clip: nn.Module | None              # with image tower, for clip_score
    device: str
    seed: int = 0
    distances: ImageDistances = field(init=False)

    def __post_init__(self):
        scores = [metric for metric in self.metrics if metric.kind == CLIP_SCORE]
        if scores and self.clip is None:
            raise OptionError("--metrics", "clip_score with CLIP weights that name an image tower", "none")
        pool = self.data.validation or self.data.training
        n = min(max((metric.n for metric in self.metrics), default=0), len(pool.images))
        rows = np.random.default_rng(self.seed).permutation(len(pool.images))[:n]     # in random order: a metric of fewer takes the first
        self.prompts = pool.prompts[rows]
        self.distances = ImageDistances(self.metrics, pool.images[rows], self.device, self.seed)
        self.centres = self._centres(pool, rows) if scores else None

    def _centres(self, pool: TrainingData, rows: np.ndarray) -> Tensor | None:
        """(n, F) mean image features of the sample of each prompt, where CLIP centres on them."""
        if not self.clip.centres_features:
            return None
        means = pool.sample_patches.mean_features(self.clip.image_encoder, n_views=self.clip.config.image_views, device=self.device)
        return means[pool.samples[rows]].to(self.device)

    @torch.no_grad()
    def measure(self, generator: Generator) -> dict[str, float]:
        """`metrics/<name>` of one patch a prompt. Every rank must call it; every rank gets the numbers."""
        if not self.metrics:
            return {}
        own = own_rows(len(self.prompts))
        made = generate(generator, self.prompts[own], [(self.seed, int(row)) for row in own], batch=BATCH)
        found = self.distances.measure(made)
        return {f"metrics/{metric.name}": self._clip_score(made, own) if metric.kind == CLIP_SCORE else found[metric.name]
                for metric in self.metrics}

    def _centre_of(self, rows: Tensor) -> Tensor | None:
        return None if self.centres is None else self.centres[rows.to(self.device)]

    def _clip_score(self, made: Tensor, own: Tensor) -> float:
        """Mean cosine of patches and the genes they were made for."""
        cosines = [(self.clip.encode_images(images_to_float(made[part].to(self.device)), self._centre_of(own[part])).cpu()
                    * F.normalize(self.prompts[own[part]], dim=1)).sum(1) for part in torch.arange(len(own)).split(BATCH)]
        return float(gather_rows(torch.cat(cosines).to(self.device))[:len(self.prompts)].mean())
