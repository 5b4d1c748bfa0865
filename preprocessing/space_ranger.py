"""Read a Space Ranger folder - Visium 1.x, Visium 2.x and later, Visium HD - into a Sample.

Counts and positions are joined by barcode. Rows of the sample: first the barcodes of the matrix in its order, then the
positions without counts by array row and column, as zero rows. So the order of rows in the table of positions is of no account.
The counts of Visium HD, up to half a billion, stay on disk.
"""
from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image

from preprocessing.barcode_join import match, match_bins
from preprocessing.errors import InputError, first_few
from preprocessing.hd_barcodes import HdBarcodes, as_bytes, as_text, check_agreement, parse_hd_barcodes
from preprocessing.inputs import read_json
from preprocessing.mpp import VISIUM_COL_UM, VISIUM_ROW_UM, check_axes, decide_mpp, fit_grid
from preprocessing.mtx_folder import barcodes_file
from preprocessing.patches import DECODE_ERRORS
from preprocessing.position_checks import check_on_image, check_over_tissue, check_slide_size
from preprocessing.sample import Sample
from preprocessing.space_ranger_folder import BIN_FOLDER, SpaceRangerFolder, find_folder
from preprocessing.tenx_matrix import TenxMatrix, open_matrix, read_matrix
from preprocessing.tissue_positions import Positions, read_positions, require_barcodes_once

if TYPE_CHECKING:
    from preprocessing.slide import Slide

LARGEST_OVERVIEW_PX = 8192      # a side of the hires image; Space Ranger writes up to 6,000
COMPARED = 200_000        # positions whose grey is compared


def read_sample(space_ranger_dir: Path | str, *, sample_id: str | None = None, slide: Slide | None = None, mpp: float | None = None,
                use_wsi_res: bool = False, is_hd: bool | None = None, below_v2: bool | None = None) -> Sample:
    """Read the folder; the platform is found out, and `is_hd` and `below_v2` only must not contradict it.

    With a slide its mpp is compared, and positions must lie on it. `mpp` overrides every source.
    `metadata` holds `mpp_source`, `software` and, where Space Ranger clustered, `cluster` (P,) str, '' in gaps.
    """
    found = find_folder(space_ranger_dir, is_hd, below_v2)
    positions = read_positions(found.positions)
    stays_on_disk = found.is_hd and not found.matrix.is_dir()
    matrix = open_matrix(found.matrix) if stays_on_disk else read_matrix(found.matrix)
    factors = _read_scalefactors(found)
    bin_um = _bin_side(found, factors) if found.is_hd else None
    position_of_row, n_counted = _join_bins(found, positions, matrix, bin_um) if found.is_hd else _join_spots(found, positions, matrix)
    grid = fit_grid(positions.array_row, positions.array_col, positions.centre_xy_px,
                    row_um=bin_um or VISIUM_ROW_UM, col_um=bin_um or VISIUM_COL_UM)
    check_axes(found.positions, grid)
    images = {kind: _read_image(path) for kind, path in found.images.items()}
    decision = decide_mpp(found.positions, override=mpp, declared=factors.get("microns_per_pixel"), grid=grid,
                          spot_diameter_px=None if found.is_hd else factors.get("spot_diameter_fullres"), factors_path=found.scalefactors,
                          slide_mpp=slide.declared_mpp if slide else None, slide_path=slide.path if slide else None,
                          use_wsi_res=use_wsi_res)
    barcodes, in_tissue, array_row, array_col, centre_xy_px = (part[position_of_row] for part in (
        positions.barcodes, positions.in_tissue, positions.array_row, positions.array_col, positions.centre_xy_px))
    notices = [*found.notices, *decision.notices, *_count_notices(in_tissue, n_counted),
               check_slide_size(slide.path, (slide.width_px, slide.height_px), images, factors) if slide else "",
               _check_places(found, positions, slide, images, factors)]
    metadata = {"mpp_source": decision.source, "software": matrix.software}
    if found.clusters:
        bins = HdBarcodes(np.full(n_counted, bin_um, np.int16), array_row[:n_counted], array_col[:n_counted]) if found.is_hd else None
        metadata["cluster"], notice = _read_clusters(found.clusters, barcodes[:n_counted], bins, len(barcodes))
        notices.append(notice)
    return Sample(
        sample_id=sample_id or found.default_sample_id, platform=found.platform,
        counts=matrix.counts if stays_on_disk else _with_zero_rows(matrix.counts, len(barcodes)),
        barcodes=barcodes if found.is_hd else as_text(barcodes), gene_names=matrix.gene_names, gene_ids=matrix.gene_ids,
        in_tissue=in_tissue, array_row=array_row, array_col=array_col, centre_xy_px=centre_xy_px, mpp=decision.mpp, bin_um=bin_um,
        images=images, scalefactors=factors, metadata=metadata, notices=tuple(notice for notice in notices if notice))


