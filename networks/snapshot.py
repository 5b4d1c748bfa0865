"""Snapshots: a generator for use. A weights folder (averaged generator) that names its gene encoder by path and hash, or holds it.

config.json holds the generator's shapes, what was trained on, and under `gene_encoder` where the CLIP weights lie
(relative to the snapshot, or their repository and commit on the hub), their hash, and the library size that expression is normalised
to; or, where the gene encoder was trained with the generator, its genes and shapes (its tensors lie beside the
generator's). None: prompts are embeddings, or (c_dim 0) there are none.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from networks.condition_mlp import ConditionMlp
from networks.generator import Generator, GeneratorConfig
from networks.weights import HUB, load_into, load_weights_folder, local_or_hub, require_tensors, save_weights_folder, weights_sha256
from preprocessing.errors import InputError, OptionError, WeightsError

Network = TypeVar("Network", bound=nn.Module)
NO_NETWORK = (TypeError, ValueError, RuntimeError, OverflowError)    # what building a network from a strange config.json raises
KIND = "generator snapshot"
MLP_KIND, MLP_PREFIX = "mlp", "gene_encoder."   # in config.json; of the names of its tensors


@dataclass(frozen=True)
class Snapshot:
    """A loaded snapshot, in evaluation mode."""

    generator: Generator
    gene_encoder: nn.Module | None   # networks.clip.CLIP without image tower, or ConditionMlp; if asked for and known
    config: dict               # config.json
    weights_sha256: str

    @property
    def is_unconditional(self) -> bool:
        return self.generator.config.c_dim == 0


def save_snapshot(folder: Path | str, generator: Generator, *, gene_encoder: Mapping | ConditionMlp | None = None,
                  **facts: object) -> Path:
    """Write a snapshot. `gene_encoder`: {"path" or (on the hub) "repo_id", "sha256", "target_sum"} of the CLIP weights that made the
    prompts, the MLP that was trained with the generator, or None."""
    folder, tensors = Path(folder), generator.state_dict()
    if isinstance(gene_encoder, ConditionMlp):
        tensors = {**tensors, **{MLP_PREFIX + name: tensor for name, tensor in gene_encoder.state_dict().items()}}
        gene_encoder = {"kind": MLP_KIND, **gene_encoder.description()}
    elif gene_encoder is not None:
        if "path" in gene_encoder:
            gene_encoder = {**gene_encoder, "path": os.path.relpath(Path(gene_encoder["path"]).absolute(), folder.absolute())}
    config = {"kind": KIND, "generator": asdict(generator.config), "gene_encoder": gene_encoder, **facts}
    return save_weights_folder(folder, tensors, config)


def load_snapshot(folder: Path | str, *, gene_encoder: bool = True, gene_encoder_path: Path | str | None = None) -> Snapshot:
    """Read a snapshot; with `gene_encoder` also the MLP it holds, or the CLIP weights it names, refused if their hash is another.

    `gene_encoder_path` says where those weights lie now, if they were moved.
    """
    tensors, mlp_tensors, config = read_snapshot(folder)
    folder = Path(folder)
    generator = _with_tensors(lambda: _generator(config["generator"], len(tensors)), tensors, folder, "generator",
                              "the shapes of a generator")
    reference, encoder = config.get("gene_encoder"), None
    if gene_encoder and reference is not None:
        is_mlp = reference.get("kind") == MLP_KIND
        if is_mlp and gene_encoder_path:
            raise OptionError("--clip", f"nothing: {folder} holds its gene encoder", str(gene_encoder_path))
        encoder = _load_mlp(folder, reference, mlp_tensors) if is_mlp else _load_clip(folder, reference, gene_encoder_path)
    return Snapshot(generator.eval().requires_grad_(False), encoder, config, weights_sha256(folder))


def read_snapshot(folder: Path | str) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:
    """(tensors of the generator, tensors of its MLP gene encoder or none, config.json) of a snapshot, before any network is built."""
    folder = Path(folder)
    if folder.is_file():
        raise WeightsError(folder, "snapshot", "a snapshot folder (model.safetensors, config.json, SHA256SUMS)",
                           "a single file; pickled networks are never read")
    tensors, config = load_weights_folder(folder)
    if config.get("kind") != KIND or not isinstance(config.get("generator"), dict):
        raise WeightsError(folder / "config.json", "kind", KIND, str(config.get("kind")))
    reference = config.get("gene_encoder")
    if reference is not None and not (isinstance(reference, dict) and (reference.get("kind") == MLP_KIND
                                      or ("sha256" in reference and ("path" in reference or "repo_id" in reference)))):
        raise WeightsError(folder / "config.json", "gene_encoder", "an MLP, or where CLIP weights lie and their sha256",
                           str(reference)[:80])
    mlp = {name.removeprefix(MLP_PREFIX): tensor for name, tensor in tensors.items() if name.startswith(MLP_PREFIX)}
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(MLP_PREFIX)}, mlp, config


def _load_mlp(folder: Path, reference: Mapping, tensors: Mapping[str, Tensor]) -> ConditionMlp:
    shapes = {name: value for name, value in reference.items() if name != "kind"}
    mlp = _with_tensors(lambda: ConditionMlp(**shapes), tensors, folder, "gene_encoder", "the genes and shapes of an MLP")
    return mlp.eval().requires_grad_(False)


def _generator(told: Mapping, n_tensors: int) -> Generator:
    config = GeneratorConfig(**told)
    if config.res_blocks > n_tensors:            # each has tensors of its own: building them would not end
        raise OptionError("res_blocks", f"at most {n_tensors}, one a tensor", str(config.res_blocks))
    return Generator(config)


def _with_tensors(make: Callable[[], Network], tensors: Mapping[str, Tensor], folder: Path, field: str, expected: str) -> Network:
    """The network of config.json with its tensors; built only once they are known to be its own, so that no shape there takes memory."""
    try:
        with torch.device("meta"):
            planned = make()
    except NO_NETWORK as error:
        raise WeightsError(folder / "config.json", field, expected, str(error).splitlines()[0][:160]) from error
    require_tensors(planned, tensors, folder)
    network = make()
    load_into(network, tensors, folder)
    return network


def _load_clip(folder: Path, reference: Mapping, moved_to: Path | str | None) -> nn.Module:
    from networks.clip import CLIP, clip_weights_sha256

    if moved_to or "repo_id" in reference:
        path = local_or_hub(moved_to or f"{HUB}{reference['repo_id']}")
    else:
        path = Path(os.path.normpath(folder.absolute() / str(reference["path"])))
    if not path.exists():
        raise InputError(path, "gene encoder", "the CLIP weights this snapshot was trained with", "nothing there",
                         "Name where they lie now with --clip, or give prompt embeddings with --encoded")
    found = clip_weights_sha256(path)
    if found != reference["sha256"]:
        raise WeightsError(path, "SHA-256", f"{reference['sha256']}, the gene encoder of {folder}", found)
    return CLIP.from_pretrained(path, image_encoder=False)


def move_fourier_input(generator: Generator, translate: tuple[float, float] = (0.0, 0.0), rotate_deg: float = 0.0) -> None:
    """Translate (in shares of the image's side, x to the right, y down) and rotate what is drawn, through the Fourier input."""
    angle = torch.deg2rad(torch.tensor(float(rotate_deg), dtype=torch.float64))
    cos, sin = torch.cos(angle).item(), torch.sin(angle).item()
    matrix = torch.tensor([[cos, -sin, translate[0]], [sin, cos, translate[1]], [0.0, 0.0, 1.0]], dtype=torch.float64)
    buffer = generator.blocks[0].input.user_transform
    buffer.copy_(torch.linalg.inv(matrix).to(buffer))    # the wave is sampled where the moved picture came from
