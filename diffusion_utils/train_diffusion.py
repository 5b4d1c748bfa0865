"""Fine-tune Stable Diffusion, or train a denoiser from scratch, on patches and ready-made prompt embeddings."""
from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import click

from diffusion_utils.options import option, switch
from preprocessing.errors import Command

if TYPE_CHECKING:
    from diffusion_utils.finetune_config import FinetuneConfig


def train_diffusion(**options) -> Path | None:
    """Train and write the run folder; returns the pipeline folder, None on all processes but the first."""
    from diffusion_utils.finetune_processes import ending_together

    with ending_together():
        from diffusion_utils.finetune_config import FinetuneConfig
        from diffusion_utils.power_ema import FOLDER as AVERAGES
        from preprocessing.outputs import only_writer
        from training.ranks import named_place

        config = FinetuneConfig(**options)
        with only_writer(config.output_dir, parts=["samples", AVERAGES]) if named_place().is_first else nullcontext():
            return _train(config)


def _train(config: FinetuneConfig) -> Path | None:
    from diffusion_utils.finetune import open_run
    from preprocessing.progress import ProgressBar

    run = open_run(config)
    main = run.accelerator.is_main_process
    if main:
        n_trained = sum(parameter.numel() for parameter in run.trained)
        click.echo(f"{len(run.data):,} patches at {config.resolution} px, prompts {run.data.embeddings.shape[1]} wide as "
                   f"{run.prompts.n_tokens} {config.prompt_tokens} token(s); {run.base.source}, {n_trained / 1e6:.1f} M weights learn; "
                   f"{run.device}, {run.batches.n_ranks} process(es), {run.batches.global_batch} images a step, {run.n_steps:,} steps"
                   + (f", from step {run.standing.step:,}" if run.standing.step else ""))
    with ProgressBar(total=run.n_steps, initial=run.standing.step, unit="step", disable=not (main and config.progress)) as bar:
        for _ in run.train():
            bar.update(run.standing.step - bar.n)
    run.accelerator.end_training()
    if not main:
        return None
    if config.push_to_hub:
        from diffusion_utils.hub import push_folder
        push_folder(config.output_dir / "pipeline", config.push_to_hub)
    return config.output_dir / "pipeline"


@click.command(cls=Command)
@option("train-data-dir", required=True, help="Patch folder (patches/) or imgs.h5; several by commas.")
@option("dataset-embs", required=True, help="Prompt embeddings (.npy, any width), one file for each of them; joined by barcode.")
@option("output-dir", type=click.Path(path_type=Path), required=True, help="Run folder: config.json, stats.jsonl, checkpoint-*/, samples/, "
        "pipeline/.")
@option("pretrained-model-name-or-path", help="Base to fine-tune: a folder in diffusers' layout (unet/ or transformer/, vae/, scheduler/), "
        "a run folder of ours, or a repository of the hub.")
@option("from-scratch", type=click.Choice(["small", "base"]), help="Instead: a new UNet of this size.")
@option("pretrained-vae-path", help="Folder of another autoencoder (AutoencoderKL or AutoencoderTiny).")
@option("pixel-space", is_flag=True, help="No autoencoder: learn on pixels; for small patches.")
@option("resolution", type=click.IntRange(max=4096), default=256, help="Side at which patches are learned, px.")
@option("prompt-tokens", type=click.Choice(["learned", "published"]), default="learned", help="learned: distinct tokens, each a "
        "learned map of the embedding. published: the embedding padded with ones.")
@option("n-tokens", type=click.IntRange(max=4096), default=8, help="Number of learned tokens.")
@option("fresh-prompts", is_flag=True, help="A base of ours goes on with what it learned of prompts of this width and number of tokens. "
        "This forgets it: for embeddings of another encoder.")
@option("prediction-type", type=click.Choice(["epsilon", "v_prediction", "flow"]), help="What is predicted. Default: as the base; "
        "v_prediction (zero terminal SNR) from scratch.")
