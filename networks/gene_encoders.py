"""Encode normalised expression (N, G) into (N, width): the published wide block, and two that do not spend G x G weights.

`InputScaling` holds what was fitted on the training spots (means, deviations, principal axes), so that it travels in the weights.
"""
from __future__ import annotations

import torch
from torch import Tensor, nn

SCALINGS = ("none", "centre", "standardise")
MIN_DEVIATION = 0.2   # added to a gene's deviation: a gene seen in three spots must not shout


class InputScaling(nn.Module):
    """Subtract the training mean, divide by the deviation, optionally project on principal axes; all fitted once by `fit`.

    Columns seen in too few training rows are set to zero. With kind "none", no components and no threshold it is the identity.
    """

    def __init__(self, width_in: int, kind: str = "none", components: int = 0, min_share: float = 0.0):
        super().__init__()
        self.kind, self.components, self.min_share = kind, components, min_share
        self.width = components or width_in
        if self.is_active:
            self.register_buffer("mean", torch.zeros(width_in))
            self.register_buffer("scale", torch.ones(width_in))
        if components:
            self.register_buffer("axes", torch.zeros(width_in, components))

    @property
    def is_active(self) -> bool:
        return self.kind != "none" or bool(self.components) or self.min_share > 0

    @torch.no_grad()
    def fit(self, rows: Tensor) -> None:
        """Fit to float (N, width_in) training rows. Deterministic."""
        if not self.is_active:
            return
        kept = ((rows != 0).float().mean(0) >= self.min_share).float()
        self.mean.copy_(rows.mean(0) if self.kind != "none" or self.components else torch.zeros_like(self.mean))
        self.scale.copy_(kept / (rows.std(0, correction=0) + MIN_DEVIATION) if self.kind == "standardise" else kept)
        if self.components:
            scaled = (rows - self.mean) * self.scale                          # (N, width_in)
            values, vectors = torch.linalg.eigh((scaled @ scaled.T).double())  # small N: the (N, N) Gram matrix is enough
            count = min(self.components, len(rows))
            values, vectors = values[-count:].flip(0).clamp_min(1e-12), vectors[:, -count:].flip(1)
            axes = (scaled.T.double() @ vectors) / values.sqrt()              # (width_in, count), orthonormal
            spread = (values / len(rows)).sqrt().mean()                       # one factor for all: the axes keep their proportions
            self.axes.zero_()[:, :count] = (axes / spread).float()

    def forward(self, rows: Tensor) -> Tensor:
        """(N, width_in) -> (N, width)."""
        if not self.is_active:
            return rows
        scaled = (rows - self.mean) * self.scale
        return scaled @ self.axes if self.components else scaled


class LinearBlock(nn.Sequential):
    """The published gene encoder: G -> G -> width, GELU and dropout after each; 352 M weights at G = 18,248."""

    def __init__(self, n_genes: int, width: int = 1024, dropout: float = 0.8):
        super().__init__(nn.Linear(n_genes, n_genes), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(n_genes, width), nn.GELU(), nn.Dropout(dropout))


class Bottleneck(nn.Sequential):
    """G -> hidden -> width: a hundredth of the published weights."""

    def __init__(self, n_genes: int, hidden: int, width: int, dropout: float):
        super().__init__(nn.Linear(n_genes, hidden), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(hidden, width), nn.GELU(), nn.Dropout(dropout))


class Hidden(nn.Sequential):
    """G -> width, one hidden layer."""

    def __init__(self, n_genes: int, width: int, dropout: float):
        super().__init__(nn.Linear(n_genes, width), nn.GELU(), nn.Dropout(dropout))


class ProjectionHead(nn.Module):
    """Linear, GELU, linear, dropout, plus the first linear's output; optional LayerNorm. Does not normalise to unit rows."""

    def __init__(self, width_in: int, width: int, dropout: float, residual: bool = True, layer_norm: bool = False):
        super().__init__()
        self.residual = residual
        self.first, self.second = nn.Linear(width_in, width), nn.Linear(width, width)
        self.activation, self.dropout = nn.GELU(), nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width) if layer_norm else nn.Identity()

    def forward(self, rows: Tensor) -> Tensor:
        """(N, width_in) -> (N, width)."""
        first = self.first(rows)
        second = self.dropout(self.second(self.activation(first)))
        return self.norm(first + second if self.residual else second)


def gene_encoder(kind: str, n_genes: int, hidden: int, width: int, dropout: float) -> tuple[nn.Module, int]:
    """(module, width out): `linear_block` (published), `bottleneck`, `hidden`, or `identity` (the scaled input itself)."""
    if kind == "linear_block":
        return LinearBlock(n_genes, width, dropout), width
    if kind == "bottleneck":
        return Bottleneck(n_genes, hidden, width, dropout), width
    if kind == "hidden":
        return Hidden(n_genes, hidden, dropout), hidden
    return nn.Identity(), n_genes


GENE_ENCODERS = ("linear_block", "bottleneck", "hidden", "identity")
