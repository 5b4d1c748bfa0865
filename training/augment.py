"""Flip, turn and recolour patches in batches. What is drawn is a table of numbers, so the same view can be made twice.

Draws come from an explicit `torch.Generator`; nothing touches the global one.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from networks.layers import images_to_float
from preprocessing.errors import OptionError

TO_YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])   # NTSC
LUMA = TO_YIQ[0]


@dataclass
class AugmentConfig:
    flip: bool = True          # both flips, each with probability 1/2
    rotate: bool = False       # quarter turns
    brightness: float = 0.2    # factor drawn from 1 ± this
    contrast: float = 0.2      # factor about the patch's mean grey
    saturation: float = 0.2    # factor about each pixel's grey
    hue: float = 0.2           # turn of the colour circle, ± this share of a full turn

    def __post_init__(self):
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"augment.{name}", "0 up to 1", str(getattr(self, name)))
        if not 0 <= self.hue <= 0.5:
            raise OptionError("augment.hue", "0 to 0.5", str(self.hue))


def draw_views(count: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """float32 (count, 7): flip x, flip y, quarter turns, brightness, contrast, saturation, hue of `count` views."""
    uniform = torch.rand(count, 7, generator=generator)
    spread = torch.tensor([config.brightness, config.contrast, config.saturation])
    views = plain_views(count)
    views[:, :2] = (uniform[:, :2] < 0.5) * float(config.flip)
    views[:, 2] = torch.floor(uniform[:, 2] * 4) * float(config.rotate)
    views[:, 3:6] = 1 + (2 * uniform[:, 3:6] - 1) * spread
    views[:, 6] = (2 * uniform[:, 6] - 1) * config.hue
    return views


def plain_views(count: int) -> Tensor:
    """The views that change nothing, (count, 7)."""
    return torch.tensor([0, 0, 0, 1, 1, 1, 0], dtype=torch.float32).repeat(count, 1)


def turned_views() -> Tensor:
    """The eight flips and quarter turns of a square, (8, 7)."""
    views = plain_views(8)
    views[:, 0], views[:, 2] = torch.arange(8) // 4, torch.arange(8) % 4
    return views


def apply_views(images: Tensor, views: Tensor) -> Tensor:
    """uint8 (N, 3, H, H) and (N, 7) -> float (N, 3, H, H) in [-1, 1]. Row i depends on row i alone."""
    images = (images_to_float(images) + 1) / 2
    turned = torch.empty_like(images)
    for row, (flip_x, flip_y, turns) in enumerate(views[:, :3].int().tolist()):
        image = torch.rot90(images[row], turns, (-2, -1))
        turned[row] = image.flip([axis for axis, flip in ((-1, flip_x), (-2, flip_y)) if flip])
    return _recolour(turned, views.to(images.device)) * 2 - 1


def _recolour(images: Tensor, views: Tensor) -> Tensor:
    """Brightness, contrast, saturation, then hue (a turn in the plane of chroma); [0, 1] in and out."""
    if bool((views[:, 3:] == plain_views(1)[0, 3:].to(views.device)).all()):
        return images
    brightness, contrast, saturation = (views[:, column].view(-1, 1, 1, 1) for column in (3, 4, 5))
    luma = LUMA.to(images.device).view(1, 3, 1, 1)
    images = (images * brightness).clamp(0, 1)
    mean = (images * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    images = ((images - mean) * contrast + mean).clamp(0, 1)
    grey = (images * luma).sum(1, keepdim=True)
    images = ((images - grey) * saturation + grey).clamp(0, 1)
    return torch.einsum("nij,njhw->nihw", _hue_turns(views[:, 6]), images).clamp(0, 1)


def _hue_turns(share: Tensor) -> Tensor:
    """(N,) shares of a full turn -> (N, 3, 3) matrices on RGB that keep brightness."""
    angle = share * 2 * torch.pi
    cosine, sine = torch.cos(angle), torch.sin(angle)
    turn = torch.zeros(len(share), 3, 3, device=share.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cosine, -sine, sine, cosine
    to_yiq = TO_YIQ.to(share.device)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
