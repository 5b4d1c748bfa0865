"""Differentiable augmentation in front of the discriminator, real and generated alike (Zhao et al., DiffAugment, 2020).

Every image's augmentation is a function of its own row of uniform numbers, so batch layout does not change it.
"""
from __future__ import annotations

import torch
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
    colour = draws[:, :3, None, None, None].to(images, non_blocking=True)
    images = images + (colour[:, 0] - 0.5) * strength
    grey = images.mean(dim=1, keepdim=True)
    images = torch.lerp(grey, images, 1 + (colour[:, 1] * 2 - 1) * strength)
    middle = images.mean(dim=(1, 2, 3), keepdim=True)
    images = torch.lerp(middle, images, 1 + (colour[:, 2] - 0.5) * strength)
    return _shift_and_cut(images, draws[:, 3:7].double())


def augment_some(images: Tensor, draws: Tensor, coins: Tensor, p: float, strength: float = 1.0) -> Tensor:
    """`diff_augment` of those images whose coin (N, 1), uniform in [0, 1), falls under `p`; the others stay as they are."""
    augmented = diff_augment(images, draws, strength)
    return augmented if p >= 1 else torch.where((coins < p).to(images.device, non_blocking=True)[:, :, None, None], augmented, images)


def adapted_p(p: float, sign: float, target: float, n_images: int, kimg: float) -> float:
    """The probability of augmentation after `n_images` more, with which real logits come to be positive as often as asked.

    `sign` is E[sign D(real)], -1..1: nearer to 1 the surer a discriminator is of its real patches, as one that knows them by heart
    is. Over `target` p rises, under it falls, by 1 in `kimg`. Karras et al., ADA (2020), eq. 1 r_t, adjusted at every step.
    """
    step = n_images / (1000 * kimg)
    return min(max(p + (step if sign > target else -step if sign < target else 0.0), 0.0), 1.0)


def _shift_and_cut(images: Tensor, draws: Tensor) -> Tensor:
    """Each of (N, 3, H, H) images moved by up to 1/8 and with one hole, by its row of draws (N, 4); both filled with zero."""
    side = images.shape[2]
    most, hole = int(side * SHIFT_SHARE + 0.5), int(side * HOLE_SHARE + 0.5)
    shifts = (draws[:, :2] * (2 * most + 1)).long() - most
    starts = (draws[:, 2:] * (side + 1)).long() - hole // 2
    pixels = torch.arange(side).to(draws.device)
    seen = pixels + shifts[:, :, None]                                               # (N, 2, H): x, y
    inside = (seen >= 0) & (seen < side)
    cut = (pixels >= starts[:, :, None]) & (pixels < starts[:, :, None] + hole)
    left = (inside[:, 1, :, None] & inside[:, 0, None]) & ~(cut[:, 1, :, None] & cut[:, 0, None])   # (N, H, H)
    x, y = seen.clamp(0, side - 1).unbind(dim=1)
    return take_pixels(images, y, x) * left[:, None].to(images, non_blocking=True)


def take_pixels(images: Tensor, y: Tensor, x: Tensor, swapped: Tensor | None = None) -> Tensor:
    """Pixel (row i, column j) of each result is pixel (y[i], x[j]) of its image; where `swapped` (N, 1) holds, pixel (x[j], y[i]).

    images (N, C, H, H) of any type, y and x (N, H) int64, on the CPU or beside the images.
    """
    side = images.shape[2]
    rows, columns = (y * side, x) if swapped is None else (torch.where(swapped, y, y * side), torch.where(swapped, x * side, x))
    rows, columns = (index.to(images.device, non_blocking=True) for index in (rows, columns))
    places = (rows[:, :, None] + columns[:, None]).flatten(1)                        # (N, H * H)
    return images.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1)).view_as(images)
