"""What a GAN run keeps of itself to go on as if it had not stopped: networks, averages, optimisers, counters, and whose they are."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from networks.weights import load_into
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import WeightsError
from training.checkpoints import STATE_FILE, Checkpoint, save_checkpoint
from training.gan_config import GanConfig
from training.gan_progress import Progress, resolved_fade_kimg

if TYPE_CHECKING:
    from training.gan_loop import GanRun

log = logging.getLogger(__name__)
RATES = ("g_lr", "d_lr")      # lowered where a run diverged
MAY_CHANGE = (*RATES, "kimg", "budget_minutes", "tick", "snap", "max_bad_steps", "precision", "compile", "workers")   # when a run goes on
OPTIMISER_SETTINGS = ("betas", "eps", "weight_decay", "amsgrad", "maximize")     # fixed in a run; the learning rate moves
OPTION_DEFAULTS = {option.name: option.default for option in fields(GanConfig)}   # of options younger than a checkpoint


def save_run(run: GanRun, on_signal: bool = False) -> Path:
    """Write a checkpoint into the run's folder; returns its path."""
    gan, options = run.gan, asdict(run.config)
    state = {**asdict(run.progress), "config": options, "data_sha256": run.data.sha256, "backbone": run.encoder.source,
             "genes_sha256": None if run.mlp is None else strings_sha256(run.mlp.gene_names)}
    optimisers = {"g_optimiser": gan.g_optimiser.state_dict(), "d_optimiser": gan.d_optimiser.state_dict()}
    return save_checkpoint(run.folder, run.progress.step, state=state, tensors=kept_tensors(run), optimisers=optimisers,
                           on_signal=on_signal)


