"""One step of the GAN: gradients of the generator and of the discriminator's heads over one global batch.

`best` runs the generator and the frozen backbone once for both losses; `reference` runs them once per network, as published.
Gradients are means over the global batch, whatever the micro-batch and the number of ranks: each computes its rows of it.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.discriminator import Discriminator
from networks.generator import Generator
from networks.layers import images_to_float
from training.cond_dropout import CondDropout
from training.diff_augment import augment_some
from training.gan_config import GanConfig
from training.gan_draws import D_PHASE, G_PHASE, Draws, batch_rows, draw, draw_z, real_views, unlike_rows
from training.gan_losses import blur, discriminator_loss, diversity_loss, feature_penalty, generator_loss, mismatch_loss
from training.gan_parts import Given, Part, Step, TrainingData
from training.gan_speed import Ahead, take_patches
from training.guidance import clip_guidance, guidance_centres, wanted_prompts
from training.mlp_prompts import MlpPrompts
from training.ranks import own_part, sum_gradients, sum_values
from training.train_modes import choose_trained

SIGN = "logits/sign"      # E[sign D(real)]: what --augment-target speaks of
ADAM = {"betas": (0.0, 0.99), "eps": 1e-8}


@dataclass
class GanStep:
    """The two networks, their optimisers and the gradients of one step."""

    config: GanConfig
    generator: Generator
    discriminator: Discriminator
    data: TrainingData
    clip: nn.Module | None = None     # image tower for guidance, gene encoder for cond_dropout
    mlp: nn.Module | None = None      # networks.condition_mlp.ConditionMlp: embeds the prompts, and is trained with the generator
    augment_p: float = 1.0            # share of images that are augmented; with augment_target the loop moves it
    g_optimiser: torch.optim.Optimizer = field(init=False)
    d_optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self):
        self.g_parameters = choose_trained(self.config.train_mode, self.generator, self.mlp)
        self.g_optimiser = torch.optim.Adam(self.g_parameters, lr=self.config.g_lr, **ADAM)
        self.d_optimiser = torch.optim.Adam(self.discriminator.heads.parameters(), lr=self.config.d_lr, **ADAM)
        self.own = own_part(self.config.batch, self.config.batch_gpu)
        self.given = Ahead(self._given, self.config.workers)
        rate = self.config.cond_dropout
        self.cond_dropout = CondDropout(self.clip, self.data.expression, rate, self.config.seed) if rate else None
        self.mlp_prompts = None if self.mlp is None else MlpPrompts(self.mlp, self.data.expression, self.config.seed)
        self.noise_scale = self.config.cond_noise * prompt_deviation(self.data.prompts)
        self.centres = self._centres() if self.config.clip_weight else None

    def _centres(self) -> Tensor | None:
        """(N, F) mean image features of each patch's sample, where the CLIP that guides centres on them."""
        if self.clip is None or not self.clip.centres_features:
            return None
        device = self.data.prompts.device
        return guidance_centres(self.clip, self.data.sample_patches, device)[self.data.samples.to(device)]

    def gradients(self, step: int, *, sigma: float, clip_weight: float) -> dict[str, float]:
        """Fill both networks' gradients for step `step`; returns the losses. Does not move any weight."""
        given, device = self.given.of_step(step), self.data.prompts.device
        self.generator.train()
        self.g_optimiser.zero_grad()
        self.d_optimiser.zero_grad()
        totals: dict[str, list[Tensor]] = {}
        self._z = None if given.z is None else given.z.to(device, non_blocking=True)
        draws, d_draws = (None if made is None else made.to(device) for made in (given.draws, given.d_draws))
        wanted = wanted_prompts(self.data.prompts, given.rows, in_pairs=self.config.diversity_weight > 0, centres=self.centres) \
            if clip_weight else None
        patches = given.patches.to(device, non_blocking=True)
        now = Step(step, given.rows, patches, self._prompts(given.rows, step), sigma, clip_weight, wanted)
        for start in self.own:
            if self.config.shared_pass:
                self._shared_part(now, self._part(now, start, draws), totals)
            else:
                self._generator_part(now, self._part(now, start, draws), totals)
                self._discriminator_part(now, self._part(now, start, d_draws, D_PHASE), totals)
        if self.mlp_prompts is not None:
            self.mlp_prompts.backward()
        sum_gradients((*self.g_parameters, *self.discriminator.heads.parameters()))
        return sum_values(self._means(totals), device)

    def _given(self, step: int) -> Given:
        """Made ahead of the step, in a thread where there are any: drawn and read, not yet on the device."""
        rows, places = batch_rows(self.config.seed, step, self.config.batch, len(self.data.images)), self._places()
        draws = self._draw(step)
        d_draws = None if self.config.shared_pass else self._draw(step, phase=D_PHASE)
        z = self._whole_z(step, draws.z) if self._moves_average() else None
        if self.data.prompts.is_cuda:
            draws, d_draws = draws.pin(), None if d_draws is None else d_draws.pin()
        return Given(rows, take_patches(self.data.images, rows[places.start:places.stop], self.data.prompts.device), draws, d_draws, z)

    def _places(self) -> range:
        """This rank's places in the global batch."""
        return range(self.own.start, self.own.stop)

    def _moves_average(self) -> bool:
        return self.generator.mapping_network.fc0.weight.requires_grad

    def _whole_z(self, step: int, own: Tensor) -> Tensor:
        """z (batch, z_dim) of all ranks, this one's `own` among them."""
        before, after = range(self.own.start), range(self.own.stop, self.config.batch)
        z_dim = self.generator.config.z_dim
        return torch.cat([draw_z(self.config.seed, step, before, z_dim), own, draw_z(self.config.seed, step, after, z_dim)])

    def _part(self, now: Step, start: int, draws: Draws, phase: int = G_PHASE) -> Part:
        """One micro-batch; the generator is asked with D's prompts or, with `cond_dropout`, with those embedded anew with dropout."""
        places = slice(start, start + self.config.batch_gpu)
        rows = now.rows[places]
        own = slice(start - self.own.start, start - self.own.start + self.config.batch_gpu)
        c, real, draws = now.prompts[places], images_to_float(now.patches[own]), draws.part(own.start, own.stop)
        asked = c if self.cond_dropout is None else self.cond_dropout.prompts(rows, now.number, phase, start, c.device)
        return Part(places, rows, c.detach(), asked, real, draws)

    def _prompts(self, rows: np.ndarray, step: int) -> Tensor:
        """(batch, c_dim) of the whole global batch: kept ones, or embedded at this step by the MLP, whose spread sets the noise."""
        if self.mlp_prompts is None:
            return self.data.prompts[rows]
        prompts = self.mlp_prompts.embed(rows, step, self.data.prompts.device)
        self.noise_scale = self.config.cond_noise * prompt_deviation(prompts.detach())
        return prompts

    def _draw(self, step: int, **phase: int) -> Draws:
        """The random numbers of this rank's places, on the CPU."""
        return self.draws(step, self._places(), **phase)

    def draws(self, step: int, places: range, **phase: int) -> Draws:
        """The random numbers of some places of a step, on the CPU."""
        generator = self.generator.config
        return draw(self.config.seed, step, places, z_dim=generator.z_dim, noise_size=self.generator.noise_size, c_dim=generator.c_dim,
                    **phase)

    def _share(self) -> float:
        return self.config.batch_gpu / self.config.batch

    def _seen(self, images: Tensor, augment: Tensor, coins: Tensor, crops: Tensor, sigma: float) -> list[Tensor]:
        images = augment_some(blur(images, sigma), augment, coins, self.augment_p, self.config.colour_strength)
        return self.discriminator.features(images, crops)

    def _fake_prompts(self, c: Tensor, draws: Draws) -> Tensor:
        """Prompts of the generated half: with diversity pressure neighbours share one; noise widens each into a small cloud."""
        noise = draws.cond_noise
        if self.config.diversity_weight:
            c, noise = c[::2].repeat_interleave(2, dim=0), noise[::2].repeat_interleave(2, dim=0)
        return c + noise * self.noise_scale

    def real_prompts(self, c: Tensor, draws: Draws) -> Tensor:
        return c + draws.cond_noise * self.noise_scale

    # ---- both losses from one pass ----------------------------------------------------------------------------------

    def _shared_part(self, now: Step, part: Part, totals: dict[str, list[Tensor]]) -> None:
        fake, features, prompts = self.alternating(part, now.sigma)
        self.discriminator.heads.requires_grad_(False)
        self._generator_backward(now, part, fake, self.discriminator.logits(features, prompts)[::2], totals)
        self.discriminator.heads.requires_grad_(True)
        features = [x.detach().requires_grad_(self._penalises(now)) for x in features]   # D's loss must not move G
        judged = self.discriminator.judge(features)
        logits = self.discriminator.project(judged, prompts)
        extra = self._extra_terms(now, part, [x[1::2] for x in judged], logits[1::2], features, slice(1, None, 2))
        self._discriminator_backward(logits[1::2], logits[::2], extra, totals)

    def alternating(self, part: Part, sigma: float) -> tuple[Tensor, list[Tensor], Tensor]:
        """Generated images (N, 3, r, r), and features and prompts of generated and real patches in turn (2N, ...).

        They alternate so that every group of a head's batch norm holds both: normalised apart, their means and scales (colour,
        contrast, density of nuclei) would look alike to the heads.
        """
        c, draws = part.c, part.draws
        real_features = self.real_features(part, sigma)
        fake = self.generator(draws.z, self._fake_prompts(part.asked, draws), noise=draws.noise)
        fake_features = self._seen(fake, draws.augment_fake, draws.coin_fake, draws.crop_fake, sigma)
        features = [alternate(*pair) for pair in zip(fake_features, real_features, strict=True)]
        return fake, features, alternate(self._fake_prompts(c, draws), self.real_prompts(c, draws))

    # ---- a pass for each loss, as published -------------------------------------------------------------------------

    def _generator_part(self, now: Step, part: Part, totals: dict[str, list[Tensor]]) -> None:
        draws = part.draws
        self.discriminator.heads.requires_grad_(False)
        fake = self.generator(draws.z, self._fake_prompts(part.asked, draws), noise=draws.noise)
        features = self._seen(fake, draws.augment_fake, draws.coin_fake, draws.crop_fake, now.sigma)
        self._generator_backward(now, part, fake, self.discriminator.logits(features, self._fake_prompts(part.c, draws)), totals)
        self.discriminator.heads.requires_grad_(True)

    def _discriminator_part(self, now: Step, part: Part, totals: dict[str, list[Tensor]]) -> None:
        draws = part.draws
        with torch.no_grad():
            fake = self.generator(draws.z, self._fake_prompts(part.asked, draws), noise=draws.noise)
            fake_features = self._seen(fake, draws.augment_fake, draws.coin_fake, draws.crop_fake, now.sigma)
        features = [x.requires_grad_(self._penalises(now)) for x in self.real_features(part, now.sigma)]
        judged = self.discriminator.judge(features)
        logits = self.discriminator.project(judged, self.real_prompts(part.c, draws))
        extra = self._extra_terms(now, part, judged, logits, features)
        fake_logits = self.discriminator.logits(fake_features, self._fake_prompts(part.c, draws))
        self._discriminator_backward(logits, fake_logits, extra, totals)

    # ---- the terms --------------------------------------------------------------------------------------------------

    def _generator_backward(self, now: Step, part: Part, fake: Tensor, logits: Tensor, totals: dict[str, list[Tensor]]) -> None:
        config, terms = self.config, {"loss/G": generator_loss(logits)}
        total = terms["loss/G"]
        if config.diversity_weight:
            terms["loss/diversity"] = diversity_loss(fake[::2], fake[1::2], self.data.pair_deviations)
            total = total + config.diversity_weight * terms["loss/diversity"]
        if config.rec_weight:
            paired = part.real if not config.diversity_weight else part.real[::2].repeat_interleave(2, dim=0)
            terms["loss/rec"] = F.mse_loss(fake, paired)
            total = total + config.rec_weight * terms["loss/rec"]
        if now.clip_weight:
            terms["loss/clip"] = clip_guidance(self.clip, config.clip_loss, fake, part.draws.crop_fake, now.wanted, part.places,
                                               reduced=config.precision == "bf16")
            total = total + now.clip_weight * terms["loss/clip"]
        (total * self._share()).backward()
        self._add(totals, terms)

    def _penalises(self, now: Step) -> bool:
        return self.config.r1_weight > 0 and now.number % self.config.r1_interval == 0

    def _extra_terms(self, now: Step, part: Part, judged: list[Tensor], logits: Tensor, features: list[Tensor],
                     real: slice = slice(None)) -> dict[str, tuple[float, Tensor]]:
        """What the discriminator minimises beside the hinge, by name: (weight, value). `judged` and `logits` are of real patches,
        those at `real` of `features`.

        A prompt meets a patch only after a head's last batch norm, so a mismatched pair needs no group of its own: it is judged with
        the statistics of the group its patch was in.
        """
        config, terms = self.config, {}
        if config.mismatch_weight:
            rows = torch.from_numpy(part.rows).to(logits.device, non_blocking=True)
            other = self.data.prompts[unlike_rows(self.data.prompts, rows, part.draws.unlike)]
            mismatched = self.discriminator.project(judged, self.real_prompts(other, part.draws))
            terms["loss/mismatch"] = config.mismatch_weight, mismatch_loss(mismatched)
        if config.r1_weight:      # counted as often as it was left out, so that a mean over steps is the penalty's
            penalty = feature_penalty(logits, features, real) * config.r1_interval if self._penalises(now) else logits.new_zeros(())
            terms["loss/r1"] = config.r1_weight / 2, penalty
        return terms

    def _discriminator_backward(self, real_logits: Tensor, fake_logits: Tensor, extra: dict[str, tuple[float, Tensor]],
                                totals: dict[str, list[Tensor]]) -> None:
        loss = discriminator_loss(real_logits, fake_logits)
        total = loss + sum(weight * value for weight, value in extra.values()) if extra else loss
        (total * self._share()).backward()
        self._add(totals, {"loss/D": loss, **{name: value for name, (_, value) in extra.items()}, "logits/real": real_logits.mean(),
                           "logits/fake": fake_logits.mean(), SIGN: real_logits.detach().sign().mean()})

    @torch.no_grad()
    def real_features(self, part: Part, sigma: float) -> list[Tensor]:
        draws = part.draws
        real = real_views(part.real, draws.view, flips=self.config.flips, max_shift_px=self.config.max_shift_px)
        return self._seen(real, draws.augment_real, draws.coin_real, draws.crop_real, sigma)

    def _add(self, totals: dict[str, list[Tensor]], terms: dict[str, Tensor]) -> None:
        """Keep the terms of a micro-batch where they are: reading one would wait for the device."""
        for name, value in terms.items():
            totals.setdefault(name, []).append(value.detach())

    def _means(self, totals: dict[str, list[Tensor]]) -> dict[str, float]:
        """What this rank's micro-batches add to the means over the global batch, read at once."""
        values = iter(torch.stack([value for terms in totals.values() for value in terms]).tolist())
        return {name: sum(next(values) * self._share() for _ in terms) for name, terms in totals.items()}

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
        if self._moves_average():
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

