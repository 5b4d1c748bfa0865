"""What a run shows of itself at every snapshot: a picture of patches beside real ones, and how much patches of one prompt differ.

Uses the averaged generator, its own random numbers, and nothing of the training state.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from evaluation.contact_sheet import contact_sheet, save_png
from evaluation.diversity import mean_group_deviation, within_prompt_diversity
from networks.condition_mlp import ConditionMlp
from networks.generator import Generator
from networks.layers import images_to_uint8
from training.gan_data import GanData
from training.gan_draws import seeded_draws

N_PROMPTS, PICTURE_SEEDS, DIVERSITY_SEEDS = 8, 4, 4
TRUNCATIONS = (1.0, 0.5)
BATCH = 16
MOST_REAL = 1000      # real patches that tell how much any two differ


@torch.no_grad()
def generate(generator: Generator, prompts: Tensor, keys: Sequence[tuple[int, int]], truncation_psi: float = 1.0,
             noise_mode: str = "random", batch: int = BATCH) -> Tensor:
    """One image a row of prompts (N, c_dim), row i with the random numbers of `keys[i]`: uint8 (N, 3, r, r) on the CPU."""
    images, device = [], next(generator.parameters()).device
    for start in range(0, len(prompts), batch):
        z, noise = (x.to(device) for x in seeded_draws(keys[start:start + batch], generator.config.z_dim, generator.noise_size))
        made = generator(z, prompts[start:start + batch].to(device), truncation_psi, noise_mode, noise)
        images.append(images_to_uint8(made).cpu())
    return torch.cat(images)


def as_pictures(images: Tensor) -> list[np.ndarray]:
    """uint8 (N, 3, H, W) -> N arrays (H, W, 3)."""
    return list(images.permute(0, 2, 3, 1).numpy())


@dataclass
class Showcase:
    """The prompts a run is watched with: half training, half validation where there is one. Without prompts: as many z."""

    data: GanData
    seed: int = 0
    prompts: Tensor = field(init=False)        # (8, c_dim)
    real: Tensor = field(init=False)           # (8, 3, H, W) uint8
    labels: list[str] = field(init=False)
    expression: sp.csr_matrix | None = field(init=False)   # (8, G) of them, where it was kept

    def __post_init__(self):
        data, order = self.data, np.random.default_rng(self.seed)
        n_train = N_PROMPTS if data.validation is None else N_PROMPTS // 2
        parts = [("train", data.training, n_train)] + ([("val", data.validation, N_PROMPTS - n_train)] if data.validation else [])
        prompts, real, labels, expression = [], [], [], []
        for name, part, n in parts:
            rows = order.choice(len(part.images), min(n, len(part.images)), replace=False)
            prompts.append(part.prompts[rows])
            real.append(part.images[rows])
            expression += [] if part.expression is None else [part.expression[rows]]
            labels += [f"{name} {row}" for row in rows]
        self.prompts, self.real, self.labels = torch.cat(prompts), torch.cat(real), labels
        self.expression = sp.vstack(expression, format="csr") if len(expression) == len(parts) else None
        self._real_diversity = self._deviation_of_real_groups()

    def embed(self, encoder: ConditionMlp) -> None:
        """Take the prompts as this encoder, which is trained with the generator, embeds them now."""
        self.prompts = encoder.embed_expression(self.expression)

    @property
    def columns(self) -> list[int]:
        """Number of every prompt among the random numbers: all alike, so that columns differ by the prompt alone; without prompts
        each its own."""
        return [0] * len(self.real) if self.prompts.shape[1] else list(range(len(self.real)))

    def save_grid(self, path: Path, generator: Generator) -> None:
        """Real patches first, then four seeds at truncation 1.0 and four at 0.5; a column is a prompt."""
        rows, names = [as_pictures(self.real)], ["real"]
        for psi in TRUNCATIONS:
            for seed in range(PICTURE_SEEDS):
                made = generate(generator, self.prompts, [(seed, column) for column in self.columns], psi)
                rows.append(as_pictures(made))
                names.append(f"psi {psi} seed {seed}")
        path.parent.mkdir(parents=True, exist_ok=True)
        save_png(path, contact_sheet(rows, row_labels=names, column_labels=self.labels))

    def diversity(self, generator: Generator) -> dict[str, float | str]:
        """Pixel deviation within one prompt as `evaluation/diversity.py` defines it (root of the mean pixel variance), grey levels 0..255.

        `generated`: over z and the per-pixel noise. `generated_z`: the noise held still, so that z alone speaks; a generator that
        ignores z scores 0 here. `real`: real patches of like spots, of which `real_groups` says how they were chosen.
        """
        prompts = self.prompts.repeat_interleave(DIVERSITY_SEEDS, dim=0)
        keys = [(seed, column) for column in self.columns for seed in range(DIVERSITY_SEEDS)]
        found: dict[str, float | str] = {}
        for name, noise_mode in (("generated", "random"), ("generated_z", "const")):
            images = generate(generator, prompts, keys, noise_mode=noise_mode).unflatten(0, (-1, DIVERSITY_SEEDS))
            found[name] = within_prompt_diversity(images.numpy())
        return {**found, **self._real_diversity}

    def _deviation_of_real_groups(self) -> dict[str, float | str]:
        """Real patches of one cluster; without clusters, of the 8 spots whose prompts are nearest to a shown one; without prompts, of
        any spots."""
        images, clusters = self.data.training.images.numpy(), self.data.clusters
        if clusters is not None:
            groups, name = (images[clusters == label] for label in np.unique(clusters)), "one cluster"   # one in memory
        elif not self.prompts.shape[1]:
            groups, name = [images[:: max(1, len(images) // MOST_REAL)]], "any spots"
        else:
            nearest = torch.cdist(self.prompts, self.data.training.prompts).topk(min(8, len(images)), largest=False).indices
            groups, name = [images[rows] for rows in nearest.numpy()], "like spots"
        return {"real": mean_group_deviation(groups), "real_groups": name}
