"""Differentiable augmentation in front of the discriminator, real and generated alike (Zhao et al., DiffAugment, 2020).

Every image's augmentation is a function of its own row of uniform numbers, so batch layout does not change it.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

N_DRAWS = 7                # brightness, saturation, contrast, shift x, shift y, hole x, hole y
SHIFT_SHARE = 1 / 8        # largest shift, of the side
HOLE_SHARE = 0.2           # side of the square hole, of the side


def diff_augment(images: Tensor, draws: Tensor, strength: float = 1.0) -> Tensor:
    """(N, 3, H, W) in [-1, 1] and uniform draws (N, 7) in [0, 1) -> the same shape.

    Brightness + U(-.5, .5), saturation x U(0, 2), contrast x U(.5, 1.5), shift to 1/8 per axis with zero fill, one square hole of
    0.2 side whose centre is uniform over the image, edges included: there a part of the hole lies outside and cuts nothing.
    `strength` scales the colour part; 1 is the published one, 0 leaves colours alone.
    """
    colour = draws[:, :3, None, None, None].to(images)
    images = images + (colour[:, 0] - 0.5) * strength
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, 1 + (colour[:, 1] * 2 - 1) * strength)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(middle, images, 1 + (colour[:, 2] - 0.5) * strength)
    return torch.stack([_shift_and_cut(image, draw) for image, draw in zip(images, draws[:, 3:7].tolist(), strict=True)])


def _shift_and_cut(image: Tensor, draw: list[float]) -> Tensor:
    """One (3, H, W) image, moved by up to 1/8 and with one hole; both filled with zero."""
    shift_x, shift_y, hole_x, hole_y = draw
    side = image.shape[2]
    most, hole = int(side * SHIFT_SHARE + 0.5), int(side * HOLE_SHARE + 0.5)
    left, top = int(shift_x * (2 * most + 1)), int(shift_y * (2 * most + 1))
    moved = F.pad(image, (most, most, most, most))[:, top:top + side, left:left + side]
    x, y = (int(draw * (side + 1)) - hole // 2 for draw in (hole_x, hole_y))
    mask = torch.ones_like(image[:1])
    mask[:, max(y, 0):max(y + hole, 0), max(x, 0):max(x + hole, 0)] = 0
    return moved * mask
