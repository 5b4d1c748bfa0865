"""What a fine-tune keeps of itself to go on as if it had not stopped: trained weights, average, optimiser, counters, and whose they are."""
from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_utils.finetune_config import MAY_CHANGE, FinetuneConfig
from preprocessing.errors import OptionError, WeightsError
from training.run_folder import Checkpoint, latest_checkpoint, read_checkpoint, save_checkpoint

if TYPE_CHECKING:
    from diffusion_utils.finetune import FinetuneRun


@dataclass
class Standing:
    """Counters of a run; what a checkpoint's state.json keeps."""

    step: int = 0
    ema_updates: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    elapsed_s: float = 0.0


def find_checkpoint(config: FinetuneConfig) -> Checkpoint | None:
    """What the run goes on from; None for a new one. A folder that holds a run is not started anew by accident."""
    said = config.resume_from_checkpoint
    if said == "latest":
        return latest_checkpoint(config.output_dir)
    if said:
        return read_checkpoint(said)
    if any(config.output_dir.glob("checkpoint-*")):
        raise OptionError("--output-dir", "a folder without checkpoints, or --resume-from-checkpoint latest", str(config.output_dir))
    return None


def save_run(run: FinetuneRun) -> Path:
    """Write a checkpoint into the run's folder; returns its path."""
    return save_checkpoint(run.config.output_dir, run.standing.step, keep=run.config.checkpoints_total_limit, tensors=_parts(run),
                           state={**asdict(run.standing), "config": run.config.record, "data_sha256": run.data.sha256,
                                  "base": run.base.source, "frozen_sha256": _frozen_sha256(run)},
                           optimisers={"optimiser": run.optimiser.state_dict()})


@torch.no_grad()
def load_run(run: FinetuneRun, checkpoint: Checkpoint) -> None:
    """Bring a new run to where a checkpoint was written; refused (exit 5) if that belongs to other options, data or base."""
    _same_run(run, checkpoint)
    parts = _parts(run)
    for part, own in parts.items():
        tensors = checkpoint.tensors.get(part, {})
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in own.items()}:
            raise WeightsError(checkpoint.folder, part, f"the {len(own)} trained tensors of {type(run.live).__name__}",
                               f"{len(tensors)}, not all of these names and shapes")
    for part, own in parts.items():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.tensors[part][name])
    run.optimiser.load_state_dict(checkpoint.optimisers["optimiser"])
    run.standing = Standing(**{counter.name: checkpoint.state[counter.name] for counter in fields(Standing)})
    if run.ema is not None:
        run.ema.n_updates = run.standing.ema_updates


def _same_run(run: FinetuneRun, checkpoint: Checkpoint) -> None:
    state, ours = checkpoint.state, run.config.record
    theirs = state.get("config", {})
    changed = [name for name in ours if name not in MAY_CHANGE and name in theirs and ours[name] != theirs[name]]
    for what, expected, found in (
            ("config", "the options it was started with", ", ".join(f"{name} {theirs[name]} -> {ours[name]}" for name in changed)),
            ("data", "the patches and prompts it was started with", "" if state.get("data_sha256") == run.data.sha256 else "others"),
            ("base", f"the weights of {state.get('base')}", "" if state.get("frozen_sha256") == _frozen_sha256(run) else "others")):
        if found:
            raise WeightsError(checkpoint.folder, what, expected, found)


def _parts(run: FinetuneRun) -> dict[str, dict[str, Tensor]]:
    """Tensors that a checkpoint holds, by the names of its files."""
    trained = {name: parameter for name, parameter in run.live.named_parameters() if parameter.requires_grad}
    return {"denoiser": trained} if run.ema is None else {"denoiser": trained, "ema": run.ema.state()}


def _frozen_sha256(run: FinetuneRun) -> str | None:
    """Over what adapters stand on, which a checkpoint does not hold; None where all weights are trained."""
    if not run.config.lora_rank:
        return None
    digest = hashlib.sha256()
    for name, parameter in run.live.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode() + parameter.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
