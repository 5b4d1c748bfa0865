"""The GAN's loss terms and the schedules of their weights, each as its formula. Touches no files and no models.

Every term is a mean over the images it is given, so that micro-batches average to the global batch.
"""
from __future__ import annotations

from collections.abc import Sequence
from math import floor
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from preprocessing.errors import OptionError

Schedule = Literal["const", "step", "linear", "exp"]
GuidanceKind = Literal["spherical", "infonce"]
DIVERSITY_POOLS = (1, 2, 4, 8)      # px: deviations are compared at these averages, so that pixel noise alone does not count


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge: mean relu(1 - D(x)) + mean relu(1 + D(G))."""
    return F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """-mean D(G)."""
    return -fake_logits.mean()


def mismatch_loss(mismatched_logits: Tensor) -> Tensor:
    """Mean relu(1 + D(x, c_other)): a real patch with the genes of another spot is a negative (Reed et al. 2016, GAN-CLS)."""
    return F.relu(1 + mismatched_logits).mean()


def feature_penalty(logits: Tensor, features: Sequence[Tensor], images: slice = slice(None)) -> Tensor:
    """R1 in feature space (Mescheder et al. 2018, eq. 9): mean over images and tokens of |d sum D / d h|^2, h (C,) being a token.

    logits (N, T) of the real patches, computed from `features`, each (M, C, T_i) with a gradient; `images` picks the rows of
    real patches among the M. Batch norm ties the samples of a group together, so the gradient is that of their summed logits. Its
    own gradient runs through the heads alone, twice, and never through the frozen backbone.
    """
    gradients = torch.autograd.grad(logits.sum(), list(features), create_graph=True)
    return torch.cat([gradient[images].square().sum(dim=1) for gradient in gradients], dim=1).mean()


def contrastive_guidance(image_embeds: Tensor, prompt_embeds: Tensor, wanted: Tensor, temperature: float | Tensor) -> Tensor:
    """InfoNCE from images to prompts: mean -log softmax_j(<f_i, c_j> / temperature) at j = `wanted[i]`.

    image_embeds (N, D) and prompt_embeds (P, D) have unit rows; `wanted` (N,) says which prompt an image was made for. The
    prompts are those of the global batch, each once, so that the mean over images does not depend on the micro-batch.
    """
    return F.cross_entropy(image_embeds @ prompt_embeds.T / temperature, wanted)


def guidance_loss(image_embeds: Tensor, prompt_embeds: Tensor) -> Tensor:
    """CLIP guidance: mean squared angle between unit rows (N, D) of generated images and of their prompts."""
    cosine = (image_embeds * prompt_embeds).sum(dim=1)
    return torch.arccos(cosine.clamp(-1 + 1e-6, 1 - 1e-6)).square().mean()   # arccos has no slope at its ends


def pair_deviations(first: Tensor, second: Tensor) -> Tensor:
    """Mean absolute difference of paired images (N, 3, H, W) after averaging over each of `DIVERSITY_POOLS`; returns (4,)."""
    return torch.stack([(F.avg_pool2d(first, pool) - F.avg_pool2d(second, pool)).abs().mean() for pool in DIVERSITY_POOLS])


def diversity_loss(first: Tensor, second: Tensor, target: Tensor) -> Tensor:
    """What two images of one prompt lack in difference, against `target` (4,), the deviations of real pairs: mean relu(1 - d / t)^2."""
    return F.relu(1 - pair_deviations(first, second) / target).square().mean()


def blur_sigma(kimg: float, blur_init: float, blur_fade_kimg: float) -> float:
    """Width of the blur in front of the discriminator, px: falls linearly from `blur_init` to 0 at `blur_fade_kimg`."""
    return max(1 - kimg / blur_fade_kimg, 0.0) * blur_init if blur_fade_kimg > 0 else 0.0


def blur_taps(sigma: float) -> Tensor:
    """Weights 2^-(t / sigma)^2 for t in -floor(3 sigma)..floor(3 sigma), summing to 1; float64."""
    reach = floor(3 * sigma)
    if reach == 0:
        return torch.ones(1, dtype=torch.float64)
    taps = torch.exp2(-(torch.arange(-reach, reach + 1, dtype=torch.float64) / sigma).square())
    return taps / taps.sum()


def blur(images: Tensor, sigma: float) -> Tensor:
    """Separable blur with `blur_taps`, zero outside the image; the taps may be wider than it."""
    taps = blur_taps(sigma)
    if len(taps) == 1:
        return images
    rows = _tap_matrix(taps, images.shape[2]).to(images)
    columns = rows if images.shape[3] == images.shape[2] else _tap_matrix(taps, images.shape[3]).to(images)
    return rows @ images @ columns.T


def _tap_matrix(taps: Tensor, side: int) -> Tensor:
    """(side, side): entry (i, j) is the weight of pixel j in the blurred pixel i."""
    reach = len(taps) // 2
    distance = torch.arange(side)[:, None] - torch.arange(side)[None, :]
    return torch.where(distance.abs() <= reach, taps[distance.clamp(-reach, reach) + reach], 0.0)


def scheduled_weight(weight: float, schedule: Schedule, kimg: float, total_kimg: float) -> float:
    """A loss weight or learning rate at `kimg` of a run of `total_kimg` (or any other clock of a run, in one unit).

    const: always `weight`. step: a tenth from half of the run on. linear: 0 at the start, `weight` at the end.
    exp: 1 % of `weight` at the start, growing evenly in the logarithm to `weight` at the end.
    """
    share = min(max(kimg / total_kimg, 0.0), 1.0) if total_kimg > 0 else 1.0
    values = {"const": weight, "step": weight * (0.1 if share >= 0.5 else 1.0), "linear": weight * share,
              "exp": weight * 0.01 ** (1 - share)}
    if schedule not in values:
        raise OptionError("schedule", f"one of {', '.join(get_args(Schedule))}", schedule)
    return values[schedule]
