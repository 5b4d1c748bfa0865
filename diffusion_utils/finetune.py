"""Fine-tune a denoiser on patches and prompts, in one process or in those that `accelerate launch` started.

The clock is the step: one move of the optimiser, made of all micro-batches of all processes. A run of k + m steps equals a run of k
steps that was resumed for m, bit for bit on a CPU. Saving, validating and averaging read the live weights and never write them.
"""
from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from diffusion_utils.adapters import add_adapters, merged
from diffusion_utils.denoisers import Base, compile_blocks
from diffusion_utils.ema import Ema
from diffusion_utils.finetune_checkpoint import Standing, find_checkpoint, kept_tensors, load_run, save_run
from diffusion_utils.finetune_config import FinetuneConfig
from diffusion_utils.finetune_data import FinetuneData, open_source, read_data
from diffusion_utils.finetune_processes import make_accelerator, stop_requests
from diffusion_utils.finetune_step import Batches, losses_of
from diffusion_utils.finetune_validation import Validation
from diffusion_utils.noising import noising_of, own_prediction
from diffusion_utils.pipeline import KIND, write_pipeline
from diffusion_utils.power_ema import PowerEma
from diffusion_utils.schedulers import make_scheduler
from preprocessing.errors import DivergedError, InputError
from preprocessing.interrupts import Stopped
from preprocessing.output_places import FolderKind, require_own_folder, require_replaceable
from preprocessing.outputs import write_json
from training.checkpoints import Checkpoint
from training.finite import ends_badly, moments, require_finite
from training.loading import in_order
from training.ranks import any_rank, sum_values
from training.run_folder import NoStats, StatsLog, require_own_config

log = logging.getLogger(__name__)
LOWER_RATE = "Lower --learning-rate, then --resume-from-checkpoint latest"
RUN = FolderKind("that of a fine-tuning run", r"config\.json|checkpoint-\d+/")
MOST_LINES = 500          # about so many lines of a run; steps between two are averaged


