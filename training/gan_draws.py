"""Every random number of a GAN step, as a function of (seed, step, position in the global batch).

Micro-batches, ranks, resuming and what ran before therefore cannot change the stream. All is drawn on the CPU: by threads ahead of
the step (training/gan_speed.py), each rank its own places.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from training.diff_augment import N_DRAWS, take_pixels

CROP_DRAWS, VIEW_DRAWS = 3, 3
UNLIKE_POOL = 64              # spots of which the farther half is unlike a given one
SAMPLING, MEASURING = 2 ** 63, 2 ** 62   # no training step is numbered so
NORMAL = ("z", "noise", "cond_noise")   # of Draws: the large ones
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
        """The draws of one micro-batch, counted from the first of these images."""
        return Draws(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))

    def pin(self) -> Draws:
        """In memory from which a GPU copies the large ones while the CPU goes on."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in NORMAL})

    def to(self, device: torch.device | str) -> Draws:
        """The large ones on the device. The uniform ones stay on the CPU, where crops and views are chosen without waiting for a GPU."""
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in NORMAL})


def draw(seed: int, step: int, places: Sequence[int], *, z_dim: int, noise_size: int, c_dim: int, phase: int = G_PHASE) -> Draws:
    """The draws of these places of a step's global batch; those of place i depend on (seed, step, phase, i) alone."""
    n, uniforms = len(places), [N_DRAWS, N_DRAWS, CROP_DRAWS, CROP_DRAWS, VIEW_DRAWS, 1, 1, UNLIKE_POOL + 1]
    normal = [np.empty((n, width), np.float32) for width in (z_dim, noise_size, c_dim)]     # an array each: it moves as one piece
    uniform = np.empty((n, sum(uniforms)), np.float32)    # new ones last: the older stay as they are
    for row, place in enumerate(places):
        stream = _stream(seed, step, phase, place)
        for values in normal:
            stream.standard_normal(out=values[row], dtype=np.float32)       # without Python's lock: threads draw side by side
        stream.random(out=uniform[row], dtype=np.float32)
    return Draws(*map(torch.from_numpy, normal), *torch.from_numpy(uniform).split(uniforms, dim=1))


def draw_z(seed: int, step: int, places: Sequence[int], z_dim: int) -> Tensor:
    """z (N, z_dim) alone, as `draw` has it for these places in its first phase: what the running mean of x is taken of."""
    z = np.empty((len(places), z_dim), np.float32)
    for row, place in enumerate(places):
        _stream(seed, step, G_PHASE, place).standard_normal(out=z[row], dtype=np.float32)
    return torch.from_numpy(z)


def _stream(seed: int, step: int, phase: int, place: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, phase, place]))


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
    n, draws = len(prompts), draws.to(prompts.device, non_blocking=True)
    pool = (rows[:, None] + 1 + (draws[:, :UNLIKE_POOL].double() * (n - 1)).long()) % n     # never the spot itself
    distance = (prompts[pool] - prompts[rows][:, None]).square().sum(dim=2)                  # (N, 64)
    farther = distance.argsort(dim=1, stable=True)[:, UNLIKE_POOL // 2:]
    chosen = (draws[:, UNLIKE_POOL:].double() * farther.shape[1]).long()
    return pool.gather(1, farther.gather(1, chosen)).squeeze(1)


def real_views(images: Tensor, draws: Tensor, *, flips: bool, max_shift_px: int) -> Tensor:
    """Show real patches as tissue may lie: eight flips and quarter turns, small shifts with mirrored edges.

    images uint8 or float (N, 3, H, H), draws (N, 3) uniform; returns the same type and shape.
    """
    side, (turn, *shifts) = images.shape[2], draws.double().unbind(dim=1)
    x, y = (_shifted(shift, side, max_shift_px) for shift in shifts)       # (N, H): column and row of the turned patch
    if not flips:
        return take_pixels(images, y, x)
    kind = (turn * 8).long()[:, None]
    quarters = kind % 4                                                    # counter-clockwise; the flip comes after the turn
    x = torch.where((kind >= 4) != (quarters >= 2), side - 1 - x, x)
    y = torch.where((quarters == 1) | (quarters == 2), side - 1 - y, y)
    return take_pixels(images, y, x, swapped=quarters % 2 == 1)


def _shifted(shift: Tensor, side: int, max_shift_px: int) -> Tensor:
    """(N, side) pixels seen along one axis after a shift, uniform (N,) in [0, 1), by up to `max_shift_px` with mirrored edges."""
    index = torch.arange(side) + ((shift * (2 * max_shift_px + 1)).long() - max_shift_px)[:, None]
    index = index.abs()
    return torch.where(index >= side, 2 * (side - 1) - index, index)
