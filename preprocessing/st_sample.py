"""Read a section of legacy Spatial Transcriptomics into a Sample: 100 µm spots on a square lattice of 200 µm pitch.

Counts are a TSV with rows `XxY` and columns of gene symbols, positions a TSV with x, y, pixel_x, pixel_y, cluster labels a
TSV with x, y, label; all three may be gzipped. `XxY` is the barcode.
"""
from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from preprocessing.errors import InputError, first_few
from preprocessing.mpp import ST_PITCH_UM, check_axes, decide_mpp, fit_grid
from preprocessing.position_checks import check_on_image
from preprocessing.sample import INT32_MAX, Sample
from preprocessing.slide import Slide

SPOT_UM = 100.0                      # diameter of a spot
HIRES_PX, LOWRES_PX = 2000, 600      # longer side of the thumbnails kept for drawing
READ_ERRORS = (OSError, EOFError, zlib.error, ValueError, LookupError, ArithmeticError, TypeError)      # pandas' own are ValueErrors


def read_st_sample(counts_file: Path, spots_file: Path, slide: Slide, *, sample_id: str, clusters_file: Path | None = None,
                   mpp: float | None = None) -> Sample:
    """Join counts and positions by `XxY`. Positions without counts are left out and counted; the reverse is an error."""
    counts = read_counts(counts_file)
    spots = read_spots(spots_file)
    unplaced = counts.obs_names[~counts.obs_names.isin(spots.index)]
    if len(unplaced):
        raise InputError(counts_file, "spots", f"a position in {spots_file} for every row of counts", f"none for {first_few(unplaced)}")
    pixels = spots[["pixel_x", "pixel_y"]].to_numpy(float)
    columns = ["new_x", "new_y"] if {"new_x", "new_y"} <= set(spots.columns) else ["x", "y"]     # printed spots stray by 0.1 step
    measured = spots[columns]
    grid = fit_grid(measured.iloc[:, 1], measured.iloc[:, 0], pixels, row_um=ST_PITCH_UM, col_um=ST_PITCH_UM)
    check_axes(spots_file, grid, "y", "x")
    decision = decide_mpp(spots_file, override=mpp, grid=grid, slide_mpp=slide.declared_mpp, slide_path=slide.path)
    placed = spots.loc[counts.obs_names]
    pixels = placed[["pixel_x", "pixel_y"]].to_numpy(float)
    notices = [*decision.notices, check_on_image(spots_file, pixels, slide.width_px, slide.height_px, slide.path)]
    if n_unread := len(spots) - len(placed):
        notices.append(f"{n_unread:,} of {len(spots):,} positions have no counts and are left out")
    metadata = {"mpp_source": decision.source}
    if clusters_file is not None:
        metadata["cluster"], notice = read_clusters(clusters_file, counts.obs_names)
        notices.append(notice)
    return Sample(
        sample_id=sample_id, platform="Spatial Transcriptomics", counts=counts.X, barcodes=counts.obs_names.to_numpy(str),
        gene_names=counts.var_names.to_numpy(str), gene_ids=None,
        in_tissue=placed["selected"].to_numpy(int) != 0 if "selected" in placed else np.ones(len(placed), bool),
        array_row=placed["y"].to_numpy(int), array_col=placed["x"].to_numpy(int), centre_xy_px=pixels, mpp=decision.mpp,
        metadata=metadata, notices=tuple(notice for notice in notices if notice), **_images(slide, decision.mpp))


def read_counts(path: Path) -> ad.AnnData:
    """(spots `XxY`, genes) raw counts as CSR; symbols that occur twice are made unique by AnnData's rule."""
    table = _read_table(path, index_col=0)
    table.index = table.index.astype(str)
    if table.empty:
        raise InputError(path, "counts", "rows of spots and columns of genes", f"{table.shape[0]} rows, {table.shape[1]} columns")
    foreign = table.index[~table.index.str.fullmatch(r"\d+x\d+")]
    if len(foreign):
        raise InputError(path, "spots", "rows named XxY, like 10x13", first_few(foreign))
    _require_unique(path, table.index)
    wordy = [name for name, dtype in table.dtypes.items() if dtype.kind not in "iuf"]
    if wordy:
        raise InputError(path, "counts", "numbers", f"words in column {first_few(wordy)}")
    values = table.to_numpy()
    if not np.isfinite(values).all() or (values < 0).any() or (values != np.floor(values)).any() or (values > INT32_MAX).any():
        raise InputError(path, "counts", f"raw counts, whole numbers from 0 up to {INT32_MAX:,}",
                         "negative, fractional, missing or larger ones")
    counts = ad.AnnData(sp.csr_matrix(values.astype(np.int32)), obs=pd.DataFrame(index=table.index))
    names = _gene_names(path)
    if len(names) != counts.n_vars:
        raise InputError(path, "columns", "a name for every column of counts", f"{len(names):,} names, {counts.n_vars:,} columns")
    counts.var_names = ad.utils.make_index_unique(names)
    return counts