def kept_tensors(run: GanRun) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint, by the names of its files."""
    return {"discriminator": run.gan.discriminator.trainable_state(), **{name: part.state_dict() for name, part in _networks(run).items()}}


def _networks(run: GanRun) -> dict[str, nn.Module]:
    """Networks that a checkpoint holds whole, by the names of their files."""
    parts = {"generator": run.gan.generator, **run.averages.parts()}
    return parts if run.mlp is None else {**parts, "mlp": run.mlp, "mlp_average": run.mlp_average}


def load_run(run: GanRun, checkpoint: Checkpoint) -> None:
    """Bring a new run to where a checkpoint was written; WeightsError if that was of other options, data or backbone."""
    theirs = {**OPTION_DEFAULTS, **read_state(checkpoint)["config"]}
    _same_run(run, checkpoint, theirs)
    gan = run.gan
    names = ("discriminator", *_networks(run))
    for part in names:
        if part not in checkpoint.tensors:
            raise WeightsError(checkpoint.folder, "parts", ", ".join(names), f"no {part}")
    for part, network in _networks(run).items():
        load_into(network, checkpoint.tensors[part], checkpoint.folder)
    frozen = {name: tensor for name, tensor in gan.discriminator.state_dict().items() if name.startswith("taps.")}
    load_into(gan.discriminator, {**checkpoint.tensors["discriminator"], **frozen}, checkpoint.folder)
    for name, optimiser in (("g_optimiser", gan.g_optimiser), ("d_optimiser", gan.d_optimiser)):
        _load_optimiser(optimiser, checkpoint, name)
    run.progress = _counters(checkpoint)
    if run.progress.blur_fade_kimg is None:      # a checkpoint older than this record
        if not _is_number(theirs["kimg"]):
            raise WeightsError(checkpoint.folder / STATE_FILE, "config", "the --kimg of the run", repr(theirs["kimg"])[:80])
        run.progress.blur_fade_kimg = resolved_fade_kimg(theirs["blur_fade_kimg"], theirs["kimg"])


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """state.json as `save_run` writes it; WeightsError where it is that of something else."""
    state, file = checkpoint.state, checkpoint.folder / STATE_FILE
    if not isinstance(state, dict):
        raise WeightsError(file, "contents", "a JSON object", type(state).__name__)
    for name, kind in (("config", dict), ("data_sha256", str), ("backbone", str)):
        if not isinstance(state.get(name), kind):
            raise WeightsError(file, name, "that of a GAN run", repr(state[name])[:80] if name in state else "nothing of that name")
    return state


def _counters(checkpoint: Checkpoint) -> Progress:
    """The counters in state.json, each of the kind it has at the start of a run."""
    told, start = {}, Progress()
    for name, value in checkpoint.state.items():
        if name not in asdict(start):
            continue
        first = getattr(start, name)
        if isinstance(first, tuple):
            fits = isinstance(value, list) and len(value) == len(first) and all(map(_is_number, value))
        elif isinstance(first, int):
            fits = isinstance(value, int) and _is_number(value) and value >= 0
        else:
            fits = _is_number(value) or (first is None and value is None)
        if not fits:
            raise WeightsError(checkpoint.folder / STATE_FILE, name, f"a counter as {first!r}", repr(value)[:80])
        told[name] = tuple(value) if isinstance(first, tuple) else value
    if "step" not in told:
        raise WeightsError(checkpoint.folder / STATE_FILE, "step", "the number of steps", "nothing of that name")
    return replace(start, **told)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)


def _load_optimiser(optimiser: torch.optim.Optimizer, checkpoint: Checkpoint, name: str) -> None:
    """Bring an optimiser to where it was; its numbers must be those of the parameters it moves."""
    file, theirs = checkpoint.folder / f"{name}.pt", checkpoint.optimisers.get(name)
    if theirs is None:
        raise WeightsError(checkpoint.folder, "parts", "g_optimiser, d_optimiser", f"no {name}")
    settings = [{key: group[key] for key in OPTIMISER_SETTINGS} for group in optimiser.param_groups]
    try:
        optimiser.load_state_dict(theirs)
        same = [{key: group[key] for key in OPTIMISER_SETTINGS} for group in optimiser.param_groups] == settings
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError) as error:
        raise WeightsError(file, "optimiser", "the state of this run's", f"another ({str(error).splitlines()[0][:120]})") from error
    if not same:
        raise WeightsError(file, "optimiser", f"the {', '.join(OPTIMISER_SETTINGS)} of this run's", "others")
    for parameter, state in optimiser.state.items():
        if not _is_adam_state(state, parameter):
            raise WeightsError(file, "optimiser", "step, exp_avg and exp_avg_sq of each parameter, shaped as it", "others")


def _is_adam_state(state: Mapping[str, Any], parameter: object) -> bool:
    if not isinstance(parameter, torch.Tensor) or not isinstance(state, Mapping):    # a number beyond those of the run's parameters
        return False
    shapes = {"step": torch.Size(), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
    return state.keys() == shapes.keys() and all(isinstance(state[name], torch.Tensor) and state[name].shape == shape
                                                 and bool(torch.isfinite(state[name]).all()) for name, shape in shapes.items())


def _same_run(run: GanRun, checkpoint: Checkpoint, theirs: dict) -> None:
    """Refuse the checkpoint of a run with other options, data or backbone."""
    state, ours = checkpoint.state, asdict(run.config)
    changed = [name for name in ours if name not in MAY_CHANGE and ours[name] != theirs.get(name)]
    for what, expected, found in (
            ("config", "the options it was started with", ", ".join(f"{name} {theirs.get(name)} -> {ours[name]}" for name in changed)),
            ("data", "the patches and prompts it was started with", "" if state["data_sha256"] == run.data.sha256 else "others"),
            ("backbone", state["backbone"], "" if state["backbone"] == run.encoder.source else run.encoder.source)):
        if found:
            raise WeightsError(checkpoint.folder, what, expected, found, "--resume-kimg 0 starts a new run from these weights")
    for name in RATES:           # the loop sets them at every step
        if ours[name] != theirs.get(name):
            log.warning("from here on --%s is %s; it was %s", name.replace("_", "-"), ours[name], theirs.get(name))
