"""Walk between two prompt embeddings with a diffusion pipeline: what `interpolate_prompts.py` does when it is given one.

Steps are those of `training.interpolation.slerp`; all steps of a seed start from the same noise, so what changes along a row, the genes
change. The embeddings themselves are written too.
"""
from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_utils.pipeline import as_patches, load_pipeline
from diffusion_utils.prompts import read_embeddings
from diffusion_utils.sampling import Solver
from evaluation.contact_sheet import contact_sheet, save_png
from evaluation.features import pick_device
from preprocessing.errors import InputError, OptionError
from preprocessing.output_places import require_outputs, require_own_folder
from preprocessing.outputs import finished_file, finished_within, locked
from preprocessing.patches import require_no_patch_folder
from preprocessing.progress import ProgressBar
from training.interpolation import Walk, slerp
from training.prompts import parse_seeds
from training.sample_folders import WALKED

COLUMNS = ("file", "seed", "step", "share", "prompt1", "prompt2", "guidance_scale", "weights_sha256")
LISTING = ("samples.csv", "strip.png", "embeddings.npy")     # what says which patches lie there


@dataclass(frozen=True, kw_only=True)
class PipelineWalk:
    """One call of `walk_with_pipeline`."""

    network: Path             # pipeline folder, or a run folder
    outdir: Path
    prompt1: str              # FILE.npy:ROW
    prompt2: str
    n_steps: int = 9          # both ends included
    seeds: str = "0"
    batch_sz: int = 16
    device: str | None = None
    solver: Solver = Solver()

    def __post_init__(self):
        if self.n_steps < 2:
            raise OptionError("--n-steps", "at least 2, the two prompts", str(self.n_steps))
        if self.batch_sz < 1:
            raise OptionError("--batch-sz", "at least 1", str(self.batch_sz))
        require_no_patch_folder("--outdir", self.outdir)
        require_own_folder("--outdir", self.outdir, WALKED)
        require_outputs({"--outdir": [self.outdir / name for name in LISTING]},
                        {"--prompt1": self.prompt1.rpartition(":")[0], "--prompt2": self.prompt2.rpartition(":")[0]})


def walk_with_pipeline(config: PipelineWalk, progress: bool = True) -> list[Path]:
    """Make the patches of the walk, embeddings.npy, samples.csv and strip.png (a row a seed); returns the files, those three last."""
    seeds = parse_seeds(config.seeds)
    pipeline = load_pipeline(config.network, pick_device(config.device or "auto"))
    width = pipeline.prompts.embedding_width
    walk = Walk(slerp(_end("--prompt1", config.prompt1, width), _end("--prompt2", config.prompt2, width), config.n_steps), seeds)
    names = walk.file_names
    samples, strip, rows = (config.outdir / name for name in LISTING)
    with locked(samples, covers=[strip, rows]), finished_within(config.outdir, LISTING) as folder:
        pictures: list[np.ndarray] = []
        for batch in ProgressBar(list(walk.batches(config.batch_sz)), desc="patches", unit="batch", disable=not progress):
            made = as_patches(pipeline.generate(batch.prompts, list(batch.keys), config.solver).cpu(), pipeline)
            for name, picture in zip(names[batch.number:], made, strict=False):
                save_png(folder / name, picture)
            pictures += made
        with finished_file(folder / rows.name) as temporary, open(temporary, "wb") as stream:
            np.save(stream, walk.embeddings.numpy(), allow_pickle=False)
        shown = [pictures[start:start + config.n_steps] for start in range(0, len(pictures), config.n_steps)]
        save_png(folder / strip.name, contact_sheet(shown, row_labels=[f"seed {seed}" for seed in seeds],
                                                    column_labels=[f"{share:.2f}" for share in walk.shares]))
        _write_samples(folder / samples.name, walk, config, pipeline.weights_sha256)
    return [*(config.outdir / name for name in names), rows, samples, strip]


def _end(option: str, text: str, width: int) -> Tensor:
    """The embedding (D,) of FILE.npy:ROW."""
    name, _, row = text.rpartition(":")
    if not name or not (row.isascii() and row.isdigit()) or not name.endswith(".npy"):
        raise OptionError(option, "FILE.npy:ROW of embeddings for a diffusion pipeline", text)
    rows = read_embeddings(name, width)
    if int(row) >= len(rows):
        raise InputError(name, "row of a prompt", f"0 to {len(rows) - 1}", row)
    if not torch.linalg.vector_norm(rows[int(row)]) > 0:
        raise InputError(name, f"embedding of {row}", "a direction", "zeros alone")
    return rows[int(row)]


def _write_samples(path: Path, walk: Walk, config: PipelineWalk, weights_sha256: str) -> None:
    with finished_file(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for name, (seed, step) in zip(walk.file_names, walk.asked, strict=True):
            writer.writerow([name, seed, step, f"{walk.shares[step]:.6g}", config.prompt1, config.prompt2, config.solver.guidance_scale,
                             weights_sha256])
