"""Frozen image encoders: pathology models from a local file, any timm model, and a small one for demo and tests.

Images go in as float (N, 3, H, W) in [-1, 1], features come out (N, width); each encoder resizes and normalises inside itself.
Nothing is downloaded except by `dump_model_to_disk`, which needs a hub login for gated models.
"""
from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.encoder_specs import ENCODERS, SWIGLU, TRANSFORMERS_FILES, TRANSFORMERS_KIND, EncoderSpec, weights_path
from networks.weights import load_into, read_state_dict, require_tensors
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from preprocessing.outputs import finished_file, finished_folder

CPU_BATCH = 8                     # images at a time on a CPU: larger activations fall out of its caches (1.4 x slower at 64)


class Encoder(nn.Module):
    """A frozen image encoder; stays in evaluation mode. Gradients may flow through it to its input."""

    def __init__(self, name: str, body: nn.Module, spec: EncoderSpec, source: str):
        super().__init__()
        self.name, self.spec, self.source = name, spec, source   # source: SHA-256 of the weight file, or "seeded"
        self.width, self.input_px = spec.width, spec.input_px
        self.body = body.to(memory_format=torch.channels_last)   # 1.6 x faster on a CPU
        self.register_buffer("mean", torch.tensor(spec.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(spec.std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Encoder:
        return super().train(False)   # a frozen tower keeps its running statistics and drops nothing

    def resize(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 3, input_px, input_px); does not change the range."""
        if images.shape[-2:] == (self.input_px, self.input_px):
            return images
        if self.spec.interpolation == "area":
            return F.interpolate(images, (self.input_px, self.input_px), mode="area")
        return F.interpolate(images, (self.input_px, self.input_px), mode="bilinear", antialias=True)

    def normalise(self, images: Tensor) -> Tensor:
        """[-1, 1] -> this encoder's own mean and deviation."""
        return ((images + 1) / 2 - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """float (N, 3, H, W) in [-1, 1] -> (N, width)."""
        if images.device.type == "cpu" and len(images) > CPU_BATCH and not torch.is_grad_enabled():
            return torch.cat([self(part) for part in images.split(CPU_BATCH)])
        images = self.normalise(self.resize(images)).contiguous(memory_format=torch.channels_last)
        features = self.body(images)
        if self.spec.pooling == "class+mean":   # Virchow2: class token beside the mean of the patch tokens, registers left out
            registers = self.body.num_prefix_tokens
            features = torch.cat([features[:, 0], features[:, registers:].mean(1)], dim=1)
        return features


class TokenPooler(nn.Module):
    """CONCH's contrastive read-out: one learned query attends over the trunk's tokens (CoCa's attentional pooler)."""

    def __init__(self, width: int, token_width: int, n_heads: int = 8):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, width))
        self.attn = nn.MultiheadAttention(width, n_heads, kdim=token_width, vdim=token_width, batch_first=True)
        self.ln_q, self.ln_k = nn.LayerNorm(width), nn.LayerNorm(token_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, L, token_width) -> (N, width)."""
        keys = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        return self.attn(query, keys, keys, need_weights=False)[0][:, 0]


class ConchTower(nn.Module):
    """A ViT trunk, its attention pooler and the norm after it; tensor names as in the published file."""

    def __init__(self, trunk: nn.Module, width: int):
        super().__init__()
        self.trunk = trunk
        self.attn_pool_contrast = TokenPooler(width, trunk.embed_dim)
        self.ln_contrast = nn.LayerNorm(width)

    def forward(self, images: Tensor) -> Tensor:
        return self.ln_contrast(self.attn_pool_contrast(self.trunk.forward_features(images)))


class ClassToken(nn.Module):
    """A transformers vision model seen as images -> class token."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).last_hidden_state[:, 0]


def build_encoder(name: str, weights: Path | str | None = None, input_px: int | None = None) -> Encoder:
    """The encoder `name` (a key of `ENCODERS` or `timm:<model>`), frozen, with weights from a local file (Phikon-v2: a folder).

    `efficientnet_lite0` finds its weights in its package; `uni` also in the file that `UNI_STATE_DICT_PATH` names. `input_px` is
    the side at which a convolutional encoder sees patches, in place of its own: at 128 px it costs a fifth of 224 px.
    """
    encoder = _build_at_its_own_size(name, weights)
    if input_px is not None and input_px != encoder.input_px:
        if hasattr(encoder.body, "patch_embed") or isinstance(encoder.body, (ClassToken, ConchTower)) or input_px < 32:
            raise OptionError("image encoder side", f"{encoder.input_px} px ({name}); another, from 32 px up, only for convolutional ones",
                              f"{input_px} px")
        encoder.input_px = input_px
    return encoder


def _build_at_its_own_size(name: str, weights: Path | str | None) -> Encoder:
    if name == "random_tiny":
        return Encoder(name, _tiny_body(), ENCODERS[name], source="seeded")
    if name.startswith("timm:"):
        body, spec = build_timm_body(name.removeprefix("timm:"))
        weights = weights_path(name, None, weights)
    elif name in ENCODERS:
        spec = ENCODERS[name]
        weights = weights_path(name, spec, weights)
        if not spec.timm_name:
            return Encoder(name, *_transformers_body(name, weights, spec))
        body = build_body(name, spec)
    else:
        raise OptionError("image encoder", f"one of {', '.join(ENCODERS)}, or timm:<model name>", name)
    load_into(body, _fitted(name, body, read_state_dict(weights), weights), weights)
    return Encoder(name, body, spec, source=file_sha256(weights))


def require_weight_file(name: str, weights: Path | str) -> None:
    """Refuse a file that `build_encoder` would refuse for the names or shapes of its tensors; their values are not read."""
    with torch.device("meta"):
        body = build_body(name, ENCODERS[name])
        require_tensors(body, _fitted(name, body, read_state_dict(weights, values=False), Path(weights)), weights)


def _fitted(name: str, body: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of a file under the names of `body`."""
    by_order = name == "efficientnet_lite0" and not _is_subset(body, tensors)
    return _by_order(body, tensors, path) if by_order else _fit_names(body, tensors)


def build_body(name: str, spec: EncoderSpec, **overrides) -> nn.Module:
    """The network of a named encoder with random weights; `overrides` shrink it for tests."""
    arguments = {**spec.timm_args, "num_classes": 0, **overrides}
    if arguments.get("mlp_layer") == SWIGLU:
        arguments.update(mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU)
    body = timm.create_model(spec.timm_name, pretrained=False, **arguments)
    return ConchTower(body, spec.width) if spec.pooling == "attention" else body


def build_timm_body(model: str) -> tuple[nn.Module, EncoderSpec]:
    """Any timm model without its classifier, and the spec that its own default configuration gives."""
    if not timm.is_model(model):
        near = ", ".join(timm.list_models(f"*{model.split('_')[0]}*")[:5]) or "see timm.list_models()"
        raise OptionError("image encoder", f"a model of timm {timm.__version__} ({near})", model)
    body = timm.create_model(model, pretrained=False, num_classes=0)
    own = body.pretrained_cfg
    width = getattr(body, "head_hidden_size", None) or body.num_features
    return body, EncoderSpec(width, own.get("license") or "see the model's card", own.get("hf_hub_id") or "timm", model, gated=False,
                             input_px=own["input_size"][-1], mean=tuple(own["mean"]), std=tuple(own["std"]), interpolation="bilinear")


def dump_model_to_disk(name: str, out_location: Path | str) -> Path:
    """Download an encoder's weights once (log in to the hub first: `hf auth login`); returns the path that the config then names.

    `out_location` is a folder that receives `<name>.safetensors`, or a file name of that suffix. Phikon-v2 is read with its
    config.json: it becomes a folder `<name>` in `out_location`.
    """
    from safetensors.torch import save_file

    downloadable = [key for key, spec in ENCODERS.items() if "/" in spec.where]
    if name not in downloadable:
        raise OptionError("encoder", f"one of {', '.join(downloadable)}", name)
    spec, target = ENCODERS[name], Path(out_location)
    if not spec.timm_name:   # by transformers
        if target.suffix == ".safetensors":
            raise OptionError("out_location", f"a folder ({name} is a folder of {' and '.join(TRANSFORMERS_FILES)})", str(target))
        sources = {file: _from_hub(spec, file) for file in TRANSFORMERS_FILES}
        with finished_folder(target / name, validate=lambda folder: _validate_safetensors(folder / TRANSFORMERS_FILES[1]),
                             kind=TRANSFORMERS_KIND) as temporary:
            for file, source in sources.items():
                shutil.copyfile(source, temporary / file)
        return target / name
    target = target if target.suffix == ".safetensors" else target / f"{name}.safetensors"
    source = _from_hub(spec, spec.file_name)
    with finished_file(target, validate=_validate_safetensors) as temporary:
        save_file({key: value.contiguous().clone() for key, value in read_state_dict(source).items()}, temporary)
    return target


def _from_hub(spec: EncoderSpec, file_name: str) -> str:
    """Path of one downloaded file of the encoder's repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return hf_hub_download(spec.where, file_name)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(spec.where, "hub repository", "a reachable hub and access to the model", type(error).__name__,
                         f"ask for access at https://huggingface.co/{spec.where}, then `hf auth login`") from error


def _validate_safetensors(path: Path) -> None:
    from safetensors import safe_open
    with safe_open(path, framework="pt") as file:
        file.keys()


def _tiny_body() -> nn.Module:
    """A seeded random convolutional network (32 features) that neither touches nor depends on the global generator."""
    with torch.device("meta"):
        body = nn.Sequential(nn.Conv2d(3, 16, 5, stride=4), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2), nn.GELU(),
                             nn.AdaptiveAvgPool2d(1), nn.Flatten())
    body.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(71)
    with torch.no_grad():
        for parameter in body.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * (2 / fan_in) ** 0.5 * (parameter.dim() > 1))
    return body


