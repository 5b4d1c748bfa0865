"""Every random number of a GAN step, as a function of (seed, step, position in the global batch).

Micro-batches, resuming and what ran before therefore cannot change the stream.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.diff_augment import N_DRAWS

CROP_DRAWS, VIEW_DRAWS = 3, 3
UNLIKE_POOL = 64              # spots of which the farther half is unlike a given one
SAMPLING, MEASURING = 2 ** 63, 2 ** 62   # no training step is numbered so
G_PHASE, D_PHASE = 0, 1       # separate streams; a shared pass uses the first for both


@dataclass(frozen=True)
class Draws:
    """Random numbers of N images: normal z, noise and condition noise, the rest uniform in [0, 1)."""

    z: Tensor                 # (N, z_dim)
    noise: Tensor             # (N, noise_size) per-pixel noise of the generator
    cond_noise: Tensor        # (N, c_dim)
    augment_fake: Tensor      # (N, 7) DiffAugment
    augment_real: Tensor      # (N, 7)
    crop_fake: Tensor         # (N, 3) crops in front of the backbone
    crop_real: Tensor         # (N, 3)
    view: Tensor              # (N, 3) flip or turn, shift x, shift y of the real patch
    coin_fake: Tensor         # (N, 1) whether an image is augmented at all, where not all are
    coin_real: Tensor         # (N, 1)
    unlike: Tensor            # (N, 65) choice of a spot with other genes

    def part(self, start: int, stop: int) -> Draws:
        """The draws of one micro-batch."""
        return Draws(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))

    def to(self, device: torch.device | str) -> Draws:
        return Draws(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


def draw(seed: int, step: int, batch: int, *, z_dim: int, noise_size: int, c_dim: int, phase: int = G_PHASE) -> Draws:
    """The draws of one step's whole batch; row i depends on (seed, step, phase, i) alone."""
    n_normal = z_dim + noise_size + c_dim
    uniforms = [N_DRAWS, N_DRAWS, CROP_DRAWS, CROP_DRAWS, VIEW_DRAWS, 1, 1, UNLIKE_POOL + 1]   # new ones last: the older stay as they are
    n_uniform = sum(uniforms)
    normal, uniform = np.empty((batch, n_normal), np.float32), np.empty((batch, n_uniform), np.float32)
    for row in range(batch):
        stream = np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, phase, row]))
        normal[row] = stream.standard_normal(n_normal, dtype=np.float32)
        uniform[row] = stream.random(n_uniform, dtype=np.float32)
    return Draws(*torch.from_numpy(normal).split([z_dim, noise_size, c_dim], dim=1),
                 *torch.from_numpy(uniform).split(uniforms, dim=1))


def seeded_draws(keys: Sequence[tuple[int, int]], z_dim: int, noise_size: int) -> tuple[Tensor, Tensor]:
    """z (N, z_dim) and per-pixel noise (N, noise_size) for sampling; row i depends on its key, (seed, number), alone."""
    streams = [np.random.Generator(np.random.Philox(key=np.array([seed, SAMPLING + number], np.uint64))) for seed, number in keys]
    normal = np.stack([stream.standard_normal(z_dim + noise_size, dtype=np.float32) for stream in streams])
    return torch.from_numpy(normal).split([z_dim, noise_size], dim=1)


def batch_rows(seed: int, step: int, batch: int, n_images: int) -> np.ndarray:
    """Rows of the data set that step `step` shows: consecutive pieces of an endless chain of shuffled epochs. (batch,) int64."""
    positions = np.arange(step * batch, (step + 1) * batch)
    epochs = positions // n_images
    orders = {epoch: np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 1, 0, 0])).permutation(n_images)
              for epoch in np.unique(epochs)}
    return np.array([orders[epoch][position % n_images] for epoch, position in zip(epochs, positions, strict=True)], dtype=np.int64)


def unlike_rows(prompts: Tensor, rows: Tensor, draws: Tensor) -> Tensor:
    """For each of `rows` (N,) another spot whose prompt (row of `prompts`) is far from its own; (N,) int64.

    Of 64 other spots drawn, one of the 32 farthest, drawn too: about uniform over the spots farther than the median distance, at a
    cost that does not grow with the data set. draws (N, 65) uniform.
    """
    n = len(prompts)
    pool = (rows[:, None] + 1 + (draws[:, :UNLIKE_POOL].double() * (n - 1)).long()) % n     # never the spot itself
    distance = (prompts[pool] - prompts[rows][:, None]).square().sum(dim=2)                  # (N, 64)
    farther = distance.argsort(dim=1, stable=True)[:, UNLIKE_POOL // 2:]
    chosen = (draws[:, UNLIKE_POOL:].double() * farther.shape[1]).long()
    return pool.gather(1, farther.gather(1, chosen)).squeeze(1)


def real_views(images: Tensor, draws: Tensor, *, flips: bool, max_shift_px: int) -> Tensor:
    """Show real patches as tissue may lie: eight flips and quarter turns, small shifts with mirrored edges.

    images uint8 or float (N, 3, H, H), draws (N, 3) uniform; returns the same type and shape.
    """
    views = []
    for image, (turn, shift_x, shift_y) in zip(images, draws.tolist(), strict=True):
        if flips:
            kind = int(turn * 8)
            image = torch.rot90(image, kind % 4, dims=(1, 2))
            image = image.flip(2) if kind >= 4 else image
        if max_shift_px:
            side = image.shape[2]
            index = torch.arange(side, device=image.device)
            x, y = (int(shift * (2 * max_shift_px + 1)) - max_shift_px for shift in (shift_x, shift_y))
            image = image[:, _mirror(index + y, side)][:, :, _mirror(index + x, side)]
        views.append(image)
    return torch.stack(views)


def _mirror(index: Tensor, side: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index)
