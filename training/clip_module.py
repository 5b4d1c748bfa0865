"""CLIP as Lightning trains it: the step, the optimiser, validation by retrieval, checkpoints that hold no frozen tower.

This file, clip_fit.py and clip_checkpoints.py alone import pytorch_lightning. Every random draw of a step is seeded by (seed, step),
so a run that was stopped and resumed equals one that was not.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytorch_lightning as pl
import torch
from torch import Tensor

from evaluation.retrieval import both_ways
from networks.clip import CLIP
from networks.clip_model_config import different_settings
from preprocessing.errors import DivergedError, OptionError, WeightsError
from training.clip_config import ClipConfig
from training.clip_continuation import RUN
from training.clip_losses import clip_loss, sample_mmd
from training.clip_pairs import Batch
from training.finite import ends_badly, require_finite
from training.ranks import gather_rows

MONITOR = "val/loss"
MAX_SKIPPED_IN_A_ROW = 20   # steps without a finite gradient; more than a float16 gradient scaler needs to find its scale
LOWER_RATE = "Lower optimizer.lr, then go on with ckpt_path=auto run_dir=<the run folder>"
SHOWN = ("val/loss", "val/gene_to_image_r10", "val/image_to_gene_r10")


class ClipModule(pl.LightningModule):
    """One optimisation step of CLIP and its validation."""

    strict_loading = False   # checkpoints hold no frozen tower

    def __init__(self, clip: CLIP, config: ClipConfig, total_steps: int, record: Mapping, val_sizes: Sequence[int] = ()):
        super().__init__()
        self.record = record         # what its checkpoints say of the run
        self.clip, self.total_steps, self.seed = clip, total_steps, config.seed
        self.optimizer_config, self.options = config.optimizer, config.trainer
        self.val_sizes = val_sizes   # spots of each validation batch, over all ranks
        self.skipped_steps = self.skipped_in_a_row = self.moved_steps = 0
        self.val_metrics: dict[str, float] = {}
        self._val_embeds: list[tuple[Tensor, Tensor, Tensor]] = []   # images (n, D), genes (n, D), samples (n,) of each batch

    def on_train_batch_start(self, batch, batch_idx: int) -> None:
        torch.manual_seed(self.seed * 1_000_003 + self.global_step * 1009 + self.global_rank)   # dropout of this step

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, genes, samples = self._embed(batch)
        loss = self._contrastive_loss(images, genes, samples)
        logged = {"train/loss": loss, "train/temperature": self.clip.temperature, "train/skipped_steps": float(self.skipped_steps)}
        if self.options.batch_mmd:
            logged["train/mmd"] = sample_mmd(genes, samples) + sample_mmd(images, samples)
            loss = loss + self.options.batch_mmd * logged["train/mmd"]
        self.log_dict(logged, prog_bar=True)
        return loss

    def _embed(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(images (N, D), genes (N, D), samples (N,)) of the batch of all ranks."""
        genes = gather_rows(self.clip.encode_genes(batch.expression).float())
        return gather_rows(self._embed_images(batch.seen, batch.centre).float()), genes, gather_rows(batch.samples)

    def _contrastive_loss(self, images: Tensor, genes: Tensor, samples: Tensor) -> Tensor:
        return clip_loss(images, genes, self.clip.temperature, samples if self.options.contrast == "within_sample" else None)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """A step without a finite gradient changes nothing. Gradients are the same on every rank, and so is what is decided here."""
        gradients = [parameter.grad for parameter in self.clip.parameters() if parameter.grad is not None]
        if torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            self.skipped_in_a_row, self.moved_steps = 0, self.moved_steps + 1
            return
        self.skipped_steps, self.skipped_in_a_row = self.skipped_steps + 1, self.skipped_in_a_row + 1
        self.print(f"step {self.global_step:>6}   gradient not finite: step skipped, {self.skipped_steps} in all")
        optimizer.zero_grad(set_to_none=True)   # without gradients neither weights nor moments move
        if self.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise self._diverged()

    def on_train_end(self) -> None:
        if self.ends_badly:
            raise self._diverged()

    @property
    def ends_badly(self) -> bool:
        """Whether a run that ends now did not reach its end."""
        return ends_badly(self.skipped_in_a_row, self.moved_steps)

    def _diverged(self) -> DivergedError:
        return DivergedError("training", f"gradient at step {self.global_step}", "finite numbers",
                             f"none for {self.skipped_in_a_row} steps, no checkpoint was written since the first of them", LOWER_RATE)

    def _embed_images(self, seen: Tensor, centre: Tensor | None) -> Tensor:
        """Images (N, 3, H, W), cached features (N, F), or features of several views (N, V, F) -> (N, D)."""
        if seen.dim() == 4:
            return self.clip.encode_images(seen, centre)
        return self.clip.project_image_features(seen, centre) if seen.dim() == 2 else self.clip.project_views(seen, centre)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:   # this rank's share
        self._val_embeds.append(tuple(part[:self.val_sizes[batch_idx]] for part in self._embed(batch)))

    def on_validation_epoch_end(self) -> None:
        size = len(self._val_embeds[0][0])
        losses = [self._contrastive_loss(*embeds) for embeds in self._val_embeds if len(embeds[0]) == size]
        images, genes, _ = (torch.cat(parts) for parts in zip(*self._val_embeds, strict=True))
        self._val_embeds.clear()
        found = flat_metrics(both_ways(genes.cpu().numpy(), images.cpu().numpy(), n_bootstrap=1))
        self.val_metrics = {MONITOR: float(torch.stack(losses).mean()), **{f"val/{name}": value for name, value in found.items()}}
        self.log_dict(self.val_metrics, sync_dist=True)   # to the last bit the same: all ranks keep the same checkpoints
        shown = "   ".join(f"{name.removeprefix('val/')} {self.val_metrics[name]:.3f}" for name in SHOWN)
        self.print(f"step {self.global_step:>6}   {shown}")   # rank 0 alone

    def configure_optimizers(self):
        config = self.optimizer_config
        trained = [(name, parameter) for name, parameter in self.clip.named_parameters() if parameter.requires_grad]
        groups = [{"params": [p for name, p in trained if name != "log_temperature"], "weight_decay": config.weight_decay},
                  {"params": [p for name, p in trained if name == "log_temperature"], "weight_decay": 0.0}]
        kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}[config.name]
        fused = {"fused": True} if config.name in ("adamw", "adam") and self.trainer.precision != "16-mixed" else {}   # a scaler unscales
        optimizer = kind([group for group in groups if group["params"]], lr=config.lr, **fused)
        if config.schedule == "constant":
            return optimizer
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=self.total_steps + 1, pct_start=0.1,
                                                    cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def on_train_start(self) -> None:
        """A checkpoint brings the rates it was trained with; from here on those of the configuration hold, said where they differ."""
        config, groups = self.optimizer_config, self.trainer.optimizers[0].param_groups
        schedules = [entry.scheduler for entry in self.trainer.lr_scheduler_configs]
        highest = "max_lr" if schedules else "lr"
        lr, weight_decay = groups[0][highest], groups[0]["weight_decay"]
        if lr != config.lr:
            for group in groups:
                for name in {"lr", "initial_lr", "max_lr", "min_lr"} & group.keys():     # one_cycle's are all shares of the highest
                    group[name] *= config.lr / lr
                group[highest] = config.lr                                               # as given, to the last bit
            for schedule in schedules:
                schedule.base_lrs = [group["initial_lr"] for group in groups]
                schedule._last_lr = [group["lr"] for group in groups]                     # what get_last_lr and logs tell
            self.print(f"from here on optimizer.lr is {config.lr:g}; it was {lr:g}")
        if weight_decay != config.weight_decay:
            groups[0]["weight_decay"] = config.weight_decay                              # the second, of the temperature, has none
            self.print(f"from here on optimizer.weight_decay is {config.weight_decay:g}; it was {weight_decay:g}")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in weights.items() if not name.startswith("clip.image_encoder.")}
        require_finite("training", checkpoint["state_dict"], LOWER_RATE)
        checkpoint["clip"] = json.dumps(self.clip.description())
        checkpoint["optimizer"] = self.optimizer_config.name
        checkpoint[RUN] = json.dumps(self.record)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        trained = json.loads(checkpoint.get("clip", "{}"))
        ours = self.clip.description()
        facts = ("vocab_sha256", "gene_sets", "image_encoder_sha256", "target_sum")
        different = [*different_settings(trained.get("model", {}), self.clip.config),
                     *(name for name in facts if trained.get(name) != ours[name])]
        if different:
            raise WeightsError(self.trainer.ckpt_path, "checkpoint", "the model, genes and encoder of this run",
                               f"another {', '.join(different)}")
        name, trained_with = self.optimizer_config.name, checkpoint.get("optimizer")
        if trained_with not in (None, name):
            raise OptionError("optimizer.name", f"{trained_with}, with which the checkpoint was trained", name)
        planned = [self.total_steps + 1] if self.optimizer_config.schedule == "one_cycle" else []
        began = [schedule.get("total_steps") for schedule in checkpoint["lr_schedulers"]]
        if began != planned:
            raise OptionError("optimizer.schedule, trainer.max_epochs, trainer.batch_size", f"{_cycle(began)}, as the checkpoint began",
                              _cycle(planned))


def _cycle(total_steps: list) -> str:
    return f"one_cycle over {total_steps[0] - 1} steps" if total_steps else "no one_cycle schedule"


def flat_metrics(ways: dict[str, dict]) -> dict[str, float]:
    """`gene_to_image_r10` and its like of `evaluation.retrieval.both_ways`."""
    return {f"{way}_{name}": ways[way][name] for way in ("gene_to_image", "image_to_gene") for name in ("r1", "r5", "r10", "median_rank")}
