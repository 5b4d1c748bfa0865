"""Select and order genes: `gex.h5ad` and a vocabulary -> `gex_filt.h5ad` with exactly those genes, raw counts."""
from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from preprocessing.errors import Command, OptionError


def filter_expression(raw_file: Path | str, vocab_file: Path | str, out_file: Path | str | None = None,
                      missing_genes: Literal["error", "zero"] = "error", gene_map: Path | str | None = None) -> tuple[Path, str]:
    """Write the selected genes of `raw_file`, unless that was finished before from these inputs.

    Returns the path (default: gex_filt.h5ad beside it) and a sentence on what was done.
    """
    from preprocessing.outputs import is_done, locked, read_done

    out_file = Path(raw_file).parent / "gex_filt.h5ad" if out_file is None else Path(out_file)
    inputs = {"raw_file": Path(raw_file), "vocab_file": Path(vocab_file)} | ({"gene_map": Path(gene_map)} if gene_map is not None else {})
    overwritten = [name for name, path in inputs.items() if out_file.resolve() == path.resolve()]
    if overwritten:
        raise OptionError("--out-file", f"another file than --{overwritten[0].replace('_', '-')}", str(out_file))
    config = {"missing_genes": missing_genes}
    with locked(out_file):
        if is_done(out_file, config=config, inputs=inputs):
            return out_file, f"{read_done(out_file)['summary']}; finished before"
        return out_file, _filter(inputs, config, out_file)


def _filter(inputs: dict[str, Path], config: dict, out_file: Path) -> str:
    from preprocessing.expression import read_expression, read_gene_map, read_vocabulary, select_genes, write_expression

    vocabulary = read_vocabulary(inputs["vocab_file"])
    renamed = read_gene_map(inputs["gene_map"]) if "gene_map" in inputs else None
    adata = read_expression(inputs["raw_file"], backed=True)
    try:
        n_before = adata.n_vars
        selected = select_genes(adata, vocabulary, config["missing_genes"], renamed, path=inputs["raw_file"])
    finally:
        adata.file.close()
    filled = int(selected.var["zero_filled"].sum()) if "zero_filled" in selected.var else 0
    zero = f", {filled:,} of them missing and filled with zeros" if filled else ""
    summary = f"{selected.n_obs:,} spots, {selected.n_vars:,} genes of the vocabulary{zero} (from {n_before:,})"
    write_expression(out_file, selected, config=config, inputs=inputs, summary=summary)
    return summary


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
    click.echo(f"{'kept' if summary.endswith('finished before') else 'wrote'} {out_file}")


if __name__ == "__main__":
    main()
