"""The moving average of a denoiser's weights, beside the live ones and never in them: what we sample from.

Decay after n steps is min(max, (1 + n) / (10 + n)). Frozen weights are shared, not copied, so that adapters cost what they weigh.
"""
from __future__ import annotations

import copy

import torch
from torch import nn

from preprocessing.errors import OptionError


class Ema:
    """`average` is a module like the live one, in evaluation mode."""

    def __init__(self, model: nn.Module, max_decay: float = 0.9999):
        if not 0 <= max_decay < 1:
            raise OptionError("--ema-decay", "at least 0 and less than 1", str(max_decay))
        frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
        self.average = copy.deepcopy(model, memo=frozen).eval().requires_grad_(False)
        self.max_decay, self.n_updates = max_decay, 0
        self._pairs = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def decay(self) -> float:
        """Weight of the old average in the next update."""
        return min(self.max_decay, (1 + self.n_updates) / (10 + self.n_updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a step of `model`, all tensors in one pass."""
        own = dict(self.average.named_parameters())
        new = [(own[name], parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        torch._foreach_lerp_([old for old, _ in new], [live.detach() for _, live in new], 1 - self.decay())
        self.n_updates += 1

    def state(self) -> dict[str, torch.Tensor]:
        """The averaged weights that are trained, by name."""
        own = dict(self.average.named_parameters())
        return {name: own[name] for name, _ in self._pairs}

    @torch.no_grad()
    def load(self, tensors: dict[str, torch.Tensor], n_updates: int) -> None:
        """Take up a checkpoint's average and its counter."""
        for name, tensor in self.state().items():
            tensor.copy_(tensors[name])
        self.n_updates = n_updates