def _transformers_body(name: str, folder: Path, spec: EncoderSpec) -> tuple[nn.Module, EncoderSpec, str]:
    """A model that transformers knows (Phikon-v2 is a Dinov2Model), from a local folder; never runs code from it."""
    from transformers import AutoModel

    folder = folder if folder.is_dir() else folder.parent
    if missing := [file for file in TRANSFORMERS_FILES if not (folder / file).is_file()]:
        raise InputError(folder, "image encoder weights", f"a folder with {' and '.join(TRANSFORMERS_FILES)}",
                         f"no {' and no '.join(missing)}",
                         f'networks.histo_models.dump_model_to_disk("{name}", out_location=...) makes it from {spec.where}')
    model, loaded = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, use_safetensors=True,
                                              output_loading_info=True)   # transformers renames tensors between its versions
    wrong = {kind: sorted(map(str, names)) for kind, names in loaded.items() if kind.endswith("_keys") and names}
    if wrong:
        found = "; ".join(f"{kind}: {first_few(names)}" for kind, names in wrong.items())
        raise WeightsError(folder, "tensors", f"those of {type(model).__name__}", found)
    if model.config.hidden_size != spec.width:
        raise WeightsError(folder / "config.json", "hidden_size", f"{spec.width} ({name})", str(model.config.hidden_size))
    return ClassToken(model), spec, file_sha256(folder / TRANSFORMERS_FILES[1])


