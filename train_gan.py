"""Train StyleGAN-G: paired patches and expression -> run folder of generator snapshots. Options are resolved here, work is below."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import click

from preprocessing.errors import Command, InputError, OptionError

PRESETS, SIZES = ("reference", "best"), ("small", "lite", "full", "custom")   # the tables of training/gan_config.py, without torch
PRESET = " Default: the preset's."
GUIDANCE = ("spherical", "infonce")
SCHEDULES, LR_SCHEDULES = ("const", "step", "linear", "exp"), ("const", "step")


def option(name: str, **kwargs) -> Callable:
    """A click option that answers to dashes and to underscores."""
    spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
    return click.option(*spellings, name.replace("-", "_"), **kwargs)


def train_gan(*, outdir: Path, data: str | None, gex: str | None, samples: Path | None, val_data: str | None, val_gex: str | None,
              network: Path, preset: str, cfg: str, n_train: int | None, cache_dir: str, resume: str | None, suffix: str | None,
              device: str | None, dry_run: bool, tensorboard: bool, metrics: str, timeout_minutes: float, **said: object) -> Path | None:
    """Resolve options, join the ranks of a torchrun job, read data, train; returns the run folder (None on a dry run)."""
    from evaluation.features import pick_device
    from training.gan_config import resolve
    from training.gan_metrics import parse_metrics
    from training.ranks import joined_ranks, local_device

    config, watched = resolve(preset, cfg, **said), parse_metrics(metrics)
    device = local_device(pick_device(device or "auto"))
    with joined_ranks(device, timeout_minutes):
        return _train(config, watched, outdir, data, gex, samples, val_data, val_gex, network, preset, cfg, n_train, cache_dir, resume,
                      suffix, device, dry_run, tensorboard)


def _train(config, watched, outdir, data, gex, samples, val_data, val_gex, network, preset, cfg, n_train, cache_dir, resume, suffix, device,
           dry_run, tensorboard) -> Path | None:
    from networks.clip import CLIP
    from networks.histo_models import build_encoder
    from training.gan_data import load_gan_data
    from training.gan_loop import GanRun, start_folder
    from training.patch_cache import cache_place
    from training.ranks import from_first, is_first, own_part, rank_and_size
    from training.run_folder import next_run_folder

    own_part(config.batch, config.batch_gpu)     # refuses a batch that the ranks cannot share
    say = click.echo if is_first() else lambda line: None
    train_files, val_files = _samples(data, gex, samples, val_data, val_gex)
    encoder = build_encoder(config.backbone, config.backbone_weights)
    gan_data = load_gan_data(train_files, val_files, network, config.img_resolution, max_size=n_train, seed=config.seed,
                             keep_expression=config.cond_dropout > 0, cache_dir=cache_place(cache_dir))
    say(f"{gan_data.name}: {len(gan_data.training.images):,} patches at {config.img_resolution} px, "
        f"prompts {gan_data.training.prompts.shape[1]} wide, backbone {encoder.name}, {device}, {rank_and_size()[1]} process(es)")
    say(f"config: {config}")
    if dry_run:
        return None
    name = "-".join(filter(None, (f"{gan_data.name}@{config.img_resolution}", cfg, f"gpus{rank_and_size()[1]}-b{config.batch}", suffix)))
    checkpoint = _checkpoint(outdir, name, resume)
    sees_images = config.clip_weight > 0 or any(metric.kind == "clip_score" for metric in watched)
    clip = CLIP.from_pretrained(network, image_encoder=sees_images) if sees_images or config.cond_dropout else None
    run = GanRun(config, gan_data, encoder, checkpoint.folder.parent if checkpoint else outdir, clip=clip, tensorboard=tensorboard,
                 device=device, watched=watched)
    if checkpoint:
        run.load(checkpoint)
        say(f"resuming at kimg {run.kimg:.2f} from {checkpoint.folder}")
    else:
        run.folder = from_first(next_run_folder(outdir, name) if is_first() else None)     # only now: what is refused leaves no folder
        if is_first():
            start_folder(run.folder, run, preset=preset, cfg=cfg)
    show_progress(run, is_first())
    return run.folder if is_first() else None


def show_progress(run, shown: bool) -> None:
    """Train with one progress bar in kimg."""
    from tqdm import tqdm

    with tqdm(total=1.0, disable=not shown, initial=run.share, bar_format="{percentage:3.0f}%|{bar}| {desc}, {elapsed}<{remaining}") as bar:
        for _ in run.train():
            bar.set_description_str(f"{run.kimg:.2f} kimg", refresh=False)
            bar.update(run.share - bar.n)


def _samples(data, gex, samples, val_data, val_gex):
    from training.data import read_sample_sheet, sample_files

    if samples is not None:
        if data or gex or val_data or val_gex:
            raise OptionError("--samples", "without --data, --gex, --val-data and --val-gex", "both")
        sheet = read_sample_sheet(samples)
        train = [sample for sample in sheet if sample.split == "train"]
        if not train:
            raise InputError(samples, "split", "at least one sample of split train", "none")
        return train, [sample for sample in sheet if sample.split == "val"]
    if not data or not gex:
        raise OptionError("--data and --gex", "both, or --samples", "one or none of them")
    if bool(val_data) != bool(val_gex):
        raise OptionError("--val-data and --val-gex", "both or none", "one of them")
    return sample_files(data, gex), sample_files(val_data, val_gex) if val_data else []


def _checkpoint(outdir: Path, name: str, resume: str | None):
    """None (a new run), the newest whole checkpoint of this name (`auto`), or the one at a path (a checkpoint or a run folder)."""
    from training.run_folder import COMMIT, latest_checkpoint, latest_run, read_checkpoint

    if resume is None:
        return None
    if resume == "auto":
        run = latest_run(outdir, name) if Path(outdir).is_dir() else None
        return latest_checkpoint(run) if run else None
    path = Path(resume)
    if (path / COMMIT).exists() or path.name.startswith("checkpoint-"):
        return read_checkpoint(path)
    checkpoint = latest_checkpoint(path) if path.is_dir() else None
    if checkpoint is None:
        raise InputError(path, "--resume", "auto, a checkpoint folder, or a run folder with a checkpoint", "none there")
    return checkpoint


@click.command(cls=Command)
@option("outdir", type=click.Path(path_type=Path), required=True, help="Where run folders are made: OUTDIR/00000-<data>@64-lite-...")
@option("data", help="Patch folder or imgs.h5; a comma-separated list for several samples.")
@option("gex", help="gex_filt.h5ad of each of them, in the same order.")
@option("samples", type=click.Path(path_type=Path), help="Instead: a CSV with sample_id, images, gex, split (train, val).")
@option("val-data", help="Held-out patches, shown in the pictures.")
@option("val-gex", help="Their expression.")
@option("network", type=click.Path(path_type=Path), required=True, help="CLIP weights (folder or single file) that embed the expression.")
@option("img-resolution", type=int, required=True, help="Side of a generated patch, px; a power of two.")
@option("batch", type=int, required=True, help="Images a step.")
@option("batch-gpu", type=int, default=8, help="Images of a micro-batch; a multiple of 8.")
@option("preset", type=click.Choice(PRESETS), default="best", help="reference: the published method. best: ours.")
@option("cfg", type=click.Choice(SIZES), default="lite", help="Size of the generator; custom: --cbase, --cmax, --res-blocks.")
@option("cbase", type=int, help="Channels at resolution r are min(cbase // r, cmax).")
@option("cmax", type=int, help="Most channels of a layer.")
@option("res-blocks", type=int, help="Residual pairs a resolution.")
@option("backbone", help="Encoder in front of the discriminator: a name of networks/histo_models.py or timm:<model>." + PRESET)
@option("backbone-weights", type=click.Path(), help="Its local weight file.")
@option("backbone-px", type=int, help="Side at which it sees patches; default: its own (ViT), the patch's (convolutional).")
@option("statistics", type=click.Choice(["own", "imagenet"]), help="Mean and deviation in front of the backbone." + PRESET)
@option("cond-norm", type=click.Choice(["l2", "scaled", "standardize"]), help="Scaling of prompt embeddings." + PRESET)
@option("cond-dropout", type=float, help="Dropout of the gene encoder where it embeds prompts for the generator in training; "
        "published: 0.8." + PRESET)
@option("cond-noise", type=float, help="Noise on prompts in training, in deviations between prompts." + PRESET)
@click.option("--flips/--no-flips", default=None, help="Show real patches in eight flips and turns." + PRESET)
@option("max-shift-px", type=int, help="Move real patches by up to this many px." + PRESET)
@option("diversity-weight", type=float, help="Pressure on two patches of one prompt to differ as real neighbours do." + PRESET)
@option("mismatch-weight", type=float, help="Real patches with the genes of an unlike spot (drawn among those farther than the median "
        "by embedding) as a further negative of the discriminator; 0 is off." + PRESET)
@option("augment-target", type=float, help="Augment only so many images that E[sign D(real)] comes to this, as 0.6. Default: all of them.")
@option("augment-kimg", type=float, default=500.0, help="kimg in which the share of augmented images can move from 0 to 1.")
@option("r1-weight", type=float, help="Half of it times the squared gradient of real logits to the backbone's features; 0 is off." + PRESET)
@option("r1-interval", type=int, default=16, help="Steps between such penalties; each counts that many times.")
@option("g-lr", type=float, help="Learning rate of the generator." + PRESET)
@option("d-lr", type=float, help="Learning rate of the discriminator." + PRESET)
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
@option("seed", type=int, default=0, help="Of everything random.")
@option("max-bad-steps", type=int, default=10, help="Steps with NaN or infinite losses in a row that end the run.")
@option("resume", help="auto: the newest run of this name under OUTDIR, if any; or a run folder or checkpoint folder.")
@option("suffix", help="Added to the run folder's name.")
@option("device", help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
@click.option("--tensorboard/--no-tensorboard", default=True, help="Mirror stats.jsonl for TensorBoard.")
@option("timeout-minutes", type=float, default=30.0, help="Of several processes: how long one waits for another before the job ends.")
@option("dry-run", is_flag=True, help="Check options and data, print the config, train nothing.")
def main(**options):
    """Train a generator of patches, conditioned on gene expression embedded by frozen CLIP weights.

    \b
    python train_gan.py --outdir runs/gan --data runs/C2/patches,runs/C3/patches --gex runs/C2/gex_filt.h5ad,runs/C3/gex_filt.h5ad \\
        --network runs/clip/clip --img-resolution 64 --batch 16 --cfg small --kimg 12

    Several GPUs: the same command behind `torchrun --nproc-per-node 4`; --batch is that of all together, and changes nothing else.
    """
    folder = train_gan(**options)
    if folder is not None:
        click.echo(f"wrote {folder} (newest snapshot: {max(folder.glob('snapshot-*'), key=lambda path: int(path.name[9:]))})")


if __name__ == "__main__":
    main()
