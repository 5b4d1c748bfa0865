"""What a step of the GAN is given: once for the global batch, and for each of its micro-batches."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from training.gan_draws import Draws
from training.guidance import Wanted


@dataclass(frozen=True)
class Step:
    """What all micro-batches of a step have in common."""

    number: int
    rows: np.ndarray                  # (batch,) of the data set
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
