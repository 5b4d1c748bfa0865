"""CLIP with its weights: folders and single files that hold everything but the frozen tower, which is named with its file's hash."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

from torch import Tensor, nn

from networks.clip_model import ClipModel
from networks.clip_model_config import ClipModelConfig
from networks.histo_models import build_encoder
from networks.model_card import model_card
from networks.weights import (
    load_into,
    load_weights_folder,
    local_or_hub,
    read_plain_file,
    save_weights_folder,
    weights_sha256,
    write_plain_file,
)
from preprocessing.done_manifests import file_sha256, program_versions, strings_sha256
from preprocessing.errors import InputError, WeightsError
from preprocessing.inputs import require_file
from preprocessing.outputs import finished_file


class CLIP(ClipModel):
    """The network and how it is saved, loaded, shared."""

    def weights(self) -> dict[str, Tensor]:
        """Everything but the frozen image tower."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("image_encoder.")}

    def description(self) -> dict:
        """The config of a weights folder, plain JSON."""
        return {"class": "CLIP", "model": asdict(self.config), "target_sum": self.target_sum, "feature_width": self.feature_width,
                "image_encoder_sha256": self.image_encoder_sha256, "vocab_sha256": strings_sha256(self.gene_names),
                "training": self.training_record, "gene_sets": self.gene_sets, "gene_names": self.gene_names}

    def save_pretrained(self, folder: Path | str) -> Path:
        """Write a weights folder, with its model card."""
        return save_weights_folder(folder, self.weights(), self.description(), model_card(self.description()))

    @classmethod
    def from_pretrained(cls, path: Path | str, *, image_encoder: bool = True, image_encoder_weights: Path | str | None = None) -> CLIP:
        """A model in evaluation mode from a weights folder, a single `.pt` of `convert_ckpt_to_dict`, or `hf:owner/name` on the hub.

        `image_encoder=False` leaves the frozen tower out (genes only); `image_encoder_weights` says where its file lies on
        this machine, if not where it was in training.
        """
        path = local_or_hub(path)
        tensors, description = _read(path)
        model = _build(description, path, image_encoder, image_encoder_weights)
        own = model.weights()
        load_into(_WithoutTower(model, own), tensors, path)
        return model.eval()

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Upload the weights folder to a model repository of the hub, made if it is not there; returns the address of the upload.

        `from_pretrained(f"hf:{repo_id}")` opens it. The frozen tower is not uploaded.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            self.save_pretrained(Path(folder) / "clip")
            return str(api.upload_folder(repo_id=repo_id, folder_path=Path(folder) / "clip"))

    @staticmethod
    def convert_ckpt_to_dict(ckpt: Path | str, config: Mapping | Path | str | None, path: Path | str) -> Path:
        """Turn a training checkpoint of `train_clip.py` into one plain file: tensors and JSON-able values.

        `config` (the run's YAML, or its dictionary; None = do not compare) must describe the model in the checkpoint.
        """
        content = read_plain_file(ckpt)
        if not isinstance(content.get("clip"), str) or not isinstance(content.get("state_dict"), Mapping):
            raise WeightsError(ckpt, "contents", "a checkpoint of train_clip.py", f"keys {', '.join(map(str, list(content)[:5]))}")
        description = json.loads(content["clip"])
        _require_same_model(config, description["model"], ckpt)
        tensors = {name.removeprefix("clip."): tensor for name, tensor in content["state_dict"].items() if name.startswith("clip.")}
        model = _build(description, ckpt, False, None)
        load_into(_WithoutTower(model, model.weights()), tensors, ckpt)
        path = Path(path)
        with finished_file(path) as temporary:
            write_plain_file({"config": {**description, "versions": program_versions()}, "state_dict": model.weights()}, temporary)
        return path


class _WithoutTower(nn.Module):
    """A model seen through its saved tensors alone, so that `load_into` compares just these."""

    def __init__(self, model: CLIP, own: dict[str, Tensor]):
        super().__init__()
        self._model, self._own = [model], own   # in a list: not registered as a child

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        return self._own

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        return self._model[0].load_state_dict(state_dict, strict=False)   # what is absent is the tower


def _read(path: Path) -> tuple[dict[str, Tensor], dict]:
    if not path.is_file():
        tensors, description = load_weights_folder(path)
    else:
        content = read_plain_file(path)
        if not isinstance(content.get("config"), dict) or not isinstance(content.get("state_dict"), Mapping):
            raise WeightsError(path, "contents", "config and state_dict, as CLIP.convert_ckpt_to_dict writes them",
                               f"keys {', '.join(map(str, list(content)[:5]))}")
        tensors, description = dict(content["state_dict"]), content["config"]
    genes = description.get("gene_names")
    if description.get("class") != "CLIP" or not isinstance(genes, list):
        raise WeightsError(path, "class", "CLIP", str(description.get("class")))
    if strings_sha256(genes) != description.get("vocab_sha256"):
        raise WeightsError(path, "vocab_sha256", str(description.get("vocab_sha256")), "another gene list")
    return tensors, description


def _build(description: dict, path: Path | str, image_encoder: bool, weights: Path | str | None) -> CLIP:
    known, settings = {field.name for field in fields(ClipModelConfig)}, description.get("model")
    if not isinstance(settings, dict) or set(settings) - known:
        raise WeightsError(path, "model", "the settings of this program's CLIP", f"unknown {sorted(set(settings or {}) - known)[:5]}")
    config = ClipModelConfig(**settings)
    encoder = None
    if image_encoder:
        encoder = build_encoder(config.image_encoder, weights or config.image_encoder_weights, config.image_encoder_px)
        if encoder.source != description.get("image_encoder_sha256"):
            raise WeightsError(weights or config.image_encoder, "SHA-256 of the image encoder",
                               f"{description.get('image_encoder_sha256')}, with which this CLIP was trained", encoder.source)
    return CLIP(config, description["gene_names"], target_sum=description.get("target_sum", "median"), image_encoder=encoder,
                feature_width=description.get("feature_width"), image_encoder_sha256=description.get("image_encoder_sha256", ""),
                training=description.get("training"), gene_sets=description.get("gene_sets"))


def _require_same_model(config: Mapping | Path | str | None, model: Mapping, ckpt: Path | str) -> None:
    if config is None:
        return
    source = "the config"
    if isinstance(config, (str, Path)):
        source, config = str(config), _read_config(config)
    told = dict(config["model"] if "model" in config else config)
    if told.get("temperature", 0) is None:   # left to the rest of the config
        told["temperature"] = ClipModelConfig(learn_temperature=bool(told.get("learn_temperature"))).temperature
    different = [f"{name} {told[name]} told, {model[name]} trained" for name in model if name in told and told[name] != model[name]]
    if different:
        raise WeightsError(ckpt, "model", f"the model that {source} describes", "; ".join(different[:5]))


def _read_config(path: Path | str) -> dict:
    """The model's settings, or those of a run with a section `model`, as YAML."""
    from omegaconf import OmegaConf
    require_file(path, "the YAML of a run")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:       # yaml and omegaconf raise a dozen types
        raise InputError(path, "file", "the YAML of a run", f"one that cannot be read ({str(error)[:120]})") from error
    if not isinstance(content, dict) or not isinstance(content.get("model", {}), dict):
        raise InputError(path, "content", "settings by name, the model's under `model`", str(content)[:60])
    return content


def clip_weights_sha256(path: Path | str) -> str:
    """SHA-256 that names CLIP weights in other files: of the folder's tensors, or of the single file."""
    path = local_or_hub(path)
    return file_sha256(path) if path.is_file() else weights_sha256(path)
