"""Decide how many micrometres one level-0 pixel spans: one number per sample, decided here and nowhere else.

Sources: Visium HD's own `microns_per_pixel`, an affine fit of pixel positions to array positions (whose pitch is
known), the slide's metadata, for fewer than three spots the scale factors, or the user (`--mpp`). Two sources more
than 2 % apart are an error: usually the slide is the wrong one, or a downsampled copy. Touches no files.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from preprocessing.errors import InputError, OptionError

VISIUM_COL_UM = 50.0                       # one array column; neighbours within a row are two columns apart
VISIUM_ROW_UM = 50.0 * math.sqrt(3.0)      # one array row of the hexagonal lattice
ST_PITCH_UM = 200.0                        # legacy Spatial Transcriptomics, rows and columns
SPOT_DIAMETER_UM = 65.0                    # what `spot_diameter_fullres` spans; not the 55 µm of the capture area
PLAUSIBLE_MPP = (0.05, 2.0)                # a TIFF's 72 dpi reads as 352.8 µm/px
ASKABLE_MPP = (0.05, 100.0)                # of --mpp: also of a downsampled picture of a section
TOLERANCE = 0.02                           # two sources of one mpp may differ by this much
MAX_FITTED = 50_000                        # positions; a Visium HD array has 11 M, and a fit does not need them
FARTHEST_PX = 2.0 ** 31                    # no position lies there; squares of such numbers do not fit a float
OF_FACTORS = ("microns_per_pixel", "spot_diameter_fullres")     # sources that a file of scale factors holds
MAX_ANISOTROPY = 1.2                       # swapped array axes give 3.0 on the Visium lattice; real fits stay below 1.02


@dataclass(frozen=True)
class GridFit:
    """Pixel positions as an affine image of the array."""

    mpp: float             # µm per pixel
    anisotropy: float      # larger over smaller scale of the two directions; 1 = square
    mirrored: bool         # the array (col right, row down) appears mirrored in the image, as in Visium HD
    residual_px: float     # median distance of a position from its place on the fitted lattice
    n_fitted: int          # positions that the fit was made on, outliers left out


@dataclass(frozen=True)
class MppDecision:
    """The mpp of a sample, what it rests on, and what the user should know about it."""

    mpp: float
    source: str
    notices: tuple[str, ...] = ()


def fit_grid(array_row, array_col, centre_xy_px, *, row_um: float, col_um: float) -> GridFit | None:
    """Fit (x, y) px to array positions with a known pitch; None where fewer than 3 different positions are usable.

    `array_row`, `array_col` (P,) int; `centre_xy_px` (P, 2). Outliers are trimmed. Rotated and mirrored images fit
    as well as upright ones. Positions on one line fix the scale along it, and only that.
    """
    array_row, array_col, pixels = np.asarray(array_row), np.asarray(array_col), np.asarray(centre_xy_px)
    usable = np.flatnonzero(np.isfinite(array_row) & np.isfinite(array_col) & (np.abs(pixels) < FARTHEST_PX).all(axis=1))
    if len(usable) > MAX_FITTED:
        usable = np.random.default_rng(0).choice(usable, MAX_FITTED, replace=False)
    array_um = np.column_stack([array_col[usable] * float(col_um), array_row[usable] * float(row_um)])
    pixels = pixels[usable].astype(float)
    if len(np.unique(array_um, axis=0)) < 3:
        return None
    array_um = array_um - array_um.mean(axis=0)
    _, extent, directions = np.linalg.svd(array_um, full_matrices=False)
    on_a_line = extent[1] < 1e-6 * extent[0]
    design = array_um @ directions[:1].T if on_a_line else array_um          # (P, 1) or (P, 2)
    slopes, kept, residual = _robust_affine(design, pixels)                  # (1 or 2, 2)
    scales = np.linalg.svd(slopes, compute_uv=False)                         # px per µm along the principal directions
    if len(scales) == 0 or scales[-1] <= 1e-9 * max(scales[0], 1e-300):
        return None
    return GridFit(mpp=float(1.0 / math.exp(np.mean(np.log(scales)))), anisotropy=float(scales[0] / scales[-1]),
                   mirrored=bool(not on_a_line and np.linalg.det(slopes) < 0), residual_px=residual, n_fitted=kept)


def _robust_affine(design: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, int, float]:
    """Least absolute deviations by reweighting, then least squares without the outliers.

    Returns the slopes (columns of design, 2), how many positions were kept and their median residual in px."""
    full = np.column_stack([design, np.ones(len(design))])
    weights = np.ones(len(full))
    for _ in range(30):
        root = np.sqrt(weights)[:, None]
        solution = np.linalg.lstsq(full * root, pixels * root, rcond=None)[0]
        distance = np.linalg.norm(pixels - full @ solution, axis=1)
        weights = 1.0 / np.maximum(distance, 0.1)                            # 0.1 px: finer than any position is known
    kept = distance <= max(4 * 1.4826 * float(np.median(distance)), 2.0)     # positions are often rounded to whole pixels
    solution = np.linalg.lstsq(full[kept], pixels[kept], rcond=None)[0]
    residual = np.median(np.linalg.norm(pixels[kept] - full[kept] @ solution, axis=1))
    return solution[:-1], int(kept.sum()), float(residual)


def check_axes(path: Path | str, grid: GridFit | None, row_name: str = "array_row", col_name: str = "array_col") -> None:
    """Refuse array positions whose lattice is not the platform's: swapped axes stretch the Visium lattice threefold."""
    if grid is not None and grid.anisotropy > MAX_ANISOTROPY:
        raise InputError(path, f"{row_name}, {col_name}", "positions on the platform's lattice",
                         f"a lattice stretched {grid.anisotropy:.2f} : 1 in the image",
                         f"Are {row_name} and {col_name} swapped, or the pixel columns?")


