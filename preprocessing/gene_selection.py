"""Select, order and merge genes: which column of a vocabulary each gene of the data goes to, and the counts that follow.

Genes that end in one name (two paralogs of one ortholog) are summed; genes outside the vocabulary are left out. Works on blocks of
rows, so that expression on disk need not fit in memory. Touches no files.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, first_few
from preprocessing.kernels import kernel
from preprocessing.sample import INT32_MAX


@dataclass(frozen=True)
class GeneSelection:
    """How the genes of some data become those of a vocabulary of V genes."""

    vocabulary: list[str]
    column_of_gene: np.ndarray      # (G,) int32: column of each gene of the data, -1 for genes left out
    missing: np.ndarray             # (V,) bool: genes that the data lack, zero columns
    records_missing: bool           # whether `var` says which these are
    path: Path | str                # of the data, for errors

    def counts(self, counts: sp.csr_matrix) -> sp.csr_matrix:
        """Whole counts (n, G) -> int32 (n, V), columns sorted, zeros not stored."""
        room = int((self.column_of_gene[counts.indices] >= 0).sum()) + 1
        columns, values = np.empty(room, np.int32), np.empty(room, np.int32)
        ends = np.zeros(counts.shape[0] + 1, np.int64)
        fits = map_columns(counts.indptr, counts.indices, counts.data, self.column_of_gene, np.zeros(len(self.vocabulary), np.int64),
                           columns, values, ends[1:])
        if not fits:
            raise InputError(self.path, "X", f"counts of a gene up to {INT32_MAX:,}, paralogs added up",
                             "a larger one: these are not UMI counts")
        return sp.csr_matrix((values[:ends[-1]], columns[:ends[-1]], ends), shape=(counts.shape[0], len(self.vocabulary)))

    def about(self, adata: ad.AnnData) -> ad.AnnData:
        """obs, obsm and uns of the data as they are, var of the vocabulary; no X."""
        found = np.flatnonzero(self.column_of_gene >= 0)
        columns, first = np.unique(self.column_of_gene[found], return_index=True)
        var = adata.var.iloc[found[first]].copy()
        var.index = [self.vocabulary[column] for column in columns]
        var = var.reindex(self.vocabulary)
        for name in var.columns[var.isna().any()]:
            if var[name].dtype == object:
                var[name] = var[name].fillna("")
        if self.records_missing:
            var["zero_filled"] = self.missing
        uns = dict(adata.uns) | {"vocab_sha256": strings_sha256(self.vocabulary)}
        return ad.AnnData(obs=adata.obs.copy(), var=var, obsm=dict(adata.obsm), uns=uns)


def choose_genes(gene_names: Sequence[str], vocabulary: Sequence[str], missing: Literal["error", "zero"] = "error",
                 gene_map: Mapping[str, str] | None = None, path: Path | str = "expression") -> GeneSelection:
    """Where each of `gene_names`, renamed by `gene_map` first, stands in the vocabulary. `path` names the data in errors.

    Genes that the data lack are an error, or zero columns with `missing="zero"`.
    """
    names = pd.Index([gene_map.get(gene, gene) for gene in gene_names] if gene_map else list(gene_names))
    column_of_gene = pd.Index(vocabulary).get_indexer(names).astype(np.int32)
    is_missing = np.ones(len(vocabulary), dtype=bool)
    is_missing[column_of_gene[column_of_gene >= 0]] = False
    if is_missing.all() or (is_missing.any() and missing == "error"):
        absent = [gene for gene, gone in zip(vocabulary, is_missing, strict=True) if gone]
        raise InputError(path, "var_names", f"the {len(vocabulary):,} genes of the vocabulary",
                         f"{len(vocabulary) - len(absent):,} of them; missing {first_few(absent)}",
                         "Rename genes with --gene-map, or make a vocabulary with preprocessing/gene_vocab.py" if is_missing.all()
                         else "Fill them with --missing-genes zero, or rename genes with --gene-map")
    return GeneSelection(list(vocabulary), column_of_gene, is_missing, missing == "zero", path)


@kernel
def map_columns(indptr, indices, data, column_of_gene, totals, columns, values, ends):
    """Add each row's entries up in `totals` (V zeros), then list what is not zero: in order, without a sort.

    Returns False, with `values` cut off, if a total is larger than int32."""
    end = 0
    bits = np.int64(0)                               # of all totals: beyond int32, or negative, if any total is
    for row in range(len(indptr) - 1):
        for entry in range(indptr[row], indptr[row + 1]):
            column = column_of_gene[indices[entry]]
            if column >= 0:
                totals[column] += data[entry]
        for column in range(len(totals)):
            if totals[column] != 0:
                columns[end] = column
                values[end] = totals[column]
                bits |= totals[column]
                end += 1
                totals[column] = 0
        ends[row] = end
    return 0 <= bits <= INT32_MAX