@dataclass
class FinetuneRun:
    """A run in its folder. `train` yields after every step, so that a test or a command decides what else happens."""

    config: FinetuneConfig
    data: FinetuneData
    base: Base
    accelerator: object
    standing: Standing = field(default_factory=Standing)
    base_sha256: str | None = None               # of what no checkpoint holds; made when a checkpoint needs it
    saved_at: int | None = None                  # the step of its last checkpoint

    def __post_init__(self):
        config, accelerator, denoiser = self.config, self.accelerator, self.base.denoiser
        self.device = str(accelerator.device)
        held = self.data.held_out
        # every process opens latents, in no collective, which would time out: the first at the cache's lock fills it, the others wait there
        self.source = open_source(self.data.images, self.base, config, self.device)
        self.held_source = None if held is None else open_source(held.images, self.base, config, self.device)
        if config.lora_rank:
            add_adapters(denoiser, config.lora_rank, config.seed)
        if config.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        denoiser.to(self.device).train()
        if self.device.startswith("cuda"):
            denoiser.to(memory_format=torch.channels_last)
        self.live = denoiser                                       # without wrapper: what is saved, averaged and shown
        self.trained = [parameter for parameter in denoiser.parameters() if parameter.requires_grad]
        self.ema = Ema(denoiser, config.ema_decay) if config.use_ema else None
        self.power_ema = PowerEma(denoiser) if config.power_ema and accelerator.is_main_process else None
        if config.compile:
            compile_blocks(denoiser)
        optimiser = torch.optim.AdamW(self.trained, lr=config.step_size, weight_decay=config.adam_weight_decay,
                                      fused=self.device.startswith("cuda") or None)
        self.wrapped, self.optimiser = accelerator.prepare(denoiser, optimiser)
        self.prompts = self.data.prompts.to(self.device)
        self.noising = noising_of(_scheduler(self.base.scheduler), config.snr_gamma)
        side = config.resolution // self.base.pixels_a_latent
        self.noise_shape = (denoiser.config.in_channels, side, side)
        self.batches = Batches(config, self.data, self.source, self.noise_shape, accelerator.process_index, accelerator.num_processes)
        if len(self.data) < self.batches.global_batch:
            raise InputError(config.train_data_dir, "patches", f"at least one step of {self.batches.global_batch}", str(len(self.data)),
                             "Lower --train-batch-size or --gradient-accumulation-steps, or give more patches")
        self.n_steps = config.max_train_steps or config.num_train_epochs * -(-len(self.data) // self.batches.global_batch)
        self.lr_share = self._lr_share()
        self.validation = Validation(self)

    def _lr_share(self):
        """Share of the learning rate at a step; a pure function, so that there is nothing to resume."""
        from diffusers.optimization import get_scheduler

        own = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=self.config.step_size)
        schedule = get_scheduler(self.config.lr_scheduler, own, num_warmup_steps=self.config.lr_warmup_steps,
                                 num_training_steps=self.n_steps)
        return schedule.lr_lambdas[0]

    # ---- the loop ---------------------------------------------------------------------------------------------------

    def train(self) -> Iterator[float]:
        """Train to the end; yields the loss of every step that moved the weights. Saves, also when stopped by a signal."""
        config, standing, main = self.config, self.standing, self.accelerator.is_main_process
        stats = StatsLog(config.output_dir, standing.step, tensorboard=config.report_to == "tensorboard") if main else NoStats()
        clock = time.monotonic() - standing.elapsed_s
        keys = itertools.product(range(standing.step, self.n_steps), range(config.gradient_accumulation_steps))
        ready = in_order(keys, self.batches.read, config.dataloader_num_workers)
        n_moved, tick, losses, save_is_due = 0, max(1, self.n_steps // MOST_LINES), [], False
        with stop_requests() as stopped:
            while standing.step < self.n_steps:
                loss = self._one_step(ready)
                standing.elapsed_s = time.monotonic() - clock
                if loss is not None:
                    n_moved += 1
                    losses.append(loss)
                    yield loss
                last = standing.step == self.n_steps
                if last and ends_badly(standing.bad_in_a_row, n_moved):
                    raise self._diverged("in every step; nothing was learned" if not n_moved else
                                         f"in the last {standing.bad_in_a_row} steps of the run")
                if losses and (last or standing.step % tick == 0):
                    self._say(stats, sum(losses) / len(losses))
                    losses = []
                if last or standing.step % config.validation_steps == 0:
                    self.validate(stats)
                save_is_due = save_is_due or standing.step % config.checkpointing_steps == 0
                if last or (save_is_due and not standing.bad_in_a_row):     # while steps are skipped the checkpoint before them stays
                    self.save()
                    save_is_due = False
                if number := any_rank(stopped[0] if stopped else 0, self.device):
                    if standing.bad_in_a_row:
                        log.warning("no checkpoint of step %d, which was skipped: the one before stays", standing.step)
                    elif self.saved_at != standing.step:
                        self.save(on_signal=True)
                    stats.close()
                    if not main:
                        raise SystemExit(128 + number)
                    raise Stopped(number, f"after step {standing.step}; go on with --resume-from-checkpoint latest")
        stats.close()
        self.write_pipeline()

    def _one_step(self, ready) -> float | None:
        """One step of all processes; None if it was skipped because of NaN or infinite gradients."""
        config, standing, n = self.config, self.standing, self.config.gradient_accumulation_steps
        total = torch.zeros((), device=self.device)
        for number in range(n):
            batch = next(ready)
            _seed_dropout(self.live, config.seed, standing.step, self.batches.rank * n + number)
            embeddings = self.data.embeddings[batch.rows].to(self.device)
            x0 = batch.x0.to(self.device) if batch.x0 is not None else \
                self.source.read(batch.rows, batch.draws.orientation, batch.draws.posterior, self.device)
            last = number == n - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):      # gradients meet once a step
                with self.accelerator.autocast():
                    losses = losses_of(self.wrapped, self.prompts, self.noising, x0, embeddings, batch.draws, config.input_perturbation)
                loss = losses.mean() / n
                self.accelerator.backward(loss)
            total += loss.detach()
        norm = self.accelerator.clip_grad_norm_(self.trained, config.max_grad_norm)      # one number on all processes
        standing.step += 1
        if not torch.isfinite(norm):
            self._skip(float(norm))
            return None
        standing.bad_in_a_row = 0
        for group in self.optimiser.param_groups:
            group["lr"] = config.step_size * self.lr_share(standing.step - 1)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.live)
            standing.ema_updates = self.ema.n_updates
        if self.power_ema is not None:
            self.power_ema.update(self.live)
            standing.ema_updates = self.power_ema.n_updates
        return sum_values({"loss": float(total)}, self.device)["loss"] / self.batches.n_ranks

    def _skip(self, norm: float) -> None:
        self.optimiser.zero_grad(set_to_none=True)
        standing = self.standing
        standing.bad_steps, standing.bad_in_a_row = standing.bad_steps + 1, standing.bad_in_a_row + 1
        log.warning("step %d skipped: the gradient's norm is %s", standing.step, norm)
        if standing.bad_in_a_row >= self.config.max_bad_steps:
            raise self._diverged(f"in {standing.bad_in_a_row} steps in a row; stopped at step {standing.step}")

    def _diverged(self, found: str) -> DivergedError:
        return DivergedError(self.config.output_dir, "gradients", "finite numbers", f"NaN or infinite ones {found}, "
                             "no checkpoint was written since the first of them", LOWER_RATE)

    def _say(self, stats: StatsLog, loss: float) -> None:
        """The line of a tick; `loss` is the mean of its steps."""
        standing, images = self.standing, self.standing.step * self.batches.global_batch
        values = {"images": images, "epoch": images / len(self.data), "loss": loss, "lr": self.optimiser.param_groups[0]["lr"],
                  "elapsed_s": standing.elapsed_s, "bad_steps": standing.bad_steps}
        line = (f"step {standing.step:>7,} of {self.n_steps:,}   epoch {values['epoch']:<8.2f} loss {loss:<9.4f} "
                f"lr {values['lr']:<10.2e} images/s {images / max(standing.elapsed_s, 1e-9):.1f}")
        stats.write(standing.step, values, line)

    # ---- what a run leaves behind -----------------------------------------------------------------------------------

    def shown_model(self) -> torch.nn.Module:
        """What pictures come from: the average, else the live denoiser."""
        return self.live if self.ema is None else self.ema.average

    def validate(self, stats: StatsLog) -> None:
        """Measure and say how the run stands; every process must call it."""
        self._require_finite()
        values, line = self.validation.measure()
        if values:
            stats.write(self.standing.step, values, line)

    def save(self, on_signal: bool = False) -> Path | None:
        """Write a checkpoint of this moment, on the first process; in turn, not on a signal, its averages of chosen length are kept too."""
        self._require_finite()
        self.saved_at = self.standing.step
        if not on_signal and self.power_ema is not None and self.power_ema.n_updates:
            self.power_ema.keep(self.config.output_dir)
        return save_run(self, on_signal) if self.accelerator.is_main_process else None

    def _require_finite(self) -> None:
        """Refuse to keep what is NaN or infinite; all processes hold the same and say the same."""
        parts = kept_tensors(self)
        require_finite(self.config.output_dir, {**{f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in
                                                   tensors.items()}, **moments("optimiser", self.optimiser)}, LOWER_RATE)

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint; refused (exit 5) if it belongs to other options, data or base."""
        load_run(self, checkpoint)

    def write_pipeline(self) -> Path | None:
        """The pipeline folder of this moment, on the first process."""
        if not self.accelerator.is_main_process:
            return None
        record = {"resolution": self.config.resolution, "patch_px": self.data.patch_px, "step": self.standing.step,
                  "images": self.standing.step * self.batches.global_batch, "base": self.base.source, "n_patches": len(self.data),
                  "data_sha256": self.data.sha256, "config": self.config.record}
        plain = merged(self.shown_model())
        require_finite(self.config.output_dir, plain.state_dict(), LOWER_RATE)
        return write_pipeline(self.config.output_dir / "pipeline", plain, self.base.vae, self.base.scheduler, self.prompts, record)


def open_run(config: FinetuneConfig, accelerator=None) -> FinetuneRun:
    """Read and check everything, then start, or go on where `--resume-from-checkpoint` says."""
    require_own_folder("--output-dir", config.output_dir, RUN)
    require_replaceable(config.output_dir / "pipeline", KIND)
    require_own_config("--output-dir", config.output_dir, ("config", "base"), "a fine-tuning run")
    checkpoint = find_checkpoint(config)
    data, base = read_data(config)
    accelerator = accelerator or make_accelerator(config)
    run = FinetuneRun(config, data, base, accelerator)
    if checkpoint is not None:
        run.load(checkpoint)
    if accelerator.is_main_process:
        write_json(config.output_dir / "config.json", {
            "config": config.record, "base": base.source, "n_patches": len(data), "data_sha256": data.sha256,
            "resumed_from": run.standing.resumed_from, "first_step": run.standing.first_step})
    return run


def _scheduler(config: dict):
    """The diffusers scheduler of a base, for its noise schedule. Solvers know flow matching by another name."""
    return make_scheduler(config, "dpm++" if own_prediction(config, "scheduler") == "flow" else "ddim", 1)


def _seed_dropout(model: torch.nn.Module, seed: int, step: int, number: int) -> None:
    """A base with dropout draws its masks as a function of the step and the micro-batch, as all other random numbers."""
    if any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules()):
        torch.manual_seed((seed * 1_000_003 + step) * 65_536 + number)
