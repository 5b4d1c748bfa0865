"""The network of CLIP: gene expression and image patches in one embedding space, of unit rows.

Published model: `LinearBlock` G -> G -> 1024 and a projection head to 512 on the genes' side, a frozen pathology encoder and a
head of its own on the images' side.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.clip_model_config import ClipModelConfig
from networks.gene_encoders import InputScaling, ProjectionHead, gene_encoder
from networks.histo_models import Encoder
from networks.sample_scaling import fit_sample_scaling, require_whole_samples
from preprocessing.errors import WeightsError

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 1.0   # bounds of a learned temperature


class ClipModel(nn.Module):
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
        of a sample must be there: `InputError` where there are fewer than `MIN_SPOTS`.
        """
        samples = np.zeros(expression.shape[0], int) if sample_ids is None else np.unique(sample_ids, return_inverse=True)[1]
        if self.config.gene_sample_scaling != "none":
            require_whole_samples(samples, sample_ids)
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
