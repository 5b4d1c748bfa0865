"""What a fine-tune reads: paired patches with prompts, the prompt encoder, the base, and pixels or latents by row."""
from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from diffusion_utils.denoisers import Base, from_scratch, load_base, load_vae, token_width_of
from diffusion_utils.finetune_config import FinetuneConfig
from diffusion_utils.hub import local_or_hub_pipeline
from diffusion_utils.latents import CachedLatents, OnlineLatents, Pixels, cached_latents, images_sha256
from diffusion_utils.pairs import read_pairs
from diffusion_utils.pipeline import find_pipeline
from diffusion_utils.prompts import PromptEncoder, read_embeddings, read_null_prompt, shuffled
from preprocessing.errors import InputError, OptionError
from training.patch_cache import PatchRows

log = logging.getLogger(__name__)
PUBLISHED_SHARE = 1.5      # of a published prompt's width from scratch, per width of the embedding: 512 became 768
Source = Pixels | OnlineLatents | CachedLatents


@dataclass(frozen=True)
class HeldOut:
    """Patches that are not learned from."""

    images: PatchRows
    embeddings: Tensor


@dataclass(frozen=True)
class FinetuneData:
    """Everything of a run that comes from files."""

    images: PatchRows
    embeddings: Tensor            # (N, D), shuffled where that was asked for
    prompts: PromptEncoder
    patch_px: int                 # side of the patches as they are
    sha256: str                   # over pixels and embeddings
    held_out: HeldOut | None
    shown: Tensor | None          # (n, D) embeddings of validation pictures

    def __len__(self) -> int:
        return len(self.embeddings)


def read_data(config: FinetuneConfig) -> tuple[FinetuneData, Base]:
    """Read and check everything, in the order of its cost: options and prompts before patches, patches before weights."""
    pairs = read_pairs(config.train_data_dir, config.dataset_embs)
    width = pairs.embeddings.shape[1]
    null = read_null_prompt(config.uncond_embedding, pairs.embeddings)
    shown = read_embeddings(config.validation_prompts, width) if config.validation_prompts else None
    held_pairs = read_pairs(config.val_data_dir, config.val_embs) if config.val_data_dir else None
    if held_pairs is not None and held_pairs.embeddings.shape[1] != width:
        raise InputError(config.val_embs, "width of an embedding", str(width), str(held_pairs.embeddings.shape[1]))
    if held_pairs is not None and len(held_pairs) < 2:
        raise InputError(config.val_data_dir, "patches", "at least 2, to exchange their prompts", str(len(held_pairs)))
    folder = None if config.from_scratch else find_pipeline(local_or_hub_pipeline(config.pretrained_model_name_or_path))
    prompts = _own_prompts(config, folder, width)
    own = prompts is not None
    prompts = prompts.fit_null(null) if own else _prompt_encoder(config, folder, width).fit(pairs.embeddings, null)
    base = _base(config, folder, prompts, own)
    images = pairs.patches.open_patches(config.resolution, config.progress)
    held = None
    if held_pairs is not None:
        held = HeldOut(held_pairs.patches.open_patches(config.resolution, config.progress), held_pairs.embeddings)
    digest = hashlib.sha256(images_sha256(images).encode() + pairs.embeddings.numpy().tobytes() + null.numpy().tobytes()).hexdigest()
    embeddings = shuffled(pairs.embeddings, config.seed) if config.shuffle_prompts else pairs.embeddings
    return FinetuneData(images, embeddings, prompts, pairs.patches.read_image(0).shape[0], digest, held, shown), base


def _own_prompts(config: FinetuneConfig, folder: Path | None, width: int) -> PromptEncoder | None:
    """The encoder of a base that learned from such prompts before: its statistics, as its layer goes on too. Else None."""
    if folder is None or not (folder / "prompts").is_dir() or config.prompt_tokens != "learned" or config.fresh_prompts:
        return None
    encoder = PromptEncoder.load(folder / "prompts")
    if (encoder.kind, encoder.embedding_width, encoder.n_tokens) != ("learned", width, config.n_tokens):
        log.warning("%s learned from %s prompts of %d tokens, %d wide: its layer of them is made new", folder, encoder.kind,
                    encoder.n_tokens, encoder.embedding_width)
        return None
    log.warning("%s: its layer of the prompts and their statistics go on; for embeddings of another encoder: --fresh-prompts", folder)
    return encoder


def _prompt_encoder(config: FinetuneConfig, folder: Path | None, width: int) -> PromptEncoder:
    if config.prompt_tokens == "learned":
        return PromptEncoder(width, "learned", config.n_tokens)
    cross_width = int(width * PUBLISHED_SHARE) if folder is None else token_width_of(folder)
    return PromptEncoder(width, config.prompt_tokens, cross_width=cross_width)


def _base(config: FinetuneConfig, folder: Path | None, prompts: PromptEncoder, own_prompts: bool) -> Base:
    if folder is not None:
        base = load_base(folder, config.pretrained_vae_path, prompts, seed=config.seed, prediction=config.prediction_type,
                         pixel_space=config.pixel_space, own_prompts=own_prompts)
    else:
        vae = load_vae(config.pretrained_vae_path) if config.pretrained_vae_path else None
        factor = Base(torch.nn.Identity(), vae, {}, "").pixels_a_latent
        if config.resolution % factor:
            raise OptionError("--resolution", f"a multiple of {factor}, as the autoencoder shrinks", str(config.resolution))
        base = from_scratch(config.from_scratch, config.resolution // factor, vae, prompts, seed=config.seed,
                            prediction=config.prediction_type or "v_prediction")
    levels = len(base.denoiser.config.get("block_out_channels") or (1, 1))
    step = base.pixels_a_latent * 2 ** (levels - 1)
    if config.resolution % step:
        raise OptionError("--resolution", f"a multiple of {step} px for this base", str(config.resolution))
    return base


def open_source(images: PatchRows, base: Base, config: FinetuneConfig, device: str) -> Source:
    """Pixels, or latents as the config says. With a cache the autoencoder goes back to the CPU once it is full."""
    if base.vae is None:
        return Pixels(images)
    if not config.latent_cache:
        return OnlineLatents(Pixels(images), base.vae.to(device))
    source = cached_latents(images, base.vae, config.cache_dir or config.output_dir / "latents", device=device,
                            progress=config.progress)
    base.vae.to("cpu")
    return source