def _join_spots(found: SpaceRangerFolder, positions: Positions, matrix: TenxMatrix) -> tuple[np.ndarray, int]:
    """Row of `positions` for every row of the sample, and how many rows of the sample have counts."""
    require_barcodes_once(barcodes_file(found.matrix), "barcodes", matrix.barcodes)
    return _counted_first(found, positions, matrix, match(positions.barcodes, as_bytes(matrix.barcodes)))


def _join_bins(found: SpaceRangerFolder, positions: Positions, matrix: TenxMatrix, bin_um: float) -> tuple[np.ndarray, int]:
    """As `_join_spots` by the bins that barcodes name, in any case; array positions must be what their barcodes say."""
    bins, wanted = parse_hd_barcodes(positions.barcodes, found.positions), parse_hd_barcodes(matrix.barcodes, barcodes_file(found.matrix))
    _require_bins_once(found.positions, "barcode", match_bins(bins, bins), positions.barcodes)
    place = match_bins(bins, wanted)
    joined = _counted_first(found, positions, matrix, place)
    _require_bins_once(barcodes_file(found.matrix), "barcodes", match_bins(wanted, wanted), matrix.barcodes)
    check_agreement(found.positions, bins, positions.array_row, positions.array_col, positions.barcodes, bin_um)
    return joined


def _require_bins_once(path: Path, field: str, place_of_itself: np.ndarray, barcodes: np.ndarray) -> None:
    """Bins that come twice are found at one place only."""
    twice = place_of_itself != np.arange(len(place_of_itself), dtype=place_of_itself.dtype)
    if twice.any():
        raise InputError(path, field, "every bin once", f"repeated {first_few(as_text(barcodes[np.flatnonzero(twice)]))}")


def _counted_first(found: SpaceRangerFolder, positions: Positions, matrix: TenxMatrix, place: np.ndarray) -> tuple[np.ndarray, int]:
    """Rows of `positions`: `place` of each barcode of the matrix, then those without counts by array row and column."""
    missing = place < 0
    if missing.any():
        raise InputError(found.positions, "barcodes",
                         f"a position for each of the {len(place):,} barcodes of {barcodes_file(found.matrix)}",
                         f"none for {int(missing.sum()):,}, first {first_few(as_text(matrix.barcodes[missing][:5]))}")
    uncounted = np.ones(len(positions.barcodes), dtype=bool)
    uncounted[place] = False
    rest = np.flatnonzero(uncounted)
    rest = rest[np.lexsort((positions.array_col[rest], positions.array_row[rest]))]
    return np.concatenate([place, rest.astype(place.dtype)]), len(place)


def _with_zero_rows(counts: sp.csr_matrix, n_rows: int) -> sp.csr_matrix:
    """Append rows without counts; data and indices are shared, not copied."""
    indptr = np.concatenate([counts.indptr, np.full(n_rows - counts.shape[0], counts.indptr[-1], dtype=counts.indptr.dtype)])
    padded = sp.csr_matrix((counts.data, counts.indices, indptr), shape=(n_rows, counts.shape[1]), copy=False)
    padded.has_sorted_indices = True
    return padded


def _read_scalefactors(found: SpaceRangerFolder) -> dict[str, float]:
    if found.scalefactors is None:
        if found.is_hd:
            raise InputError(found.positions.parent, "scalefactors_json.json", "the scale factors of Visium HD", "no such file")
        return {}
    content = read_json(found.scalefactors, "a JSON object of numbers")
    try:
        factors = {str(name): float(value) for name, value in content.items() if value is not None}
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(found.scalefactors, "file", "a JSON object of numbers", f"other JSON ({error})") from error
    wrong = [name for name, value in factors.items() if not (math.isfinite(value) and value > 0)]
    if wrong:
        raise InputError(found.scalefactors, first_few(wrong), "a positive number", f"{factors[wrong[0]]:g}")
    return factors


