"""The gene encoder that is trained with the generator: normalised expression (N, G) -> unit prompt embeddings (N, 768).

Dropout .4, Linear(G, 1024), BatchNorm, PReLU, Linear(1024, 768), L2-normalise, as published (`--encoder mlp`).
In training the dropout mask is handed over, and the running statistics move when told, so that a step is a function of its draws.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

DROPOUT, HIDDEN, WIDTH = 0.4, 1024, 768


class ConditionMlp(nn.Module):
    """Knows its genes and the library size they were normalised to, as `networks.clip.CLIP` does, and embeds like it."""

    scales_by_sample = False     # every row is embedded by itself

    def __init__(self, gene_names: Sequence[str], target_sum: float | str = "median", hidden: int = HIDDEN, width: int = WIDTH):
        super().__init__()
        self.gene_names, self.target_sum, self.hidden, self.width = list(gene_names), target_sum, hidden, width
        self.first = nn.Linear(len(self.gene_names), hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.activation = nn.PReLU()
        self.second = nn.Linear(hidden, width)

    def forward(self, expression: Tensor, mask: Tensor | None = None) -> Tensor:
        """(N, G) -> (N, width) unit rows. In training mode: statistics of these rows; `mask` (N, G) multiplies the expression."""
        x = self.first(expression if mask is None else expression * mask)
        if self.training:
            self._seen = torch.var_mean(x.detach(), dim=0)
            x = F.batch_norm(x, None, None, self.norm.weight, self.norm.bias, training=True, eps=self.norm.eps)
        else:
            x = self.norm(x)
        return F.normalize(self.second(self.activation(x)), dim=1)

    @torch.no_grad()
    def update_statistics(self) -> None:
        """Move the running statistics towards those of the last training batch: call once per optimiser step."""
        variance, mean = self._seen
        self.norm.running_mean.lerp_(mean, self.norm.momentum)
        self.norm.running_var.lerp_(variance, self.norm.momentum)
        self.norm.num_batches_tracked += 1

    @torch.no_grad()
    def embed_expression(self, expression: sp.csr_matrix, batch_size: int = 256, *, sample_ids: Sequence[str] | None = None) -> Tensor:
        """Normalised expression, sparse (N, G) -> float32 (N, width) on the CPU, in evaluation mode. `sample_ids` change nothing here."""
        was_training, device = self.training, self.first.weight.device
        self.eval()
        blocks = [self(torch.from_numpy(expression[start:start + batch_size].toarray().astype(np.float32)).to(device)).cpu()
                  for start in range(0, expression.shape[0], batch_size)]
        self.train(was_training)
        return torch.cat(blocks) if blocks else torch.zeros(0, self.width)

    def description(self) -> dict:
        """What builds it again, plain JSON."""
        return {"gene_names": self.gene_names, "target_sum": self.target_sum, "hidden": self.hidden, "width": self.width}
