"""Moving averages of the generator's weights: the ones we sample from. Half-lives are counted in images, not steps."""
from __future__ import annotations

import copy
from collections.abc import Sequence

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


class Averages:
    """Averages of one model by multiple of the published half-life; that of multiple 1 is `published`, the one snapshots hold.

    A multiple stretches the ramp-up too, so that averages differ from the first step on.
    """

    def __init__(self, model: nn.Module, multiples: Sequence[float], batch: int):
        self.models, self.batch = {multiple: frozen_copy(model) for multiple in multiples}, batch

    @property
    def published(self) -> nn.Module:
        return self.models[1.0]

    @property
    def others(self) -> dict[str, nn.Module]:
        """The averages beside the published one, by name: ema-<half-life in kimg>."""
        kimg = half_life_kimg(self.batch)
        return {f"ema-{multiple * kimg:g}": model for multiple, model in self.models.items() if multiple != 1}

    def update(self, model: nn.Module, n_images: int) -> None:
        """After the step with which `n_images` images were seen in all."""
        beta = ema_beta(n_images, self.batch, half_life_kimg(self.batch))
        for multiple, average in self.models.items():
            update_average(average, model, beta ** (1 / multiple))

    def parts(self) -> dict[str, nn.Module]:
        """All of them by part of a checkpoint: `average`, and `average-<multiple>` of the others."""
        return {"average" if multiple == 1 else f"average-{multiple:g}": model for multiple, model in self.models.items()}
