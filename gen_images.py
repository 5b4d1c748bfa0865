"""Generate patches: GAN snapshot + prompts (expression or embeddings) + seeds -> PNG patches or one .h5, samples.csv, grid.png."""
from __future__ import annotations

from pathlib import Path

import click

from preprocessing.errors import Command
from training.sampling_options import sampling_options


@click.command(cls=Command)
@click.option("--gex", type=click.Path(path_type=Path), help="Prompts (none for an unconditional snapshot): .h5ad of raw counts; or .npy, "
              "one row a prompt: expression of the snapshot's genes in their order, normalised as in training (counts scaled to the "
              "snapshot's library size, gene_encoder.target_sum in its config.json, then log1p).")
@click.option("--n-samples", "--n_samples", type=int,
              help=".h5ad: prompts per cluster, or over all; .npy: patches a row. Default: every row.")
@click.option("--clusters", help="Cluster labels: .npy, CSV (last column), or an obs column of the .h5ad.")
@click.option("--same-seed", "--same_seed", is_flag=True, help="One z a seed for all prompts, so that only the genes differ.")
@click.option("--images", help="Real patches (folder or imgs.h5) of the .h5ad, shown first in grid.png.")
@click.option("--out-h5", "--out_h5", type=click.Path(path_type=Path, dir_okay=False), help="One file of patches instead of PNGs, as "
              "imgs.h5: with one seed it pairs with the .h5ad by barcode, with several a patch is called BARCODE_seed0003.")
@sampling_options
@click.option("--timeout-minutes", "--timeout_minutes", default=30.0, help="Of several processes: how long one waits for another before "
              "the job ends. They meet after every 32 batches of each: raise it where those, at this --batch-sz, take one so much longer "
              "than another, or where another command holds the output for longer.")
def main(**options):
    """Generate patches for gene-expression prompts. Interrupted, the same command goes on with what is missing.

    \b
    python gen_images.py --network runs/gan/00000-C2-C3@64-small-gpus1-b16 --gex runs/C4/gex_filt.h5ad --seeds 0-3 \\
        --n-samples 5 --clusters cluster --images runs/C4/patches --outdir runs/generated

    On several GPUs, one a process: torchrun --nproc-per-node 4 gen_images.py ... makes the same patches.
    """
    from training.generation import GenerateConfig, generate_patches

    made = generate_patches(GenerateConfig(**options))
    if made is not None:
        kept = f" ({made.n_kept:,} of them were there)" if made.n_kept else ""
        click.echo(f"wrote {made.n_patches:,} patches{kept}, {', '.join(map(str, made.files))}")


if __name__ == "__main__":
    main()