@option("train-batch-size", type=click.IntRange(max=2**16), default=16, help="Images of a micro-batch, on each process.")
@option("gradient-accumulation-steps", default=1, help="Micro-batches a step.")
@option("num-train-epochs", default=15, help="Length of the run.")
@option("max-train-steps", type=int, help="Length in steps instead.")
@option("gradient-checkpointing", is_flag=True, help="Less memory for a third more time.")
@option("learning-rate", type=float, help="Default: 1e-5 for a base, 1e-4 with --lora-rank, 3e-4 from scratch.")
@option("lr-scheduler", type=click.Choice(["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]),
        default="constant", help="Over the run.")
@option("lr-warmup-steps", default=0, help="Steps in which the rate rises, where the schedule has them.")
@option("adam-weight-decay", default=1e-2, help="Of AdamW.")
@option("max-grad-norm", default=1.0, help="Gradients are cut to this norm.")
@option("snr-gamma", default=5.0, help="min-SNR weights of timesteps; 0 turns them off.", callback=lambda _c, _p, value: value or None)
@switch("use-ema", True, help="Keep a moving average of the weights, and sample from it.")
@option("ema-decay", default=0.9999, help="Longest memory of it.")
@option("power-ema", is_flag=True, help="Also keep, at every checkpoint, averages from which diffusion_utils.choose_ema makes one of any "
        "length afterwards (twice the weights in memory; the weights' size on the disk each time).")
@option("noise-offset", default=0.0, help="Noise shared by a whole channel.")
@option("input-perturbation", default=0.0, help="Extra noise on what the denoiser sees.")
@option("mixed-precision", type=click.Choice(["no", "bf16"]), help="Weights stay float32. Default: bf16 on a GPU.")
@option("lora-rank", type=click.IntRange(max=4096),
        help="Train low-rank adapters of cross-attention and projections alone: for small GPUs.")
@switch("classifier-free-guidance", True, help="Learn the null prompt too.")
@option("p-uncond", default=0.1, help="Share of samples, each on its own, that show it.")
@option("uncond-embedding", default="mean", help="The null prompt: mean, zeros, or an .npy of shape (D,) or (1, D).")
@option("shuffle-prompts", is_flag=True, help="The null experiment: prompts of other patches.")
@switch("orientations", True, help="Show flips and quarter turns.")
@switch("latent-cache", True, help="Encode all patches once, before training.")
@option("cache-dir", type=click.Path(path_type=Path), help="Where latents are kept. Default: in the run folder.")
@option("compile", is_flag=True, help="Compile the denoiser's repeated blocks.")
@option("seed", type=click.IntRange(max=2**62 - 1), default=0, help="Of everything random.")
@option("dataloader-num-workers", default=2, help="Threads that read and draw ahead.")
@option("checkpointing-steps", default=500, help="Steps between checkpoints.")
@option("checkpoints-total-limit", default=2, help="Checkpoints kept, beside one more where a signal stopped the run.")
@option("resume-from-checkpoint", help="latest (of --output-dir; a new run if there is none), or a checkpoint folder: goes on exactly.")
@option("validation-prompts", help=".npy of embeddings: pictures of the first 8 in samples/.")
@option("validation-steps", default=500, help="Steps between them, and between measurements on --val-data-dir.")
@option("val-data-dir", help="Held-out patches: loss with their own prompts, and with those of others.")
@option("val-embs", help="Their embeddings.")
@option("guidance-scale", default=3.0, help="Of the pictures.")
@option("metrics", default="none", help="Distances of patches drawn for held-out (else training) prompts to the real ones, at validation "
        "steps: fid10k, kid10k, fd_ENCODER, kd_ENCODER@500=weights.safetensors, by commas.")
@option("report-to", type=click.Choice(["tensorboard", "none"]), default="tensorboard", help="Mirror of stats.jsonl.")
@option("push-to-hub", help="owner/name: upload the pipeline at the end, with the login of this machine.")
@option("max-bad-steps", default=10, help="Steps with NaN or infinite gradients in a row that end the run.")
@option("timeout-minutes", default=30.0, help="Of several processes: how long one waits for another before the run ends.")
@switch("progress", True, help="Show progress bars.")
def main(**options):
    """Train a generator of patches on prompt embeddings (CLIP's gene_clip_emb.npy, scGPT's or any other); writes OUTPUT_DIR/pipeline.

    \b
    python -m diffusion_utils.train_diffusion --train-data-dir runs/C2/patches --dataset-embs runs/C2/embeddings/gene_clip_emb.npy \\
        --pretrained-model-name-or-path models/stable-diffusion-v1-4 --resolution 256 --output-dir runs/diffusion

    Several GPUs: accelerate launch --num_processes 4 -m diffusion_utils.train_diffusion ... (their batches add up).
    Without weights: --from-scratch small --pixel-space --resolution 64.
    """
    folder = train_diffusion(**options)
    if folder is not None:
        click.echo(f"wrote {folder}")


if __name__ == "__main__":
    main()
