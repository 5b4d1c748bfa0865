"""Train the GAN, in one process or on every rank of a torchrun job, from data in memory to a run folder of snapshots and checkpoints.

The clock is kimg: thousands of real images shown. A run of k + m steps equals a run of k steps that was resumed for m,
bit for bit on a CPU, as every random number is a function of (seed, step, position in the batch). A wall-time budget is the
exception: there the share of the run that has passed, and with it the blur, follows the clock on the wall.
"""
from __future__ import annotations

import copy
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from networks.discriminator import Discriminator
from networks.generator import Generator
from networks.histo_models import Encoder
from networks.snapshot import save_snapshot
from preprocessing.errors import DivergedError, InputError
from preprocessing.interrupts import Stopped, stop_signals
from training.checkpoints import Checkpoint
from training.diff_augment import adapted_p
from training.ema import Averages, ema_beta, frozen_copy, half_life_kimg, update_average
from training.finite import ends_badly, moments, require_finite
from training.gan_checkpoint import kept_tensors, load_run, save_run
from training.gan_config import GanConfig
from training.gan_data import GanData, mean_colour
from training.gan_grids import Showcase
from training.gan_losses import blur_sigma, scheduled_weight
from training.gan_metrics import SnapshotMetrics
from training.gan_progress import SHORT_RUN_FADE, Progress, resolved_fade_kimg, status_line
from training.gan_speed import prepare
from training.gan_step import SIGN, GanStep
from training.held_out import HeldOut
from training.image_metrics import Metric
from training.ranks import any_rank, from_first, is_first
from training.run_folder import NoStats, StatsLog

log = logging.getLogger(__name__)
MIN_TICKS, MIN_SNAPSHOTS = 20, 5
LOWER_RATES = "Lower --g-lr and --d-lr, then --resume auto"