def _is_subset(body: nn.Module, tensors: Mapping[str, Tensor]) -> bool:
    return all(name in tensors for name, _ in body.named_parameters())


def _by_order(body: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The package file's tensors under timm's names: equal in order once the counters are set aside; every shape is compared."""
    theirs = [tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")]
    full = timm.create_model(ENCODERS["efficientnet_lite0"].timm_name, pretrained=False).state_dict()
    names = [name for name in full if not name.endswith("num_batches_tracked")]
    agree = len(names) == len(theirs) and all(full[name].shape == tensor.shape for name, tensor in zip(names, theirs, strict=True))
    if not agree:
        raise WeightsError(path, "tensors", f"the {len(names)} shapes of EfficientNet-Lite0 in order", f"{len(theirs)} tensors")
    return _fit_names(body, dict(zip(names, theirs, strict=True)))


def _fit_names(body: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out a classifier that the body does not have, and fill in batch counters, which frozen statistics never use."""
    own = body.state_dict()
    classifier = getattr(body, "pretrained_cfg", {}).get("classifier") or ()
    heads = tuple(f"{head}." for head in ((classifier,) if isinstance(classifier, str) else classifier))
    kept = {name: tensor for name, tensor in tensors.items() if name in own or not (heads and name.startswith(heads))}
    counters = {name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked") and name not in kept}
    return {**kept, **counters}
