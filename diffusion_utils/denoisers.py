"""Denoisers, autoencoders and schedulers: read from a folder in diffusers' layout, or made new; and one way to call each denoiser.

A folder is `unet/` or `transformer/`, `vae/`, `scheduler/`, each a `config.json` beside safetensors (or `.bin`, read without running
code). Only the classes named here are ever built: a file cannot choose another. Nothing is downloaded but a base named `owner/name`.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_utils.noising import own_prediction, require_scheduler, scheduler_config
from diffusion_utils.prompts import PromptEncoder
from diffusion_utils.schedulers import make_scheduler
from networks.weights import load_into, read_state_dict
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from preprocessing.inputs import read_json

Size = Literal["small", "base"]
UNET, PIXART, SD3 = "UNet2DConditionModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"
VAES = ("AutoencoderKL", "AutoencoderTiny")
PROMPT_LAYER = {UNET: "encoder_hid_proj", PIXART: "caption_projection", SD3: "context_embedder"}   # first to see the tokens
REPEATED_BLOCKS = ("BasicTransformerBlock", "JointTransformerBlock")    # of all of these denoisers
MORE_CONDITIONS = ("addition_embed_type", "class_embed_type", "num_class_embeds", "use_additional_conditions")   # that nothing here gives
PIXART_SIZED = 128          # latents a side at which PixArt is told the picture's size unless its config says otherwise
LARGEST = 65_536            # number in the config of a network that is built
PROMPT_WIDTH = {PIXART: "caption_channels", SD3: "joint_attention_dim"}
SIZES = {   # channels by level, residual blocks a level, width of cross-attention; attention from the second level on
    "small": {"block_out_channels": (32, 64, 128), "layers_per_block": 1, "cross_attention_dim": 128, "attention_head_dim": 4},
    "base": {"block_out_channels": (128, 256, 384, 512), "layers_per_block": 2, "cross_attention_dim": 512, "attention_head_dim": 8},
}


@dataclass(frozen=True)
class Base:
    """What a fine-tune starts from."""

    denoiser: nn.Module
    vae: nn.Module | None             # None: the denoiser works on pixels
    scheduler: dict                   # config of a diffusers scheduler
    source: str                       # folder or from-scratch size

    @property
    def pixels_a_latent(self) -> int:
        """Side of the square of pixels behind one latent; 1 in pixel space."""
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)


# ---- calling one ----------------------------------------------------------------------------------------------------

def denoise(denoiser: nn.Module, x: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
    """What a denoiser (or its data-parallel wrapper) predicts of noisy x (N, C, H, W), told timesteps (N,) and tokens (N, L, W)."""
    name = type(getattr(denoiser, "module", denoiser)).__name__
    if name == SD3:
        pooled = x.new_zeros(len(x), getattr(denoiser, "module", denoiser).config.pooled_projection_dim)
        return denoiser(x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=timesteps, return_dict=False)[0]
    if name == PIXART:
        out = denoiser(x, encoder_hidden_states=tokens, timestep=timesteps, return_dict=False,
                       added_cond_kwargs={"resolution": None, "aspect_ratio": None})[0]
        return out[:, :x.shape[1]]                   # the rest is a learned variance, which no loss here trains
    return denoiser(x, timesteps, tokens, return_dict=False)[0]


def compile_blocks(denoiser: nn.Module, backend: str | Callable = "inductor") -> None:
    """Compile the blocks that a denoiser is built of again and again, each once; names of weights stay."""
    for module in denoiser.modules():
        if type(module).__name__ in REPEATED_BLOCKS:
            module.compile(backend=backend)


def prompt_width(config: Mapping) -> int:
    """Width of the tokens a denoiser reads, by its config."""
    name = config["_class_name"]
    if name == UNET:
        width = config.get("encoder_hid_dim") or config["cross_attention_dim"]
        return width if isinstance(width, int) else width[0]
    return config[PROMPT_WIDTH[name]]


# ---- from scratch ---------------------------------------------------------------------------------------------------

def from_scratch(size: Size, side: int, vae: nn.Module | None, prompts: PromptEncoder, *, seed: int, prediction: str) -> Base:
    """A new UNet for inputs of `side` px or latents that reads the tokens of `prompts`."""
    from diffusers import UNet2DConditionModel

    layout = dict(SIZES[size])
    n_levels = len(layout["block_out_channels"])
    if side % 2 ** (n_levels - 1):
        raise OptionError("--resolution", f"a multiple of {2 ** (n_levels - 1)} pixels or latents for --from-scratch {size}", str(side))
    channels = 3 if vae is None else vae.config.latent_channels
    if prompts.kind == "learned":
        layout |= {"encoder_hid_dim": prompts.width, "encoder_hid_dim_type": "text_proj"}
    else:
        layout["cross_attention_dim"] = prompts.width
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(sample_size=side, in_channels=channels, out_channels=channels, norm_num_groups=16,
                                    down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * (n_levels - 1)),
                                    up_block_types=(*["CrossAttnUpBlock2D"] * (n_levels - 1), "UpBlock2D"), **layout)
        if prompts.kind == "learned":
            _start_prompt_layer(unet, prompts.embedding_width)
    return Base(unet, vae, scheduler_config(prediction), f"from-scratch {size}")


def _start_prompt_layer(denoiser: nn.Module, n_filled: int) -> None:
    """A new first layer of the prompts: of tokens with so many entries of unit second moment it makes values of unit variance."""
    layer = getattr(denoiser, PROMPT_LAYER[type(denoiser).__name__])
    linear = layer if isinstance(layer, nn.Linear) else layer.linear_1
    nn.init.normal_(linear.weight, std=n_filled ** -0.5)
    nn.init.zeros_(linear.bias)


# ---- from a folder --------------------------------------------------------------------------------------------------

def load_base(folder: Path, vae_folder: Path | str | None, prompts: PromptEncoder, *, seed: int, prediction: str | None = None,
              pixel_space: bool = False, own_prompts: bool = False) -> Base:
    """A base in diffusers' layout. Its first layer of the prompts is made new for learned tokens, kept for published ones, and where
    it learned from such prompts before (`own_prompts`)."""
    denoiser = load_denoiser(folder, prompts if prompts.kind == "learned" and not own_prompts else None, seed=seed)
    if pixel_space and type(denoiser).__name__ != UNET:
        raise OptionError("--pixel-space", f"a base with a {UNET}", type(denoiser).__name__)
    if not pixel_space and not vae_folder and not (folder / "vae").is_dir():
        raise InputError(folder / "vae", "folder", "the autoencoder of the base", "nothing there",
                         "Name one with --pretrained-vae-path; a base of pixels goes on with --pixel-space")
    vae = None if pixel_space else load_vae(vae_folder or folder / "vae")
    channels = 3 if vae is None else vae.config.latent_channels
    if denoiser.config.in_channels != channels:
        raise WeightsError(folder, "input channels of the denoiser",
                           f"{channels}, as {'pixels have' if vae is None else 'the autoencoder gives'}", str(denoiser.config.in_channels))
    scheduler = read_scheduler(folder)
    own = own_prediction(scheduler, folder)
    return Base(denoiser, vae, scheduler if prediction in (None, own) else scheduler_config(prediction), str(folder))


def read_scheduler(folder: Path) -> dict:
    """The config of a base's scheduler; refused now if a run could not train with it, or write it into its pipeline."""
    path = folder / "scheduler" / "scheduler_config.json"
    config = read_json(path, "the config of a scheduler")
    sampler = "dpm++" if own_prediction(config, path) == "flow" else "ddim"
    require_scheduler(config, path)
    try:
        make_scheduler(config, sampler, 1)
    except Exception as error:       # whatever diffusers and torch make of words for numbers
        raise InputError(path, "scheduler", "a config that a scheduler can be made of", _first_line(error)) from error
    return config


