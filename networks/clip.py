"""CLIP: gene expression and image patches in one embedding space (symmetric contrastive training, frozen image tower).

Published model: `LinearBlock` G -> G -> 1024 and a projection head to 512 on the genes' side, a frozen pathology encoder and a
head of its own on the images' side. Embeddings are unit rows. Saved weights hold everything but the frozen tower, which is
named with its weight file's hash.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from itertools import zip_longest
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.clip_model_config import ClipModelConfig
from networks.gene_encoders import InputScaling, ProjectionHead, gene_encoder
from networks.histo_models import Encoder, build_encoder
from networks.model_card import model_card
from networks.sample_scaling import fit_sample_scaling
from networks.weights import load_into, load_weights_folder, read_plain_file, save_weights_folder, weights_sha256
from preprocessing.errors import WeightsError
from preprocessing.outputs import file_sha256, finished_file, program_versions, strings_sha256

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0   # bounds of a learned temperature


class CLIP(nn.Module):
    """`image_encoder=None` builds a model that embeds genes and image features, but not images."""

    def __init__(self, config: ClipModelConfig, gene_names: Sequence[str], *, target_sum: float | str = "median",
                 image_encoder: Encoder | None = None, feature_width: int | None = None, image_encoder_sha256: str = "",
                 training: Mapping | None = None, gene_sets: Mapping[str, Sequence[str]] | None = None):
        super().__init__()
        self.config, self.gene_names, self.target_sum = config, list(gene_names), target_sum
        self.gene_sets = dict(gene_sets or {})   # of the pathways encoder: known genes by set
        self.training_record = dict(training or {})   # what it was trained on: kept in the weights' config
        self.feature_width = image_encoder.width if image_encoder else feature_width
        self.image_encoder_sha256 = image_encoder.source if image_encoder else image_encoder_sha256
        self.image_encoder = image_encoder
        self.gene_scaling = InputScaling(len(self.gene_names), config.gene_scaling, config.gene_components, config.gene_min_share)
        self.gene_encoder, width = gene_encoder(config, self.gene_scaling.width, self.gene_names, self.gene_sets)
        self.feature_scaling = InputScaling(self.feature_width, config.feature_scaling, config.feature_components)
        if config.feature_sample_scaling != "none":
            self.register_buffer("feature_centre", torch.zeros(self.feature_width))   # of a patch that belongs to no known sample
        self.gene_head = self._head(width, config.dropout)
        self.image_head = self._head(self.feature_scaling.width, config.image_dropout)
        log_temperature = torch.tensor(float(np.log(config.temperature)))
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature)

    def _head(self, width: int, dropout: float) -> nn.Module:
        config = self.config
        if config.linear_heads:
            return nn.Linear(width, config.projection)
        return ProjectionHead(width, config.projection, dropout, config.residual, config.layer_norm)

    @property
    def temperature(self) -> Tensor:
        """() the number that divides the cosines; a learned one stays between 0.01 and 1."""
        temperature = self.log_temperature.exp()
        return temperature.clamp(MIN_TEMPERATURE, MAX_TEMPERATURE) if self.config.learn_temperature else temperature

    def fit_inputs(self, expression: Tensor, features: Tensor, *, gene_shares: Tensor | None = None, centres: Tensor | None = None) -> None:
        """Fit both sides' scaling to training rows, (N, G) and (M, F); does nothing where the config asks for none.

        `gene_shares` (G,): share of spots that show a gene, where expression is scaled by sample already. `centres` (M, F): mean
        features of each row's sample, with `feature_sample_scaling`.
        """
        self.gene_scaling.fit(expression, gene_shares)
        if centres is not None:
            self.feature_centre.copy_(centres.mean(0))
            features = features - centres
        self.feature_scaling.fit(features)

    @property
    def needs_fitting(self) -> bool:
        return self.gene_scaling.is_active or self.feature_scaling.is_active or self.centres_features

    @property
    def scales_by_sample(self) -> bool:
        """True if a row of expression can only be embedded together with its whole sample."""
        return self.config.gene_sample_scaling != "none"

    @property
    def centres_features(self) -> bool:
        return self.config.feature_sample_scaling != "none"

    def encode_genes(self, expression: Tensor) -> Tensor:
        """Normalised expression (N, G) -> (N, D) unit rows; with `gene_sample_scaling`, rows scaled by `SampleScaling` already."""
        rows = F.dropout(self.gene_scaling(expression), self.config.gene_dropout, self.training)
        return F.normalize(self.gene_head(self.gene_encoder(rows)), dim=-1)

    def image_features(self, images: Tensor) -> Tensor:
        """[-1, 1] (N, 3, H, W) -> (N, F) of the frozen tower; no gradient."""
        if self.image_encoder is None:
            raise RuntimeError("this CLIP was loaded without its image tower (image_encoder=False)")
        with torch.no_grad():
            return self.image_encoder(images).float()

    def project_image_features(self, features: Tensor, centre: Tensor | None = None) -> Tensor:
        """(N, F) -> (N, D) unit rows. With `feature_sample_scaling`, `centre` (F,) or (N, F) is the mean of the features of each
        patch's sample; None: of the training patches."""
        if self.centres_features:
            features = features - (self.feature_centre if centre is None else centre)
        rows = F.dropout(self.feature_scaling(features), self.config.feature_dropout, self.training)
        return F.normalize(self.image_head(rows), dim=-1)

    def encode_images(self, images: Tensor, centre: Tensor | None = None) -> Tensor:
        """[-1, 1] (N, 3, H, W) -> (N, D) unit rows; outside training the mean over `image_views` flips and turns. `centre`: see
        `project_image_features`."""
        if self.training or self.config.image_views == 1:
            return self.project_image_features(self.image_features(images), centre)
        return self.project_views(self.view_features(images), centre)

    def view_features(self, images: Tensor) -> Tensor:
        """[-1, 1] (N, 3, H, W) -> (N, V, F): features of the flips and turns over which an embedding is averaged."""
        if self.config.image_views == 1:
            return self.image_features(images)[:, None]
        views = [torch.rot90(flipped, turns, (-2, -1)) for flipped in (images, images.flip(-1)) for turns in range(4)]
        return torch.stack([self.image_features(view) for view in views], dim=1)

    def project_views(self, features: Tensor, centre: Tensor | None = None) -> Tensor:
        """Features of several views (N, V, F) -> (N, D): the unit mean of their embeddings."""
        centre = centre[:, None] if centre is not None and centre.dim() == 2 else centre
        return F.normalize(self.project_image_features(features, centre).mean(1), dim=-1)

    @torch.no_grad()
    def embed_expression(self, expression: sp.csr_matrix, batch_size: int = 256, *, sample_ids: Sequence[str] | None = None) -> Tensor:
        """Normalised expression, sparse (N, G) -> float32 (N, D) on the CPU. Streams; leaves the module's mode as it was.

        With `gene_sample_scaling`, `sample_ids` (N,) say which rows are scaled together (none: all are one sample), and all spots
        of a sample must be there.
        """
        samples = np.zeros(expression.shape[0], int) if sample_ids is None else np.unique(sample_ids, return_inverse=True)[1]
        scaling = fit_sample_scaling(expression, samples, self.config.gene_sample_scaling)
        was_training, device = self.training, self.log_temperature.device
        self.eval()
        blocks = []
        for start in range(0, expression.shape[0], batch_size):
            part = slice(start, start + batch_size)
            rows = torch.from_numpy(expression[part].toarray().astype(np.float32))
            rows = rows if scaling is None else scaling(rows, torch.from_numpy(samples[part]))
            blocks.append(self.encode_genes(rows.to(device)).cpu())
        self.train(was_training)
        return torch.cat(blocks) if blocks else torch.zeros(0, self.config.projection)

    def require_genes(self, genes: Sequence[str], path: Path | str) -> None:
        """Refuse (exit 5) expression whose genes are not this model's, in its order."""
        genes = list(genes)
        if genes != self.gene_names:
            place, ours, theirs = next((i, a, b) for i, (a, b) in enumerate(zip_longest(self.gene_names, genes)) if a != b)
            difference = f"first difference at gene {place + 1}: {ours or 'no gene'} expected, {theirs or 'no gene'} found"
            raise WeightsError(path, "var_names", f"the {len(self.gene_names):,} genes of these weights in their order",
                               f"{len(genes):,}; {difference}")

    # ---- weights ----------------------------------------------------------------------------------------------------

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
        """A model in evaluation mode from a weights folder or a single `.pt` of `convert_ckpt_to_dict`.

        `image_encoder=False` leaves the frozen tower out (genes only); `image_encoder_weights` says where its file lies on
        this machine, if not where it was in training.
        """
        tensors, description = _read(Path(path))
        model = _build(description, path, image_encoder, image_encoder_weights)
        own = model.weights()
        load_into(_WithoutTower(model, own), tensors, path)
        return model.eval()

    def push_to_hub(self, repo_id: str, *, token: str | None = None, private: bool | None = None) -> str:
        """Upload the weights folder to a model repository of the hub, made if it is not there; returns the address of the upload.

        Whoever downloads that repository into a folder opens it with `from_pretrained`. The frozen tower is not uploaded.
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
            torch.save({"config": {**description, "versions": program_versions()}, "state_dict": model.weights()}, temporary)
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
    if isinstance(config, (str, Path)):
        from omegaconf import OmegaConf
        config = OmegaConf.to_container(OmegaConf.load(config))
    told = dict(config["model"] if "model" in config else config)
    if told.get("temperature", 0) is None:   # left to the rest of the config
        told["temperature"] = ClipModelConfig(learn_temperature=bool(told.get("learn_temperature"))).temperature
    different = [f"{name} {told[name]} told, {model[name]} trained" for name in model if name in told and told[name] != model[name]]
    if different:
        raise WeightsError(ckpt, "model", "the model that the config describes", "; ".join(different[:5]))


def clip_weights_sha256(path: Path | str) -> str:
    """SHA-256 that names CLIP weights in other files: of the folder's tensors, or of the single file."""
    path = Path(path)
    return file_sha256(path) if path.is_file() else weights_sha256(path)
