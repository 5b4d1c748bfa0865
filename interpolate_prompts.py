"""Walk between two prompts: GAN snapshot or diffusion pipeline + two prompts + seeds -> a patch a step, samples.csv, strip.png."""
from __future__ import annotations

import click

from preprocessing.errors import Command
from training.sampling_options import is_pipeline, refuse_given, sampling_options, solver_options

GAN_ALONE = ("truncation", "noise_mode", "translate", "rotate", "workers", "clip")
PIPELINE_ALONE = ("steps", "sampler", "guidance_scale")


@click.command(cls=Command)
@click.option("--prompt1", required=True, help="Where the walk begins: FILE.npy:ROW, FILE.h5ad:BARCODE or FILE.h5ad:ROW; rows count from "
              "0. The files are as gen_images.py takes them; for a diffusion pipeline FILE.npy:ROW of embeddings.")
@click.option("--prompt2", required=True, help="Where it ends.")
@click.option("--n-steps", "--n_steps", type=click.IntRange(max=10_000), default=9, help="Patches a seed, both ends included.")
@solver_options
@sampling_options
def main(**options):
    """Generate patches on the way from one gene-expression prompt to another: a row a seed, in which only the genes change.

    \b
    python interpolate_prompts.py --network runs/gan/00000-C2-C3@64-small-gpus1-b16 --prompt1 runs/C4/gex_filt.h5ad:20x8 \\
        --prompt2 runs/C4/gex_filt.h5ad:12x20 --n-steps 9 --seeds 0-3 --outdir runs/walk
    python interpolate_prompts.py --network runs/diffusion --prompt1 runs/C4/embeddings/gene_clip_emb.npy:0 \\
        --prompt2 runs/C4/embeddings/gene_clip_emb.npy:20 --outdir runs/walk
    """
    solving = {name: value for name in PIPELINE_ALONE if (value := options.pop(name)) is not None}
    made = _walk_pipeline(options, solving) if is_pipeline(options["network"]) else _walk_gan(options, solving)
    *patches, samples, strip = made
    click.echo(f"wrote {len([path for path in patches if path.suffix == '.png']):,} patches, {samples}, {strip}")


def _walk_gan(options: dict, solving: dict):
    from training.interpolation import InterpolateConfig, interpolate_prompts

    refuse_given(solving, "a diffusion pipeline as --network", "a GAN snapshot")
    return interpolate_prompts(InterpolateConfig(**options))


def _walk_pipeline(options: dict, solving: dict):
    from diffusion_utils.interpolation import PipelineWalk, walk_with_pipeline
    from diffusion_utils.sampling import Solver

    refuse_given(GAN_ALONE, "a GAN snapshot as --network", "a diffusion pipeline")
    taken = {name: value for name, value in options.items() if name not in (*GAN_ALONE, "encoded")}    # its prompts always are embeddings
    return walk_with_pipeline(PipelineWalk(**taken, solver=Solver(**solving)))


if __name__ == "__main__":
    main()
