"""Encode normalised expression (N, G) into (N, width): the published wide block, and others that do not spend G x G weights.

`InputScaling` holds what was fitted on the training spots (means, deviations, principal axes), so that it travels in the weights.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.clip_model_config import ClipModelConfig
from networks.gene_tokens import GeneTokens

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
    def fit(self, rows: Tensor, shares: Tensor | None = None) -> None:
        """Fit to float (N, width_in) training rows. Deterministic. `shares` (width_in,): of rows in which a column is seen, where
        `rows` have lost their zeros."""
        if not self.is_active:
            return
        kept = (((rows != 0).float().mean(0) if shares is None else shares) >= self.min_share).float()
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


class MemberLinear(nn.Module):
    """G -> P sums, each over the genes of one set: a weight outside its set is zero, gets no gradient, and stays zero."""

    def __init__(self, gene_names: Sequence[str], gene_sets: Mapping[str, Sequence[str]]):
        super().__init__()
        place = {gene: column for column, gene in enumerate(gene_names)}
        members = torch.zeros(len(gene_sets), len(gene_names), dtype=torch.bool)
        for row, genes in enumerate(gene_sets.values()):
            members[row, [place[gene] for gene in genes]] = True
        self.register_buffer("members", members, persistent=False)   # the names of the genes travel in the config of the weights
        bound = members.sum(1, keepdim=True).float().rsqrt()         # as nn.Linear, whose inputs are the members
        self.weight = nn.Parameter((torch.rand(members.shape) * 2 - 1) * bound * members)
        self.bias = nn.Parameter(torch.zeros(len(gene_sets)))

    def forward(self, rows: Tensor) -> Tensor:
        """(N, G) -> (N, P)."""
        return F.linear(rows, self.weight * self.members, self.bias)


class Pathways(nn.Sequential):
    """G -> one sum a gene set -> width."""

    def __init__(self, gene_names: Sequence[str], gene_sets: Mapping[str, Sequence[str]], width: int, dropout: float):
        super().__init__(MemberLinear(gene_names, gene_sets), nn.GELU(), nn.Dropout(dropout),
                         nn.Linear(len(gene_sets), width), nn.GELU(), nn.Dropout(dropout))


def gene_encoder(config: ClipModelConfig, width_in: int, gene_names: Sequence[str],
                 gene_sets: Mapping[str, Sequence[str]]) -> tuple[nn.Module, int]:
    """(module, width out) of `config.gene_encoder`. `width_in`: of the scaled input; `identity` is that input itself."""
    kind, hidden, width, dropout = config.gene_encoder, config.gene_hidden, config.gene_width, config.dropout
    if kind == "linear_block":
        return LinearBlock(width_in, width, dropout), width
    if kind == "bottleneck":
        return Bottleneck(width_in, hidden, width, dropout), width
    if kind == "hidden":
        return Hidden(width_in, hidden, dropout), hidden
    if kind == "gene_tokens":
        return GeneTokens(width_in, config), width
    if kind == "pathways":
        return Pathways(gene_names, gene_sets, width, dropout), width
    return nn.Identity(), width_in
