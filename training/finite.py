"""What tells a training that diverged from one that learns: the largest rates that make sense, weights that may be kept, a bad end.

A step without finite losses and gradients is skipped. While steps are skipped nothing is saved, so that what stays is from before the
first of them; and weights that are NaN or infinite themselves are saved by nobody.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from preprocessing.errors import DivergedError, first_few

MAX_RATE = 10.0      # Adam moves every weight by about the rate at a step; plain SGD is trained with rates of a few units at most
MAX_DECAY = 100.0    # a hundred times what is used


def require_finite(where: Path | str, tensors: Mapping[str, Tensor], next_step: str = "") -> None:
    """DivergedError if any of the tensors is not finite; called before they are saved. One look at each device."""
    by_device: dict[torch.device, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            by_device.setdefault(tensor.device, {})[name] = tensor
    broken = []
    for held in by_device.values():
        finite = torch.stack([torch.isfinite(tensor).all() for tensor in held.values()]).tolist()
        broken += [name for name, is_finite in zip(held, finite, strict=True) if not is_finite]
    if broken:
        raise DivergedError(where, "weights", "finite numbers", f"NaN or infinite ones, not saved, in {first_few(broken)}", next_step)


def moments(name: str, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser remembers of its parameters, for `require_finite`."""
    return {f"{name}.{number}.{what}": value for number, state in enumerate(optimiser.state.values())
            for what, value in state.items() if isinstance(value, Tensor)}


def ends_badly(bad_in_a_row: int, n_moved: int) -> bool:
    """Whether a run that ends so did not reach its end: its last steps were skipped, or all of them. One alone at the end is skipped
    as anywhere else: a gradient scaler has such steps now and then, and a run that goes on would only meet the same one again."""
    return bad_in_a_row > 1 or (bad_in_a_row > 0 and n_moved == 0)
