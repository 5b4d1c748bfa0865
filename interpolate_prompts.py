"""Walk between two prompts: GAN snapshot + two prompts + seeds -> a patch a step, samples.csv, strip.png."""
from __future__ import annotations

import click

from preprocessing.errors import Command
from training.sampling_options import sampling_options


@click.command(cls=Command)
@click.option("--prompt1", required=True, help="Where the walk begins: FILE.npy:ROW, FILE.h5ad:BARCODE or FILE.h5ad:ROW; rows count from "
              "0. The files are as gen_images.py takes them.")
@click.option("--prompt2", required=True, help="Where it ends.")
@click.option("--n-steps", "--n_steps", default=9, help="Patches a seed, both ends included.")
@sampling_options
def main(**options):
    """Generate patches on the way from one gene-expression prompt to another: a row a seed, in which only the genes change.

    \b
    python interpolate_prompts.py --network runs/gan/00000-C2-C3@64-small-gpus1-b16 --prompt1 runs/C4/gex_filt.h5ad:20x8 \\
        --prompt2 runs/C4/gex_filt.h5ad:12x20 --n-steps 9 --seeds 0-3 --outdir runs/walk
    """
    from training.interpolation import InterpolateConfig, interpolate_prompts

    *patches, samples, strip = interpolate_prompts(InterpolateConfig(**options))
    click.echo(f"wrote {len(patches):,} patches, {samples}, {strip}")


if __name__ == "__main__":
    main()
