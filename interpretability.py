"""Say which genes tell clusters apart in the CLIP space: CLIP weights + expression + cluster labels -> a table of attributions."""
from __future__ import annotations

from pathlib import Path

import click

from preprocessing.errors import Command


@click.command(cls=Command)
@click.option("--network", type=click.Path(path_type=Path), required=True, help="CLIP weights: the folder runs/.../clip, or a single .pt.")
@click.option("--gex", type=click.Path(path_type=Path), required=True, help="Expression, gex_filt.h5ad of a whole sample.")
@click.option("--cluster-labs", "--cluster_labs", required=True, help="Cluster labels: .npy, CSV (last column; by "
              "barcode if another column has them), or an obs column.")
@click.option("--method", type=click.Choice(["ig", "sg"]), default="ig", help="Integrated Gradients or SmoothGrad.")
@click.option("--target", type=click.Choice(["clusters", "image"]), default="clusters", help="clusters: the distance to each other "
              "cluster's genes, every ordered pair. image: the distance to --images.")
@click.option("--images", type=click.Path(path_type=Path), help="For --target image: one picture; a folder of patches (a target a cluster "
              "where metadata.jsonl or samples.csv says whose they are, else their mean); or an .npy of embeddings, a row a target.")
@click.option("--out-file", "--out_file", type=click.Path(path_type=Path, dir_okay=False), default="genes.csv", help="Table to write; the "
              "convergence deltas go into the .json of the same name.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Rows that go through the encoder at once.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--encoder-weights", type=click.Path(path_type=Path), help="The image tower's weight file, if it moved since training.")
@click.option("--already-normalised", is_flag=True, help="The expression file holds log-normalised values, not counts.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of SmoothGrad's noise.")
def main(**options) -> None:
    """Attribute distances in the CLIP space to genes. The table has a row a gene and a column "i vs. j" for every pair.

    \b
    --target clusters  cluster i, from cluster j: how much each gene that is higher in i adds to the squared distance of
                       their embeddings (absolute values; 0 for genes that are not higher).
    --target image     cluster i, from the average spot: what each gene adds to the squared distance to the picture.
                       Below 0: the gene brings the cluster's profile nearer to the picture.

    Example: python interpretability.py --network runs/00000-clip/clip --gex S1/gex_filt.h5ad --cluster-labs cluster --out-file genes.csv
    """
    from training.attribution_run import AttributionConfig, write_attributions

    done = write_attributions(AttributionConfig(**options))
    for line in done.lines:
        click.echo(line)
    click.echo(f"wrote {done.table}, {done.record}")


if __name__ == "__main__":
    main()
