"""Embed the prompts of a step with the encoder that is trained with the generator.

The whole global batch is embedded at once: batch statistics and dropout masks then do not depend on the micro-batch (nor on
how many processes share the batch, if each embeds all of it). Losses of the micro-batches leave their gradient on the
embeddings, and `backward` takes it through the encoder once. The discriminator sees the embeddings without a gradient: what a
prompt says is learned from the pictures it makes, not from what pleases the heads.
"""
from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from networks.condition_mlp import DROPOUT, ConditionMlp
from training.cond_dropout import dropout_mask, mask_streams

STREAM = 4      # counter of the masks' streams: after those of training/cond_dropout.py


class MlpPrompts:
    """`mlp` embeds rows of `expression`, normalised, sparse (N, G). A frozen encoder embeds as in use: no dropout, running statistics."""

    def __init__(self, mlp: ConditionMlp, expression: sp.csr_matrix, seed: int):
        self.mlp, self.expression, self.seed = mlp, expression, seed
        self.is_trained = mlp.first.weight.requires_grad
        mlp.train(self.is_trained)

    def embed(self, rows: np.ndarray, step: int, device: torch.device | str) -> Tensor:
        """Unit embeddings (n, width) of the rows of a whole global batch, a leaf that collects the micro-batches' gradients."""
        expression = torch.from_numpy(self.expression[rows].toarray().astype(np.float32)).to(device)
        mask = None
        if self.is_trained:
            mask = dropout_mask(mask_streams(self.seed, step, STREAM, range(len(rows))), expression.shape[1], DROPOUT).to(device)
        self._embedded = self.mlp(expression, mask)
        self._leaf = self._embedded.detach().requires_grad_(self.is_trained)
        return self._leaf

    def backward(self) -> None:
        """Take the gradient on the embeddings through the encoder."""
        if self.is_trained and self._leaf.grad is not None:
            self._embedded.backward(self._leaf.grad)

    def update_statistics(self) -> None:
        """Running statistics follow the batch of this step: call when the step is taken."""
        if self.is_trained:
            self.mlp.update_statistics()
