"""Memory that training SD-1.4 takes, counted on the meta device: nothing is computed and no memory is used.

Weights, gradients, AdamW's two moments and the average in float32, and what a forward pass keeps for the backward one, also in
float32 (autocast to 16 bits keeps about half). Not counted: the block that gradient checkpointing computes again, buffers of kernels.
"""
from __future__ import annotations

import torch
from torch import nn

from diffusion_utils.adapters import add_adapters

FLOAT_BYTES, GB = 4, 1e9


def state_gb(denoiser: nn.Module) -> dict[str, float]:
    """GB of a run's tensors that do not depend on the batch."""
    every = sum(parameter.numel() for parameter in denoiser.parameters())
    trained = sum(parameter.numel() for parameter in denoiser.parameters() if parameter.requires_grad)
    return {"weights": every * FLOAT_BYTES / GB, "gradients": trained * FLOAT_BYTES / GB, "optimiser": 2 * trained * FLOAT_BYTES / GB,
            "average": trained * FLOAT_BYTES / GB}


def kept_gb(denoiser: nn.Module, side: int, n_tokens: int, width: int) -> float:
    """GB that the forward pass of one image of `side` latents keeps for the backward pass, beside the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in denoiser.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}       # by storage: views of one tensor count once

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    denoiser.train()
    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        noisy = torch.randn(1, denoiser.config.in_channels, side, side, requires_grad=True)
        out = denoiser(noisy, torch.zeros(1), torch.randn(1, n_tokens, width)).sample
    del out
    return sum(storage.nbytes() for storage in kept.values()) / GB


def ways(make_denoiser, rank: int) -> dict[str, nn.Module]:
    """The same denoiser on the meta device: all weights trained, or adapters of that rank alone."""
    with torch.device("meta"):
        return {"all weights": make_denoiser(), f"--lora-rank {rank}": add_adapters(make_denoiser(), rank, seed=0)}
