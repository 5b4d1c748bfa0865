"""One step of the GAN: gradients of the generator and of the discriminator's heads over one global batch.

`best` runs the generator and the frozen backbone once for both losses; `reference` runs them once per network, as published.
Gradients are means over the global batch, whatever the micro-batch.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.discriminator import Discriminator
from networks.generator import Generator
from networks.layers import images_to_float
from training.cond_dropout import CondDropout
from training.diff_augment import diff_augment
from training.gan_config import GanConfig
from training.gan_draws import D_PHASE, G_PHASE, Draws, batch_rows, draw, real_views
from training.gan_losses import blur, discriminator_loss, diversity_loss, generator_loss, guidance_loss
from training.mlp_prompts import MlpPrompts
from training.train_modes import choose_trained

GUIDANCE_PX = 64
ADAM = {"betas": (0.0, 0.99), "eps": 1e-8}


@dataclass
class TrainingData:
    """What the discriminator may see, held on the device: patches in memory as uint8, prompts embedded once."""

    images: Tensor                    # (N, 3, H, H) uint8
    prompts: Tensor                   # (N, c_dim) float32, row i belongs to patch i
    pair_deviations: Tensor | None = None   # (4,) how much two real patches of like prompts differ; with diversity_weight
    expression: sp.csr_matrix | None = None   # (N, G) normalised, on the CPU: what prompts are embedded from; with cond_dropout or an MLP

    def to(self, device: torch.device | str) -> TrainingData:
        deviations = None if self.pair_deviations is None else self.pair_deviations.to(device)
        return TrainingData(self.images.to(device), self.prompts.to(device), deviations, self.expression)


@dataclass
class GanStep:
    """The two networks, their optimisers and the gradients of one step."""

    config: GanConfig
    generator: Generator
    discriminator: Discriminator
    data: TrainingData
    clip: nn.Module | None = None     # image tower for guidance, gene encoder for cond_dropout
    mlp: nn.Module | None = None      # networks.condition_mlp.ConditionMlp: embeds the prompts, and is trained with the generator
    g_optimiser: torch.optim.Optimizer = field(init=False)
    d_optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        self.g_parameters = choose_trained(self.config.train_mode, self.generator, self.mlp)
        self.g_optimiser = torch.optim.Adam(self.g_parameters, lr=self.config.g_lr, **ADAM)
        self.d_optimiser = torch.optim.Adam(self.discriminator.heads.parameters(), lr=self.config.d_lr, **ADAM)
        rate = self.config.cond_dropout
        self.cond_dropout = CondDropout(self.clip, self.data.expression, rate, self.config.seed) if rate else None
        self.mlp_prompts = None if self.mlp is None else MlpPrompts(self.mlp, self.data.expression, self.config.seed)
        self.noise_scale = self.config.cond_noise * prompt_deviation(self.data.prompts)

    def gradients(self, step: int, *, sigma: float, clip_weight: float) -> dict[str, float]:
        """Fill both networks' gradients for step `step`; returns the losses. Does not move any weight."""
        rows = batch_rows(self.config.seed, step, self.config.batch, len(self.data.images))
        draws = self._draw(step)
        self.generator.train()
        self.g_optimiser.zero_grad()
        self.d_optimiser.zero_grad()
        totals: dict[str, float] = {}
        self._z = draws.z
        d_draws = draws if self.config.shared_pass else self._draw(step, phase=D_PHASE)
        prompts = self._prompts(rows, step)
        for start in range(0, self.config.batch, self.config.batch_gpu):
            part = slice(start, start + self.config.batch_gpu)
            c, real = prompts[part].detach(), images_to_float(self.data.images[rows[part]])
            micro = draws.part(part.start, part.stop)
            asked = self._asked(prompts[part], rows[part], step, G_PHASE, start)
            if self.config.shared_pass:
                self._shared_part(c, asked, real, micro, sigma, clip_weight, totals)
            else:
                self._generator_part(c, asked, real, micro, sigma, clip_weight, totals)
                asked = self._asked(c, rows[part], step, D_PHASE, start)
                self._discriminator_part(c, asked, real, d_draws.part(part.start, part.stop), sigma, totals)
        if self.mlp_prompts is not None:
            self.mlp_prompts.backward()
        return totals

    def _prompts(self, rows: np.ndarray, step: int) -> Tensor:
        """(batch, c_dim) of the whole global batch: kept ones, or embedded at this step by the MLP, whose spread sets the noise."""
        if self.mlp_prompts is None:
            return self.data.prompts[rows]
        prompts = self.mlp_prompts.embed(rows, step, self.data.images.device)
        self.noise_scale = self.config.cond_noise * prompt_deviation(prompts.detach())
        return prompts

    def _asked(self, c: Tensor, rows: np.ndarray, step: int, phase: int, first: int) -> Tensor:
        """The prompts the generator is given: those the discriminator sees, or with `cond_dropout` embedded anew with dropout."""
        return c if self.cond_dropout is None else self.cond_dropout.prompts(rows, step, phase, first, c.device)

    def _draw(self, step: int, **phase: int) -> Draws:
        generator = self.generator.config
        draws = draw(self.config.seed, step, self.config.batch, z_dim=generator.z_dim, noise_size=self.generator.noise_size,
                     c_dim=generator.c_dim, **phase)
        return draws.to(self.data.images.device)

    def _share(self) -> float:
        return self.config.batch_gpu / self.config.batch

    def _seen(self, images: Tensor, augment: Tensor, crops: Tensor, sigma: float) -> list[Tensor]:
        images = diff_augment(blur(images, sigma), augment, self.config.colour_strength)
        return self.discriminator.features(images, crops)

    def _fake_prompts(self, c: Tensor, draws: Draws) -> Tensor:
        """Prompts of the generated half: with diversity pressure neighbours share one; noise widens each into a small cloud."""
        noise = draws.cond_noise
        if self.config.diversity_weight:
            c, noise = c[::2].repeat_interleave(2, dim=0), noise[::2].repeat_interleave(2, dim=0)
        return c + noise * self.noise_scale

    def _shared_part(self, c: Tensor, asked: Tensor, real: Tensor, draws: Draws, sigma: float, clip_weight: float, totals: dict) -> None:
        """Both losses from one pass. Generated and real patches alternate, so that every group of a head's batch norm holds both:
        normalised apart, their means and scales (colour, contrast, density of nuclei) would look alike to the heads."""
        prompts = alternate(self._fake_prompts(c, draws), self._real_prompts(c, draws))
        real_features = self._real_features(real, draws, sigma)
        fake = self.generator(draws.z, self._fake_prompts(asked, draws), noise=draws.noise)
        features = [alternate(*pair) for pair in
                    zip(self._seen(fake, draws.augment_fake, draws.crop_fake, sigma), real_features, strict=True)]
        self.discriminator.heads.requires_grad_(False)
        self._generator_backward(fake, self.discriminator.logits(features, prompts)[::2], c, real, draws, clip_weight, totals)
        self.discriminator.heads.requires_grad_(True)
        logits = self.discriminator.logits([x.detach() for x in features], prompts)   # D sees detached images: its loss must not move G
        self._discriminator_backward(logits[1::2], logits[::2], totals)

    def _generator_part(self, c: Tensor, asked: Tensor, real: Tensor, draws: Draws, sigma: float, clip_weight: float,
                        totals: dict) -> None:
        self.discriminator.heads.requires_grad_(False)
        fake = self.generator(draws.z, self._fake_prompts(asked, draws), noise=draws.noise)
        logits = self.discriminator.logits(self._seen(fake, draws.augment_fake, draws.crop_fake, sigma), self._fake_prompts(c, draws))
        self._generator_backward(fake, logits, c, real, draws, clip_weight, totals)
        self.discriminator.heads.requires_grad_(True)

    def _discriminator_part(self, c: Tensor, asked: Tensor, real: Tensor, draws: Draws, sigma: float, totals: dict) -> None:
        with torch.no_grad():
            fake = self.generator(draws.z, self._fake_prompts(asked, draws), noise=draws.noise)
            features = self._seen(fake, draws.augment_fake, draws.crop_fake, sigma)
        real_logits = self.discriminator.logits(self._real_features(real, draws, sigma), self._real_prompts(c, draws))
        self._discriminator_backward(real_logits, self.discriminator.logits(features, self._fake_prompts(c, draws)), totals)

    def _generator_backward(self, fake: Tensor, logits: Tensor, c: Tensor, real: Tensor, draws: Draws, clip_weight: float,
                            totals: dict) -> None:
        terms = {"loss/G": generator_loss(logits)}
        total = terms["loss/G"]
        if self.config.diversity_weight:
            terms["loss/diversity"] = diversity_loss(fake[::2], fake[1::2], self.data.pair_deviations)
            total = total + self.config.diversity_weight * terms["loss/diversity"]
        if self.config.rec_weight:
            paired = real if not self.config.diversity_weight else real[::2].repeat_interleave(2, dim=0)
            terms["loss/rec"] = F.mse_loss(fake, paired)
            total = total + self.config.rec_weight * terms["loss/rec"]
        if clip_weight:
            wanted = c if not self.config.diversity_weight else c[::2].repeat_interleave(2, dim=0)
            terms["loss/clip"] = guidance_loss(self._clip_embeds(fake, draws.crop_fake), F.normalize(wanted, dim=1))
            total = total + clip_weight * terms["loss/clip"]
        (total * self._share()).backward()
        self._add(totals, terms)

    def _discriminator_backward(self, real_logits: Tensor, fake_logits: Tensor, totals: dict) -> None:
        loss = discriminator_loss(real_logits, fake_logits)
        (loss * self._share()).backward()
        self._add(totals, {"loss/D": loss, "logits/real": real_logits.mean(), "logits/fake": fake_logits.mean()})

    @torch.no_grad()
    def _real_features(self, real: Tensor, draws: Draws, sigma: float) -> list[Tensor]:
        real = real_views(real, draws.view, flips=self.config.flips, max_shift_px=self.config.max_shift_px)
        return self._seen(real, draws.augment_real, draws.crop_real, sigma)

    def _real_prompts(self, c: Tensor, draws: Draws) -> Tensor:
        return c + draws.cond_noise * self.noise_scale

    def _clip_embeds(self, images: Tensor, crops: Tensor) -> Tensor:
        """Embeddings of images with a gradient to them, which `CLIP.encode_images` does not give."""
        return self.clip.project_image_features(self.clip.image_encoder(_guidance_crops(images, crops)))

    def _add(self, totals: dict[str, float], terms: dict[str, Tensor]) -> None:
        for name, value in terms.items():
            totals[name] = totals.get(name, 0.0) + value.item() * self._share()

    def finite(self, losses: dict[str, float]) -> bool:
        """True if no loss and no gradient is NaN or infinite."""
        if not np.isfinite(list(losses.values())).all():
            return False
        gradients = [p.grad for p in (*self.g_parameters, *self.discriminator.heads.parameters()) if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients))
        return bool(torch.isfinite(norms).all())

    def move(self, g_lr: float, d_lr: float) -> None:
        """One optimiser step of both networks with the gradients that `gradients` left; x_avg follows the same batch of z, unless
        the mapping is frozen."""
        if self.generator.mapping_network.fc0.weight.requires_grad:
            self.generator.mapping_network.update_average(self._z)
        if self.mlp_prompts is not None:
            self.mlp_prompts.update_statistics()
        for optimiser, lr in ((self.g_optimiser, g_lr), (self.d_optimiser, d_lr)):
            optimiser.param_groups[0]["lr"] = lr
            optimiser.step()
        self.discriminator.update_spectral_norm()


def prompt_deviation(prompts: Tensor) -> Tensor:
    """() root mean square distance of the entries of prompts (N, c_dim) from the mean prompt; 0 where there are no entries."""
    if not prompts.shape[1]:
        return prompts.new_zeros(())
    return (prompts - prompts.mean(dim=0)).square().mean().sqrt()


def alternate(first: Tensor, second: Tensor) -> Tensor:
    """Rows of two tensors in turn: (N, ...) twice -> (2N, ...)."""
    return torch.stack((first, second), dim=1).flatten(0, 1)


def _guidance_crops(images: Tensor, crops: Tensor) -> Tensor:
    """Random 64 px squares of larger images; `crops` (N, 3) uniform: unused, x, y."""
    room = images.shape[3] - GUIDANCE_PX + 1
    if room <= 1:
        return images
    corners = [(int(x * room), int(y * room)) for _, x, y in crops.tolist()]
    return torch.stack([image[:, y:y + GUIDANCE_PX, x:x + GUIDANCE_PX] for image, (x, y) in zip(images, corners, strict=True)])
