"""Low-rank adapters (Hu et al., ICLR 2022) for small GPUs: cross-attention and the projections around it learn, all else is frozen.

The prompts' first layer is trained whole: with learned tokens it is new. `merged` gives a plain denoiser of the same outputs.
"""
from __future__ import annotations

import copy

import torch
from torch import nn

from diffusion_utils.denoisers import PROMPT_LAYER
from preprocessing.errors import OptionError

LINEARS = r"(to_q|to_k|to_v|to_out\.0)"
CROSS_ATTENTION = rf".*\.(attn2\.{LINEARS}|attn\.(add_q_proj|add_k_proj|add_v_proj|{LINEARS})|proj_in|proj_out)"   # attn: SD3's joint one
ACCELERATES = ("forward", "_original_forward")      # what accelerate puts over a module's own under autocast


def add_adapters(denoiser: nn.Module, rank: int, seed: int) -> nn.Module:
    """Freeze the denoiser and put adapters of that rank into it; returns it."""
    from peft import LoraConfig, inject_adapter_in_model

    if rank < 1:
        raise OptionError("--lora-rank", "at least 1", str(rank))
    denoiser.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=CROSS_ATTENTION, init_lora_weights="gaussian"), denoiser)
    layer = getattr(denoiser, PROMPT_LAYER[type(denoiser).__name__], None)
    if layer is not None:
        layer.requires_grad_(True)
    return denoiser


def merged(denoiser: nn.Module) -> nn.Module:
    """A copy with the adapters worked into the weights and gone; the denoiser itself, where it has none."""
    from peft.tuners.lora import LoraLayer

    if not any(isinstance(module, LoraLayer) for module in denoiser.modules()):
        return denoiser
    wrapped = {name: vars(denoiser).pop(name) for name in ACCELERATES if name in vars(denoiser)}     # it cannot be copied
    try:
        plain = copy.deepcopy(denoiser)
    finally:
        vars(denoiser).update(wrapped)
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, last = name.rpartition(".")
            setattr(plain.get_submodule(parent), last, module.base_layer) if not last.isdigit() else \
                plain.get_submodule(parent).__setitem__(int(last), module.base_layer)
    if hasattr(plain, "peft_config"):
        del plain.peft_config
    return plain
