"""Train StyleGAN-G: paired patches and expression -> run folder of generator snapshots. Options are resolved here, work is below."""
from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import click

from preprocessing.errors import Command, OptionError

RUN_OPTIONS = ("outdir", "n_train", "mask", "train_clusters", "cache_dir", "resume", "resume_kimg", "suffix", "dry_run", "tensorboard",
               "wandb")
SOURCES = ("data", "gex", "samples", "val_data", "val_gex", "embeddings", "val_embeddings", "encoder", "network")
PRESETS, SIZES = ("reference", "best"), ("small", "lite", "full", "custom")   # the tables of training/gan_config.py, without torch
PRESET = " Default: the preset's."
MAX_SUFFIX = 60
GUIDANCE = ("spherical", "infonce")
MODES = ("all", "text_encoder", "freeze8", "freeze16", "freeze32", "freeze64", "freeze128")
COMPILE = ("off", "blocks", "max")
SCHEDULES, LR_SCHEDULES = ("const", "step", "linear", "exp"), ("const", "step")


def option(name: str, **kwargs) -> Callable:
    """A click option that answers to dashes and to underscores."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    return click.option(*spellings, name.replace("-", "_"), **kwargs)


def train_gan(*, device: str | None, timeout_minutes: float, **said: object) -> Path | None:
    """Join the ranks of a torchrun job, resolve options, train; returns the run folder (None on a dry run and on silent ranks)."""
    from training.ranks import joined_ranks

    with joined_ranks(device, timeout_minutes) as own_device:
        return train_as_said(own_device, **said)


def train_as_said(device: str, *, preset: str, cfg: str, fp32: bool | None, nobench: bool, metrics: str, val_clusters: str | None,
                  **said: object) -> Path | None:
    """Resolve options and train on the device of this rank; returns as `train_gan`."""
    from training.compiler_probe import require_compiler
    from training.gan_config import resolve
    from training.gan_run import run_gan
    from training.gan_sources import gan_sources
    from training.gan_speed import default_precision, set_up_gpu
    from training.image_metrics import parse_metrics
    from training.ranks import own_part

    watched = parse_metrics(metrics)
    sources = gan_sources(**{name: said.pop(name) for name in SOURCES}, guided=bool(said["clip_weight"]),
                          scored=any(metric.kind == "clip_score" for metric in watched))
    run_options = {name: said.pop(name) for name in RUN_OPTIONS}
    suffix = run_options["suffix"] or ""
    if "/" in suffix or not suffix.isprintable() or len(suffix) > MAX_SUFFIX:
        raise OptionError("--suffix", f"up to {MAX_SUFFIX} printable letters without a slash", suffix)
    if run_options["wandb"] and find_spec("wandb") is None:
        raise OptionError("--wandb", "the package wandb (pip install wandb)", "it is not installed")
    precision = default_precision(device, fp32)
    config = resolve(preset, cfg, encoder=sources.encoder, precision=precision, **said)
    if val_clusters and not (sources.validation or sources.val_patches):
        raise OptionError("--val-clusters", "spots to show: --val-data and --val-gex, or a sample of split val", "none")
    if watched and sources.encoder == "mlp":
        raise OptionError("--metrics", "none with --encoder mlp, whose prompts move in training", metrics)
    own_part(config.batch, config.batch_gpu)         # refuses a batch that the ranks cannot share
    require_compiler(config.compile, device)
    set_up_gpu(precision, search_kernels=not nobench)
    return run_gan(config, sources, watched, device, preset=preset, cfg=cfg, val_clusters=val_clusters, **run_options)


@click.command(cls=Command)
@option("outdir", type=click.Path(path_type=Path), required=True, help="Where run folders are made: OUTDIR/00000-<data>@64-lite-...")
@option("data", help="Patch folder or imgs.h5; a comma-separated list for several samples.")
@option("gex", help="gex_filt.h5ad of each of them, in the same order. Without it (and --network): unconditional training.")
@option("samples", type=click.Path(path_type=Path), help="Instead: a CSV with sample_id, images, gex, split (train, val), embeddings.")
@option("val-data", help="Held-out patches, shown in the pictures.")
@option("val-gex", help="Their expression.")
@option("network", type=click.Path(path_type=Path), help="CLIP weights (folder or single file) that embed the expression.")
@option("encoder", type=click.Choice(["clip", "mlp"]), help="clip (default): frozen --network. mlp: trained with the generator.")
@option("embeddings", help="Instead of CLIP: ready-made prompt embeddings (.npy), rows in h5ad order, one file for each of --gex.")
@option("val-embeddings", help="Those of the held-out patches.")
@option("mask", help="Train on these spots alone: .npy of booleans or row numbers (h5ad order, sample after sample), CSV or obs column of "
        "booleans.")
@option("train-clusters", help="Train on these clusters of obs['cluster'] alone, comma-separated.")
@option("val-clusters", help="Show held-out patches of these clusters alone.")
@option("img-resolution", type=click.IntRange(max=4096), required=True, help="Side of a generated patch, px; a power of two.")
@option("batch", type=click.IntRange(max=2**20), required=True, help="Images a step.")
@option("batch-gpu", type=click.IntRange(max=2**20), default=8, help="Images of a micro-batch; a multiple of 8.")
@option("preset", type=click.Choice(PRESETS), default="best", help="reference: the published method. best: ours.")
@option("cfg", type=click.Choice(SIZES), default="lite", help="Size of the generator; custom: --cbase, --cmax, --res-blocks.")
@option("cbase", type=click.IntRange(max=2**20), help="Channels at resolution r are min(cbase // r, cmax).")
@option("cmax", type=click.IntRange(max=2**14), help="Most channels of a layer.")
@option("res-blocks", type=click.IntRange(max=64), help="Residual pairs a resolution.")
@option("backbone", help="Encoder in front of the discriminator: a name in networks/encoder_specs.py or timm:<model>." + PRESET)
@option("backbone-weights", type=click.Path(), help="Its local weight file.")
@option("backbone-px", type=click.IntRange(max=4096),
        help="Side at which it sees patches; default: its own (ViT), the patch's (convolutional).")
@option("statistics", type=click.Choice(["own", "imagenet"]), help="Mean and deviation in front of the backbone." + PRESET)
@option("cond-norm", type=click.Choice(["l2", "scaled", "standardize"]), help="Scaling of prompt embeddings." + PRESET)
@option("cond-dropout", type=float, help="Dropout of the gene encoder where it embeds prompts for the generator in training; "
        "published: 0.8." + PRESET)
@option("cond-noise", type=float, help="Noise on prompts in training, in deviations between prompts." + PRESET)
@click.option("--flips/--no-flips", default=None, help="Show real patches in eight flips and turns." + PRESET)
@option("max-shift-px", type=int, help="Move real patches by up to this many px." + PRESET)
@option("colour-strength", type=float, help="Strength of the colour part of the augmentation; 1 as published." + PRESET)
@click.option("--shared-pass/--two-passes", default=None, help="One pass of generator and backbone for both losses, real and generated "
              "patches in one batch norm; or one for each network, as published." + PRESET)
@click.option("--colour-start/--no-colour-start", default=None, help="Start at the mean colour of the real patches." + PRESET)
@option("noise-init", type=float, help="Strength of the generator's noise inputs at the start." + PRESET)
@option("prompt-bias", type=float, help="Start of the heads' prompt bias; 1: they judge realism whatever the prompt." + PRESET)
@option("diversity-weight", type=float, help="Pressure on two patches of one prompt to differ as real neighbours do." + PRESET)
@option("mismatch-weight", type=float, help="Real patches with the genes of an unlike spot (drawn among those farther than the median "
        "by embedding) as a further negative of the discriminator; 0 is off." + PRESET)
@option("augment-target", type=float, help="Augment only so many images that E[sign D(real)] comes to this, as 0.6. Default: all of them.")
@option("augment-kimg", type=float, default=500.0, help="kimg in which the share of augmented images can move from 0 to 1.")
@option("r1-weight", type=float, help="Half of it times the squared gradient of real logits to the backbone's features; 0 is off." + PRESET)
@option("r1-interval", type=int, default=16, help="Steps between such penalties; each counts that many times.")
@option("train-mode", type=click.Choice(MODES), default="all", help="text_encoder: the --encoder mlp alone (--g-lr 3e-6 by default). "
        "freezeN: the blocks above N px and all ToRGB.")
@option("g-lr", type=float, help="Learning rate of the generator. Default: the preset's (reference), the size's (best).")
@option("d-lr", type=float, help="Learning rate of the discriminator. Default: the preset's (reference), the size's (best).")
@option("g-lr-schedule", type=click.Choice(LR_SCHEDULES), default="const", help="step: a tenth from half of the run on.")
@option("d-lr-schedule", type=click.Choice(LR_SCHEDULES), default="const", help="step: a tenth from half of the run on.")
@option("clip-weight", type=float, default=0.0, help="Guidance by the CLIP image tower; 0 is off. reference: times --batch-gpu.")
@option("clip-schedule", type=click.Choice(SCHEDULES), default="const", help="Its weight over --kimg, whatever the wall time.")
@option("clip-loss", type=click.Choice(GUIDANCE), help="spherical: squared angle to the own prompt. infonce: the own prompt among those "
        "of the whole batch, whatever the micro-batch, at CLIP's temperature, from images to prompts." + PRESET)
@option("rec-weight", type=float, default=0.0, help="Mean squared error to the paired patch; 0 is off.")
@option("blur-init", type=float, default=32.0, help="Blur in front of the discriminator at the start, px.")
@option("blur-fade-kimg", type=float, help="When it has faded to 0. Default: 1000 (reference), a tenth of the run (best).")
@option("kimg", type=float, default=25000.0, help="Length of the run: thousands of real images shown.")
@option("budget-minutes", type=float, help="Stop cleanly after this wall time, if that comes first.")
@option("tick", type=float, default=4.0, help="kimg between status lines (at least 20 lines a run).")
@option("snap", type=int, default=100, help="Ticks between snapshots (at least 5 snapshots a run).")
@option("emas", help="Averages of the generator to keep: multiples of the published half-life, 1 among them, as 0.5,1,2; those beside 1 "
        "lie in ema-<kimg> of a snapshot." + PRESET)
@option("n-train", type=int, help="Use a random subset of this many patches.")
@option("cache-dir", default="auto", help="Folder for packed patches, read without decoding; auto: .patch_cache beside the first images, "
        "if they are many; none: read into memory.")
@option("metrics", default="none", help="Measured at every snapshot, on validation patches where given: fid10k, kid10k, fd_ENCODER, "
        "kd_ENCODER (fd_uni@2k=weights.safetensors), clip_score, by commas.")
@click.option("--fp32/--bf16", default=None, help="Type of convolutions and frozen towers; weights and losses stay float32. "
              "Default: bf16 on a GPU, fp32 on a CPU.")
@option("compile", type=click.Choice(COMPILE), default="off", help="blocks: compile every resolution of the generator, the heads and the "
        "backbone, minutes at the start; max: also search for the fastest kernels.")
@option("nobench", is_flag=True, help="Do not let a GPU try several convolution kernels for the fastest one.")
@option("workers", type=click.IntRange(max=1024), default=3, help="Threads that draw random numbers and read patches ahead of a step.")
@option("seed", type=click.IntRange(max=2**63 - 1), default=0, help="Of everything random.")
@option("max-bad-steps", type=int, default=10, help="Steps with NaN or infinite losses in a row that end the run.")
@option("resume", help="auto: the newest run of this name under OUTDIR, if any; or a run or checkpoint folder: goes on exactly. A snapshot "
        "folder, a checkpoint of a lower --img-resolution, or any with --resume-kimg: a new run starts from what fits of its weights.")
@option("resume-kimg", type=float, help="Where the clock of such a new run starts, as 0. Default: 0.")
@option("suffix", help="Added to the run folder's name.")
@option("device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
@click.option("--tensorboard/--no-tensorboard", default=True, help="Mirror stats.jsonl for TensorBoard.")
@option("wandb", metavar="PROJECT", help="Mirror it to this project of Weights & Biases, whose package and login are yours to set up.")
@option("timeout-minutes", type=float, default=30.0, help="Of several processes: how long one waits for another before the job ends.")
@option("dry-run", is_flag=True, help="Check options, data and what --resume names; print the config, train nothing.")
def main(**options):
    """Train a generator of patches, conditioned on gene expression: embedded by frozen CLIP weights, by an encoder trained along, or
    ready-made embeddings; without --gex unconditional.

    \b
    python train_gan.py --outdir runs/gan --data runs/C2/patches,runs/C3/patches --gex runs/C2/gex_filt.h5ad,runs/C3/gex_filt.h5ad \\
        --network runs/clip/clip --img-resolution 64 --batch 16 --cfg small --kimg 12

    Several GPUs: the same command behind `torchrun --nproc-per-node 4`; --batch is that of all together, and changes nothing else.
    \b
    Without prompts, and then larger out of what that run learned:
    python train_gan.py --outdir runs/gan --data runs/C2/patches --img-resolution 64 --batch 16 --kimg 12
    python train_gan.py --outdir runs/gan --data runs/C2/patches --img-resolution 128 --batch 16 --kimg 12 --resume runs/gan/00000-C2@64-...
    """
    folder = train_gan(**options)
    if folder is not None:
        from training.sampling import newest_snapshot
        click.echo(f"wrote {folder} (newest snapshot: {newest_snapshot(folder)})")


if __name__ == "__main__":
    main()
