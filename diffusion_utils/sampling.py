"""Draw pictures: solve from noise to x0, a batch of prompts at a time, guided where guidance helps.

A picture depends on its prompt and its own random numbers, not on who is drawn beside it. Guidance costs a second forward pass; scale 1
is none, and outside `interval` (shares of the noise schedule, 0 clean to 1 pure noise; Kynkaanniemi et al., NeurIPS 2024) none is spent.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import get_args

import torch
from torch import Tensor, nn

from diffusion_utils.denoisers import denoise
from diffusion_utils.schedulers import Sampler
from preprocessing.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class Solver:
    """How noise becomes a picture."""

    sampler: Sampler = "dpm++"
    steps: int = 20
    guidance_scale: float = 3.0                        # 1 = off
    interval: tuple[float, float] = (0.0, 1.0)         # where guidance acts

    def __post_init__(self):
        if self.sampler not in get_args(Sampler):
            raise OptionError("--sampler", f"one of {', '.join(get_args(Sampler))}", str(self.sampler))
        if not 1 <= self.steps <= 1000:
            raise OptionError("--steps", "1 to 1000", str(self.steps))
        if not isfinite(self.guidance_scale) or self.guidance_scale < 0:
            raise OptionError("--guidance-scale", "a number of at least 0", str(self.guidance_scale))
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise OptionError("--guidance-interval", "lo,hi with 0 <= lo <= hi <= 1", f"{low:g},{high:g}")

    def guides(self, share: float) -> bool:
        return self.guidance_scale != 1 and self.interval[0] <= share <= self.interval[1]


def parse_interval(text: str) -> tuple[float, float]:
    """'0.2,0.8' -> (0.2, 0.8)."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as error:
        raise OptionError("--guidance-interval", "two numbers, as 0.2,0.8", text) from error
    return low, high


@torch.no_grad()
def sample(denoiser: nn.Module, scheduler, tokens: Tensor, null_tokens: Tensor, noise: Tensor, solver: Solver,
           generators: Sequence[torch.Generator] | None = None, after_step: Callable[[], object] = lambda: None) -> Tensor:
    """x0 (N, C, H, W) of float32 `noise` for tokens (N, L, W); null_tokens (1, L, W). `generators`: one a picture, on the CPU, for
    samplers that add noise on the way (ddpm). `scheduler` comes fresh from `make_scheduler`."""
    device, dtype = noise.device, next(denoiser.parameters()).dtype
    nulls = null_tokens.expand(len(tokens), -1, -1)
    both = torch.cat([nulls, tokens]).to(dtype)
    x = noise * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else noise
    n_timesteps = scheduler.config.num_train_timesteps
    takes_generator = "generator" in scheduler.step.__code__.co_varnames
    extra = {"generator": list(generators)} if takes_generator and generators is not None else {}
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
        seen, times = seen.to(dtype), timestep.to(device).expand(len(x))
        if solver.guides(float(timestep) / n_timesteps):
            null, prompted = denoise(denoiser, torch.cat([seen, seen]), torch.cat([times, times]), both).float().chunk(2)
            predicted = null + solver.guidance_scale * (prompted - null)
        else:
            predicted = denoise(denoiser, seen, times, both[len(x):]).float()
        x = scheduler.step(predicted, timestep, x, **extra, return_dict=False)[0]
        after_step()
    return x
