"""Embed a sample with trained CLIP weights: gene_clip_emb.npy and image_clip_emb.npy, unit rows in h5ad order.

Either expression or patches alone is enough; with both, patches are paired by barcode and retrieval.json says how well each
finds the other. embeddings.json says what was embedded.
"""
from __future__ import annotations

from pathlib import Path

import click

from preprocessing.errors import Command


@click.command(cls=Command)
@click.option("--network", type=click.Path(path_type=Path), required=True, help="CLIP weights: the folder runs/.../clip, or a single .pt.")
@click.option("--gex", type=click.Path(path_type=Path), help="Expression, gex_filt.h5ad.")
@click.option("--images", type=click.Path(path_type=Path), help="Patch folder or imgs.h5.")
@click.option("--out-dir", type=click.Path(path_type=Path), default=".", help="Folder for the .npy files.")
@click.option("--batch-size", type=click.IntRange(min=1), default=64, help="Spots at a time.")
@click.option("--device", default="auto", help="auto, cpu, cuda or cuda:N.")
@click.option("--encoder-weights", type=click.Path(path_type=Path), help="The image tower's weight file, if it moved since training.")
@click.option("--already-normalised", is_flag=True, help="The expression file holds log-normalised values, not counts.")
@click.option("--add-to-h5ad", is_flag=True, help="Also write obsm['X_clip_gene'] and obsm['X_clip_image'] into --gex.")
@click.option("--null", is_flag=True, help="Also write null_clip_emb.npy, the null prompt: the embedding of all-zero "
              "expression (of the average spot, with a CLIP of model.gene_sample_scaling).")
def main(**options) -> None:
    """Embed expression and patches with a trained CLIP.

    Example: python clip_embeddings.py --network runs/00000-clip/clip --gex S1/gex_filt.h5ad --images S1/patches --out-dir emb
    """
    from training.clip_embed import EmbedConfig, write_embeddings

    written, found = write_embeddings(EmbedConfig(**options))
    if found:
        click.echo(found)
    click.echo(f"wrote {', '.join(str(path) for path in written)}")


if __name__ == "__main__":
    main()
