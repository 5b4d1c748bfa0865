"""Encode a spot as a set of tokens, one for each of its most expressed genes, read by a small transformer.

A token is a learned embedding of the gene plus an encoding of its value (as scGPT adds them); no order is given to the genes. A
learned token of the spot stands before them, so that a spot without any gene is a set of one.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.clip_model_config import ClipModelConfig

GENE_STD = 0.2   # of a gene's embedding at the start: about that of a value's encoding


class GeneTokens(nn.Module):
    """The `gene_tokens` genes of highest value of each spot -> gene_width. Genes whose value is not above 0 are absent: nothing sees them.

    `gene_token_pooling`: attention reads the spot's token, mean averages all tokens that are there.
    """

    def __init__(self, n_genes: int, config: ClipModelConfig):
        super().__init__()
        self.n_tokens, self.pooling, token_width = min(config.gene_tokens, n_genes), config.gene_token_pooling, config.gene_token_width
        self.gene = nn.Embedding(n_genes, token_width)
        nn.init.normal_(self.gene.weight, std=GENE_STD)
        self.value = nn.Sequential(nn.Linear(1, token_width), nn.GELU(), nn.Linear(token_width, token_width))
        self.spot = nn.Parameter(torch.randn(1, 1, token_width) * GENE_STD)
        self.layers = nn.ModuleList(TokenLayer(token_width, config.gene_token_heads, config.dropout)
                                    for _ in range(config.gene_token_layers))
        self.norm, self.out = nn.LayerNorm(token_width), nn.Linear(token_width, config.gene_width)

    def forward(self, rows: Tensor) -> Tensor:
        """(N, G) -> (N, gene_width)."""
        values, genes = rows.topk(self.n_tokens, dim=1)                             # (N, L - 1) each
        tokens = self.gene(genes) + self.value(values.unsqueeze(-1))                # (N, L - 1, token_width)
        tokens = torch.cat([self.spot.expand(len(rows), -1, -1).to(tokens), tokens], dim=1)
        present = F.pad(values > 0, (1, 0), value=True)                             # (N, L)
        for layer in self.layers:
            tokens = layer(tokens, present)
        if self.pooling == "attention":
            return self.out(self.norm(tokens[:, 0]))
        kept = present.unsqueeze(-1).to(tokens)
        return self.out(self.norm((tokens * kept).sum(1) / kept.sum(1)))


class TokenLayer(nn.Module):
    """Attention among the present tokens, then an MLP on each; both after a LayerNorm and added to what came in."""

    def __init__(self, width: int, n_heads: int, dropout: float):
        super().__init__()
        self.n_heads = n_heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.merge = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)   # a key's bias does nothing
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, present: Tensor) -> Tensor:
        """(N, L, width) and bool (N, L) -> (N, L, width)."""
        parts = self.query_key_value(self.attention_norm(tokens)).unflatten(-1, (3, self.n_heads, -1))   # (N, L, 3, heads, width / heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4)                                                 # (N, heads, L, width / heads)
        heads = F.scaled_dot_product_attention(query, key, value, attn_mask=present[:, None, None, :])
        tokens = tokens + self.dropout(self.merge(heads.transpose(1, 2).flatten(2)))
        return tokens + self.dropout(self.mlp(self.mlp_norm(tokens)))
