"""What a GAN run keeps of itself to go on as if it had not stopped: networks, averages, optimisers, counters, and whose they are."""
from __future__ import annotations

from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from networks.weights import load_into
from preprocessing.errors import WeightsError
from preprocessing.outputs import config_sha256, strings_sha256
from training.gan_config import GanConfig
from training.gan_progress import Progress, resolved_fade_kimg
from training.run_folder import Checkpoint, save_checkpoint

if TYPE_CHECKING:
    from training.gan_loop import GanRun

MAY_CHANGE = ("kimg", "budget_minutes", "tick", "snap", "max_bad_steps", "precision", "compile", "workers")   # when a run goes on
OPTION_DEFAULTS = {option.name: option.default for option in fields(GanConfig)}   # of options younger than a checkpoint


def save_run(run: GanRun) -> Path:
    """Write a checkpoint into the run's folder; returns its path."""
    gan, options = run.gan, asdict(run.config)
    state = {**asdict(run.progress), "config": options, "data_sha256": run.data.sha256, "backbone": run.encoder.source,
             "config_sha256": config_sha256({name: value for name, value in options.items() if name not in MAY_CHANGE}),
             "genes_sha256": None if run.mlp is None else strings_sha256(run.mlp.gene_names)}
    return save_checkpoint(run.folder, run.progress.step, state=state, tensors={
        "discriminator": gan.discriminator.trainable_state(), **{name: part.state_dict() for name, part in _networks(run).items()},
    }, optimisers={"g_optimiser": gan.g_optimiser.state_dict(), "d_optimiser": gan.d_optimiser.state_dict()})


def _networks(run: GanRun) -> dict[str, nn.Module]:
    """Networks that a checkpoint holds whole, by the names of their files."""
    parts = {"generator": run.gan.generator, **run.averages.parts()}
    return parts if run.mlp is None else {**parts, "mlp": run.mlp, "mlp_average": run.mlp_average}


def load_run(run: GanRun, checkpoint: Checkpoint) -> None:
    """Bring a new run to where a checkpoint was written; WeightsError if that was of other options, data or backbone."""
    theirs = {**OPTION_DEFAULTS, **checkpoint.state.get("config", {})}
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
    gan.g_optimiser.load_state_dict(checkpoint.optimisers["g_optimiser"])
    gan.d_optimiser.load_state_dict(checkpoint.optimisers["d_optimiser"])
    counters = {counter.name for counter in fields(Progress)}
    run.progress = replace(Progress(), **{name: tuple(value) if isinstance(value, list) else value
                                          for name, value in checkpoint.state.items() if name in counters})
    if run.progress.blur_fade_kimg is None:      # a checkpoint older than this record
        run.progress.blur_fade_kimg = resolved_fade_kimg(theirs["blur_fade_kimg"], theirs["kimg"])


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
