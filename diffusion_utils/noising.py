"""What a denoiser learns: how a picture is made noisy, what is predicted of it, and how errors are weighed.

epsilon: the noise, with min-SNR weights min(SNR, gamma) / SNR (Hang et al., ICCV 2023). v_prediction: v = a noise - s x0, weights
min(SNR, gamma) / (SNR + 1), on betas whose last step is pure noise (Lin et al., WACV 2024). flow: x_t = (1 - s) x0 + s noise, and the
velocity noise - x0, s drawn logit-normal (Esser et al., ICML 2024). x0 are pictures or latents (N, C, H, W) of about unit scale.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from preprocessing.errors import InputError, OptionError

Prediction = Literal["epsilon", "v_prediction", "flow"]
N_TIMESTEPS, MOST_TIMESTEPS = 1000, 100_000
FLOW_KIND = "flow_prediction"       # what diffusers' solvers call it
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class Noising:
    """One way to make noisy; `uniform` (N,) in [0, 1) chooses how noisy."""

    prediction: Prediction
    signal: Tensor            # (T,) weight of x0 by timestep; flow: unused
    noise: Tensor             # (T,) weight of the noise
    snr_gamma: float | None = 5.0

    def timesteps(self, uniform: Tensor) -> Tensor:
        """(N,): what the denoiser is told; whole numbers below T, for flow 1000 s."""
        if self.prediction == "flow":
            s = torch.sigmoid(torch.special.ndtri(uniform.double().clamp(1e-6, 1 - 1e-6)))
            return (s * N_TIMESTEPS).float()
        return (uniform.double() * len(self.signal)).long().clamp(max=len(self.signal) - 1)

    def _weights(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self.prediction == "flow":
            s = timesteps / N_TIMESTEPS
            a, b = 1 - s, s
        else:
            a, b = self.signal.to(timesteps.device)[timesteps], self.noise.to(timesteps.device)[timesteps]
        return a[:, None, None, None], b[:, None, None, None]

    def noisy(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        a, b = self._weights(timesteps)
        return a * x0 + b * noise

    def target(self, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - x0
        a, b = self._weights(timesteps)
        return a * noise - b * x0

    def losses(self, predicted: Tensor, x0: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """(N,) weighted mean squared errors."""
        errors = (predicted.float() - self.target(x0, noise, timesteps)).square().mean(dim=(1, 2, 3))
        return errors * self.loss_weights(timesteps)

    def loss_weights(self, timesteps: Tensor) -> Tensor:
        """(N,); 1 for flow and without `snr_gamma`."""
        if self.prediction == "flow" or self.snr_gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        a, b = (weights.flatten() for weights in self._weights(timesteps))
        snr = a.square() / b.square().clamp(min=1e-12)
        least = snr.clamp(max=self.snr_gamma)
        if self.prediction == "v_prediction":
            return least / (snr + 1)
        return torch.where(snr > 0, least / snr.clamp(min=1e-12), torch.ones_like(snr))


def noising_of(scheduler, snr_gamma: float | None = 5.0) -> Noising:
    """The training side of a diffusers scheduler with `alphas_cumprod`, or one of flow matching."""
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind == FLOW_KIND:
        return Noising("flow", torch.zeros(0), torch.zeros(0), None)
    if kind not in get_args(Prediction):
        raise OptionError("--prediction-type", f"one of {', '.join(get_args(Prediction))}", str(kind))
    alphas = scheduler.alphas_cumprod.double()
    return Noising(kind, alphas.sqrt().float(), (1 - alphas).sqrt().float(), snr_gamma)


def scheduler_config(prediction: str) -> dict:
    """Config of the scheduler that belongs to a way of predicting."""
    if prediction == "flow":
        return {"_class_name": "DPMSolverMultistepScheduler", "prediction_type": FLOW_KIND, "use_flow_sigmas": True, "flow_shift": 1.0,
                "num_train_timesteps": 1000}
    return {"_class_name": "DDIMScheduler", **SD_BETAS, "num_train_timesteps": 1000, "prediction_type": prediction, "clip_sample": False,
            "set_alpha_to_one": True, "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": prediction == "v_prediction"}


def own_prediction(scheduler: Mapping, path: Path | str) -> str:
    """epsilon, v_prediction or flow, as a scheduler's config says."""
    if not isinstance(scheduler, Mapping):
        raise InputError(path, "scheduler", "the config of a scheduler", type(scheduler).__name__)
    kind = scheduler.get("prediction_type", "epsilon")
    if "FlowMatch" in str(scheduler.get("_class_name")) or kind == FLOW_KIND:
        return "flow"
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(path, "scheduler: prediction_type", "epsilon, v_prediction or flow matching", str(kind))
    return kind


def require_scheduler(config: Mapping, path: Path) -> None:
    """Refuse now what could not be written into a pipeline, or solved, after the training."""
    import diffusers

    name = str(config.get("_class_name"))
    if not (name.endswith("Scheduler") and hasattr(diffusers, name)):
        raise InputError(path, "_class_name", "a scheduler of diffusers", name)
    if config.get("beta_schedule", "linear") not in BETA_SCHEDULES and not config.get("trained_betas"):
        raise InputError(path, "beta_schedule", f"one of {', '.join(BETA_SCHEDULES)}", str(config.get("beta_schedule")))
    steps = config.get("num_train_timesteps", N_TIMESTEPS)
    if not isinstance(steps, int) or not 0 < steps <= MOST_TIMESTEPS:           # before tensors of that length are made
        raise InputError(path, "num_train_timesteps", f"a whole number up to {MOST_TIMESTEPS:,}", str(steps))
