"""Embed prompts for the generator as the published method does by accident: through the gene encoder with its dropout on.

The dropouts are those inside the gene encoder (two in the published one); its head, and the discriminator's prompts, have none.
Every mask is a function of (seed, step, phase, position in the global batch), as all random numbers of a step are.
"""
from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preprocessing.errors import OptionError

STREAM = 2      # counter of the masks' streams: this + the phase of training/gan_draws.py


class CondDropout:
    """Embeds rows of expression anew, each with dropout masks of its own.

    `clip` is a networks.clip.CLIP in evaluation mode; `expression` is normalised, sparse (N, G), row i of training patch i.
    """

    def __init__(self, clip: nn.Module | None, expression: sp.csr_matrix | None, rate: float, seed: int):
        if clip is None or expression is None:
            raise OptionError("--cond-dropout", "expression and a gene encoder to embed prompts with at every step, or --cond-dropout 0",
                              f"{rate} with ready-made prompt embeddings")
        layers = list(clip.gene_encoder) if isinstance(clip.gene_encoder, nn.Sequential) else []
        if not any(isinstance(layer, nn.Dropout) for layer in layers):
            raise OptionError("--cond-dropout", "a gene encoder with dropout, or --cond-dropout 0", type(clip.gene_encoder).__name__)
        if clip.config.gene_sample_scaling != "none":
            raise OptionError("--cond-dropout", "0 with a gene encoder that scales every sample by its own genes", str(rate))
        self.clip, self.layers, self.expression, self.rate, self.seed = clip, layers, expression, rate, seed

    @torch.no_grad()
    def prompts(self, rows: np.ndarray, step: int, phase: int, first: int, device: torch.device | str) -> Tensor:
        """Unit embeddings (n, D) of the rows; `first` is the place of the first one in the global batch of this step."""
        streams = [np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, STREAM + phase, place]))
                   for place in range(first, first + len(rows))]
        x = self.clip.gene_scaling(torch.from_numpy(self.expression[rows].toarray().astype(np.float32)).to(device))
        for layer in self.layers:
            x = x * self._mask(streams, x.shape[1]).to(x) if isinstance(layer, nn.Dropout) else layer(x)
        return F.normalize(self.clip.gene_head(x), dim=-1)

    def _mask(self, streams: Iterable[np.random.Generator], width: int) -> Tensor:
        """(n, width): 0 with probability `rate`, else 1 / (1 - rate)."""
        kept = np.stack([stream.random(width, dtype=np.float32) >= self.rate for stream in streams])
        return torch.from_numpy(kept) / (1 - self.rate)
