"""Read, check and normalise expression: `gex.h5ad`, `gex_filt.h5ad`, vocabularies. Selecting genes: `gene_selection.py`.

X on disk is CSR of raw UMI counts (spots, genes) and stays raw; `normalise_expression` is the one home of
library size -> target, then log1p, and is called per sample when data are loaded.
"""
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from preprocessing.cores import usable_cores
from preprocessing.done_manifests import program_versions, strings_sha256, write_done
from preprocessing.errors import InputError, first_few
from preprocessing.expression_file import CountsPacker, write_expression_blocks
from preprocessing.inputs import read_text, require_file
from preprocessing.outputs import finished_file
from preprocessing.sample import INT32_MAX

ROWS_AT_ONCE = 2048                     # rows of a backed or dense matrix looked at together
RAW_COUNTS = "Raw counts are needed: they may lie in layers['counts']"


# ---- reading --------------------------------------------------------------------------------------------------------

def read_expression(path: Path | str, backed: bool = False, already_normalised: bool = False, hint: str = RAW_COUNTS) -> ad.AnnData:
    """Read an `.h5ad` and check it: unique barcodes, finite counts, raw unless `already_normalised`.

    X comes back as CSR, or stays on disk, unread and unchecked, if `backed`: `row_blocks` checks what it reads. Duplicate gene
    symbols are made unique by AnnData's rule (`Actb`, `Actb-1`).
    `hint` says in the error what to do about values that are no counts.
    """
    adata = open_h5ad(path, backed)
    if not _has_x(adata) or 0 in adata.shape:
        found = f"shape {adata.shape}" if 0 in adata.shape else f"no X (layers: {', '.join(adata.layers) or 'none'})"
        raise InputError(path, "X", "counts of at least one spot and one gene", found)
    _require_unique_barcodes(path, adata)
    if not backed:
        check_counts(path, adata.X, already_normalised, hint)
        adata.X = as_csr(adata.X)
    if not adata.var_names.is_unique:
        adata.var_names_make_unique()
    return adata


def open_h5ad(path: Path | str, backed: bool = False) -> ad.AnnData:
    """Any `.h5ad`, unchecked; `InputError` where anndata cannot read it. `backed` leaves X on disk: close `.file` afterwards."""
    path = require_file(path, "an .h5ad file")
    try:
        return ad.read_h5ad(path, backed="r" if backed else None)
    except Exception as error:      # anndata, h5py and pandas raise a dozen types for a damaged file or one with other items
        raise InputError(path, "file", "an .h5ad file", f"one that anndata cannot read ({str(error)[:120]})") from error


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
    csr.check_format(full_check=True)                # a damaged file's columns may lie outside the matrix, and memory with them
    csr.sum_duplicates()
    return csr


def row_blocks(adata: ad.AnnData, path: Path | str, first: int = 0) -> Iterator[sp.csr_matrix]:
    """Raw counts in CSR blocks of `ROWS_AT_ONCE` rows, from block `first` on, each checked. X may lie on disk, in any layout."""
    matrix = adata.X
    if not isinstance(matrix, np.ndarray) and getattr(matrix, "format", "csr") == "csc":
        matrix = as_csr(matrix)                      # column-wise: a block of its rows would read everything each time
    for start in range(first * ROWS_AT_ONCE, adata.n_obs, ROWS_AT_ONCE):
        try:
            block = as_csr(matrix[start:start + ROWS_AT_ONCE])
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(path, "X", "readable counts", f"rows from {start:,} that cannot be read ({str(error)[:120]})") from error
        check_counts(path, block)
        yield block


def check_counts(path: Path | str, counts: sp.spmatrix | np.ndarray, already_normalised: bool = False, hint: str = RAW_COUNTS) -> None:
    """Refuse NaN, infinite and negative values, and (unless `already_normalised`) values that are not whole numbers."""
    values = counts.data if sp.issparse(counts) else counts
    if sp.issparse(counts):
        try:
            counts.check_format(full_check=True)
        except (ValueError, TypeError) as error:
            raise InputError(path, "X", "a whole sparse matrix", f"a damaged one ({error})") from error
    if values.dtype.kind not in "iufb":
        raise InputError(path, "X", "numbers", f"{values.dtype}")
    if values.dtype.kind in "ub":
        return
    for bad, what in ((~np.isfinite(values), "NaN or infinite"), (values < 0, "negative")):
        if bad.any():
            raise InputError(path, "X", "raw UMI counts" if not already_normalised else "normalised expression",
                             f"{int(bad.sum()):,} {what} values")
    if not already_normalised and values.dtype.kind == "f" and (values != np.rint(values)).any():
        example = values[values != np.rint(values)][0]
        raise InputError(path, "X", "raw UMI counts, whole numbers", f"values like {example:.4g}, normalised or logged already",
                         hint)


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
    """Write obs, var, obsm, uns and X of expression in memory by `expression_file.py`. With `config`, a done-manifest follows.

    Fills in `uns['morphology']['barcode_sha256']` where the record lacks it. Counts must be raw: nothing normalised goes to disk.
    """
    counts = as_csr(adata.X)
    check_counts(path, counts)
    if counts.nnz and counts.data.max() > INT32_MAX:
        raise InputError(path, "X", f"counts up to {INT32_MAX:,}", f"{counts.data.max():,}")
    if "morphology" in adata.uns and "barcode_sha256" not in adata.uns["morphology"]:
        adata.uns["morphology"] = dict(adata.uns["morphology"]) | {"barcode_sha256": strings_sha256(adata.obs_names)}
    with ThreadPoolExecutor(usable_cores()) as pool:
        packed = CountsPacker().pack(counts, pool)
    about = ad.AnnData(obs=adata.obs, var=adata.var, obsm=dict(adata.obsm), uns=dict(adata.uns))
    write_expression_blocks(path, about, lambda *names: iter([packed]))
    if config is not None:
        write_done(path, config=config, inputs=inputs or {}, rows=adata.n_obs, genes=adata.n_vars,
                   barcode_sha256=strings_sha256(adata.obs_names), **facts)


def recorded_barcode_sha256(adata: ad.AnnData) -> str | None:
    """The hash over the barcodes in the order in which the patches were cut, where the file records it."""
    record = adata.uns.get("morphology")
    return str(record["barcode_sha256"]) if isinstance(record, Mapping) and "barcode_sha256" in record else None


def recorded_scale(path: Path | str) -> dict[str, float]:
    """`patch_um` and `mpp` of the patches that were cut for the spots, as far as `uns['morphology']` of the file has them."""
    adata = open_h5ad(path, backed=True)
    try:
        record = adata.uns.get("morphology")
    finally:
        adata.file.close()
    found = {name: record[name] for name in ("patch_um", "mpp") if name in record} if isinstance(record, Mapping) else {}
    for name, value in found.items():
        if np.ndim(value) or not isinstance(value, Real) or not 0 < value < np.inf:
            raise InputError(path, f"uns['morphology']['{name}']", "a positive number", str(value)[:60])
    return {name: float(value) for name, value in found.items()}


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
