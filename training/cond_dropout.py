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
        streams = mask_streams(self.seed, step, STREAM + phase, range(first, first + len(rows)))
        x = self.clip.gene_scaling(torch.from_numpy(self.expression[rows].toarray().astype(np.float32)).to(device))
        for layer in self.layers:
            x = x * dropout_mask(streams, x.shape[1], self.rate).to(x) if isinstance(layer, nn.Dropout) else layer(x)
        return F.normalize(self.clip.gene_head(x), dim=-1)


def mask_streams(seed: int, step: int, stream: int, places: Iterable[int]) -> list[np.random.Generator]:
    """The random numbers of the masks of one step, one generator for every place in the global batch."""
    return [np.random.Generator(np.random.Philox(key=[seed, step], counter=[0, 0, stream, place])) for place in places]


def dropout_mask(streams: Iterable[np.random.Generator], width: int, rate: float) -> Tensor:
    """(n, width): 0 with probability `rate`, else 1 / (1 - rate)."""
    kept = np.stack([stream.random(width, dtype=np.float32) >= rate for stream in streams])
    return torch.from_numpy(kept) / (1 - rate)
