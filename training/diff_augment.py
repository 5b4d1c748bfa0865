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


def augment_some(images: Tensor, draws: Tensor, coins: Tensor, p: float, strength: float = 1.0) -> Tensor:
    """`diff_augment` of those images whose coin (N, 1), uniform in [0, 1), falls under `p`; the others stay as they are."""
    augmented = diff_augment(images, draws, strength)
    return augmented if p >= 1 else torch.where((coins < p)[:, :, None, None], augmented, images)


def adapted_p(p: float, sign: float, target: float, n_images: int, kimg: float) -> float:
    """The probability of augmentation after `n_images` more, with which real logits come to be positive as often as asked.

    `sign` is E[sign D(real)], -1..1: nearer to 1 the surer a discriminator is of its real patches, as one that knows them by heart
    is. Over `target` p rises, under it falls, by 1 in `kimg`. Karras et al., ADA (2020), eq. 1 r_t, adjusted at every step.
    """
    step = n_images / (1000 * kimg)
    return min(max(p + (step if sign > target else -step if sign < target else 0.0), 0.0), 1.0)


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