def token_width_of(folder: Path) -> int:
    """Width of the tokens that the denoiser of a pipeline folder reads."""
    return prompt_width(_denoiser_config(denoiser_folder(folder)))


def _denoiser_config(path: Path) -> dict:
    config = read_json(path / "config.json", "the config of a denoiser")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in PROMPT_LAYER:
        raise InputError(path / "config.json", "_class_name", f"one of {', '.join(PROMPT_LAYER)}", str(name))
    asked = [key for key in MORE_CONDITIONS if config.get(key)]
    if name == PIXART and config.get("use_additional_conditions") is None and config.get("sample_size", 128) == PIXART_SIZED:
        asked = ["use_additional_conditions"]
    if asked:
        raise InputError(path / "config.json", ", ".join(asked), "a denoiser told prompts and timesteps alone", "one that wants more",
                         "SDXL and its like cannot be taken: choose Stable Diffusion 1 or 2, PixArt or SD 3")
    return config


def denoiser_folder(folder: Path) -> Path:
    """`unet/` or `transformer/` of a pipeline folder."""
    for name in ("unet", "transformer"):
        if (folder / name / "config.json").is_file():
            return folder / name
    raise InputError(folder, "content", "unet/ or transformer/, vae/ and scheduler/ of a diffusers pipeline", "neither",
                     "Name a folder with local weights, or train without any: --from-scratch small")


