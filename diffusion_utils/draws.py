"""Every random number of a training step, as a function of (seed, step, place in the global batch).

Micro-batches, the number of processes, resuming and what ran before therefore cannot change the stream. Which rows a step shows:
`training.gan_draws.batch_rows`.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

NOISE, POSTERIOR, CHOICES, PERTURBATION = range(4)   # streams: one that is not asked for does not move the others
VALIDATION = 2 ** 62                                 # no training step is numbered so
ORIENTATIONS = 8


@dataclass(frozen=True)
class Draws:
    """Random numbers of N samples."""

    noise: Tensor             # (N, C, H, W) normal
    posterior: Tensor | None  # (N, C, H, W) normal: the draw from the autoencoder's posterior
    perturbation: Tensor | None   # (N, C, H, W) normal: --input-perturbation
    uniform: Tensor           # (N,) chooses how noisy
    dropped: Tensor           # (N,) bool: shows the null prompt
    orientation: Tensor       # (N,) int64 0..7: flips and quarter turns


def draw(seed: int, step: int, places: Sequence[int], shape: tuple[int, int, int], *, p_uncond: float, posterior: bool,
         noise_offset: float = 0.0, perturbation: bool = False) -> Draws:
    """The draws of the samples at `places` of step `step`'s global batch; `shape` (C, H, W)."""
    def normal(kind: int) -> Tensor:
        return torch.from_numpy(np.stack([_stream(seed, step, kind, place).standard_normal(shape, dtype=np.float32) for place in places]))

    choices = [_stream(seed, step, CHOICES, place) for place in places]
    uniform = torch.from_numpy(np.stack([stream.random(3) for stream in choices]))     # float64
    noise = normal(NOISE)
    if noise_offset:
        offsets = np.stack([stream.standard_normal((shape[0], 1, 1), dtype=np.float32) for stream in choices])
        noise = noise + noise_offset * torch.from_numpy(offsets)
    return Draws(noise, normal(POSTERIOR) if posterior else None, normal(PERTURBATION) if perturbation else None, uniform[:, 0],
                 uniform[:, 1] < p_uncond, (uniform[:, 2] * ORIENTATIONS).long())


def _stream(seed: int, step: int, kind: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], np.uint64), counter=[0, 0, kind, place]))


def oriented(image: Tensor, orientation: int) -> Tensor:
    """One of the eight flips and quarter turns of (..., H, H)."""
    image = torch.rot90(image, orientation % 4, dims=(-2, -1))
    return image.flip(-1) if orientation >= 4 else image
