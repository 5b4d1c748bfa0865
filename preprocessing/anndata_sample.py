"""Read any `.h5ad` with `obsm['spatial']` into a Sample: spots from squidpy, scanpy, HEST or our own `gex.h5ad`.

`obsm['spatial']` is (x, y) in level-0 pixels of the slide; counts are `layers['counts']` where there are any, else `X`, and must be
raw. Positions on an array, scale factors and images are used where the file has them under their usual names.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp

from preprocessing.errors import InputError, first_few
from preprocessing.expression import as_csr, check_counts, read_expression, recorded_barcode_sha256
from preprocessing.hd_barcodes import parse_hd_barcodes
from preprocessing.mpp import VISIUM_COL_UM, VISIUM_ROW_UM, GridFit, decide_mpp, fit_grid
from preprocessing.position_checks import check_on_image, check_slide_size
from preprocessing.sample import Sample

if TYPE_CHECKING:
    from preprocessing.slide import Slide

UNKNOWN_PLACE = -1           # array_row, array_col of spots whose place on an array is not known
COUNTS_LAYER = "Put the raw counts into layers['counts']; X may then stay as it is"
SQUARE = 1.05                # a lattice pitch is believed where both directions agree on the scale this well


def read_anndata_sample(gex_file: Path | str, *, sample_id: str | None = None, slide: Slide | None = None, mpp: float | None = None,
                        spot_um: float | None = None, use_wsi_res: bool = False) -> Sample:
    """Read one section. `spot_um` says what `spot_diameter_fullres` spans (65 µm where Space Ranger wrote it)."""
    gex_file = Path(gex_file)
    adata, counts = _raw_counts(gex_file)
    pixels = _pixels(gex_file, adata)
    with _usual(gex_file, "uns['spatial']", "libraries with scalefactors and images, as scanpy keeps them"):
        sample_id = sample_id or _own_sample_id(gex_file, adata)
        library = _library(adata, sample_id)
        factors = {name: float(value) for name, value in dict(library.get("scalefactors", {})).items() if np.isscalar(value)}
        images = {name: _as_uint8(image) for name, image in dict(library.get("images", {})).items()}
    with _usual(gex_file, "obs", "in_tissue, array_row, array_col and n_members as numbers"):
        in_tissue = adata.obs["in_tissue"].to_numpy(bool) if "in_tissue" in adata.obs else np.ones(adata.n_obs, dtype=bool)
        array_row, array_col, bin_um = _array_places(gex_file, adata)
    with _usual(gex_file, "uns['morphology']", "mpp, bin_um and stride_bins as numbers"):
        declared, made_of = _declared(adata, factors, spot_um), _made_of(adata)
    decision = decide_mpp(gex_file, override=mpp, declared=declared,
                          grid=_grid(array_row, array_col, pixels, bin_um), spot_diameter_px=factors.get("spot_diameter_fullres"),
                          slide_mpp=slide.declared_mpp if slide else None, slide_path=slide.path if slide else None,
                          use_wsi_res=use_wsi_res)
    places = (check_slide_size(slide.path, (slide.width_px, slide.height_px), images, factors),
              check_on_image(gex_file, pixels[in_tissue], slide.width_px, slide.height_px, slide.path)) if slide else ()
    metadata = {"mpp_source": decision.source, **made_of}
    if "cluster" in adata.obs:
        labels = adata.obs["cluster"].astype(object)
        metadata["cluster"] = labels.where(labels.notna(), "").to_numpy(str)
    return Sample(
        sample_id=sample_id, platform="AnnData file", counts=counts, barcodes=adata.obs_names.to_numpy(str),
        gene_names=adata.var_names.to_numpy(str), gene_ids=adata.var["gene_ids"].to_numpy(str) if "gene_ids" in adata.var else None,
        in_tissue=in_tissue, array_row=array_row, array_col=array_col, centre_xy_px=pixels, mpp=decision.mpp, bin_um=bin_um,
        images=images, scalefactors=factors, metadata=metadata, notices=tuple(text for text in (*decision.notices, *places) if text))


@contextmanager
def _usual(path: Path, field: str, expected: str) -> Iterator[None]:
    """What a file has under a usual name, but of another form, is refused."""
    try:
        yield
    except InputError:
        raise
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(path, field, expected, f"another form ({error})") from error


def _raw_counts(path: Path) -> tuple[ad.AnnData, sp.csr_matrix]:
    """The file, and its raw counts (P, G) int32: of `layers['counts']`, beside which X may be normalised, else of X."""
    in_layer = _has_counts_layer(path)
    adata = read_expression(path, already_normalised=in_layer, hint=COUNTS_LAYER)
    counts = as_csr(adata.layers["counts"] if in_layer else adata.X)
    check_counts(path, counts, hint=COUNTS_LAYER)
    return adata, counts.astype(np.int32)


def _has_counts_layer(path: Path) -> bool:
    """False too for what is no HDF5 file: reading it says so."""
    try:
        with h5py.File(path, "r") as file:
            return "layers/counts" in file
    except OSError:
        return False


def _pixels(path: Path, adata: ad.AnnData) -> np.ndarray:
    if "spatial" not in adata.obsm:
        raise InputError(path, "obsm['spatial']", "level-0 pixel positions (x, y)", f"only {first_few(list(adata.obsm))}" if len(adata.obsm)
                         else "no obsm at all")
    pixels = np.asarray(adata.obsm["spatial"])
    if pixels.ndim != 2 or pixels.shape[1] != 2 or pixels.dtype.kind not in "iuf" or not np.isfinite(pixels).all():
        raise InputError(path, "obsm['spatial']", "finite numbers (N, 2)", f"{pixels.dtype} {pixels.shape}"
                         + (" with gaps" if pixels.dtype.kind == "f" and not np.isfinite(pixels).all() else ""))
    return pixels.astype(np.float64)


def _own_sample_id(path: Path, adata: ad.AnnData) -> str:
    """The one id the file itself gives, else its name. Several sections in one file are refused: one slide has one."""
    if "sample_id" in adata.obs:
        ids = pd.unique(adata.obs["sample_id"].astype(str))
        if len(ids) > 1:
            raise InputError(path, "obs['sample_id']", "one section, as there is one slide", first_few(ids))
        return str(ids[0])
    libraries = list(adata.uns.get("spatial", {}))
    return str(libraries[0]) if len(libraries) == 1 else path.stem


def _library(adata: ad.AnnData, sample_id: str) -> Mapping:
    libraries = adata.uns.get("spatial", {})
    return libraries.get(sample_id, next(iter(libraries.values())) if len(libraries) == 1 else {})


def _made_of(adata: ad.AnnData) -> dict[str, object]:
    """What our own extraction says of the bins the rows were summed from: `n_members` (P,), `bin_um`, `stride_bins`."""
    if recorded_barcode_sha256(adata) is None:
        return {}
    record = adata.uns["morphology"]
    of_rows = {"n_members": adata.obs["n_members"].to_numpy(np.int64)} if "n_members" in adata.obs else {}
    return of_rows | {name: kind(record[name]) for name, kind in (("bin_um", float), ("stride_bins", int)) if name in record}


def _array_places(path: Path, adata: ad.AnnData) -> tuple[np.ndarray, np.ndarray, float | None]:
    """array_row and array_col, and the side of a bin where the rows are Visium HD bins (not pseudo-spots, not spots).

    A pseudo-spot has the barcode of its centre bin; the rows that our own extraction wrote are spots or pseudo-spots always."""
    is_sum = recorded_barcode_sha256(adata) or ("n_members" in adata.obs and (adata.obs["n_members"].to_numpy() > 1).any())
    if adata.obs_names.str.match(r"(?i)s_\d{3}um_").all() and not is_sum:
        bins = parse_hd_barcodes(adata.obs_names.to_numpy(str), path)
        return bins.array_row, bins.array_col, float(bins.bin_um[0])
    if {"array_row", "array_col"} <= set(adata.obs.columns):
        return adata.obs["array_row"].to_numpy(np.int64), adata.obs["array_col"].to_numpy(np.int64), None
    unknown = np.full(adata.n_obs, UNKNOWN_PLACE, dtype=np.int64)
    return unknown, unknown, None


def _grid(array_row: np.ndarray, array_col: np.ndarray, pixels: np.ndarray, bin_um: float | None) -> GridFit | None:
    """The fit on the lattice of bins, or on Visium's where the positions are on it; other arrays have a pitch we do not know."""
    if bin_um:
        return fit_grid(array_row, array_col, pixels, row_um=bin_um, col_um=bin_um)
    grid = fit_grid(array_row, array_col, pixels, row_um=VISIUM_ROW_UM, col_um=VISIUM_COL_UM)
    on_lattice = ((array_row + array_col) % 2 == 0).all()                     # Visium's columns are even in even rows, odd in odd ones
    return grid if grid and on_lattice and grid.anisotropy < SQUARE else None


def _declared(adata: ad.AnnData, factors: Mapping[str, float], spot_um: float | None) -> float | None:
    if "mpp" in adata.uns.get("morphology", {}):
        return float(adata.uns["morphology"]["mpp"])
    if "microns_per_pixel" in factors:
        return factors["microns_per_pixel"]
    return spot_um / factors["spot_diameter_fullres"] if spot_um and "spot_diameter_fullres" in factors else None


def _as_uint8(image: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3); scanpy keeps some images as floats in 0 to 1."""
    image = np.asarray(image)
    scaled = np.rint(image * 255) if image.dtype.kind == "f" and image.max(initial=0) <= 1 else image
    rgb = scaled[..., :3] if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)
    return np.ascontiguousarray(rgb.astype(np.uint8))
