"""Power-function averages of the weights, whose length is chosen after the training (Karras et al., CVPR 2024, section 3).

An average after t steps weighs the weights of step s as s^gamma: beta_t = (1 - 1/t)^(gamma + 1). Its length is the width of that profile
as a share of t, sigma_rel. Two lengths are averaged in a run, beside the live weights and never in them, and kept now and then; any other
length is the sum of what was kept that comes nearest to its profile, by least squares of the profiles' inner products.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from networks.weights import load_weights_folder, save_weights_folder
from preprocessing.errors import InputError, WeightsError
from training.finite import require_finite

LENGTHS = (0.05, 0.10)          # sigma_rel of the two that are averaged, as published
SHORTEST, LONGEST = 0.01, 0.28  # sigma_rel that can be asked for; at 0.289 every step weighs the same
FOLDER = "averages"             # in a run folder
Profile = tuple[float, int]     # (gamma, t)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the profile of that relative length: sigma^2 (gamma + 2)^2 (gamma + 3) = gamma + 1."""
    inverse = sigma_rel ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class PowerEma:
    """Both averages of the trained parameters, float32, on the model's device."""

    def __init__(self, model: nn.Module, lengths: Sequence[float] = LENGTHS):
        self.averages = {length: [parameter.detach().clone() for parameter in _trained(model).values()] for length in lengths}
        self.names, self.n_updates = list(_trained(model)), 0

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """After a step of `model`."""
        self.n_updates += 1
        live = [parameter.detach() for parameter in _trained(model).values()]
        for length, average in self.averages.items():
            torch._foreach_lerp_(average, live, 1 - (1 - 1 / self.n_updates) ** (gamma_of(length) + 1))

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, by length and name."""
        return {f"{length}/{name}": tensor for length, average in self.averages.items()
                for name, tensor in zip(self.names, average, strict=True)}

    def keep(self, run_folder: Path) -> Path:
        """Write both, in half precision, into the run's `averages/`; returns their folder."""
        tensors = {name: tensor.half() for name, tensor in self.state().items()}
        require_finite(run_folder / FOLDER, tensors, "Lower --learning-rate")      # half precision ends at 65,504
        return save_weights_folder(run_folder / FOLDER / f"update-{self.n_updates:08d}", tensors,
                                   {"class": "PowerEma", "lengths": list(self.averages), "n_updates": self.n_updates})


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- after the training ---------------------------------------------------------------------------------------------

def inner_product(a: Profile, b: Profile) -> float:
    """Integral of the product of two profiles, (gamma + 1) s^gamma / t^(gamma + 1) for s in 0..t."""
    (p, s), (q, t) = a, b
    shorter = min(s, t)
    return (p + 1) * (q + 1) / (p + q + 1) * (shorter / s) ** p * (shorter / t) ** q * shorter / (s * t)


def shares(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Of each kept average in the one that is wanted, and how far the sum's profile stays from it: 0 for exact, 1 for nothing."""
    products = np.array([[inner_product(a, b) for b in kept] for a in kept])
    target = np.array([inner_product(a, wanted) for a in kept])
    found = np.linalg.lstsq(products, target, rcond=None)[0]
    own = inner_product(wanted, wanted)
    missed = (own - 2 * found @ target + found @ products @ found) / own
    return found, float(np.sqrt(max(missed, 0.0)))


def average_of_length(run_folder: Path, sigma_rel: float) -> tuple[dict[str, Tensor], float, int]:
    """Weights by name, float32, averaged with that length up to the last kept; how far their profile is from it; and how many were kept."""
    folders = sorted(path for path in (run_folder / FOLDER).glob("update-*") if path.name.removeprefix("update-").isdigit())
    if not folders:
        raise InputError(run_folder / FOLDER, "folder", "averages that a run with --power-ema kept", "none")
    kept = [(float(length), folder, int(folder.name.split("-")[1])) for folder in folders for length in LENGTHS]
    profiles = [(gamma_of(length), n_updates) for length, _, n_updates in kept]
    found, missed = shares(profiles, (gamma_of(sigma_rel), kept[-1][2]))
    total: dict[str, Tensor] = {}
    for start, folder in enumerate(folders):                       # one folder in memory at a time
        tensors, _config = load_weights_folder(folder)
        for length, share in zip(LENGTHS, found[start * len(LENGTHS):(start + 1) * len(LENGTHS)], strict=True):
            _add(total, tensors, f"{length}/", float(share), folder)
    return total, missed, len(folders)


def _add(total: dict[str, Tensor], tensors: Mapping[str, Tensor], prefix: str, share: float, folder: Path) -> None:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    shapes, expected = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (own, total))
    if not own or (total and shapes != expected):
        raise WeightsError(folder, "tensors", f"averages of length {prefix[:-1]} of the same model as the first", "others")
    for name, tensor in own.items():
        part = tensor.float() * share
        total[name] = total[name] + part if name in total else part