def load_denoiser(folder: Path, learned: PromptEncoder | None = None, *, seed: int = 0) -> nn.Module:
    """The denoiser of a pipeline folder in float32; with `learned` prompts its first layer of them is new."""
    import diffusers

    path = denoiser_folder(folder)
    config, new = _denoiser_config(path), ""
    name = config["_class_name"]
    if learned is not None:
        first = {"encoder_hid_dim": learned.width, "encoder_hid_dim_type": "text_proj"}
        config |= first if name == UNET else {PROMPT_WIDTH[name]: learned.width}
        new = f"{PROMPT_LAYER[name]}."
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        denoiser = _built(getattr(diffusers, name), config, path)
        if learned is not None:
            _start_prompt_layer(denoiser, learned.embedding_width)
    tensors = {key: value for key, value in read_sharded(path).items() if not (new and key.startswith(new))}
    fresh = {key: value for key, value in denoiser.state_dict().items() if new and key.startswith(new)}
    load_into(denoiser, {**tensors, **fresh}, weights_file(path))
    return denoiser


def load_vae(folder: Path | str) -> nn.Module:
    """A frozen AutoencoderKL or AutoencoderTiny, from its folder or the pipeline folder around it."""
    import diffusers

    folder = Path(folder)
    folder = folder / "vae" if (folder / "vae" / "config.json").is_file() else folder
    config = read_json(folder / "config.json", "an autoencoder in diffusers' layout (AutoencoderKL or AutoencoderTiny)")
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name not in VAES:
        raise InputError(folder / "config.json", "_class_name", " or ".join(VAES), str(name))
    vae = _built(getattr(diffusers, name), config, folder)
    load_into(vae, _todays_names(read_sharded(folder), vae.state_dict()), weights_file(folder))
    return vae.eval().requires_grad_(False)


OLD_ATTENTION = {"query": ".to_q.", "key": ".to_k.", "value": ".to_v.", "proj_attn": ".to_out.0."}


def _todays_names(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Autoencoders of SD-1.x call their attention's layers otherwise, and may keep them as 1 x 1 convolutions."""
    old = re.compile(r"\.(query|key|value|proj_attn)\.")
    renamed = {old.sub(lambda part: OLD_ATTENTION[part[1]], key): value for key, value in tensors.items()}
    return {key: value.reshape(own[key].shape) if "attentions" in key and key in own and value.numel() == own[key].numel() else value
            for key, value in renamed.items()}


def _built(cls, config: Mapping, path: Path) -> nn.Module:
    huge = [key for key, value in config.items() if not _is_bounded(value)]
    if huge:                         # memory and hours go before the weights are seen not to fit
        raise WeightsError(path / "config.json", ", ".join(huge), f"numbers up to {LARGEST:,}", str(config[huge[0]])[:60])
    try:
        return cls.from_config({key: value for key, value in config.items() if key != "_name_or_path"})
    except (OSError, MemoryError):
        raise
    except Exception as error:       # diffusers and torch raise a dozen types for a config they cannot build
        raise WeightsError(path / "config.json", "config", f"one that {cls.__name__} can be built from", _first_line(error)) from error


def _is_bounded(value: object) -> bool:
    """Whether no number in it is beyond any width or depth of a network."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_bounded, value))
    return not isinstance(value, (int, float)) or abs(value) <= LARGEST


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def read_sharded(folder: Path) -> dict[str, Tensor]:
    """Tensors of a component, in one file or several; float32. safetensors are preferred."""
    path = weights_file(folder)
    parts = _parts(path) if path.suffix == ".json" else [path]
    tensors = {key: value for part in parts for key, value in read_state_dict(part).items()}
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def weights_file(folder: Path) -> Path:
    """The weights of a component in one file, or the index of their parts."""
    found = [folder / f"diffusion_pytorch_model{suffix}"
             for suffix in (".safetensors.index.json", ".safetensors", ".fp16.safetensors", ".bin")]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        raise InputError(folder, "weights", "diffusion_pytorch_model.safetensors (or .bin)", "nothing there")
    return path


def _parts(index: Path) -> list[Path]:
    content = read_json(index, "an index of weights")
    files = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(files, dict) or not all(isinstance(name, str) and name and Path(name).name == name for name in files.values()):
        raise WeightsError(index, "weight_map", "names of files inside the folder", json.dumps(files)[:120])
    absent = [name for name in sorted(set(files.values())) if not os.path.isfile(index.with_name(name))]
    if absent:
        raise WeightsError(index, "weight_map", "files that lie beside it", f"none of the name {first_few(absent)}")
    return [index.with_name(name) for name in sorted(set(files.values()))]
