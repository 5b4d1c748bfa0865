"""Building blocks of the networks. The two functions that convert image ranges live here and nowhere else."""
from __future__ import annotations

import torch
from torch import Tensor


def images_to_float(images: Tensor) -> Tensor:
    """uint8 (N, 3, H, W) in 0..255 -> float32 in [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def images_to_uint8(images: Tensor) -> Tensor:
    """float (N, 3, H, W), nominally in [-1, 1] -> uint8; values outside are clamped."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)
