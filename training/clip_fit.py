"""Train a CLIP with Lightning: its trainer, loaders, loggers and checkpoints, as the configuration says."""
from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from torch.utils.data import DataLoader

from networks.clip import CLIP
from networks.weights import read_plain_file
from preprocessing.errors import OptionError
from preprocessing.interrupts import StopSignals
from preprocessing.outputs import writes_to
from training.clip_checkpoints import GoodCheckpoints, StopOnSignal, SummedCheckpoints
from training.clip_config import ClipConfig
from training.clip_data import ClipData
from training.clip_module import LOWER_RATE, MONITOR, ClipModule
from training.clip_pairs import StepBatches, whole_batch
from training.finite import require_finite
from training.loading import BatchesAhead
from training.ranks import own_rows
from training.run_folder import say_without_wandb, wandb_id


def fit_clip(clip: CLIP, data: ClipData, config: ClipConfig, run_dir: Path, record: Mapping, ckpt_path: Path | None) -> CLIP:
    """Train; returns, on rank 0, the model the run ends with (`trainer.select`). Logs and checkpoints go to `run_dir`; `record`: of
    `run_record`."""
    options, stops = config.trainer, StopSignals()
    trainer = pl.Trainer(
        accelerator=options.accelerator, devices=options.devices, num_nodes=options.num_nodes, precision=_precision(config),
        max_epochs=options.max_epochs, logger=_loggers(config, run_dir), callbacks=_callbacks(config, run_dir, data.val is not None, stops),
        val_check_interval=options.val_every_steps if data.val is not None else None, check_val_every_n_epoch=None,
        limit_val_batches=options.limit_val_batches if data.val is not None else 0, log_every_n_steps=options.log_every_steps,
        num_sanity_val_steps=0, use_distributed_sampler=False, enable_model_summary=False, enable_progress_bar=options.progress_bar,
        default_root_dir=run_dir, plugins=[SummedCheckpoints()])
    batches = StepBatches(len(data.train), options.batch_size, config.seed, lambda: trainer.global_step,
                          rank=trainer.global_rank, world_size=trainer.world_size)
    val_batches = _val_batches(data, config)
    module = ClipModule(clip, config, len(batches) * options.max_epochs, record, [len(batch) for batch in val_batches])
    loader = BatchesAhead(batches, data.train.__getitems__, _loader_threads(config))
    val_loader = None if data.val is None else DataLoader(
        data.val, batch_sampler=[[batch[place] for place in own_rows(len(batch))] for batch in val_batches], collate_fn=whole_batch)
    try:
        with stops.same_handlers_after(), writes_to(run_dir):
            trainer.fit(module, loader, val_loader, ckpt_path=ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        raise OptionError("trainer", "a run that can go on from its checkpoint", " ".join(str(error).split())) from error
    best = trainer.checkpoint_callback.best_model_path if data.val is not None and options.select == "best" else ""
    if best and trainer.is_global_zero:
        trained = read_plain_file(best)
        module.load_state_dict(trained["state_dict"], strict=False)
        clip.training_record["chosen"] = f"best {MONITOR} at step {trained['global_step']}"
    else:
        clip.training_record["chosen"] = f"last, at step {trainer.global_step}"
    require_finite("training", clip.state_dict(), LOWER_RATE)
    return clip.cpu().eval()


def _val_batches(data: ClipData, config: ClipConfig) -> list[list[tuple[int, int]]]:
    keys = [(0, row) for row in range(len(data.val))] if data.val is not None else []
    return [keys[start:start + config.trainer.batch_size] for start in range(0, len(keys), config.trainer.batch_size)]


def _loader_threads(config: ClipConfig) -> int:
    """Threads that draw batches ahead; a CPU that trains has no core to spare for them."""
    if config.data.loader_threads is not None:
        return config.data.loader_threads
    return 2 if _on_gpu(config) else 0


def _precision(config: ClipConfig) -> str:
    if config.trainer.precision:
        return config.trainer.precision
    return "bf16-mixed" if _on_gpu(config) else "32-true"


def _on_gpu(config: ClipConfig) -> bool:
    return config.trainer.accelerator in ("gpu", "cuda") or (config.trainer.accelerator == "auto" and torch.cuda.is_available())


class _Bar(TQDMProgressBar):
    """Lightning's, but it ends its line where a run ends early: what is said then stands on a line of its own."""

    def on_exception(self, *_: object) -> None:
        with suppress(TypeError):            # Lightning's word for a bar that does not stand yet
            self.train_progress_bar.close()
        sys.stdout.flush()


def _loggers(config: ClipConfig, run_dir: Path) -> list:
    loggers = []
    if "csv" in config.logger:
        parts = ("csv", *(f"csv-{part}" for part in range(2, 1000)))   # Lightning would delete what a resumed run logged before
        free = next(part for part in parts if not (run_dir / part / "metrics.csv").exists())
        loggers.append(CSVLogger(run_dir, name="", version=free))
    if "tensorboard" in config.logger:
        loggers.append(TensorBoardLogger(run_dir, name="", version="tensorboard"))
    if "wandb" in config.logger:
        loggers += _on_wandb(run_dir)
    return loggers


def _on_wandb(run_dir: Path) -> list:
    """The run on Weights & Biases that mirrors this folder; none, with a notice, where the service takes none (no login, no network)."""
    from pytorch_lightning.loggers import WandbLogger

    try:
        logger = WandbLogger(project="clip", name=run_dir.name, id=wandb_id(run_dir), resume="allow", save_dir=run_dir)
        logger.log_hyperparams({"run_dir": str(run_dir)})      # asks for the login: here, not in the first step
        return [logger]
    except Exception as error:       # a mirror is not worth a run, whatever the service says
        say_without_wandb("logger=wandb", error)
        return []


def _callbacks(config: ClipConfig, run_dir: Path, validates: bool, stops: StopSignals) -> list:
    options = config.trainer
    if validates and options.save_top:
        keep = GoodCheckpoints(run_dir / "checkpoints", filename="step{step:06d}", monitor=MONITOR, save_top_k=options.save_top,
                               save_last=True, auto_insert_metric_name=False, enable_version_counter=False)
    else:
        every = max(options.max_epochs // 10, 1) if options.save_top else options.max_epochs
        keep = GoodCheckpoints(run_dir / "checkpoints", filename="step{step:06d}", every_n_epochs=every,
                               save_last=True, auto_insert_metric_name=False, enable_version_counter=False, save_on_train_epoch_end=True)
    return [keep, StopOnSignal(run_dir, stops), *([_Bar(refresh_rate=20)] if options.progress_bar else [])]
