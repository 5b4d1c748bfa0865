"""Read gene sets (pathways) from a GMT file: one a line, tab-separated name, description, genes."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from preprocessing.errors import InputError, first_few
from preprocessing.inputs import read_text, require_unique


def read_gene_sets(path: Path | str) -> dict[str, list[str]]:
    """Genes by name of the set, in the order of the file; a gene counts once a set."""
    names, sets = [], []
    for number, line in enumerate(read_text(path, "gene sets (GMT)").splitlines(), start=1):
        if not line.strip():
            continue
        name, *rest = (part.strip() for part in line.split("\t"))
        genes = list(dict.fromkeys(gene.split(",")[0] for gene in rest[1:] if gene))   # Enrichr writes "gene,weight"
        if not name or not genes:
            raise InputError(path, f"line {number}", "tab-separated name, description and genes", line[:60])
        names.append(name)
        sets.append(genes)
    if not names:
        raise InputError(path, "lines", "one gene set a line", "none")
    require_unique(path, "gene sets", names)
    return dict(zip(names, sets, strict=True))


def gene_sets_within(path: Path | str, gene_names: Sequence[str]) -> tuple[dict[str, list[str]], str]:
    """(the sets of a GMT file reduced to known genes, in one line what was left out). Sets without any known gene are dropped."""
    known, sets = set(gene_names), read_gene_sets(path)
    kept = {name: members for name, genes in sets.items() if (members := [gene for gene in genes if gene in known])}
    strangers = sorted({gene for genes in sets.values() for gene in genes} - known)
    if not kept:
        raise InputError(path, "genes", f"some of the {len(known):,} genes of the expression files", f"none, but {first_few(strangers)}",
                         "Are these the symbols of the same species?")
    members = len({gene for genes in kept.values() for gene in genes})
    said = (f"{path}: {len(kept):,} of {len(sets):,} gene sets with {members:,} of {len(known):,} genes"
            + (f"; unknown genes left out: {first_few(strangers)}" if strangers else ""))
    return kept, said
