"""Measure a run's averaged generator at its snapshots: distances to real patches, and how well patches fit their genes.

Uses the validation patches where there are some, else the training ones; the prompts are those patches' own. Random numbers are its
own, weights are those of the average: nothing of the training state is touched. Several ranks share the images.
"""
from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaluation.distances import frechet_distance, kernel_distance
from evaluation.features import FeatureSpec, build_features
from networks.generator import Generator
from networks.layers import images_to_float
from preprocessing.errors import OptionError
from training.gan_data import GanData
from training.gan_grids import generate
from training.gan_parts import TrainingData
from training.ranks import gather_rows, own_rows

DEFAULT_N = 10_000
PATTERN = re.compile(r"(fid|kid)(\d+k?)?|(fd|kd)_([^=@]+?)(?:@(\d+k?))?(?:=(.+))?|(clip_score)")
EXPECTED = "fid10k, kid10k, fd_ENCODER, kd_ENCODER (fd_uni@2k=weights.safetensors), clip_score, by commas"
BATCH = 32


@dataclass(frozen=True)
class Metric:
    """One number: a Frechet (`fd`) or kernel (`kd`) distance in a feature space, or the mean cosine of patch and genes."""

    name: str                           # as the user wrote it, without the weight file
    kind: str                           # fd | kd | clip_score
    features: FeatureSpec | None = None
    n: int = DEFAULT_N                  # images a side, at most


def parse_metrics(text: str) -> list[Metric]:
    """`fid10k,fd_uni@2k=uni.safetensors,clip_score` -> metrics; "none" or nothing -> none."""
    metrics = []
    for part in (part.strip() for part in text.split(",") if part.strip() not in ("", "none")):
        match = PATTERN.fullmatch(part)
        if match is None:
            raise OptionError("--metrics", EXPECTED, part)
        short, short_n, kind, encoder, n, weights, clip_score = match.groups()
        name = part.split("=", 1)[0]
        if clip_score:
            metrics.append(Metric(name, "clip_score"))
        elif short:
            metrics.append(Metric(name, {"fid": "fd", "kid": "kd"}[short], FeatureSpec("inception"), _count(short_n)))
        else:
            metrics.append(Metric(name, kind, FeatureSpec(encoder, Path(weights) if weights else None), _count(n)))
    if len({metric.name for metric in metrics}) < len(metrics):
        raise OptionError("--metrics", "every metric once", text)
    return metrics


def _count(text: str | None) -> int:
    """10k -> 10,000."""
    n = DEFAULT_N if text is None else int(text.removesuffix("k")) * (1000 if text.endswith("k") else 1)
    if n < 2:
        raise OptionError("--metrics", "at least 2 images", str(n))
    return n


@dataclass
class SnapshotMetrics:
    """What `--metrics` asked for, with the real side computed once."""

    metrics: list[Metric]
    data: GanData
    clip: nn.Module | None              # with image tower, for clip_score
    device: str
    seed: int = 0
    encoders: dict[FeatureSpec, nn.Module] = field(init=False, default_factory=dict)
    real: dict[FeatureSpec, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self):
        for metric in self.metrics:
            if metric.features is not None and metric.features not in self.encoders:
                self.encoders[metric.features] = build_features(metric.features).to(self.device)
            if metric.kind == "clip_score" and self.clip is None:
                raise OptionError("--metrics", "clip_score with CLIP weights that name an image tower", "none")
        pool = self.data.validation or self.data.training
        n = min(max((metric.n for metric in self.metrics), default=0), len(pool.images))
        rows = np.random.default_rng(self.seed).permutation(len(pool.images))[:n]     # in random order: a metric of fewer takes the first
        self.images, self.prompts = pool.images[rows], pool.prompts[rows]
        self.centres = self._centres(pool, rows) if any(metric.kind == "clip_score" for metric in self.metrics) else None
        if self.metrics and n < 2:
            raise OptionError("--metrics", "at least 2 patches to compare with", str(n))

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
        fake = {spec: self._features(made, encoder) for spec, encoder in self.encoders.items()}
        if not self.real:
            self.real = {spec: self._features(self.images[own], encoder) for spec, encoder in self.encoders.items()}
        return {f"metrics/{metric.name}": self._value(metric, fake, made, own) for metric in self.metrics}

    def _features(self, images: Tensor, encoder: nn.Module) -> np.ndarray:
        """float32 (N, F) of all ranks' uint8 images."""
        blocks = [encoder(images_to_float(block.to(self.device))).float() for block in images.split(BATCH)]
        return gather_rows(torch.cat(blocks))[:len(self.prompts)].cpu().numpy()

    def _centre_of(self, rows: Tensor) -> Tensor | None:
        return None if self.centres is None else self.centres[rows.to(self.device)]

    def _value(self, metric: Metric, fake: Mapping[FeatureSpec, np.ndarray], made: Tensor, own: Tensor) -> float:
        if metric.kind == "clip_score":
            cosines = [(self.clip.encode_images(images_to_float(made[part].to(self.device)), self._centre_of(own[part])).cpu()
                        * F.normalize(self.prompts[own[part]], dim=1)).sum(1) for part in torch.arange(len(own)).split(BATCH)]
            return float(gather_rows(torch.cat(cosines).to(self.device))[:len(self.prompts)].mean())
        real, generated = self.real[metric.features][:metric.n], fake[metric.features][:metric.n]
        return frechet_distance(generated, real) if metric.kind == "fd" else kernel_distance(generated, real, seed=self.seed)[0]
