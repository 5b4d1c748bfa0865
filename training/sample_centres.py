"""The mean image features of whole samples, about which a CLIP with `feature_sample_scaling` centres every patch.

They are of all spots of a sample, whichever a run trains on, and of patches as an embedding sees them: not recoloured.
"""
from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from networks.sample_scaling import patches_for_mean
from training.augment import plain_views, turned_views
from training.clip_features import compute_features
from training.patch_cache import PatchRows

if TYPE_CHECKING:      # a machine that only times the networks has no readers of patches
    from training.patch_images import PatchImages


@dataclass(frozen=True)
class SamplePatches:
    """Opens the patches that stand for each of S samples, one sample at a time: together they need not fit into memory."""

    openers: list[Callable[[], PatchRows]]

    @classmethod
    def of(cls, images: PatchImages, numbers: np.ndarray, *, image_px: int | None = None,
           cache_dir: Path | str | None = None) -> SamplePatches:
        """Of `images`, before any row of them is left out; `numbers` (N,) their samples, from 0."""
        parts = [copy(images) for _ in range(int(numbers.max()) + 1)]
        for number, part in enumerate(parts):
            part.keep(patches_for_mean(numbers, number))
        return cls([partial(part.open_patches, image_px, progress=False, cache_dir=cache_dir) for part in parts])

    def mean_features(self, tower: Callable[[Tensor], Tensor], *, n_views: int = 1, device: torch.device | str = "cpu") -> Tensor:
        """float32 (S, F) on the CPU: means over the patches, and over their eight flips and turns where `n_views` is 8."""
        views, means = turned_views() if n_views == 8 else plain_views(1), []
        for open_patches in self.openers:
            images = open_patches()
            features = compute_features(images, views.expand(len(images), -1, -1), tower, device=device, progress=False)
            means.append(features.mean((0, 1)))
        return torch.stack(means)
