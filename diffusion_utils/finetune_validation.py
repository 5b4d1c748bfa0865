"""How a fine-tune stands, from the weights in memory: held-out losses, distances to real patches, pictures. Reads weights, writes none.

Its random numbers are its own, so that measuring at any step leaves the run as it was.
"""
from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffusion_utils.finetune_step import held_out_losses
from diffusion_utils.latents import OnlineLatents
from diffusion_utils.pipeline import GenePipeline
from diffusion_utils.sampling import Solver
from evaluation.contact_sheet import contact_sheet, save_png
from training.gan_grids import as_pictures
from training.image_metrics import BATCH, ImageDistances, parse_metrics
from training.ranks import own_rows

if TYPE_CHECKING:
    from diffusion_utils.finetune import FinetuneRun

SHOWN_PROMPTS, SHOWN_SEEDS = 8, 4


class Validation:
    """What a run measures of itself at its validation steps. Pictures come from the average where there is one."""

    def __init__(self, run: FinetuneRun):
        self.run, config = run, run.config
        self.solver = Solver(guidance_scale=config.guidance_scale if config.dropout else 1.0)
        held = run.data.held_out
        self.distances = None
        if metrics := parse_metrics(config.metrics):
            images, embeddings = (run.data.images, run.data.embeddings) if held is None else (held.images, held.embeddings)
            n = min(max(metric.n for metric in metrics), len(embeddings))
            order = torch.randperm(len(embeddings), generator=torch.Generator().manual_seed(config.seed))
            self.rows = order[:n]                # in random order: a metric of fewer takes the first
            self.asked = embeddings[self.rows]
            self.distances = ImageDistances(metrics, images[self.rows], run.device, config.seed)

    @torch.no_grad()
    def measure(self) -> tuple[dict[str, float], str]:
        """Numbers of this moment and the line that says them, empty where nothing was asked for. Every process must call it."""
        run = self.run
        was_training = run.live.training
        run.live.eval()
        try:
            values = {} if self.distances is None else self._distances()
            parts = [f"{name.removeprefix('metrics/')} {value:.4g}" for name, value in values.items()]
            if run.held_source is not None and run.accelerator.is_main_process:
                found = held_out_losses(run.shown_model(), run.prompts, run.noising, run.held_source, run.data.held_out,
                                        run.noise_shape, run.config.seed, run.device)
                values |= found
                parts.insert(0, f"held out: loss {found['val/loss']:.4f}, with other patches' genes {found['val/gene_gap']:+.4f}")
            if run.data.shown is not None and run.accelerator.is_main_process:
                self._show()
        finally:
            run.live.train(was_training)
        return values, f"step {run.standing.step:>7,} " + "   ".join(parts)

    def _distances(self) -> dict[str, float]:
        """`metrics/<name>` of one patch a prompt; the processes share them."""
        own = own_rows(len(self.asked))
        made = torch.cat([self._draw(self.asked[part], [(self.run.config.seed, int(row)) for row in self.rows[part]])
                          for part in own.split(BATCH)])
        return {f"metrics/{name}": value for name, value in self.distances.measure(made).items()}

    def _show(self) -> None:
        shown = self.run.data.shown[:SHOWN_PROMPTS]
        keys = [(seed, 0) for _ in shown for seed in range(SHOWN_SEEDS)]
        images = as_pictures(self._draw(shown.repeat_interleave(SHOWN_SEEDS, dim=0), keys))
        save_png(self._picture_path(), contact_sheet([images[start:start + SHOWN_SEEDS] for start in range(0, len(images), SHOWN_SEEDS)],
                                                     row_labels=[f"prompt {number}" for number in range(len(shown))]))

    def _picture_path(self) -> Path:
        return self.run.config.output_dir / "samples" / f"step-{self.run.standing.step:08d}.png"

    def _draw(self, embeddings: Tensor, keys: list[tuple[int, int]]) -> Tensor:
        """uint8 (N, 3, H, W) on the CPU."""
        run = self.run
        pipeline = GenePipeline(run.shown_model(), run.base.vae, run.base.scheduler, run.prompts, run.config.resolution,
                                run.data.patch_px, "")
        if run.base.vae is not None:
            run.base.vae.to(run.device)
        images = pipeline.generate(embeddings, keys, self.solver).cpu()
        if run.base.vae is not None and not isinstance(run.source, OnlineLatents):
            run.base.vae.to("cpu")
        return images
