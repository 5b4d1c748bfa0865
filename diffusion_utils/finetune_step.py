"""One micro-batch of a fine-tune: its rows and random numbers, and the loss of a denoiser on it."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_utils.denoisers import denoise
from diffusion_utils.draws import VALIDATION, Draws, draw
from diffusion_utils.finetune_config import FinetuneConfig
from diffusion_utils.finetune_data import FinetuneData, HeldOut, Source
from diffusion_utils.latents import OnlineLatents
from diffusion_utils.noising import Noising
from diffusion_utils.prompts import PromptEncoder
from training.gan_draws import batch_rows


@dataclass(frozen=True)
class Batch:
    """Samples of one micro-batch, on the CPU."""

    rows: Tensor              # (n,) of the data
    draws: Draws
    x0: Tensor | None         # (n, C, H, W); None where it is encoded on the device


@dataclass(frozen=True)
class Batches:
    """Which samples each process shows at each step, and with which random numbers: functions of (seed, step, place)."""

    config: FinetuneConfig
    data: FinetuneData
    source: Source
    noise_shape: tuple[int, int, int]
    rank: int
    n_ranks: int

    @property
    def global_batch(self) -> int:
        return self.config.train_batch_size * self.config.gradient_accumulation_steps * self.n_ranks

    def read(self, key: tuple[int, int]) -> Batch:
        """Micro-batch `key` = (step, number) of this process. Safe in threads."""
        step, number = key
        config, size = self.config, self.config.train_batch_size
        first = (number * self.n_ranks + self.rank) * size
        places = range(first, first + size)
        rows = torch.from_numpy(batch_rows(config.seed, step, self.global_batch, len(self.data)))[list(places)]
        draws = draw(config.seed, step, places, self.noise_shape, p_uncond=config.dropout, posterior=self.source.has_posterior,
                     noise_offset=config.noise_offset, perturbation=config.input_perturbation > 0)
        if not config.orientations:
            draws.orientation.zero_()
        x0 = None if isinstance(self.source, OnlineLatents) else self.source.read(rows, draws.orientation, draws.posterior, "cpu")
        return Batch(rows, draws, x0)


def losses_of(denoiser: nn.Module, prompts: PromptEncoder, noising: Noising, x0: Tensor, embeddings: Tensor, draws: Draws,
              perturbation: float = 0.0) -> Tensor:
    """(n,) weighted errors of a denoiser (or its wrapper) on x0 (n, C, H, W), all on one device but `draws`."""
    device = x0.device
    noise, timesteps = draws.noise.to(device), noising.timesteps(draws.uniform).to(device)
    seen = noise if draws.perturbation is None else noise + perturbation * draws.perturbation.to(device)
    tokens = prompts(prompts.with_nulls(embeddings, draws.dropped.to(device)))
    predicted = denoise(denoiser, noising.noisy(x0, seen, timesteps), timesteps, tokens)
    return noising.losses(predicted, x0, noise, timesteps)


@torch.no_grad()
def held_out_losses(denoiser: nn.Module, prompts: PromptEncoder, noising: Noising, source: Source, held_out: HeldOut,
                    noise_shape: tuple[int, int, int], seed: int, device: str, batch: int = 16, most: int = 512) -> dict[str, float]:
    """Mean loss on held-out patches with their own prompts, and how much larger it is with those of other patches: what genes tell.

    The same random numbers at every call; `most` patches, evenly chosen.
    """
    chosen = torch.linspace(0, len(held_out.embeddings) - 1, min(most, len(held_out.embeddings))).long()
    embeddings = held_out.embeddings[chosen]
    exchanged = embeddings.roll(len(chosen) // 2, dims=0)
    totals = {"own": 0.0, "exchanged": 0.0}
    for start in range(0, len(chosen), batch):
        rows = chosen[start:start + batch]
        draws = draw(seed, VALIDATION, range(start, start + len(rows)), noise_shape, p_uncond=0.0, posterior=source.has_posterior)
        x0 = source.read(rows, torch.zeros_like(rows), draws.posterior, device)
        for name, given in (("own", embeddings), ("exchanged", exchanged)):
            part = given[start:start + len(rows)].to(device)
            totals[name] += float(losses_of(denoiser, prompts, noising, x0.to(device), part, draws).sum())
    own, other = totals["own"] / len(chosen), totals["exchanged"] / len(chosen)
    return {"val/loss": own, "val/gene_gap": other - own}
