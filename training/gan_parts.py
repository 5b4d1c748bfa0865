"""What the GAN is given: for the whole run, once for a step's global batch, and for each of its micro-batches."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from training.gan_draws import Draws
from training.gan_speed import place_patches
from training.guidance import Wanted
from training.sample_centres import SamplePatches


@dataclass
class TrainingData:
    """What the discriminator may see, held on the device: patches as uint8 (on the host where they are too many), prompts embedded once."""

    images: Tensor                    # (N, 3, H, H) uint8
    prompts: Tensor                   # (N, c_dim) float32, row i belongs to patch i
    pair_deviations: Tensor | None = None   # (4,) how much two real patches of like prompts differ; with diversity_weight
    expression: sp.csr_matrix | None = None   # (N, G) normalised, on the CPU: what prompts are embedded from; with cond_dropout or an MLP
    samples: Tensor | None = None     # int64 (N,) sample of each patch; None without expression
    sample_patches: SamplePatches | None = None   # of these samples, whole: for a CLIP that centres on them

    def to(self, device: torch.device | str) -> TrainingData:
        deviations = None if self.pair_deviations is None else self.pair_deviations.to(device)
        return replace(self, images=place_patches(self.images, device), prompts=self.prompts.to(device), pair_deviations=deviations)


@dataclass(frozen=True)
class Given:
    """What a step starts with, made ahead of it; on the CPU, but for patches of a data set that lies on the device."""

    rows: np.ndarray                  # (batch,) of the data set
    patches: Tensor                   # uint8 (n, 3, H, H) of this rank's rows
    draws: Draws                      # of this rank's places
    d_draws: Draws | None             # of the discriminator's pass, where it has one of its own
    z: Tensor | None                  # (batch, z_dim) of all ranks, where the running mean of x follows them


@dataclass(frozen=True)
class Step:
    """What all micro-batches of a step have in common."""

    number: int
    rows: np.ndarray                  # (batch,) of the data set
    patches: Tensor                   # uint8 (n, 3, H, H) of this rank's rows
    prompts: Tensor                   # (batch, c_dim), with a gradient where their encoder is trained
    sigma: float                      # px of the blur
    clip_weight: float
    wanted: Wanted | None             # with clip_weight


@dataclass(frozen=True)
class Part:
    """One micro-batch of N."""

    places: slice                     # in the global batch
    rows: np.ndarray                  # (N,) of the data set
    c: Tensor                         # (N, c_dim) prompts the discriminator sees
    asked: Tensor                     # (N, c_dim) prompts the generator is given
    real: Tensor                      # (N, 3, H, H) in [-1, 1]
    draws: Draws