def plausible_mpp(value: float | None) -> bool:
    """True for an mpp that a microscope slide can have."""
    return value is not None and PLAUSIBLE_MPP[0] <= value <= PLAUSIBLE_MPP[1]


def require_mpp(value: float) -> None:
    """Refuse a `--mpp` that no picture of a section has."""
    if not ASKABLE_MPP[0] <= value <= ASKABLE_MPP[1]:        # false for NaN, too
        raise OptionError("--mpp", f"a positive number of µm per pixel, {ASKABLE_MPP[0]:g} to {ASKABLE_MPP[1]:g}", f"{value:g}")


def decide_mpp(path: Path | str, *, override: float | None = None, declared: float | None = None, grid: GridFit | None = None,
               spot_diameter_px: float | None = None, slide_mpp: float | None = None, slide_path: Path | str | None = None,
               use_wsi_res: bool = False, factors_path: Path | None = None) -> MppDecision:
    """Choose the mpp of the sample whose positions lie in `path`, or refuse.

    `override` is `--mpp` and ends every comparison; `declared` is `microns_per_pixel`; `slide_mpp` is what the slide's
    metadata say, plausible or not. With `use_wsi_res` the slide's value is taken, and still compared. `factors_path`: of the file of scale
    factors, where they come from one.
    """
    if override is not None:
        require_mpp(override)
        return MppDecision(float(override), "--mpp")
    notices = []
    if slide_mpp is not None and not plausible_mpp(slide_mpp):
        notices.append(f"{slide_path}: its mpp of {slide_mpp:g} is outside {PLAUSIBLE_MPP[0]:g}-{PLAUSIBLE_MPP[1]:g} and is ignored")
        slide_mpp = None
    if use_wsi_res and slide_mpp is None:
        raise InputError(slide_path or path, "mpp", "an mpp in the slide's metadata, as --use-wsi-res asks for", "none that is plausible",
                         "Leave --use-wsi-res away, or give --mpp")
    sources = [("microns_per_pixel", declared), ("the fit of pixel to array positions", grid.mpp if grid else None)]
    sources = [(name, float(value)) for name, value in sources if value is not None]
    if wrong := [f"{value:g} from {name}" for name, value in sources if not (math.isfinite(value) and value > 0)]:
        raise InputError(path, "mpp", "a positive number of micrometres per pixel", ", ".join(wrong), "--mpp overrides all sources")
    if not sources and spot_diameter_px and slide_mpp is None:
        sources = [(f"spot_diameter_fullres ({SPOT_DIAMETER_UM:g} µm)", SPOT_DIAMETER_UM / spot_diameter_px)]
    if slide_mpp is not None:
        sources.insert(0 if use_wsi_res else len(sources), (f"the slide {slide_path}", float(slide_mpp)))
    if not sources:
        raise InputError(slide_path or path, "mpp", "a source for µm per pixel (positions on an array, scale factors or the slide)",
                         "none", "Give it with --mpp")
    _compare(path, sources, factors_path)
    return MppDecision(sources[0][1], sources[0][0], tuple(notices))


def _compare(path: Path | str, sources: list[tuple[str, float]], factors_path: Path | None) -> None:
    ordered = sorted(sources, key=lambda source: source[1])
    (low_name, low), (high_name, high) = ordered[0], ordered[-1]
    if high > low * (1 + TOLERANCE):
        low_name, high_name = (f"{name} of {factors_path}" if factors_path and name.startswith(OF_FACTORS) else name
                               for name in (low_name, high_name))
        raise InputError(path, "mpp", f"sources that agree within {TOLERANCE:.0%}",
                         f"{low:.4g} from {low_name} and {high:.4g} from {high_name}",
                         "Usually the slide is another one or a downsampled copy; --mpp overrides all sources")
