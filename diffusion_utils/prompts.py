"""Turn prompt embeddings into the tokens that cross-attention reads; the only home of that step.

learned: L tokens of width L * D; token l carries the embedding in block l, zeros elsewhere, so that the denoiser's own first linear
layer turns it into W_l g: L distinct learned tokens, and stock diffusers samples them. The embeddings are standardised first
(`networks.layers.ConditionNorm`), as what all prompts share tells nothing.
published: one token, the embedding padded with ones to the cross-attention width. The published recipe repeats it 77 times, which
attention cannot tell from once.
"""
from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from networks.layers import ConditionNorm
from networks.weights import load_into, load_weights_folder, save_weights_folder
from preprocessing.errors import InputError, OptionError, WeightsError
from training.prompts import read_rows

PromptTokens = Literal["learned", "published"]
MEAN, ZEROS = "mean", "zeros"     # null prompts that need no file


class PromptEncoder(nn.Module):
    """Embeddings (N, D) -> tokens (N, L, width), and the null prompt. Has no trained weights: those are the denoiser's."""

    def __init__(self, embedding_width: int, kind: PromptTokens = "learned", n_tokens: int = 8, cross_width: int = 0):
        """`cross_width`: of the denoiser's cross-attention, which published prompts are padded to."""
        super().__init__()
        if kind not in get_args(PromptTokens):
            raise OptionError("--prompt-tokens", f"one of {', '.join(get_args(PromptTokens))}", str(kind))
        if n_tokens < 1:
            raise OptionError("--n-tokens", "at least 1", str(n_tokens))
        if kind == "published" and cross_width < embedding_width:
            raise OptionError("--prompt-tokens published", f"embeddings at most {cross_width} wide, as the cross-attention is",
                              str(embedding_width))
        self.embedding_width, self.kind = embedding_width, kind
        self.n_tokens = n_tokens if kind == "learned" else 1
        self.width = self.n_tokens * embedding_width if kind == "learned" else cross_width
        self.norm = ConditionNorm(embedding_width) if kind == "learned" else None
        self.register_buffer("null", torch.zeros(embedding_width))

    @torch.no_grad()
    def fit(self, embeddings: Tensor, null: Tensor) -> PromptEncoder:
        """Take the statistics of the training prompts (N, D), and the embedding (D,) that means "no condition"."""
        if self.norm is not None:
            self.norm.fit(embeddings)
        return self.fit_null(null)

    @torch.no_grad()
    def fit_null(self, null: Tensor) -> PromptEncoder:
        """Take the null prompt (D,) alone; statistics stay."""
        self.null.copy_(null)
        return self

    def forward(self, embeddings: Tensor) -> Tensor:
        """(N, D) -> (N, L, width)."""
        if self.kind == "published":
            ones = embeddings.new_ones(len(embeddings), self.width - self.embedding_width)
            return torch.cat([embeddings, ones], dim=1)[:, None]
        tokens = embeddings.new_zeros(len(embeddings), self.n_tokens, self.n_tokens, self.embedding_width)
        blocks = torch.arange(self.n_tokens, device=embeddings.device)
        tokens[:, blocks, blocks] = self.norm(embeddings)[:, None]
        return tokens.flatten(2)

    def null_tokens(self) -> Tensor:
        """(1, L, width)."""
        return self(self.null[None])

    def with_nulls(self, embeddings: Tensor, dropped: Tensor) -> Tensor:
        """The embeddings (N, D), replaced by the null prompt where `dropped` (N,) is true."""
        return torch.where(dropped[:, None], self.null, embeddings)

    def save(self, folder: Path | str) -> None:
        """A weights folder of the statistics and the null prompt."""
        save_weights_folder(folder, self.state_dict(), {"class": "PromptEncoder", "kind": self.kind, "n_tokens": self.n_tokens,
                                                        "embedding_width": self.embedding_width, "width": self.width})

    @classmethod
    def load(cls, folder: Path | str) -> PromptEncoder:
        tensors, config = load_weights_folder(folder)
        try:
            encoder = cls(int(config["embedding_width"]), config["kind"], int(config["n_tokens"]), int(config["width"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(folder, "config.json", "embedding_width, kind, n_tokens, width", str(error)) from error
        load_into(encoder, tensors, folder)
        return encoder.eval().requires_grad_(False)


def read_embeddings(path: Path | str, width: int | None = None) -> Tensor:
    """float32 (N, D) of an .npy; finite, of that width if it is given."""
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file", "an .npy of prompt embeddings", "nothing there")
    return torch.from_numpy(read_rows(path, width, encoded=True))


def read_null_prompt(said: str, embeddings: Tensor) -> Tensor:
    """(D,): the mean of the training prompts (N, D), zeros, or what the .npy of shape (D,) or (1, D) holds."""
    if said == MEAN:
        return embeddings.mean(dim=0)
    if said == ZEROS:
        return torch.zeros(embeddings.shape[1])
    rows = read_embeddings(said, embeddings.shape[1])
    if len(rows) != 1:
        raise InputError(said, "null prompt", f"one embedding, ({rows.shape[1]},) or (1, {rows.shape[1]})", str(tuple(rows.shape)))
    return rows[0]


def shuffled(embeddings: Tensor, seed: int) -> Tensor:
    """The same prompts at other patches: the null experiment, in which genes tell nothing."""
    order = np.random.Generator(np.random.Philox(key=[seed, 77])).permutation(len(embeddings))
    return embeddings[torch.from_numpy(order)]


def mean_cosine(rows: Tensor) -> float:
    """Mean cosine between different rows (N, W): 1 where all prompts are one."""
    unit = nn.functional.normalize(rows.double(), dim=1)
    total = unit.sum(dim=0).square().sum() - len(unit)
    return float(total / (len(unit) * (len(unit) - 1)))
