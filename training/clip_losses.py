"""The contrastive loss of CLIP."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image_embeds: Tensor, gene_embeds: Tensor, temperature: float | Tensor) -> Tensor:
    """Symmetric InfoNCE; both (N, D) with unit rows, row i of each from one spot. Returns ()."""
    logits = image_embeds @ gene_embeds.T / temperature       # (N, N)
    target = torch.arange(len(logits), device=logits.device)  # (N,)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
