"""The overfitting alarm: how much surer the discriminator is of patches it was trained on than of held-out ones.

Training and held-out patches are judged in one way: under the blur of the moment, with augmentation and generated neighbours from
draws that are always the same. Nothing of the training state moves: batch norm keeps no statistics and spectral norm iterates only
when an optimiser moves.
"""
from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from networks.discriminator import GROUP
from networks.layers import images_to_float
from training.gan_draws import MEASURING
from training.gan_parts import Part, TrainingData
from training.gan_step import GanStep

N_SPOTS = 32        # of either kind: a tick should cost little of the time between two


class HeldOut:
    """The spots by which a run is watched; drawn once, with the run's seed."""

    def __init__(self, training: TrainingData, held_out: TrainingData | None, seed: int):
        self.sets = {} if held_out is None else {"train": _some_spots(training, seed), "val": _some_spots(held_out, seed)}

    def measure(self, gan: GanStep, sigma: float) -> dict[str, float]:
        """`logits/val`: mean logit of held-out patches; `logits/gap`: of training ones less that, about 0 until D knows them by heart.

        Nothing ({}) without held-out spots.
        """
        means = {name: real_logits(gan, *spots, sigma).mean().item() for name, spots in self.sets.items()}
        return {"logits/val": means["val"], "logits/gap": means["train"] - means["val"]} if means else {}


def _some_spots(data: TrainingData, seed: int) -> tuple[Tensor, Tensor]:
    """Patches and prompts of at most 32 spots, repeated where they would not fill a group of the heads' batch norm."""
    rows = np.random.default_rng(seed).permutation(len(data.images))[:N_SPOTS]
    rows = np.resize(rows, -(-len(rows) // GROUP) * GROUP)
    return data.images[rows], data.prompts[rows]


@torch.no_grad()
def real_logits(gan: GanStep, images: Tensor, c: Tensor, sigma: float) -> Tensor:
    """Logits (N, T) of real patches, uint8 (N, 3, H, H) with prompts (N, c_dim), as a training step sees them; N a multiple of 8."""
    logits, device = [], gan.data.prompts.device
    for part in _parts(gan, images.to(device), c.to(device)):
        if gan.config.shared_pass:
            _, features, prompts = gan.alternating(part, sigma)
            logits.append(gan.discriminator.logits(features, prompts)[1::2])
        else:
            logits.append(gan.discriminator.logits(gan.real_features(part, sigma), gan.real_prompts(part.c, part.draws)))
    return torch.cat(logits)


def _parts(gan: GanStep, images: Tensor, c: Tensor) -> Iterator[Part]:
    """Micro-batches with draws that no step has."""
    draws, micro = gan.draws(MEASURING, range(len(images))).to(images.device), gan.config.batch_gpu
    for start in range(0, len(images), micro):
        places = slice(start, min(start + micro, len(images)))
        yield Part(places, np.arange(places.start, places.stop), c[places], c[places], images_to_float(images[places]),
                   draws.part(places.start, places.stop))
