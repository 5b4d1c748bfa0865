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
N_DRAWS = 7      # uniform numbers a view
BLOCK = 8        # patches recoloured together on a CPU: their floats stay in its cache


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
                raise OptionError(f"image.augment.{name}", "0 up to 1", str(getattr(self, name)))
        if not 0 <= self.hue <= 0.5:
            raise OptionError("image.augment.hue", "0 to 0.5", str(self.hue))

    @property
    def recolours(self) -> bool:
        return any((self.brightness, self.contrast, self.saturation, self.hue))


def draw_views(count: int, config: AugmentConfig, generator: torch.Generator) -> Tensor:
    """float32 (count, 7): flip x, flip y, quarter turns, brightness, contrast, saturation, hue of `count` views."""
    return views_from(torch.rand(count, N_DRAWS, generator=generator), config)


def views_from(uniform: Tensor, config: AugmentConfig) -> Tensor:
    """(N, 7) uniform numbers in [0, 1) -> the (N, 7) views they draw."""
    spread = torch.tensor([config.brightness, config.contrast, config.saturation])
    views = plain_views(len(uniform))
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
    seen = torch.empty(images.shape, dtype=torch.float32, device=images.device)
    recolour = not bool((views[:, 3:] == plain_views(1)[0, 3:].to(views.device)).all())
    laid, views = views[:, :3].int().tolist(), views.to(images.device)
    size = BLOCK if images.device.type == "cpu" else max(len(images), 1)
    for start in range(0, len(images), size):
        part = slice(start, start + size)
        turned = _turn(images[part], laid[part])
        if recolour:
            _recolour(turned, views[part], seen[part])
        else:
            seen[part] = images_to_float(turned)
    return seen


def _turn(images: Tensor, laid: list[list[int]]) -> Tensor:
    """Flip and turn while a pixel is three bytes."""
    turned = torch.empty_like(images)
    for row, (flip_x, flip_y, turns) in enumerate(laid):
        image = torch.rot90(images[row], turns, (-2, -1)) if turns else images[row]
        axes = [axis for axis, flip in ((-1, flip_x), (-2, flip_y)) if flip]
        turned[row] = image.flip(axes) if axes else image
    return turned


def _recolour(images: Tensor, views: Tensor, seen: Tensor) -> None:
    """Brightness, contrast, saturation, then hue (a turn in the plane of chroma), each clamped: uint8 into `seen`, [-1, 1].

    Written in [-1, 1] from the start, where contrast, saturation and hue are the same formulas as in [0, 1]: all three keep the sum of
    their weights at one, so the shift passes through. Saturation and hue are (3, 3) matrices on a pixel.
    """
    luma = LUMA.to(images.device)
    brightness, contrast, saturation = (views[:, column].view(-1, 1, 1) for column in (3, 4, 5))
    pixels = images.flatten(2).to(torch.float32)                               # (n, 3, H * W), in place from here
    pixels.mul_(brightness / 127.5).sub_(1).clamp_(-1, 1)
    mean = (pixels.mean(2) @ luma).view(-1, 1, 1)
    pixels.mul_(contrast).add_(mean * (1 - contrast)).clamp_(-1, 1)
    to_saturation = saturation * torch.eye(3, device=images.device) + (1 - saturation) * luma.expand(3, 3)
    pixels = torch.bmm(to_saturation, pixels).clamp_(-1, 1)
    torch.bmm(_hue_turns(views[:, 6]), pixels, out=seen.flatten(2)).clamp_(-1, 1)


def _hue_turns(share: Tensor) -> Tensor:
    """(N,) shares of a full turn -> (N, 3, 3) matrices on RGB that keep brightness."""
    angle = share * 2 * torch.pi
    cosine, sine = torch.cos(angle), torch.sin(angle)
    turn = torch.zeros(len(share), 3, 3, device=share.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1], turn[:, 1, 2], turn[:, 2, 1], turn[:, 2, 2] = cosine, -sine, sine, cosine
    to_yiq = TO_YIQ.to(share.device)
    return torch.linalg.inv(to_yiq) @ turn @ to_yiq
