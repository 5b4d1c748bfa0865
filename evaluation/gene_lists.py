"""Read a table of attributions as lists of genes: the top of every pair, what pairs share, which gene sets lie at the top.

Reads what interpretability.py writes, genes x "i vs. j". Loads no torch.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.gene_sets import gene_sets_within
from preprocessing.inputs import require_file

BETWEEN = " vs. "
GO_CELLULAR_COMPONENT = "GO_Cellular_Component_2023"
MAX_P, LEAST_LEAD = 0.02, 4          # a set is told of below this nominal p, with so many leading genes


def read_attributions(path: Path | str) -> pd.DataFrame:
    """Genes x pairs, float; no gaps."""
    require_file(path, "the table that interpretability.py writes")
    try:
        table = pd.read_csv(path).set_index("gene").astype(float)
    except (ValueError, KeyError, pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise InputError(path, "columns", "gene, and a column of numbers a pair", str(error).splitlines()[0]) from error
    wrong = [name for name in table.columns if BETWEEN not in name]
    if wrong or not len(table.columns) or table.index.has_duplicates or not np.isfinite(table.to_numpy()).all():
        raise InputError(path, "columns", f"names as `i{BETWEEN}j`, finite numbers, every gene once",
                         first_few(wrong) if wrong else "gaps, genes twice, or no pair")
    return table


def top_genes(table: pd.DataFrame, count: int = 10) -> dict[str, list[str]]:
    """By pair, the genes of the largest absolute attributions, largest first; genes of 0 do not count."""
    return {pair: [str(gene) for gene in values.abs().sort_values(ascending=False, kind="stable").index[:count] if values[gene] != 0]
            for pair, values in table.items()}


def top_table(table: pd.DataFrame, count: int = 10) -> pd.DataFrame:
    """`top_genes` side by side, a row a place."""
    return pd.DataFrame({pair: pd.Series(genes, index=range(1, len(genes) + 1), dtype=object)
                         for pair, genes in top_genes(table, count).items()}).fillna("")


def union_of(lists: Mapping[str, Sequence[str]]) -> list[str]:
    """Genes of any list, those of most lists first, then by name."""
    counts = pd.Series([gene for genes in lists.values() for gene in genes], dtype=object).value_counts()
    return sorted(map(str, counts.index), key=lambda gene: (-counts[gene], gene))


def intersection_of(lists: Mapping[str, Sequence[str]]) -> list[str]:
    """Genes of every list, by name."""
    return sorted(set.intersection(*map(set, lists.values()))) if lists else []


def query_lists(table: pd.DataFrame, count: int = 10) -> dict[str, list[str]]:
    """By query cluster, the genes among the top of *all* its pairs: what tells it from every other cluster."""
    by_query: dict[str, dict[str, list[str]]] = {}
    for pair, genes in top_genes(table, count).items():
        by_query.setdefault(pair.split(BETWEEN)[0], {})[pair] = genes
    return {query: intersection_of(lists) for query, lists in by_query.items()}


def signed_ranking(table: pd.DataFrame, query: str, other: str) -> pd.Series:
    """Genes from the strongest mark of `query` to that of `other`: "query vs. other" minus "other vs. query"."""
    pairs = f"{query}{BETWEEN}{other}", f"{other}{BETWEEN}{query}"
    missing = [pair for pair in pairs if pair not in table]
    if missing:
        raise OptionError("pair", f"two clusters of the table, as {table.columns[0]}", ", ".join(missing))
    return (table[pairs[0]] - table[pairs[1]]).sort_values(ascending=False, kind="stable")


def load_gene_sets(source: Path | str, genes: Sequence[str], organism: str = "Human") -> dict[str, list[str]]:
    """Sets of a GMT file by path, else of an Enrichr library by name, which needs the network."""
    if Path(source).is_file():
        return gene_sets_within(source, genes)[0]
    if Path(source).suffix:
        raise InputError(source, "gene sets", "a GMT file", "nothing there")
    import gseapy
    try:
        found = gseapy.get_library(str(source), organism=organism)
    except Exception as error:           # whatever its HTTP client, or a proxy's page in place of the sets, makes of it
        raise InputError(source, "gene sets", "a GMT file, or the name of an Enrichr library and a network to fetch it",
                         f"no answer ({type(error).__name__})", "Fetch the library as GMT elsewhere and give its path") from error
    known = set(genes)
    kept = {name: [gene for gene in members if gene in known] for name, members in found.items()}
    return {name: members for name, members in kept.items() if members}


def enriched_sets(ranking: pd.Series, gene_sets: Mapping[str, Sequence[str]], *, permutations: int = 1000, least_genes: int = 5,
                  most_genes: int = 500, max_p: float = MAX_P, least_lead: int = LEAST_LEAD, seed: int = 0) -> pd.DataFrame:
    """GSEA prerank (gseapy) of signed values by gene: sets of nominal p below `max_p` with `least_lead` leading genes, strongest first.

    Columns: NES (above 0: the set lies at the top of the ranking), p, FDR, genes, lead. Empty where none qualifies."""
    import gseapy

    columns = ["NES", "p", "FDR", "genes", "lead"]
    fitting = {name: list(genes) for name, genes in gene_sets.items() if least_genes <= len(set(genes) & set(ranking.index)) <= most_genes}
    if not fitting or not (ranking != 0).any():
        return pd.DataFrame(columns=columns)
    found = gseapy.prerank(rnk=ranking.rename("value").to_frame(), gene_sets=fitting, min_size=least_genes, max_size=most_genes,
                           permutation_num=permutations, seed=seed, threads=1, no_plot=True, outdir=None).res2d
    lead = found["Lead_genes"].fillna("").astype(str)
    table = pd.DataFrame({"NES": found["NES"].astype(float).to_numpy(), "p": found["NOM p-val"].astype(float).to_numpy(),
                          "FDR": found["FDR q-val"].astype(float).to_numpy(), "genes": [len(fitting[name]) for name in found["Term"]],
                          "lead": lead.to_numpy()}, index=pd.Index(found["Term"].astype(str), name="set"))
    n_lead = table["lead"].map(lambda genes: len([gene for gene in genes.split(";") if gene]))
    kept = table[(table["p"] < max_p) & (n_lead >= least_lead)]
    return kept.sort_values("NES", key=lambda values: -values.abs(), kind="stable")
