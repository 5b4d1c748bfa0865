"""Read, check, normalise and select expression: `gex.h5ad`, `gex_filt.h5ad`, vocabularies.

X on disk is CSR of raw UMI counts (spots, genes) and stays raw; `normalise_expression` is the one home of
library size -> target, then log1p, and is called per sample when data are loaded.
"""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from preprocessing.errors import InputError, first_few, read_text, require_file
from preprocessing.hdf5_output import hdf5_output
from preprocessing.outputs import finished_file, program_versions, require_free_space, strings_sha256, write_done

ROWS_AT_ONCE = 4096                     # rows of a backed or dense matrix looked at together
RAW_COUNTS = "Raw counts are needed: they may lie in layers['counts']"


# ---- reading --------------------------------------------------------------------------------------------------------

def read_expression(path: Path | str, backed: bool = False, already_normalised: bool = False, hint: str = RAW_COUNTS) -> ad.AnnData:
    """Read an `.h5ad` and check it: unique barcodes, finite counts, raw unless `already_normalised`.

    X comes back as CSR, or stays on disk if `backed`. Duplicate gene symbols are made unique by AnnData's rule (`Actb`, `Actb-1`).
    `hint` says in the error what to do about values that are no counts.
    """
    path = require_file(path, "an .h5ad file")
    try:
        adata = ad.read_h5ad(path, backed="r" if backed else None)
    except (OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        raise InputError(path, "file", "an .h5ad file", f"one that anndata cannot read ({str(error).splitlines()[0][:120]})") from error
    if not _has_x(adata) or 0 in adata.shape:
        found = f"shape {adata.shape}" if 0 in adata.shape else f"no X (layers: {', '.join(adata.layers) or 'none'})"
        raise InputError(path, "X", "counts of at least one spot and one gene", found)
    _require_unique_barcodes(path, adata)
    check_counts(path, adata.X, already_normalised, hint)
    if not backed:
        adata.X = as_csr(adata.X)
    if not adata.var_names.is_unique:
        adata.var_names_make_unique()
    return adata


def _has_x(adata: ad.AnnData) -> bool:
    return "X" in adata.file._file if adata.isbacked else adata.X is not None


def _require_unique_barcodes(path: Path, adata: ad.AnnData) -> None:
    if not adata.obs_names.is_unique:
        repeated = adata.obs_names[adata.obs_names.duplicated()].unique().tolist()
        raise InputError(path, "obs_names", "unique barcodes", f"repeated {first_few(repeated)}")


def as_csr(matrix: Any) -> sp.csr_matrix:
    """CSR with sorted, unique columns of a dense, CSC, CSR or backed matrix; dtype kept."""
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    csr = sp.csr_matrix(matrix if sp.issparse(matrix) else np.asarray(matrix))
    csr.sum_duplicates()
    return csr


def check_counts(path: Path | str, counts: Any, already_normalised: bool = False, hint: str = RAW_COUNTS) -> None:
    """Refuse NaN, infinite and negative values, and (unless `already_normalised`) values that are not whole numbers."""
    for values in _value_blocks(counts):
        if values.dtype.kind not in "iufb":
            raise InputError(path, "X", "numbers", f"{values.dtype}")
        if values.dtype.kind in "ub":
            continue
        for bad, what in ((~np.isfinite(values), "NaN or infinite"), (values < 0, "negative")):
            if bad.any():
                raise InputError(path, "X", "raw UMI counts" if not already_normalised else "normalised expression",
                                 f"{int(bad.sum()):,} {what} values")
        if not already_normalised and values.dtype.kind == "f" and (values != np.rint(values)).any():
            example = values[values != np.rint(values)][0]
            raise InputError(path, "X", "raw UMI counts, whole numbers", f"values like {example:.4g}, normalised or logged already",
                             hint)


def _value_blocks(counts: Any):
    """The stored values, a block at a time: rows are loaded only for what lies on disk."""
    if sp.issparse(counts):
        yield counts.data
    elif isinstance(counts, np.ndarray):
        yield counts
    else:
        group = getattr(counts, "group", None)
        stored = group["data"] if group is not None else counts          # backed sparse or backed dense
        step = 1 << 22 if group is not None else ROWS_AT_ONCE
        for start in range(0, len(stored), step):
            yield np.asarray(stored[start:start + step])


# ---- normalising ----------------------------------------------------------------------------------------------------

def library_sizes(counts: sp.csr_matrix) -> np.ndarray:
    """(N,) float64: total counts of every spot."""
    return np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()


def normalise_expression(counts: sp.csr_matrix, target_sum: float | Literal["median"] = "median") -> sp.csr_matrix:
    """float32 CSR (N, G) = log1p(counts / library size * target). Zero-count rows stay zero. Does not change `counts`.

    "median" is the median of this sample's non-zero library sizes.
    """
    counts = as_csr(counts)
    sizes = library_sizes(counts)
    target = (float(np.median(sizes[sizes > 0])) if (sizes > 0).any() else 1.0) if target_sum == "median" else float(target_sum)
    scale = np.divide(target, sizes, out=np.zeros_like(sizes), where=sizes > 0).astype(np.float32)
    values = counts.data.astype(np.float32)
    values *= np.repeat(scale, np.diff(counts.indptr))
    np.log1p(values, out=values)
    return sp.csr_matrix((values, counts.indices.copy(), counts.indptr.copy()), shape=counts.shape)


# ---- vocabularies ---------------------------------------------------------------------------------------------------

def read_vocabulary(path: Path | str) -> list[str]:
    """Gene symbols, one a line, in order. CRLF, blank lines and spaces around a symbol are harmless; a repeated symbol is not."""
    lines = read_text(path, "a vocabulary, one gene symbol a line").splitlines()
    genes = [line.strip() for line in lines if line.strip()]
    if not genes:
        raise InputError(path, "genes", "one symbol a line", "no symbol")
    columns = [gene for gene in genes if "\t" in gene or "," in gene]
    if columns:
        raise InputError(path, "genes", "one symbol a line", f"several columns in {first_few(columns)}")
    repeated = pd.Index(genes)[pd.Index(genes).duplicated()].unique().tolist()
    if repeated:
        raise InputError(path, "genes", "every symbol once", f"repeated {first_few(repeated)}")
    return genes


def write_vocabulary(path: Path | str, genes: Sequence[str]) -> None:
    """One symbol a line, UTF-8."""
    with finished_file(path, validate=read_vocabulary) as temporary:
        temporary.write_text("\n".join(genes) + "\n", encoding="utf-8")


def vocabulary_sha256(genes: Sequence[str]) -> str:
    """SHA-256 over the ordered symbols."""
    return strings_sha256(genes)


def read_gene_map(path: Path | str) -> dict[str, str]:
    """First column -> second column of a TSV (a header line is harmless); further columns and rows without a target are ignored."""
    lines = read_text(path, "a two-column TSV: symbol in the data, symbol in the vocabulary").splitlines()
    rows = [line.split("\t") for line in lines if line.strip()]
    narrow = [number for number, row in enumerate(rows, start=1) if len(row) < 2]
    if not rows or narrow:
        raise InputError(path, "columns", "two columns with a tab between", f"lines {first_few(narrow)} without one" if rows else "no line")
    gene_map: dict[str, str] = {}
    for source, target in ((row[0].strip(), row[1].strip()) for row in rows):
        if target and gene_map.setdefault(source, target) != target:
            raise InputError(path, source, "one target a symbol", f"{gene_map[source]} and {target}")
    return gene_map


def rename_genes(adata: ad.AnnData, gene_map: Mapping[str, str]) -> ad.AnnData:
    """A new AnnData with genes renamed; those that end in one name (two paralogs of one ortholog) are summed.

    Genes outside the map keep their names.
    """
    names = pd.Index([gene_map.get(gene, gene) for gene in adata.var_names])
    unique = names.unique()
    merge = sp.csr_matrix((np.ones(len(names), dtype=adata.X.dtype), (np.arange(len(names)), unique.get_indexer(names))),
                          shape=(len(names), len(unique)))
    var = adata.var[~names.duplicated()].copy()
    var.index = unique
    return ad.AnnData(as_csr(as_csr(adata.X) @ merge), obs=adata.obs.copy(), var=var, obsm=dict(adata.obsm), uns=dict(adata.uns))


def select_genes(adata: ad.AnnData, vocabulary: Sequence[str], missing: Literal["error", "zero"] = "error",
                 gene_map: Mapping[str, str] | None = None, path: Path | str = "expression") -> ad.AnnData:
    """Exactly the vocabulary's genes in its order, X as CSR; obs, obsm and uns go along. Reads a backed file in row blocks.

    With `missing="zero"` absent genes become zero columns, marked in `var['zero_filled']`. `path` names the file in errors.
    """
    if gene_map is not None:
        adata = rename_genes(adata, gene_map)
    place = adata.var_names.get_indexer(pd.Index(vocabulary))
    absent = [gene for gene, column in zip(vocabulary, place, strict=True) if column < 0]
    if len(absent) == len(vocabulary) or (absent and missing == "error"):
        raise InputError(path, "var_names", f"the {len(vocabulary):,} genes of the vocabulary",
                         f"{len(vocabulary) - len(absent):,} of them; missing {first_few(absent)}",
                         "Fill them with --missing-genes zero, or rename genes with --gene-map" if len(absent) < len(vocabulary)
                         else "Rename genes with --gene-map, or make a vocabulary with preprocessing/gene_vocab.py")
    found = np.flatnonzero(place >= 0)
    columns = sp.csr_matrix((np.ones(len(found), dtype=adata.X.dtype), (place[found], found)), shape=(adata.n_vars, len(vocabulary)))
    blocks = [as_csr(as_csr(adata.X[start:start + ROWS_AT_ONCE]) @ columns) for start in range(0, adata.n_obs, ROWS_AT_ONCE)]
    var = adata.var.reindex(adata.var_names[place[found]])
    var.index = [vocabulary[i] for i in found]
    var = var.reindex(list(vocabulary))
    for name in var.columns[var.isna().any()]:
        if var[name].dtype == object:
            var[name] = var[name].fillna("")
    if missing == "zero":
        var["zero_filled"] = place < 0
    uns = dict(adata.uns) | {"vocab_sha256": vocabulary_sha256(vocabulary)}
    return ad.AnnData(sp.vstack(blocks, format="csr"), obs=adata.obs.copy(), var=var, obsm=dict(adata.obsm), uns=uns)


# ---- writing --------------------------------------------------------------------------------------------------------

def morphology_record(*, barcodes: Sequence[str], mpp: float, patch_um: float, patch_px: int, slide: Mapping[str, object],
                      settings: Mapping[str, object], stride_bins: int | None = None, bin_um: float | None = None) -> dict[str, object]:
    """`uns['morphology']` of a `gex.h5ad`: how its patches were cut. `slide` is `outputs.fingerprint(slide)`."""
    record = {"mpp": mpp, "patch_um": patch_um, "patch_px": patch_px, "stride_bins": stride_bins, "bin_um": bin_um, "slide": dict(slide),
              "settings": json.dumps(dict(settings), default=str), "barcode_sha256": strings_sha256(barcodes),
              "version": program_versions().get("genes-to-morphology", "unknown")}
    return {key: value for key, value in record.items() if value is not None}


def write_expression(path: Path | str, adata: ad.AnnData, *, config: Mapping | None = None, inputs: Mapping[str, Path | str] | None = None,
                     **facts: object) -> None:
    """Write an `.h5ad` with CSR counts; it appears under `path` after it was read back. With `config`, a done-manifest follows.

    Fills in `uns['morphology']['barcode_sha256']` where the record lacks it. Counts must be raw: nothing normalised goes to disk.
    """
    adata.X = as_csr(adata.X)
    check_counts(path, adata.X)
    if "morphology" in adata.uns and "barcode_sha256" not in adata.uns["morphology"]:
        adata.uns["morphology"] = dict(adata.uns["morphology"]) | {"barcode_sha256": strings_sha256(adata.obs_names)}
    require_free_space(Path(path).parent, adata.X.data.nbytes + adata.X.indices.nbytes)
    with finished_file(path, validate=lambda temporary: _require_complete(temporary, path, adata)) as temporary:
        with hdf5_output(temporary) as file:
            ad.io.write_elem(file, "/", adata, dataset_kwargs={"compression": "gzip", "compression_opts": 1})
    if config is not None:
        write_done(path, config=config, inputs=inputs or {}, rows=adata.n_obs, genes=adata.n_vars,
                   barcode_sha256=strings_sha256(adata.obs_names), **facts)


def _require_complete(temporary: Path, path: Path | str, adata: ad.AnnData) -> None:
    written = ad.read_h5ad(temporary, backed="r")
    try:
        if (list(written.obs_names) != list(adata.obs_names) or list(written.var_names) != list(adata.var_names)
                or int(written.X.group["indptr"][-1]) != adata.X.nnz or len(written.X.group["data"]) != adata.X.nnz):
            raise OSError(f"{path}: what was written is not what was meant")
    finally:
        written.file.close()


def recorded_barcode_sha256(adata: ad.AnnData) -> str | None:
    """The hash over the barcodes in the order in which the patches were cut, where the file records it."""
    record = adata.uns.get("morphology")
    return str(record["barcode_sha256"]) if isinstance(record, Mapping) and "barcode_sha256" in record else None


def recorded_sample_id(adata: ad.AnnData) -> str | None:
    """The one sample id of `obs['sample_id']`, or None."""
    ids = adata.obs["sample_id"].unique() if "sample_id" in adata.obs else []
    return str(ids[0]) if len(ids) == 1 else None


def spot_positions(adata: ad.AnnData, path: Path | str) -> np.ndarray | None:
    """(N, 2) float64 `obsm['spatial']`: centres (x, y) in level-0 px; None where the file has none. `path` names it in errors."""
    if "spatial" not in adata.obsm:
        return None
    stored = np.asarray(adata.obsm["spatial"])
    if stored.dtype.kind not in "iuf" or stored.ndim != 2 or stored.shape[1] < 2:
        raise InputError(path, "obsm['spatial']", "numbers (N, 2): x, y", f"{stored.dtype} {stored.shape}")
    return stored[:, :2].astype(np.float64)
