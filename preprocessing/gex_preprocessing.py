"""Select and order genes: `gex.h5ad` and a vocabulary -> `gex_filt.h5ad` with exactly those genes, raw counts."""
from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from preprocessing.errors import Command


def filter_expression(raw_file: Path | str, vocab_file: Path | str, out_file: Path | str | None = None,
                      missing_genes: Literal["error", "zero"] = "error", gene_map: Path | str | None = None) -> tuple[Path, str]:
    """Write the selected genes of `raw_file`; returns the path (default: gex_filt.h5ad beside it) and a sentence on what was done."""
    from preprocessing.expression import read_expression, read_gene_map, read_vocabulary, select_genes, write_expression
    from preprocessing.outputs import locked

    out_file = Path(raw_file).parent / "gex_filt.h5ad" if out_file is None else Path(out_file)
    vocabulary = read_vocabulary(vocab_file)
    renamed = read_gene_map(gene_map) if gene_map is not None else None
    adata = read_expression(raw_file, backed=True)
    try:
        n_before = adata.n_vars
        selected = select_genes(adata, vocabulary, missing_genes, renamed, path=raw_file)
    finally:
        adata.file.close()
    inputs = {"raw_file": raw_file, "vocab_file": vocab_file} | ({"gene_map": gene_map} if gene_map is not None else {})
    with locked(out_file):
        write_expression(out_file, selected, config={"missing_genes": missing_genes}, inputs=inputs)
    filled = int(selected.var["zero_filled"].sum()) if "zero_filled" in selected.var else 0
    zero = f", {filled:,} of them missing and filled with zeros" if filled else ""
    return out_file, f"{selected.n_obs:,} spots, {selected.n_vars:,} genes of the vocabulary{zero} (from {n_before:,})"


PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--raw-file", type=PATH, required=True, help="gex.h5ad with raw counts.")
@click.option("--vocab-file", type=PATH, required=True, help="Gene vocabulary: one symbol a line.")
@click.option("--out-file", type=PATH, default=None, help="File to write; default: gex_filt.h5ad beside --raw-file.")
@click.option("--missing-genes", type=click.Choice(["error", "zero"]), default="error",
              help="Genes the data lack: stop, or fill with zeros.")
@click.option("--gene-map", type=PATH, default=None, help="TSV: symbol in the data, symbol in the vocabulary (human to mouse orthologs).")
def main(**options):
    """Keep exactly the genes of a vocabulary, in its order.

    Example: python preprocessing/gex_preprocessing.py --raw-file S1/gex.h5ad --vocab-file vocab.txt
    """
    out_file, summary = filter_expression(**options)
    click.echo(summary)
    click.echo(f"wrote {out_file}")


if __name__ == "__main__":
    main()
