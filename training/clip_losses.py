"""The contrastive loss of CLIP, and the gathering of embeddings that makes its batch the global one."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image_embeds: Tensor, gene_embeds: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric InfoNCE; both (N, D) with unit rows, row i of each from one spot. Returns ()."""
    logits = image_embeds @ gene_embeds.T / temperature       # (N, N)
    target = torch.arange(len(logits), device=logits.device)  # (N,)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the gradient of a row is summed over ranks and goes back to its owner."""

    @staticmethod
    def forward(context, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous()
        torch.distributed.all_reduce(gradient)
        share = len(gradient) // torch.distributed.get_world_size()
        start = share * torch.distributed.get_rank()
        return gradient[start:start + share]


def gather_rows(rows: Tensor) -> Tensor:
    """(N, D) of this rank -> (ranks x N, D) of all; every rank must hold the same N. One process: the rows themselves.

    Every rank computes the same global loss, so the summed gradient counts it once a rank; averaging gradients over
    ranks, as data-parallel training does, brings back the gradient of one rank with the whole batch.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return _GatherRows.apply(rows)
    return rows
