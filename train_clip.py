"""Train CLIP on paired patches and expression; the run folder ends with `clip/`, the weights every later command takes.

    python train_clip.py data.train_gex=S1/gex_filt.h5ad data.train_image_dir=S1/patches \\
                         data.val_gex=S2/gex_filt.h5ad data.val_image_dir=S2/patches

Configurations lie in assets/: clip_config.yaml (the published values, default), clip_small.yaml (real tissue, few spots, on a
CPU), clip_demo.yaml; choose with --config-name clip_small. Several samples: data.train_gex=A.h5ad,B.h5ad. Relative paths mean
the folder the command is started in. SIGTERM and Ctrl-C finish the step and save; a second Ctrl-C ends at once and leaves the
checkpoint before. Continue such a run, or any, with run_dir=runs/00000-clip ckpt_path=last. With run_dir=runs/clip ckpt_path=auto
from the start, the same command begins and goes on. --debug shows tracebacks.

Gene encoders: model.gene_encoder=linear_block (published), bottleneck, hidden, identity, gene_tokens, or pathways with
model.pathways_file=sets.gmt. Batch effects between samples: trainer.contrast=within_sample, trainer.batch_mmd=0.1,
model.gene_sample_scaling=standardise, model.feature_sample_scaling=centre. Frozen features once: image.cache_features=8.

Several devices: trainer.devices=4, or auto for all; trainer.batch_size is that of all together, a multiple of their number, and
every spot is contrasted with the whole of it. Several machines that share a file system: the same command on each, with
trainer.num_nodes=2 trainer.devices=4, started by one of
    srun --nodes 2 --ntasks-per-node 4 python train_clip.py ...
    torchrun --nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint FIRST_HOST:29500 train_clip.py ...
    MASTER_ADDR=FIRST_HOST MASTER_PORT=29500 NODE_RANK=0 python train_clip.py ...       (NODE_RANK=1 on the second)
"""
from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from preprocessing.errors import Command, end_progress_bars
from preprocessing.interrupts import stops_answered

MANUAL = "\b\n" + __doc__.replace("\n\n", "\n\n\b\n")   # as it stands, not filled


def train(loaded, launch_folder: Path) -> Path | None:
    """Train as a composed configuration says; returns the run folder, on the first process of several."""
    from training.clip_config import clip_config, from_launch_folder

    config = clip_config(loaded)   # whatever is wrong with it is said before torch is asked for anything
    from training.clip_run import run_clip

    return run_clip(config, lambda path: from_launch_folder(path, launch_folder))


def stop(number: int) -> None:
    """A signal ends the command with one true line and the shell's exit code, before, in and after training."""
    end_progress_bars()
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    print(f"stopped by {name} outside training; checkpoints and files that were finished are kept", file=sys.stderr, flush=True)
    raise SystemExit(128 + number)


@click.command(cls=Command, help=MANUAL)
@click.argument("changes", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--config-name", "-cn", default="clip_config", metavar="NAME", help="Configuration to begin with.")
@click.option("--config-dir", "-cd", type=click.Path(exists=True, file_okay=False), metavar="DIR",
              help="Folder of configurations of your own; they may build on those of assets/.")
@click.option("--cfg", type=click.Choice(["job"]), help="Show every key with its value, and end.")
def main(changes: tuple[str, ...], config_name: str, config_dir: str | None, cfg: str | None) -> None:
    from training.composed_config import compose_config

    loaded = compose_config(config_name, config_dir, changes)
    if cfg:
        from omegaconf import OmegaConf

        click.echo(OmegaConf.to_yaml(loaded), nl=False)
        return
    from training.clip_notices import quiet_lightning

    quiet_lightning()
    with stops_answered(stop):
        run_dir = train(loaded, Path.cwd())
    if run_dir:
        click.echo(f"wrote {run_dir}/clip (weights), {run_dir}/config.json, {run_dir}/checkpoints")


if __name__ == "__main__":
    main()
