"""Write a gene vocabulary: the symbols that every given sample has, in the order of the first, one a line."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np

from preprocessing.errors import Command, InputError, OptionError
from preprocessing.inputs import path_list


def make_vocabulary(gex_files: Sequence[Path | str], min_counts: int = 0, gene_map: Path | str | None = None) -> list[str]:
    """Genes found in all files whose counts, summed over all spots of all files, reach `min_counts`."""
    from preprocessing.expression import read_gene_map

    renamed = read_gene_map(gene_map) if gene_map is not None else {}
    totals: dict[str, int] = {}
    for number, path in enumerate(gex_files):
        counts = gene_totals(path, renamed)
        totals = counts if number == 0 else {gene: total + counts[gene] for gene, total in totals.items() if gene in counts}
    genes = [gene for gene, total in totals.items() if total >= min_counts]
    if not genes:
        found = "none" if not totals else f"none of the {len(totals):,} common genes has as many"
        raise InputError(", ".join(str(path) for path in gex_files), "var_names", f"common genes with at least {min_counts} counts", found)
    return genes


def gene_totals(path: Path | str, gene_map: Mapping[str, str]) -> dict[str, int]:
    """Counts of every gene, renamed by `gene_map`, over all spots of a file, which is read in blocks."""
    from preprocessing.expression import read_expression, row_blocks

    adata = read_expression(path, backed=True)
    try:
        sums = sum((block.sum(axis=0, dtype=np.float64).A1 for block in row_blocks(adata, path)), np.zeros(adata.n_vars))
    finally:
        adata.file.close()
    totals: dict[str, int] = {}
    for gene, count in zip(adata.var_names, sums.tolist(), strict=True):
        name = gene_map.get(gene, gene)
        totals[name] = totals.get(name, 0) + round(count)
    return totals


def write_sample_vocabulary(gex: str, out: Path, min_counts: int, gene_map: Path | None) -> int:
    """Write the vocabulary of a comma-separated list of files; returns its length."""
    from preprocessing.expression import write_vocabulary
    from preprocessing.older_outputs import VOCABULARY
    from preprocessing.output_places import require_outputs
    from preprocessing.outputs import locked

    files = path_list(gex)
    if not files:
        raise OptionError("--gex", "at least one .h5ad", "none")
    require_outputs({"--out": {out: VOCABULARY}}, {"--gex": files, "--gene-map": gene_map})
    genes = make_vocabulary(files, min_counts, gene_map)
    with locked(out):
        write_vocabulary(out, genes)
    return len(genes)


PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--gex", required=True, help="gex.h5ad files, comma-separated.")
@click.option("--out", type=PATH, required=True, help="Text file to write, one symbol a line.")
@click.option("--min-counts", type=click.IntRange(min=0), default=0, help="Least counts of a gene over all spots of all samples.")
@click.option("--gene-map", type=PATH, default=None, help="TSV to rename genes by first: symbol in the data, new symbol.")
def main(**options):
    """Write the genes that all samples share: the fixed, ordered list a model is trained on.

    Example: python preprocessing/gene_vocab.py --gex S1/gex.h5ad,S2/gex.h5ad --out vocab.txt --min-counts 10
    """
    click.echo(f"wrote {write_sample_vocabulary(**options):,} genes to {options['out']}")


if __name__ == "__main__":
    main()
