"""A pipeline folder: what a fine-tune leaves, stock diffusers loads, and `generate_img.py` draws from.

model_index.json, unet/ or transformer/, vae/ (none in pixel space), scheduler/, and ours: prompts/ (embedding to tokens, null prompt),
training.json (how it came to be), SHA256SUMS. Stock diffusers: StableDiffusionPipeline.from_pretrained(folder, text_encoder=None,
tokenizer=None)(prompt_embeds=..., negative_prompt_embeds=...), tokens by `PromptEncoder`.
"""
from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_utils.denoisers import PIXART, SD3, UNET, denoiser_folder, load_denoiser, load_vae
from diffusion_utils.latents import unscaled
from diffusion_utils.prompts import PromptEncoder
from diffusion_utils.sampling import Solver, sample
from diffusion_utils.schedulers import make_scheduler
from evaluation.contact_sheet import as_cell
from networks.layers import images_to_uint8
from networks.weights import SUMS_FILE
from preprocessing.done_manifests import file_sha256, program_versions
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from preprocessing.inputs import read_json
from preprocessing.output_places import FolderKind
from preprocessing.outputs import finished_folder
from training.gan_draws import seeded_draws
from training.gan_grids import as_pictures

TRAINING = "training.json"
KIND = FolderKind("a pipeline folder", mark=TRAINING,
                  names=r"(unet|transformer|vae|prompts|scheduler)/|pipeline\.py|model_index\.json|training\.json|SHA256SUMS")
CHECKED = (".json", ".safetensors", ".bin", ".py")
PIPELINE_CLASS = {UNET: "StableDiffusionPipeline", PIXART: "PixArtAlphaPipeline", SD3: "StableDiffusion3Pipeline"}
ABSENT = {UNET: ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"),
          PIXART: ("text_encoder", "tokenizer"),
          SD3: ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3", "image_encoder",
                "feature_extractor")}


def write_pipeline(folder: Path | str, denoiser: nn.Module, vae: nn.Module | None, scheduler: dict, prompts: PromptEncoder,
                   record: dict) -> Path:
    """Write a pipeline folder; it appears when it is whole. `record`: plain JSON with at least `resolution`, px. Returns the folder."""
    import diffusers

    name = type(denoiser).__name__
    part = "unet" if name == UNET else "transformer"
    index = {"_class_name": PIPELINE_CLASS[name] if vae is not None else ["pipeline", "GenePixelPipeline"],
             "_diffusers_version": diffusers.__version__, part: ["diffusers", name], "scheduler": ["diffusers", scheduler["_class_name"]]}
    if vae is not None:
        index |= {"vae": ["diffusers", type(vae).__name__], **{absent: [None, None] for absent in ABSENT[name]}}
    if name == UNET and vae is not None:
        index["requires_safety_checker"] = False
    with finished_folder(folder, validate=verify_sums, kind=KIND) as temporary:
        denoiser.save_pretrained(temporary / part)
        if vae is not None:
            vae.save_pretrained(temporary / "vae")
        else:
            shutil.copyfile(Path(__file__).with_name("pixel_pipeline.py"), temporary / "pipeline.py")
        prompts.save(temporary / "prompts")
        (temporary / "scheduler").mkdir()
        for name, content in (("model_index.json", index), ("scheduler/scheduler_config.json", scheduler),
                              (TRAINING, {**record, "versions": program_versions()})):
            (temporary / name).write_text(json.dumps(content, indent=2) + "\n")
        files = sorted(path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file())
        (temporary / SUMS_FILE).write_text("".join(f"{file_sha256(temporary / file)}  {file}\n" for file in files))
    return Path(folder)


def verify_sums(folder: Path) -> None:
    """Compare every file with SHA256SUMS; JSON, weights and code that it does not list are refused."""
    sums = [line.partition("  ")[::2] for line in (folder / SUMS_FILE).read_text(errors="replace").splitlines()]
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix in CHECKED and path.is_file()}
    unlisted = sorted(present - {name for _, name in sums})
    if unlisted:
        raise WeightsError(folder / SUMS_FILE, "content", "a line for every file of the pipeline", f"none for {first_few(unlisted)}")
    for expected, name in sums:
        found = file_sha256(folder / name) if (folder / name).is_file() else "nothing there"
        if found != expected:
            raise WeightsError(folder / name, "SHA-256", expected, found, "the file is damaged")


