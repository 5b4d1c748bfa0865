"""Select and order genes: `gex.h5ad` and a vocabulary -> `gex_filt.h5ad` with exactly those genes, raw counts."""
from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from preprocessing.cores import usable_cores
from preprocessing.errors import Command, OptionError
from preprocessing.inputs import require_file

if TYPE_CHECKING:
    from anndata import AnnData

    from preprocessing.gene_selection import GeneSelection
    from preprocessing.parts import Parts


def filter_expression(raw_file: Path | str, vocab_file: Path | str, out_file: Path | str | None = None,
                      missing_genes: Literal["error", "zero"] = "error", gene_map: Path | str | None = None,
                      workers: int = 1) -> tuple[Path, str, bool]:
    """Write the selected genes of `raw_file`, unless that was finished before from these inputs. A killed run goes on.

    Returns the path (default: gex_filt.h5ad beside it), what it holds, and whether it was written now.
    """
    from preprocessing.done_manifests import is_done, read_done
    from preprocessing.older_outputs import FILTERED
    from preprocessing.output_places import require_outputs
    from preprocessing.outputs import locked
    from preprocessing.parts import Parts

    if workers < 1:
        raise OptionError("--workers", "at least 1", str(workers))

    out_file = Path(raw_file).parent / "gex_filt.h5ad" if out_file is None else Path(out_file)
    inputs = {"raw_file": Path(raw_file), "vocab_file": Path(vocab_file)} | ({"gene_map": Path(gene_map)} if gene_map is not None else {})
    require_outputs({"--out-file": {out_file: FILTERED}}, {f"--{name.replace('_', '-')}": path for name, path in inputs.items()})
    for name, path in inputs.items():
        require_file(path, f"the file of --{name.replace('_', '-')}")
    config = {"missing_genes": missing_genes}
    with locked(out_file):
        if is_done(out_file, config=config, inputs=inputs):
            Parts.clear(out_file)
            return out_file, read_done(out_file)["summary"], False
        return out_file, _filter(inputs, config, out_file, workers), True


def _filter(inputs: dict[str, Path], config: dict, out_file: Path, workers: int) -> str:
    from preprocessing.done_manifests import fingerprints, strings_sha256, write_done
    from preprocessing.expression import read_expression, read_gene_map, read_vocabulary
    from preprocessing.expression_file import write_expression_blocks
    from preprocessing.gene_selection import choose_genes
    from preprocessing.parts import Parts

    before = fingerprints(inputs)
    vocabulary = read_vocabulary(inputs["vocab_file"])
    renamed = read_gene_map(inputs["gene_map"]) if "gene_map" in inputs else None
    adata = read_expression(inputs["raw_file"], backed=True)
    try:
        selection = choose_genes(adata.var_names, vocabulary, config["missing_genes"], renamed, path=inputs["raw_file"])
        parts = Parts(out_file, config=config, inputs=before)
        _make_blocks(adata, inputs["raw_file"], selection, parts, workers)
        about, n_before = selection.about(adata), adata.n_vars
    finally:
        adata.file.close()
    write_expression_blocks(out_file, about, parts.blocks)
    filled = int(selection.missing.sum())
    zero = f", {filled:,} of them missing and filled with zeros" if filled else ""
    summary = f"{about.n_obs:,} spots, {about.n_vars:,} genes of the vocabulary{zero} (from {n_before:,})"
    write_done(out_file, config=config, inputs=before, rows=about.n_obs, genes=about.n_vars,
               barcode_sha256=strings_sha256(about.obs_names), summary=summary)
    parts.remove()
    return summary


def _make_blocks(adata: AnnData, path: Path, selection: GeneSelection, parts: Parts, workers: int) -> None:
    """The blocks of rows that `parts` lacks."""
    from preprocessing.expression import ROWS_AT_ONCE, row_blocks
    from preprocessing.expression_file import TAILS, CountsPacker
    from preprocessing.progress import ProgressBar

    done = len(parts)
    packer = CountsPacker(parts.read(done - 1, *TAILS) if done else None)
    with ThreadPoolExecutor(workers) as pool, ProgressBar(desc="genes", unit="spot", total=adata.n_obs, initial=min(done * ROWS_AT_ONCE,
                                                                                                            adata.n_obs)) as bar:
        for number, counts in enumerate(row_blocks(adata, path, first=done), start=done):
            parts.write(number, **packer.pack(selection.counts(counts), pool))
            bar.update(counts.shape[0])


PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--raw-file", type=PATH, required=True, help="gex.h5ad with raw counts.")
@click.option("--vocab-file", type=PATH, required=True, help="Gene vocabulary: one symbol a line.")
@click.option("--out-file", type=PATH, default=None, help="File to write; default: gex_filt.h5ad beside --raw-file.")
@click.option("--missing-genes", type=click.Choice(["error", "zero"]), default="error",
              help="Genes the data lack: stop, or fill with zeros.")
@click.option("--gene-map", type=PATH, default=None, help="TSV: symbol in the data, symbol in the vocabulary (human to mouse orthologs).")
@click.option("--workers", type=click.IntRange(max=1024), default=usable_cores, show_default="all cores", help="Threads that compress.")
def main(**options):
    """Keep exactly the genes of a vocabulary, in its order.

    Example: python preprocessing/gex_preprocessing.py --raw-file S1/gex.h5ad --vocab-file vocab.txt
    """
    out_file, summary, is_new = filter_expression(**options)
    click.echo(summary if is_new else f"{summary}; finished before")
    click.echo(f"{'wrote' if is_new else 'kept'} {out_file}")


if __name__ == "__main__":
    main()