@dataclass
class GanRun:
    """A run in its folder. `train` yields after every step, so that a test or a command decides what else happens."""

    config: GanConfig
    data: GanData
    encoder: Encoder                  # the discriminator's backbone
    folder: Path
    clip: nn.Module | None = None     # with image tower for guidance and clip_score; its gene encoder for cond_dropout
    tensorboard: bool = True
    wandb_project: str | None = None
    device: str = "cpu"
    watched: Sequence[Metric] = ()    # measured at every snapshot
    progress: Progress = field(default_factory=Progress)
    saved_at: int | None = field(default=None, init=False)       # the step of its last checkpoint

    def __post_init__(self):
        config = self.config
        if self.progress.blur_fade_kimg is None:
            self.progress.blur_fade_kimg = resolved_fade_kimg(config.blur_fade_kimg, config.kimg)
        if len(self.data.training.images) < config.batch:
            raise InputError(self.data.name, "patches", f"at least one batch of {config.batch}", str(len(self.data.training.images)),
                             "Lower --batch or give more patches")
        self.training = self.data.training.to(self.device)
        c_dim = self.training.prompts.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            generator = Generator(config.generator(c_dim))
            discriminator = Discriminator(self.encoder, c_dim, config.img_resolution, cond_norm=config.cond_norm,
                                          input_px=config.backbone_px, statistics=config.statistics, prompt_bias=config.prompt_bias)
        if config.colour_start:
            generator.start_at_colour(mean_colour(self.data.training.images))
        for network in (generator, discriminator):
            network.condition.fit(self.data.training.prompts)
        generator.to(self.device)
        discriminator.to(self.device).train()
        clip = None if self.clip is None else self.clip.to(self.device).eval().requires_grad_(False)
        if config.augment_target is not None:
            self.progress.augment_p = 0.0
        self.mlp = None if self.data.mlp is None else copy.deepcopy(self.data.mlp).to(self.device)   # the run's own gene encoder
        self.gan = GanStep(config, generator, discriminator, self.training, clip, self.mlp, augment_p=self.progress.augment_p)
        self.averages = Averages(generator, config.ema_multiples, config.batch)
        self.average = self.averages.published
        prepare(generator, discriminator, precision=config.precision, compiled=config.compile, on_gpu=str(self.device).startswith("cuda"),
                penalised=config.r1_weight > 0)      # after the averages were copied: they stay as they are
        self.mlp_average = None if self.mlp is None else frozen_copy(self.mlp)
        self.held_out = HeldOut(self.data.training, None if self.mlp else self.data.validation, config.seed)   # its prompts move
        self.showcase = Showcase(self.data, config.seed)
        self.metrics = SnapshotMetrics(list(self.watched), self.data, clip, self.device, config.seed)

    @property
    def kimg(self) -> float:
        return self.progress.step * self.config.batch / 1000

    @property
    def share(self) -> float:
        """Share of the run that has passed, 0..1: by images, or by wall time if that is further."""
        return min(max(self.kimg / self.config.kimg, self.time_share), 1.0)

    @property
    def time_share(self) -> float:
        """Share of the wall-time budget that has passed; 0 without one."""
        budget = self.config.budget_minutes
        return self.progress.elapsed_s / (budget * 60) if budget else 0.0

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> Iterator[dict[str, float]]:
        """Train to the end of the run or its budget; yields the losses of every step. Saves, also when stopped by a signal."""
        stats = StatsLog(self.folder, self.progress.step, tensorboard=self.tensorboard,
                         wandb_project=self.wandb_project) if is_first() else NoStats()
        clock, self._tick_kimg = time.monotonic() - self.progress.elapsed_s, self.kimg
        totals: dict[str, float] = {}
        with stop_signals() as stopped:
            if self.progress.step == self.progress.first_step:
                self._snapshot(stats)
            n_steps, n_moved, tick_start = 0, 0, time.monotonic() - clock
            while self.share < 1:
                losses = self.one_step()
                self.progress.elapsed_s = from_first(time.monotonic() - clock)   # one clock for all ranks
                if losses is not None:
                    totals, n_steps = {name: totals.get(name, 0.0) + value for name, value in losses.items()}, n_steps + 1
                    n_moved += 1
                    yield losses
                if self.share >= 1 and ends_badly(self.progress.bad_in_a_row, n_moved):
                    raise self._diverged("in every step; nothing was learned" if not n_moved else
                                         f"in the last {self.progress.bad_in_a_row} steps of the run")
                if self._due("last_tick", self.config.tick, MIN_TICKS) or self.share >= 1:
                    self._tick(stats, {name: value / max(n_steps, 1) for name, value in totals.items()}, tick_start)
                    totals, n_steps, tick_start = {}, 0, self.progress.elapsed_s
                snap_is_due = not self.progress.bad_in_a_row and self._due("last_snap", self.config.tick * self.config.snap, MIN_SNAPSHOTS)
                if snap_is_due or self.share >= 1:      # while steps are skipped it stays due: what there is, is from before them
                    began = time.monotonic()
                    self._snapshot(stats)
                    self.save()
                    tick_start += time.monotonic() - began      # a status line speaks of training
                if number := any_rank(stopped[0] if stopped else 0, self.device):
                    self._stop(number, stats)
        stats.close()

    def one_step(self) -> dict[str, float] | None:
        """One optimiser step of both networks; None if it was skipped because of NaN or infinite numbers."""
        config, progress = self.config, self.progress
        clip_weight = scheduled_weight(config.guidance_weight, config.clip_schedule, self.kimg, config.kimg)
        losses = self.gan.gradients(progress.step, sigma=self._next_sigma(), clip_weight=clip_weight)
        progress.step += 1
        if not self.gan.finite(losses):
            self._skip(losses)
            return None
        progress.bad_in_a_row = 0
        self.gan.move(*(scheduled_weight(lr, schedule, self.share, 1.0) for lr, schedule in
                        ((config.g_lr, config.g_lr_schedule), (config.d_lr, config.d_lr_schedule))))
        n_images = progress.step * config.batch
        self.averages.update(self.gan.generator, n_images)
        if self.mlp is not None:
            update_average(self.mlp_average, self.mlp, ema_beta(n_images, config.batch, half_life_kimg(config.batch)))
        if config.augment_target is not None:
            progress.augment_p = adapted_p(progress.augment_p, losses[SIGN], config.augment_target, config.batch, config.augment_kimg)
            self.gan.augment_p = progress.augment_p
        return losses

    def _next_sigma(self) -> float:
        """Blur of this step, px: by images, or by the wall-time budget if that is further and no fade was asked for; never rising."""
        config, progress = self.config, self.progress
        sigma = blur_sigma(self.kimg, config.blur_init, progress.blur_fade_kimg)
        if config.blur_fade_kimg is None:
            sigma = min(sigma, blur_sigma(self.time_share, config.blur_init, SHORT_RUN_FADE))
        progress.sigma = sigma if progress.sigma is None else min(sigma, progress.sigma)
        return progress.sigma

    def _skip(self, losses: Mapping[str, float]) -> None:
        progress = self.progress
        progress.bad_steps, progress.bad_in_a_row = progress.bad_steps + 1, progress.bad_in_a_row + 1
        log.warning("step %d skipped: NaN or infinite numbers (%s)", progress.step, json.dumps(losses))
        if progress.bad_in_a_row >= self.config.max_bad_steps:
            raise self._diverged(f"in {progress.bad_in_a_row} steps in a row; stopped at step {progress.step}")

    def _diverged(self, found: str) -> DivergedError:
        return DivergedError(self.folder, "losses and gradients", "finite numbers",
                             f"NaN or infinite ones {found}, no checkpoint was written since the first of them", LOWER_RATES)

    def _due(self, last: str, every_kimg: float, at_least: int) -> bool:
        """True every `every_kimg`, and at least `at_least` times in a run."""
        kimg, share = getattr(self.progress, last)
        due = (int(self.kimg / every_kimg + 1e-9) > int(kimg / every_kimg + 1e-9)
               or int(self.share * at_least + 1e-9) > int(share * at_least + 1e-9))
        if due:
            setattr(self.progress, last, (self.kimg, self.share))
        return due

    def _tick(self, stats: StatsLog, losses: Mapping[str, float], tick_start: float) -> None:
        shown = max(self.kimg - self._tick_kimg, 1e-9)
        self._tick_kimg = self.kimg
        values = {"kimg": self.kimg, "elapsed_s": self.progress.elapsed_s,
                  "sec_per_kimg": (self.progress.elapsed_s - tick_start) / shown, "bad_steps": self.progress.bad_steps, **losses,
                  **(self.held_out.measure(self.gan, self.progress.sigma or 0.0) if is_first() else {})}
        if self.config.augment_target is not None:
            values["augment/p"] = self.progress.augment_p
        stats.write(self.progress.step, values, status_line(values))

    def _stop(self, number: int, stats: StatsLog) -> None:
        if self.progress.bad_in_a_row:
            log.warning("no checkpoint of step %d, which was skipped: the one before stays", self.progress.step)
        elif self.saved_at != self.progress.step:
            self.save(on_signal=True)
        stats.close()
        if not is_first():
            raise SystemExit(128 + number)
        raise Stopped(number, f"after step {self.progress.step}; go on with --resume auto")

    # ---- what a run leaves behind -----------------------------------------------------------------------------------

    def _snapshot(self, stats: StatsLog) -> None:
        """Averaged generator for use, picture, metrics, and how much patches of one prompt differ."""
        self._require_finite()
        measured = self.metrics.measure(self.average)
        if not is_first():
            return
        n_images = self.progress.step * self.config.batch
        name = f"snapshot-{n_images:06d}"
        if self.mlp_average is not None:
            self.showcase.embed(self.mlp_average)
        diversity = self.showcase.diversity(self.average)
        facts = {"gene_encoder": self.mlp_average or self.data.gene_encoder, "kimg": self.kimg, "training": self.data.record,
                 "config": asdict(self.config), "backbone": {"name": self.encoder.name, "source": self.encoder.source}}
        save_snapshot(self.folder / name, self.average, **facts, diversity=diversity)
        self.showcase.save_grid(self.folder / "samples" / f"{name}.png", self.average)
        line = (f"kimg {self.kimg:<8.2f} {name}   diversity within a prompt {diversity['generated']:.1f} grey levels, by z alone "
                f"{diversity['generated_z']:.1f} (real patches of {diversity['real_groups']}: {diversity['real']:.1f})")
        line += "".join(f"   {name.removeprefix('metrics/')} {value:.4g}" for name, value in measured.items())
        measured |= {f"diversity/{what}": diversity[what] for what in ("generated", "generated_z", "real")}
        for ema, average in self.averages.others.items():
            found = self.showcase.diversity(average)
            save_snapshot(self.folder / name / ema, average, **facts, diversity=found)
            measured |= {f"diversity/{what}/{ema}": found[what] for what in ("generated", "generated_z")}
            line += f"   {ema}: {found['generated']:.1f}, by z alone {found['generated_z']:.1f}"
        stats.write(self.progress.step, {"kimg": self.kimg, **measured}, line)

    def save(self, on_signal: bool = False) -> Path | None:
        """Write a checkpoint of this moment, on the first rank; out of turn on a signal."""
        self._require_finite()
        self.saved_at = self.progress.step
        return save_run(self, on_signal) if is_first() else None

    def _require_finite(self) -> None:
        """Refuse to keep what is NaN or infinite; all ranks hold the same and say the same."""
        gan, parts = self.gan, kept_tensors(self)
        require_finite(self.folder, {**{f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()},
                                     **moments("g_optimiser", gan.g_optimiser), **moments("d_optimiser", gan.d_optimiser)}, LOWER_RATES)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; refused (exit 5) if it belongs to another config, data set or backbone."""
        load_run(self, checkpoint)
        self.gan.augment_p = self.progress.augment_p
