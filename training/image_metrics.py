"""What `--metrics` names, and distances of generated patches to real ones while a run trains.

Distances: Frechet (`fd`) and kernel (`kd`) in the features of any encoder. Several ranks share the images.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from evaluation.distances import frechet_distance, kernel_distance
from evaluation.features import FeatureSpec, build_features
from networks.layers import images_to_float
from preprocessing.errors import OptionError
from training.ranks import gather_rows, own_rows

DEFAULT_N = 10_000
PATTERN = re.compile(r"(fid|kid)(\d+k?)?|(fd|kd)_([^=@]+?)(?:@(\d+k?))?(?:=(.+))?|(clip_score)")
EXPECTED = "fid10k, kid10k, fd_ENCODER, kd_ENCODER (fd_uni@2k=weights.safetensors), clip_score, by commas"
CLIP_SCORE, BATCH = "clip_score", 32


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
            metrics.append(Metric(name, CLIP_SCORE))
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


class ImageDistances:
    """The distances among `metrics` to real `images`, uint8 (N, 3, H, W), whose features are computed once."""

    def __init__(self, metrics: Sequence[Metric], images: Tensor, device: str, seed: int = 0):
        if metrics and len(images) < 2:
            raise OptionError("--metrics", "at least 2 patches to compare with", str(len(images)))
        self.metrics = [metric for metric in metrics if metric.features is not None]
        self.images, self.device, self.seed = images, device, seed
        self.encoders: dict[FeatureSpec, nn.Module] = {}
        for spec in dict.fromkeys(metric.features for metric in self.metrics):
            self.encoders[spec] = build_features(spec).to(device).eval()
        self.real: dict[FeatureSpec, np.ndarray] = {}

    @torch.no_grad()
    def measure(self, made: Tensor) -> dict[str, float]:
        """By metric, of uint8 patches that this rank made: one for each of `own_rows(N)`. Every rank must call it."""
        if not self.real:
            self.real = {spec: self._features(self.images[own_rows(len(self.images))], encoder) for spec, encoder in self.encoders.items()}
        fake = {spec: self._features(made, encoder) for spec, encoder in self.encoders.items()}
        return {metric.name: self._value(metric, fake) for metric in self.metrics}

    def _features(self, images: Tensor, encoder: nn.Module) -> np.ndarray:
        """float32 (N, F) of all ranks' images."""
        blocks = [encoder(images_to_float(block.to(self.device))).float() for block in images.split(BATCH)]
        return gather_rows(torch.cat(blocks))[:len(self.images)].cpu().numpy()

    def _value(self, metric: Metric, fake: Mapping[FeatureSpec, np.ndarray]) -> float:
        real, generated = self.real[metric.features][:metric.n], fake[metric.features][:metric.n]
        return frechet_distance(generated, real) if metric.kind == "fd" else kernel_distance(generated, real, seed=self.seed)[0]