def _gene_names(path: Path) -> pd.Index:
    """Column names as they stand in the file: `read_csv` renames the second of two equal ones."""
    header = _read_table(path, header=None, nrows=1, index_col=0, dtype=str)
    return pd.Index(header.iloc[0].to_numpy(str).astype(object))


def read_spots(path: Path) -> pd.DataFrame:
    """Positions by `XxY`: x, y (whole numbers), pixel_x, pixel_y; new_x, new_y (where the spot really lies on the lattice, in
    steps) and `selected` where the file has them."""
    table = _read_table(path)
    _require_columns(path, table, ("x", "y", "pixel_x", "pixel_y"))
    for column in table.columns.intersection(["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"]):
        if table[column].dtype.kind not in "iuf" or not np.isfinite(table[column]).all():
            raise InputError(path, column, "a number in every row", "words or gaps")
    table.index = _spot_names(path, table)
    _require_unique(path, table.index)
    return table


def read_clusters(path: Path, barcodes: Sequence[str]) -> tuple[np.ndarray, str]:
    """Labels (P,) str of columns x, y, label, aligned to `barcodes` ('' where there is none), and what to say about gaps."""
    table = _read_table(path, dtype={"label": str})
    _require_columns(path, table, ("x", "y", "label"))
    table.index = _spot_names(path, table)
    _require_unique(path, table.index)
    labels = table["label"].reindex(barcodes).fillna("").to_numpy(str)
    n_labelled = int(np.count_nonzero(labels != ""))
    if n_labelled == 0:
        raise InputError(path, "x, y", "labels for the spots of this section", f"none of its {len(table):,} rows is a spot with counts")
    gaps = len(labels) - n_labelled
    return labels, f"{gaps:,} of {len(labels):,} spots have no cluster label" if gaps else ""


def _spot_names(path: Path, table: pd.DataFrame) -> pd.Index:
    for column in ("x", "y"):
        if table[column].dtype.kind not in "iuf" or not (np.isfinite(table[column]) & (table[column] == np.floor(table[column]))).all():
            raise InputError(path, column, "whole array positions", f"{first_few(list(table[column][:5]))}")
    return pd.Index(table["x"].astype(int).astype(str) + "x" + table["y"].astype(int).astype(str))


def _read_table(path: Path, **options) -> pd.DataFrame:
    try:
        return pd.read_csv(path, sep="\t", **options)
    except FileNotFoundError as error:
        raise InputError(path, "file", "a tab-separated table", "nothing at this path") from error
    except READ_ERRORS as error:
        raise InputError(path, "file", "a tab-separated table, gzipped if it ends in .gz", str(error).strip()) from error


def _require_columns(path: Path, table: pd.DataFrame, names: Sequence[str]) -> None:
    missing = [name for name in names if name not in table.columns]
    if missing:
        raise InputError(path, "columns", ", ".join(names), f"no {', '.join(missing)} in {first_few(list(table.columns))}")


def _require_unique(path: Path, names: pd.Index) -> None:
    if names.has_duplicates:
        raise InputError(path, "spots", "every spot once", f"repeated: {first_few(names[names.duplicated()].unique())}")


def _images(slide: Slide, mpp: float) -> dict[str, dict]:
    """Thumbnails and scale factors under Space Ranger's names, so that scanpy and squidpy draw the section."""
    hires, lowres = slide.thumbnail(HIRES_PX), slide.thumbnail(LOWRES_PX)
    longer = max(slide.width_px, slide.height_px)
    return {"images": {"hires": hires, "lowres": lowres},
            "scalefactors": {"tissue_hires_scalef": max(hires.shape) / longer, "tissue_lowres_scalef": max(lowres.shape) / longer,
                             "spot_diameter_fullres": SPOT_UM / mpp}}
