"""What CLIP minimises: the contrastive loss, and a distance between samples that keeps batch effects out of the embeddings."""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def clip_loss(image_embeds: Tensor, gene_embeds: Tensor, temperature: float | Tensor, samples: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE; both (N, D) with unit rows, row i of each from one spot. Returns ().

    With `samples` (N,) a spot is contrasted with those of its own sample alone: telling samples apart then earns nothing.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):   # bfloat16 has 3 digits: too few for cosines over a temperature
        logits = image_embeds @ gene_embeds.T / temperature         # (N, N)
    if samples is not None:
        logits = logits.masked_fill(samples[:, None] != samples[None, :], -torch.inf)
    target = torch.arange(len(logits), device=logits.device)  # (N,)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def sample_mmd(embeds: Tensor, samples: Tensor) -> Tensor:
    """Squared maximum mean discrepancy between samples, summed over their pairs; (N, D) and int (N,) -> ().

    Kernel exp(-d^2 / median d^2) over the batch (the median heuristic, no gradient through it); unbiased (Gretton et al. 2012,
    eq. 3): 0 on average for samples of one distribution. A sample with a single spot in the batch takes no part.
    """
    numbers, members = samples.unique(return_inverse=True)
    member = F.one_hot(members, len(numbers)).to(embeds).T                # (S, N)
    counts = member.sum(1)                                                # (S,)
    several = counts > 1
    if several.sum() < 2:
        return embeds.new_zeros(())
    with torch.autocast(embeds.device.type, enabled=False):
        norms = embeds.square().sum(1)
        squared = (norms[:, None] + norms[None, :] - 2 * embeds @ embeds.T).clamp_min(0)   # (N, N)
    others = ~torch.eye(len(embeds), dtype=torch.bool, device=embeds.device)
    median = squared.detach()[others].median().clamp_min(torch.finfo(embeds.dtype).eps)
    kernel = torch.exp(-squared / median) * others                        # a spot is not compared with itself
    member, counts = member[several], counts[several]
    sums = member @ kernel @ member.T                                     # (S, S)
    within = sums.diagonal() / (counts * (counts - 1))
    distance = within[:, None] + within[None, :] - 2 * sums / (counts[:, None] * counts[None, :])
    return distance.triu(diagonal=1).sum()
