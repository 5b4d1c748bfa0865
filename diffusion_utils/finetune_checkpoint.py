"""What a fine-tune keeps of itself to go on as if it had not stopped: trained weights, averages, statistics of the prompts, optimiser,
counters, and whose they are."""
from __future__ import annotations

import hashlib
import logging
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_utils.finetune_config import MAY_CHANGE, FinetuneConfig
from diffusion_utils.latents import hash_tensors
from preprocessing.errors import OptionError, WeightsError
from training.checkpoints import Checkpoint, latest_checkpoint, read_checkpoint, require_newest, save_checkpoint

if TYPE_CHECKING:
    from diffusion_utils.finetune import FinetuneRun

log = logging.getLogger(__name__)


@dataclass
class Standing:
    """Where a run stands and what it began with; what a checkpoint's state.json keeps."""

    step: int = 0
    ema_updates: int = 0
    bad_steps: int = 0
    bad_in_a_row: int = 0
    elapsed_s: float = 0.0
    resumed_from: str | None = None       # a checkpoint of another run; going on with its own changes neither
    first_step: int = 0


def find_checkpoint(config: FinetuneConfig) -> Checkpoint | None:
    """What the run goes on from; None for a new one. A folder that holds a run is not started anew by accident."""
    said = config.resume_from_checkpoint
    if said == "latest":
        return latest_checkpoint(config.output_dir)
    if said:
        found = read_checkpoint(said)
        require_newest(found, config.output_dir, "--output-dir")
        return found
    if any(config.output_dir.glob("checkpoint-*")):
        raise OptionError("--output-dir", "a folder without checkpoints, or --resume-from-checkpoint latest", str(config.output_dir))
    return None


def save_run(run: FinetuneRun, on_signal: bool = False) -> Path:
    """Write a checkpoint into the run's folder; returns its path."""
    state = {**asdict(run.standing), "config": run.config.record, "data_sha256": run.data.sha256, "base": run.base.source,
             "base_sha256": _base_sha256(run)}
    return save_checkpoint(run.config.output_dir, run.standing.step, keep=run.config.checkpoints_total_limit, tensors=kept_tensors(run),
                           state=state, optimisers={"optimiser": run.optimiser.state_dict()}, on_signal=on_signal)


@torch.no_grad()
def load_run(run: FinetuneRun, checkpoint: Checkpoint) -> None:
    """Bring a new run to where a checkpoint was written; refused (exit 5) if that belongs to other options, data or base."""
    _same_run(run, checkpoint)
    parts = kept_tensors(run)
    for part, own in parts.items():
        tensors = checkpoint.tensors.get(part, {})
        if {name: tensor.shape for name, tensor in tensors.items()} != {name: tensor.shape for name, tensor in own.items()}:
            raise WeightsError(checkpoint.folder, part, f"the {len(own)} trained tensors of {type(run.live).__name__}",
                               f"{len(tensors)}, not all of these names and shapes")
    try:
        run.optimiser.load_state_dict(checkpoint.optimisers["optimiser"])       # first: it looks before it takes
    except (KeyError, ValueError, TypeError) as error:
        raise WeightsError(checkpoint.folder, "optimiser", f"the state of {type(run.optimiser).__name__} for these tensors",
                           str(error)) from error
    for part, own in parts.items():
        for name, tensor in own.items():
            tensor.copy_(checkpoint.tensors[part][name])
    run.standing = Standing(**{entry.name: checkpoint.state[entry.name] for entry in fields(Standing) if entry.name in checkpoint.state})
    if checkpoint.folder.parent.resolve() != run.config.output_dir.resolve():
        run.standing.resumed_from, run.standing.first_step = str(checkpoint.folder), run.standing.step
    if run.ema is not None:
        run.ema.n_updates = run.standing.ema_updates
    if run.power_ema is not None:
        run.power_ema.n_updates = run.standing.ema_updates


def _same_run(run: FinetuneRun, checkpoint: Checkpoint) -> None:
    state, ours = checkpoint.state, run.config.record
    theirs = state.get("config", {})
    changed = [name for name in ours if name not in MAY_CHANGE and name in theirs and ours[name] != theirs[name]]
    before, now = (rate or "its default" for rate in (theirs.get("learning_rate"), ours["learning_rate"]))
    if before != now:
        log.warning("from here on --learning-rate is %s; it was %s", now, before)
    for what, expected, found in (
            ("config", "the options it was started with", ", ".join(f"{name} {theirs[name]} -> {ours[name]}" for name in changed)),
            ("data", "the patches and prompts it was started with", "" if state.get("data_sha256") == run.data.sha256 else "others"),
            ("base", f"autoencoder, noise schedule and frozen weights of {state.get('base')}",
             "" if state.get("base_sha256") == _base_sha256(run) else "others")):
        if found:
            raise WeightsError(checkpoint.folder, what, expected, found)


def kept_tensors(run: FinetuneRun) -> dict[str, dict[str, Tensor]]:
    """Tensors that a checkpoint holds, by the names of its files."""
    trained = {name: parameter for name, parameter in run.live.named_parameters() if parameter.requires_grad}
    parts = {"denoiser": trained, "prompts": run.prompts.state_dict(), "ema": None if run.ema is None else run.ema.state(),
             "power_ema": None if run.power_ema is None else run.power_ema.state()}
    return {name: tensors for name, tensors in parts.items() if tensors is not None}


def _base_sha256(run: FinetuneRun) -> str:
    """Over what is taken of the base and held by no checkpoint: how noise is added, the autoencoder, what adapters stand on."""
    if run.base_sha256 is None:                  # none of it changes in a run
        noising = run.noising
        digest = hashlib.sha256(noising.prediction.encode())
        hash_tensors(digest, {"signal": noising.signal, "noise": noising.noise})
        hash_tensors(digest, {} if run.base.vae is None else run.base.vae.state_dict())
        hash_tensors(digest, {name: parameter for name, parameter in run.live.named_parameters() if not parameter.requires_grad})
        run.base_sha256 = digest.hexdigest()
    return run.base_sha256