def _bin_side(found: SpaceRangerFolder, factors: dict[str, float]) -> float:
    """Side of a bin in µm: of the scale factors, else of the folder's name."""
    name = BIN_FOLDER.fullmatch(found.folder.name)
    if "bin_size_um" not in factors and name is None:
        raise InputError(found.scalefactors, "bin_size_um", "the side of a bin in µm", f"only {', '.join(factors) or 'nothing'}")
    return factors.get("bin_size_um") or float(name[1])


def _read_image(path: Path) -> np.ndarray:
    """uint8 (H, W, 3) RGB of a hires or lowres image."""
    try:
        with Image.open(path) as image:
            if max(image.size) > LARGEST_OVERVIEW_PX:       # before it is decoded
                raise InputError(path, "image", f"a small overview, up to {LARGEST_OVERVIEW_PX:,} px a side", f"{image.size} px")
            return np.asarray(image.convert("RGB"))
    except DECODE_ERRORS as error:
        raise InputError(path, "image", "an image that can be decoded (or no such file)", str(error)) from error


def _count_notices(in_tissue: np.ndarray, n_counted: int) -> list[str]:
    unread, outside = int(np.count_nonzero(in_tissue[n_counted:])), int(np.count_nonzero(~in_tissue[:n_counted]))
    notices = [f"{unread:,} of {int(in_tissue.sum()):,} positions in tissue are not in the matrix: rows of zeros"] if unread else []
    return notices + ([f"{outside:,} of {n_counted:,} barcodes with counts are outside tissue"] if outside else [])


def _check_places(found: SpaceRangerFolder, positions: Positions, slide: Slide | None, images: dict[str, np.ndarray],
                  factors: dict[str, float]) -> str:
    """Refuse positions that lie off the slide, or that lie over tissue only with their pixel columns exchanged."""
    centres = positions.centre_xy_px[positions.in_tissue]
    notice = check_on_image(found.positions, centres, slide.width_px, slide.height_px, slide.path) if slide else ""
    for kind in ("lowres", "hires"):
        scale = factors.get(f"tissue_{kind}_scalef")
        if kind in images and scale:
            some = _some(len(positions.in_tissue))
            check_over_tissue(found.positions, positions.centre_xy_px[some] * scale, positions.in_tissue[some], images[kind],
                              found.images[kind])
            if slide is None:
                height, width = images[kind].shape[:2]
                notice = check_on_image(found.positions, centres, width / scale, height / scale, found.images[kind], may_be_cropped=True)
            break
    return notice


def _some(n_positions: int) -> np.ndarray | slice:
    """Positions enough to compare the grey under them: all, or of millions some at random, and the same every time."""
    return slice(None) if n_positions <= COMPARED else np.random.default_rng(0).integers(0, n_positions, COMPARED)


def _read_clusters(path: Path, counted: np.ndarray, bins: HdBarcodes | None, n_rows: int) -> tuple[np.ndarray, str]:
    """Labels (n_rows,) of Space Ranger's graph-based clusters, '' in gaps; rows beyond `counted` have no counts, hence no label.

    Visium HD clusters larger bins: each of the small `bins` takes the label of the one it lies in."""
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        names, labels = as_bytes(table["Barcode"].to_numpy(object)), table["Cluster"].to_numpy(str)
    except (OSError, KeyError, ValueError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(path, "file", "a table with the columns Barcode and Cluster", f"another ({error})") from error
    require_barcodes_once(path, "Barcode", names)
    aligned = np.full(n_rows, "", dtype=labels.dtype if len(labels) else "U1")
    if len(names) and bins is None:
        place = match(names, counted)
    elif len(names):
        cluster_bins = parse_hd_barcodes(names, path)
        ratio = cluster_bins.bin_um[0] // bins.bin_um[0]
        if ratio < 1:
            raise InputError(path, "Barcode", f"bins of at least {bins.bin_um[0]} µm", f"bins of {cluster_bins.bin_um[0]} µm")
        place = match_bins(cluster_bins, HdBarcodes(bins.bin_um * ratio, bins.array_row // ratio, bins.array_col // ratio))
    if len(names):
        aligned[:len(counted)] = np.where(place >= 0, labels[place], "")
    gaps = int(np.count_nonzero(aligned[:len(counted)] == ""))
    return aligned, f"{path}: {gaps:,} of {len(counted):,} barcodes with counts have no cluster label" if gaps else ""
