"""diffusers' solvers with the noise schedule of a base or a pipeline."""
from __future__ import annotations

from typing import Literal

from diffusion_utils.noising import FLOW_KIND, SD_BETAS, own_prediction
from preprocessing.errors import OptionError

Sampler = Literal["dpm++", "unipc", "ddim", "ddpm", "euler"]
FLOW_SAMPLERS = ("dpm++", "unipc", "euler")


def make_scheduler(config: dict, sampler: Sampler, steps: int):
    """A diffusers scheduler of that kind with the noise schedule of `config`, set to so many steps."""
    import diffusers

    prediction = own_prediction(config, "scheduler")
    if prediction == "flow":
        if sampler not in FLOW_SAMPLERS:
            raise OptionError("--sampler", f"one of {', '.join(FLOW_SAMPLERS)} for a model of flow matching", sampler)
        shift = config.get("flow_shift") or config.get("shift") or 1.0
        if sampler == "euler":
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        else:
            cls = diffusers.DPMSolverMultistepScheduler if sampler == "dpm++" else diffusers.UniPCMultistepScheduler
            scheduler = cls(prediction_type=FLOW_KIND, use_flow_sigmas=True, flow_shift=shift)
        scheduler.set_timesteps(steps)
        return scheduler
    shared = {name: config.get(name, default) for name, default in
              {**SD_BETAS, "num_train_timesteps": 1000, "trained_betas": None, "rescale_betas_zero_snr": False}.items()}
    shared |= {"prediction_type": prediction, "timestep_spacing": "trailing"}
    cls = {"dpm++": diffusers.DPMSolverMultistepScheduler, "unipc": diffusers.UniPCMultistepScheduler, "ddim": diffusers.DDIMScheduler,
           "ddpm": diffusers.DDPMScheduler, "euler": diffusers.EulerDiscreteScheduler}[sampler]
    if sampler in ("ddim", "ddpm"):
        shared["clip_sample"] = False
    scheduler = cls(**shared)
    scheduler.set_timesteps(steps)
    return scheduler