@dataclass(frozen=True)
class GenePipeline:
    """A pipeline folder in memory, on one device."""

    denoiser: nn.Module
    vae: nn.Module | None
    scheduler: dict
    prompts: PromptEncoder
    resolution: int            # px of the pictures it learned
    patch_px: int              # of the patches that were brought to `resolution`
    weights_sha256: str
    knows_null: bool = True    # whether it was trained with the null prompt too, which guidance needs

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    def noise_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(C, h, w) of the noise that a picture of `resolution` px comes from."""
        factor = 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)
        px = resolution or self.resolution
        levels = len(self.denoiser.config.get("block_out_channels") or (1, 1))
        step = factor * 2 ** (levels - 1)
        if px < step or px % step:
            raise OptionError("--resolution", f"a multiple of {step} px", str(px))
        return self.denoiser.config.in_channels, px // factor, px // factor

    def latents(self, embeddings: Tensor, keys: list[tuple[int, int]], solver: Solver, resolution: int | None = None) -> Tensor:
        """x0 (N, C, h, w) of prompt embeddings (N, D); `keys`: (seed, number) of each picture, its random numbers."""
        shape = self.noise_shape(resolution)
        noise = seeded_draws(keys, int(np.prod(shape)), 0)[0].view(-1, *shape)
        generators = [torch.Generator().manual_seed((seed * 1_000_003 + number) % 2 ** 63) for seed, number in keys]
        tokens = self.prompts(embeddings.to(self.device))
        scheduler = make_scheduler(self.scheduler, solver.sampler, solver.steps)
        return sample(self.denoiser, scheduler, tokens, self.prompts.null_tokens(), noise.to(self.device), solver, generators)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 (N, 3, H, W) of x0."""
        images = latents if self.vae is None else self.vae.decode(unscaled(self.vae.config, latents)).sample
        return images_to_uint8(images.float())

    def generate(self, embeddings: Tensor, keys: list[tuple[int, int]], solver: Solver, resolution: int | None = None) -> Tensor:
        """uint8 (N, 3, H, W), one picture a prompt embedding (N, D)."""
        return self.decode(self.latents(embeddings, keys, solver, resolution))


def prompt_width_of(folder: Path | str) -> int:
    """Width D of the embeddings that a pipeline folder of ours is asked with."""
    folder = find_pipeline(folder)
    _require_ours(folder)
    return PromptEncoder.load(folder / "prompts").embedding_width


def as_patches(images: Tensor, pipeline: GenePipeline, px: int | None = None) -> list[np.ndarray]:
    """uint8 (H, W, 3) each, `px` a side; None: brought back to the size of the training patches where they were drawn larger."""
    side = px or min(images.shape[-1], pipeline.patch_px)
    return [picture if picture.shape[0] == side else as_cell(picture, side) for picture in as_pictures(images)]


def find_pipeline(folder: Path | str) -> Path:
    """`folder` itself, or the pipeline in a run folder."""
    folder = Path(folder)
    return folder / "pipeline" if (folder / "pipeline" / "model_index.json").is_file() else folder


def _require_ours(folder: Path) -> None:
    if not (folder / "model_index.json").is_file():
        stopped = any(folder.glob("checkpoint-*"))
        raise InputError(folder, "pipeline", "a pipeline folder, or the run folder it lies in",
                         "a run without one" if stopped else "none in this folder" if folder.is_dir() else "nothing there",
                         "Let the run finish: --resume-from-checkpoint latest" if stopped else "")
    denoiser_folder(folder)                             # says what a folder must hold
    if not (folder / SUMS_FILE).is_file() or not (folder / "prompts").is_dir():
        raise WeightsError(folder, "content", f"{SUMS_FILE} and prompts/, as train_diffusion writes them", "a pipeline without them")


def load_pipeline(folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> GenePipeline:
    """Read a pipeline folder of ours, after comparing it with its SHA256SUMS. No code of the folder runs."""
    folder = find_pipeline(folder)
    _require_ours(folder)
    verify_sums(folder)
    record = read_json(folder / TRAINING, "how the pipeline was trained")
    if not isinstance(record, dict) or not isinstance(record.get("resolution"), int):
        raise WeightsError(folder / TRAINING, "resolution", "px of the pictures it learned", f"{str(record)[:80]}")
    prompts = PromptEncoder.load(folder / "prompts")
    denoiser = nn.Module.to(load_denoiser(folder).eval().requires_grad_(False), device, dtype)   # diffusers' own `to` warns of nothing
    vae = load_vae(folder / "vae").to(device) if (folder / "vae").is_dir() else None
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json", "the config of a scheduler")
    sha256 = file_sha256(folder / SUMS_FILE)       # stands for every file
    resolution, trained = int(record["resolution"]), record.get("config") or {}
    return GenePipeline(denoiser, vae, scheduler, prompts.to(device), resolution, int(record.get("patch_px", resolution)), sha256,
                        knows_null=trained.get("classifier_free_guidance", True) and trained.get("p_uncond", 1) > 0)
