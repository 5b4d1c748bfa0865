"""Start a new run from the weights of another: a snapshot, or a checkpoint, also of a lower resolution (progressive growing).

What fits by name and shape is taken, the rest starts anew and is listed. Blocks are numbered from 8 px up, so the lower blocks
of a larger generator are those of the smaller one. A checkpoint also gives the discriminator's heads, where the backbone is the
same; optimisers, averages and counters start anew.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from networks.snapshot import read_snapshot
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from training.checkpoints import COMMIT, Checkpoint, latest_checkpoint, read_checkpoint, require_newest
from training.gan_checkpoint import OPTION_DEFAULTS, read_state
from training.gan_config import GanConfig
from training.gan_loop import GanRun
from training.run_folder import latest_run


@dataclass(frozen=True)
class Weights:
    """What another run learned, on the CPU."""

    folder: Path
    img_resolution: int
    cond_norm: str
    generator: Mapping[str, Tensor]
    mlp: Mapping[str, Tensor] = field(default_factory=dict)
    discriminator: Mapping[str, Tensor] = field(default_factory=dict)
    backbone: str = ""                  # source of the discriminator's encoder
    genes_sha256: str | None = None     # of the MLP's genes


def find_start(outdir: Path, name: str, resume: str | None, config: GanConfig, as_weights: bool = False) -> Checkpoint | Weights | None:
    """Where `--resume` leads: None (a new run), a checkpoint to go on from exactly, or weights to start from.

    `auto`: the newest whole checkpoint of the newest run of this name. A path: a snapshot, a checkpoint, or a run folder (its newest
    checkpoint); a checkpoint of a lower resolution gives weights, one of this resolution `as_weights`; one of a higher is refused.
    """
    if resume is None:
        return None
    if resume == "auto":
        run = latest_run(outdir, name) if Path(outdir).is_dir() else None
        checkpoint = latest_checkpoint(run) if run else None
        if checkpoint is not None and as_weights:
            raise OptionError("--resume-kimg", f"the path of a run as --resume; auto goes on with {checkpoint.folder} exactly", "auto")
        return checkpoint
    path = Path(resume)
    if (path / "config.json").is_file() and (path / "model.safetensors").is_file():
        found = _of_snapshot(path)
    else:
        checkpoint = _checkpoint(path)
        found = _of_checkpoint(checkpoint)
        if found.img_resolution == config.img_resolution and not as_weights:
            require_newest(checkpoint, checkpoint.folder.parent, "--resume")
            return checkpoint
    if found.img_resolution > config.img_resolution:
        raise OptionError("--img-resolution", f"at least the {found.img_resolution} px of {path}", str(config.img_resolution))
    return found


def _checkpoint(path: Path) -> Checkpoint:
    if (path / COMMIT).exists() or path.name.startswith("checkpoint-"):
        return read_checkpoint(path)
    checkpoint = latest_checkpoint(path) if path.is_dir() else None
    if checkpoint is None:
        raise InputError(path, "--resume", "auto, a checkpoint folder, a run folder with a checkpoint, or a snapshot folder", "none there")
    return checkpoint


def _of_checkpoint(checkpoint: Checkpoint) -> Weights:
    told, tensors = {**OPTION_DEFAULTS, **read_state(checkpoint)["config"]}, checkpoint.tensors
    if "generator" not in tensors or not isinstance(told.get("img_resolution"), int):
        raise WeightsError(checkpoint.folder, "parts", "a generator and its config", "none")
    return Weights(checkpoint.folder, told["img_resolution"], told["cond_norm"], tensors["generator"], tensors.get("mlp", {}),
                   tensors.get("discriminator", {}), checkpoint.state.get("backbone", ""), checkpoint.state.get("genes_sha256"))


def _of_snapshot(folder: Path) -> Weights:
    generator, mlp, config = read_snapshot(folder)
    shapes = config["generator"]
    if not isinstance(shapes.get("img_resolution"), int):
        raise WeightsError(folder / "config.json", "generator", "the shapes of a generator", str(shapes)[:80])
    genes = (config.get("gene_encoder") or {}).get("gene_names")
    return Weights(folder, shapes["img_resolution"], shapes.get("cond_norm", "l2"), generator, mlp,
                   genes_sha256=strings_sha256(genes) if genes else None)


def start_from(run: GanRun, weights: Weights, resume_kimg: float = 0.0) -> list[str]:
    """Give a new run these weights and set its clock to `resume_kimg`; returns what was taken and what was not, a line each."""
    report = []
    network_names = {"generator": run.gan.generator, "discriminator": run.gan.discriminator}
    given = {"generator": weights.generator, "discriminator": weights.discriminator}
    if weights.backbone != run.encoder.source:      # heads read the features of one backbone
        given["discriminator"] = {}
    if run.mlp is not None:
        if weights.genes_sha256 not in (None, strings_sha256(run.mlp.gene_names)):
            raise WeightsError(weights.folder, "genes", "those of the expression, in their order, as its gene encoder was trained with",
                               "others")
        network_names["mlp"], given["mlp"] = run.mlp, weights.mlp
    for name, network in network_names.items():
        tensors = given[name]
        if weights.cond_norm != run.config.cond_norm:     # statistics of another kind of scaling
            tensors = {key: tensor for key, tensor in tensors.items() if not key.startswith("condition.")}
        report += _take_what_fits(name, network, tensors, weights.folder)
    for average in run.averages.models.values():
        average.load_state_dict(run.gan.generator.state_dict())
    if run.mlp is not None:
        run.mlp_average.load_state_dict(run.mlp.state_dict())
    _set_clock(run, resume_kimg)
    return report


def _set_clock(run: GanRun, kimg: float) -> None:
    if not 0 <= kimg < run.config.kimg:
        raise OptionError("--resume-kimg", f"0 up to less than --kimg {run.config.kimg:g}", str(kimg))
    progress = run.progress
    progress.step = progress.first_step = round(kimg * 1000 / run.config.batch)
    progress.last_tick = progress.last_snap = (run.kimg, run.share)


@torch.no_grad()
def _take_what_fits(name: str, network: nn.Module, tensors: Mapping[str, Tensor], folder: Path) -> list[str]:
    broken = [key for key, tensor in tensors.items() if tensor.is_floating_point() and not torch.isfinite(tensor).all()]
    if broken:
        raise WeightsError(folder, "tensors", "finite numbers", f"NaN or infinite ones in {first_few(broken)}")
    if not tensors:
        return [f"{name}: starts anew"]
    own = {key: tensor for key, tensor in network.state_dict().items() if not key.startswith("taps.")}    # the backbone is given
    fitting = [key for key in own if key in tensors and tensors[key].shape == own[key].shape]
    if name == "generator" and not fitting:
        raise WeightsError(folder, "tensors", "some that fit this generator", "none")
    for key in fitting:
        own[key].copy_(tensors[key])
    anew, left_out = [key for key in own if key not in fitting], [key for key in tensors if key not in fitting]
    return [f"{name}: {len(fitting)} of {len(own)} tensors taken",
            *([f"{name}: new here: {', '.join(anew)}"] if anew else []),
            *([f"{name}: without a place here: {', '.join(left_out)}"] if left_out else [])]
