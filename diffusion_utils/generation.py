"""Draw pictures for prompt embeddings from a pipeline folder: PNG patches (or latents), samples.csv and grid.png.

The random numbers of a picture are those of its (seed, prompt row), or of its seed alone with `same_seed`: the batch size does not
change it, and with `same_seed` what differs between prompts of a seed, the genes do.
"""
from __future__ import annotations

import csv
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_utils.denoisers import compile_blocks
from diffusion_utils.pairs import prompt_barcodes
from diffusion_utils.pipeline import GenePipeline, as_patches, load_pipeline, prompt_width_of
from diffusion_utils.prompts import read_embeddings
from diffusion_utils.sampling import Solver, parse_interval
from evaluation.contact_sheet import contact_sheet, save_png
from evaluation.features import pick_device
from preprocessing.errors import InputError, OptionError
from preprocessing.output_places import require_outputs, require_own_folder
from preprocessing.outputs import finished_file, finished_within, locked
from preprocessing.patches import require_no_patch_folder
from preprocessing.progress import ProgressBar
from training.prompts import parse_seeds
from training.sample_folders import DRAWN

log = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COLUMNS = ("file", "prompt", "seed", "guidance_scale", "sampler", "steps", "weights_sha256")   # and barcode, where it is known
SAMPLES, GRID, LATENTS, GRID_PROMPTS, GRID_SEEDS = "samples.csv", "grid.png", "latents.npy", 24, 8
NULL = "null"         # folder of the controls
LISTING = (SAMPLES, f"{NULL}/{SAMPLES}", GRID, LATENTS)     # what says which pictures lie there


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """One call of `generate_images`."""

    model_checkpoint: Path            # pipeline folder, or a run folder
    prompt_file: Path                 # .npy of embeddings
    gen_img_path: Path                # folder of the pictures
    num_imgs: int = 5                 # a prompt, seeds 0, 1, ...
    seeds: str | None = None          # instead, as 0,1,4-6
    n_prompts: int | None = None      # so many rows of prompt_file, evenly chosen; None: all
    classifier_free_guidance: bool = True
    guidance_scale: float = 3.0
    guidance_interval: str = "0,1"    # shares of the noise schedule
    uncond_embedding: Path | None = None   # another null prompt than the pipeline's
    same_seed: bool = False
    output_type: Literal["pil", "latent"] = "pil"
    batch_size: int = 16
    steps: int = 20
    sampler: str = "dpm++"
    resolution: int | None = None     # px the pipeline draws at; None: as it learned
    output_px: int | None = None      # px of the files; None: as drawn, at most the training patches' size
    dtype: str = "float32"
    compile: bool = False
    null_control: bool = False        # beside each picture, the same random numbers without genes
    device: str = "auto"
    progress: bool = True

    def __post_init__(self):
        for name in ("num_imgs", "batch_size", "output_px", "n_prompts"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')}", "at least 1", str(value))
        if self.output_type == "latent" and self.output_px:
            raise OptionError("--output-px", "pictures (--output-type pil)", "latents")
        require_no_patch_folder("--gen-img-path", self.gen_img_path)
        require_own_folder("--gen-img-path", self.gen_img_path, DRAWN)
        require_outputs({"--gen-img-path": [self.gen_img_path / name for name in (SAMPLES, GRID, LATENTS)]},
                        {"--prompt-file": self.prompt_file, "--uncond-embedding": self.uncond_embedding})
        self.solver()                 # refuses what cannot be solved before weights are read

    def solver(self) -> Solver:
        return Solver(sampler=self.sampler, steps=self.steps, interval=parse_interval(self.guidance_interval),
                      guidance_scale=self.guidance_scale if self.classifier_free_guidance else 1.0)

    def chosen_seeds(self) -> list[int]:
        return list(range(self.num_imgs)) if self.seeds is None else parse_seeds(self.seeds)


@dataclass(frozen=True)
class Request:
    """One picture to draw."""

    prompt: int
    seed: int
    null: bool = False                # the control: no genes

    @property
    def file_name(self) -> str:
        return f"{f'{NULL}/' if self.null else ''}prompt{self.prompt:05d}_seed{self.seed:04d}.png"


def open_pipeline(config: GenerateConfig) -> GenePipeline:
    """The pipeline, on its device, with the null prompt that was asked for."""
    pipeline = load_pipeline(config.model_checkpoint, pick_device(config.device), DTYPES[config.dtype])
    if config.uncond_embedding is not None:
        null = read_embeddings(config.uncond_embedding, pipeline.prompts.embedding_width)
        if len(null) != 1:
            raise InputError(config.uncond_embedding, "null prompt", "one embedding, (D,) or (1, D)", str(tuple(null.shape)))
        pipeline.prompts.null.copy_(null[0])
    if config.compile:
        compile_blocks(pipeline.denoiser)
    return pipeline


def generate_images(config: GenerateConfig) -> list[Path]:
    """Draw and save everything `config` asks for; returns the files."""
    seeds, solver = config.chosen_seeds(), config.solver()
    prompts = read_embeddings(config.prompt_file, prompt_width_of(config.model_checkpoint))    # before weights go to a GPU
    barcodes = prompt_barcodes(config.prompt_file, len(prompts))
    pipeline = open_pipeline(config)
    if solver.guidance_scale != 1 and not pipeline.knows_null:
        log.warning("%s was trained without the null prompt (--p-uncond): guidance leads nowhere; draw with --guidance-scale 1",
                    config.model_checkpoint)
    pipeline.noise_shape(config.resolution)            # refuses a resolution that the layers cannot halve
    asked = [Request(row, seed, null) for null in ((False, True) if config.null_control else (False,))
             for row in _chosen_rows(len(prompts), config.n_prompts) for seed in seeds]
    with locked(config.gen_img_path / SAMPLES), finished_within(config.gen_img_path, LISTING) as folder:
        if config.output_type == "latent":
            files = [_save_latents(folder / LATENTS, [made for _, made in draw(pipeline, prompts, asked, solver, config)])]
            names = [f"{LATENTS}:{row}" for row in range(len(asked))]
        else:
            files = _save_pictures(folder, pipeline, prompts, asked, solver, config)
            if config.null_control:                    # a list of their own: whoever scores `folder` scores what genes made
                controls, asked = [request for request in asked if request.null], [request for request in asked if not request.null]
                files.append(folder / NULL / SAMPLES)
                _write_samples(files[-1], controls, [Path(request.file_name).name for request in controls], solver,
                               pipeline.weights_sha256, barcodes)
            names = [request.file_name for request in asked]
        files.append(folder / SAMPLES)
        _write_samples(files[-1], asked, names, solver, pipeline.weights_sha256, barcodes)
    return [config.gen_img_path / path.relative_to(folder) for path in files]


def _chosen_rows(n_rows: int, n_prompts: int | None) -> list[int]:
    """`n_prompts` of the rows, from the first to the last at even distances."""
    return sorted({int(row) for row in np.linspace(0, n_rows - 1, min(n_prompts or n_rows, n_rows))})


def draw(pipeline: GenePipeline, prompts: Tensor, asked: list[Request], solver: Solver, config: GenerateConfig
         ) -> Iterator[tuple[list[Request], Tensor]]:
    """Batches of requests with their pictures, uint8 (n, 3, H, W), or latents float32 (n, C, h, w). Controls cost one pass a step."""
    plain = Solver(sampler=solver.sampler, steps=solver.steps, guidance_scale=1.0)
    with ProgressBar(total=len(asked), desc="pictures", unit="picture", disable=not config.progress) as bar:
        for null in (False, True):
            group = [request for request in asked if request.null == null]
            for start in range(0, len(group), config.batch_size):
                part = group[start:start + config.batch_size]
                embeddings = pipeline.prompts.null.cpu().expand(len(part), -1) if null else prompts[[request.prompt for request in part]]
                keys = [(request.seed, 0 if config.same_seed else request.prompt) for request in part]
                x0 = pipeline.latents(embeddings, keys, plain if null else solver, config.resolution)
                yield part, (x0.float() if config.output_type == "latent" else pipeline.decode(x0)).cpu()
                bar.update(len(part))


def _save_pictures(folder: Path, pipeline: GenePipeline, prompts: Tensor, asked: list[Request], solver: Solver, config: GenerateConfig
                   ) -> list[Path]:
    """PNG files and the contact sheet: one row a prompt, its control beside it."""
    files: list[Path] = []
    shown: dict[tuple[int, bool], list[np.ndarray]] = {}
    for part, images in draw(pipeline, prompts, asked, solver, config):
        for request, picture in zip(part, as_patches(images, pipeline, config.output_px), strict=True):
            files.append(folder / request.file_name)
            save_png(files[-1], picture)
            row = shown.setdefault((request.prompt, request.null), [])
            row += [picture] if len(row) < GRID_SEEDS and len(shown) <= GRID_PROMPTS else []
    grid = folder / GRID
    rows = sorted(row for row in shown if shown[row])
    save_png(grid, contact_sheet([shown[row] for row in rows], [f"{'null ' if null else ''}prompt {prompt}" for prompt, null in rows]))
    return [*files, grid]


def _save_latents(path: Path, parts: list[Tensor]) -> Path:
    with finished_file(path) as temporary, open(temporary, "wb") as stream:
        np.save(stream, torch.cat(parts).numpy(), allow_pickle=False)
    return path


def _write_samples(path: Path, asked: list[Request], names: list[str], solver: Solver, weights_sha256: str,
                   barcodes: list[str] | None) -> None:
    with finished_file(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS if barcodes is None else [*COLUMNS, "barcode"])
        for request, name in zip(asked, names, strict=True):
            row = [name, "null" if request.null else request.prompt, request.seed, 1.0 if request.null else solver.guidance_scale,
                   solver.sampler, solver.steps, weights_sha256]
            writer.writerow(row if barcodes is None else [*row, "" if request.null else barcodes[request.prompt]])
