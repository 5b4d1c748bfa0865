"""One GAN run, on every rank: read the data, find where to start, make or reopen the run folder, train with one progress bar."""
from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click

from networks.clip import CLIP
from networks.histo_models import build_encoder
from preprocessing.errors import InputError, OptionError
from preprocessing.inputs import read_json
from preprocessing.output_places import require_shared_folder
from preprocessing.outputs import only_writer, write_json
from preprocessing.progress import ProgressBar
from training.checkpoints import Checkpoint
from training.gan_config import GanConfig
from training.gan_data import load_gan_data
from training.gan_loop import GanRun
from training.gan_sources import GanSources
from training.image_metrics import Metric
from training.patch_cache import cache_place
from training.ranks import from_first, is_first, rank_and_size
from training.run_folder import begun_run, next_run_folder
from training.spot_choice import SpotChoice
from training.warm_start import Weights, find_start, start_from


def run_gan(config: GanConfig, sources: GanSources, watched: Sequence[Metric], device: str, *, preset: str, cfg: str, outdir: Path,
            n_train: int | None, mask: str | None, train_clusters: str | None, val_clusters: str | None, cache_dir: str,
            resume: str | None, resume_kimg: float | None, suffix: str | None, dry_run: bool, tensorboard: bool,
            wandb: str | None) -> Path | None:
    """Read data and train, on every rank; returns the run folder (None on a dry run and on silent ranks)."""
    require_shared_folder("--outdir", outdir)
    backbone = build_encoder(config.backbone, config.backbone_weights)
    gan_data = load_gan_data(sources, config.img_resolution, choice=SpotChoice(mask, train_clusters, val_clusters, n_train),
                             seed=config.seed, keep_expression=config.cond_dropout > 0, cache_dir=cache_place(cache_dir))
    width, n_ranks = gan_data.training.prompts.shape[1], rank_and_size()[1]
    say(f"{gan_data.name}: {len(gan_data.training.images):,} patches at {config.img_resolution} px, "
        f"{f'prompts {width} wide' if width else 'no prompts'}, backbone {backbone.name}, {device}, {n_ranks} process(es)")
    say(f"config: {config}")
    name = "-".join(filter(None, (f"{gan_data.name}@{config.img_resolution}", cfg, f"gpus{n_ranks}-b{config.batch}", suffix)))
    start = find_start(outdir, from_first(name), resume, config, as_weights=resume_kimg is not None)
    clip = _clip(sources.network, config, width, scored=any(metric.kind == "clip_score" for metric in watched))
    run = GanRun(config, gan_data, backbone, Path(outdir), clip=clip, tensorboard=tensorboard, wandb_project=wandb,
                 device=device, watched=watched)
    report = set_start(run, start, resume_kimg)
    if dry_run:
        say("\n".join([*report, "nothing was trained: --dry-run"]))
        return None
    record = about(run, preset=preset, cfg=cfg, started_from=str(start.folder) if isinstance(start, Weights) else None)
    with ExitStack() as held:
        if isinstance(start, Checkpoint):
            hold_folder(run, held)
            renew_config(run, record)
        else:
            make_folder(run, name, record, report, held, begins_again=resume == "auto")
        show_progress(run)
    return run.folder if is_first() else None


def say(line: str) -> None:
    """Print a line, on the first rank."""
    if is_first():
        click.echo(line)


def _clip(network: Path | None, config: GanConfig, width: int, scored: bool) -> CLIP | None:
    """CLIP weights where a run needs them: to guide, to embed prompts with dropout at every step, to score snapshots."""
    if network is None or not (config.clip_weight or config.cond_dropout or scored):
        return None
    clip = CLIP.from_pretrained(network, image_encoder=config.clip_weight > 0 or scored)
    if clip.config.projection != width:
        raise InputError(network, "width of an embedding", f"{width}, as the prompts are", str(clip.config.projection))
    return clip


def set_start(run: GanRun, start: Checkpoint | Weights | None, resume_kimg: float | None) -> list[str]:
    """Go on from a checkpoint in its folder, or give a new run the weights of another; returns what a new run has to say of them."""
    if isinstance(start, Checkpoint):
        run.folder = start.folder.parent
        run.load(start)
        say(f"resuming at kimg {run.kimg:.2f} from {start.folder}")
        return []
    if start is None and resume_kimg is not None:
        raise OptionError("--resume-kimg", "with --resume of a snapshot, checkpoint or run folder", "a new run")
    report = [] if start is None else [f"starting at kimg {resume_kimg or 0:g} from the weights of {start.folder}",
                                       *start_from(run, start, resume_kimg or 0.0)]
    if start is None and run.config.train_mode != "all":
        report.append(f"--train-mode {run.config.train_mode} without --resume: what it freezes was never trained")
    return report


def make_folder(run: GanRun, name: str, record: dict, report: Sequence[str], held: ExitStack, begins_again: bool) -> None:
    """The folder of a new run, its config.json, and the report of its start. `begins_again`: in the folder of the same run where that was
    killed before its first checkpoint."""
    begun = begun_run(run.folder, name, record) if begins_again and is_first() else None
    run.folder = Path(from_first(str(begun or next_run_folder(run.folder, name)) if is_first() else None))
    hold_folder(run, held)
    if not is_first():
        return
    for log in ("stats.jsonl", "log.txt"):
        (run.folder / log).unlink(missing_ok=True)
    write_json(run.folder / "config.json", record)
    for line in report:
        click.echo(line)
    if report:
        (run.folder / "log.txt").write_text("\n".join(report) + "\n")


def hold_folder(run: GanRun, held: ExitStack) -> None:
    """Let no other process train in the run's folder until `held` ends."""
    if is_first():
        held.enter_context(only_writer(run.folder, parts=["samples"]))


def renew_config(run: GanRun, record: dict) -> None:
    """config.json of a run that goes on: what it began with stays, options that may change are those of now."""
    path = run.folder / "config.json"
    if not is_first():
        return
    try:
        begun = read_json(path, "that of a run")
    except InputError:                           # gone or damaged: the checkpoint was compared with this very run
        begun = None
    write_json(path, {**record, **(begun if isinstance(begun, dict) else {}), "config": record["config"]})


def show_progress(run: GanRun) -> None:
    """Train with one progress bar in kimg."""
    shape = "{percentage:3.0f}%|{bar}| {desc}, {elapsed}<{remaining}"
    with ProgressBar(total=1.0, disable=not is_first(), initial=run.share, bar_format=shape) as bar:
        for _ in run.train():
            bar.set_description_str(f"{run.kimg:.2f} kimg", refresh=False)
            bar.update(run.share - bar.n)


def about(run: GanRun, *, preset: str, cfg: str, started_from: str | None = None) -> dict:
    """config.json of a new run; `started_from`: the folder of the weights that it began with."""
    return {"preset": preset, "cfg": cfg, "config": asdict(run.config), "data": run.data.record, "started_from": started_from,
            "samples": run.data.sources, "gene_encoder": run.data.gene_encoder,
            "backbone": {"name": run.encoder.name, "source": run.encoder.source}}
