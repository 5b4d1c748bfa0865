"""Choose the length of the weights' average after the training, and write the pipeline of it."""
from __future__ import annotations

from pathlib import Path

import click

from diffusion_utils.options import option
from preprocessing.errors import Command, OptionError


def choose_ema(run_dir: Path, sigma_rel: float, out_dir: Path | None = None) -> tuple[Path, float, int]:
    """Write the pipeline folder; returns it, how far the profile of its average is from the one asked for, and how many were kept."""
    from diffusion_utils.denoisers import load_denoiser
    from diffusion_utils.pipeline import KIND, TRAINING, find_pipeline, load_pipeline, write_pipeline
    from diffusion_utils.power_ema import LONGEST, SHORTEST, average_of_length
    from networks.weights import load_into
    from preprocessing.inputs import read_json
    from preprocessing.output_places import require_replaceable
    from preprocessing.outputs import locked

    if not SHORTEST <= sigma_rel <= LONGEST:
        raise OptionError("--sigma-rel", f"{SHORTEST:g} to {LONGEST:g}", f"{sigma_rel:g}")
    folder = out_dir or run_dir / f"pipeline-ema{sigma_rel:g}"
    require_replaceable(folder, KIND)
    if folder.resolve() == find_pipeline(run_dir).resolve():
        raise OptionError("--out-dir", "another folder than that of the pipeline which is read", str(folder))
    pipeline = load_pipeline(run_dir)
    weights, missed, n_kept = average_of_length(run_dir, sigma_rel)
    denoiser = load_denoiser(run_dir / "pipeline")
    load_into(denoiser, {**denoiser.state_dict(), **weights}, run_dir)
    record = {name: value for name, value in read_json(run_dir / "pipeline" / TRAINING, "how the pipeline was trained").items()
              if name != "versions"}
    about = {"sigma_rel": sigma_rel, "missed": missed, "kept": n_kept}
    with locked(folder):
        write_pipeline(folder, denoiser, pipeline.vae, pipeline.scheduler, pipeline.prompts, {**record, "power_ema": about})
    return folder, missed, n_kept


@click.command(cls=Command)
@option("run-dir", type=click.Path(path_type=Path), required=True, help="Run folder of train_diffusion --power-ema.")
@option("sigma-rel", type=float, required=True, help="Length of the average, as a share of the training: 0.01 (its end) to 0.28 (all).")
@option("out-dir", type=click.Path(path_type=Path), help="The pipeline's folder. Default: RUN_DIR/pipeline-ema<sigma-rel>.")
def main(run_dir: Path, sigma_rel: float, out_dir: Path | None):
    """Write the pipeline whose weights are averaged over another length than the run's own.

    \b
    python -m diffusion_utils.choose_ema --run-dir runs/diffusion --sigma-rel 0.15
    """
    folder, missed, n_kept = choose_ema(run_dir, sigma_rel, out_dir)
    click.echo(f"wrote {folder}: sigma_rel {sigma_rel:g} from the averages of {n_kept} moments, whose profile misses {missed:.1%} of it"
               + (": keep more of them (--checkpointing-steps)" if missed > 0.1 else ""))


if __name__ == "__main__":
    main()
