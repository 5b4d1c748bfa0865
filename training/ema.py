"""Moving average of the generator's weights: the ones we sample from. The half-life is counted in images, not steps."""
from __future__ import annotations

import copy

import torch
from torch import nn

RAMP_UP = 0.05    # the half-life is never longer than this share of the images seen so far


def half_life_kimg(batch: int) -> float:
    """Half-life that suits a batch size: batch * 10 / 32 kimg."""
    return batch * 10 / 32


def ema_beta(n_images: int, batch: int, half_life: float) -> float:
    """Weight of the old average in one step of `batch` images, after `n_images` images in all; `half_life` in kimg."""
    half_life_images = min(half_life * 1000, n_images * RAMP_UP)
    return 0.5 ** (batch / max(half_life_images, 1e-8))


def frozen_copy(model: nn.Module) -> nn.Module:
    """The start of an average: a copy in evaluation mode that no optimiser sees."""
    return copy.deepcopy(model).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, beta: float) -> None:
    """Trainable parameters are averaged, frozen ones and buffers copied."""
    for old, new in zip(average.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - beta) if new.requires_grad else old.copy_(new)
    for old, new in zip(average.buffers(), model.buffers(), strict=True):
        old.copy_(new)
