"""Count and measure nuclei on H&E patches, classically: haematoxylin by colour deconvolution, Otsu's threshold, watershed.

Touches no files. Patches are uint8 (H, W, 3), stain-normalised as `dump_patches.py` writes them; stain amounts are in units of the
target's stain vectors. One threshold serves all patches that are compared: it is fitted on the real ones and used on the generated ones,
so that pale nuclei count as pale and not as absent.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from skimage.feature import peak_local_max
from skimage.filters import gaussian, threshold_otsu
from skimage.measure import regionprops_table
from skimage.segmentation import find_boundaries, watershed

from preprocessing.progress import ProgressBar
from preprocessing.stain import TARGET_VECTORS, optical_density

BLUR_UM = 0.5              # of the haematoxylin before the threshold: smaller than chromatin clumps
SEED_BLUR_UM = 0.6         # of what nuclei are told apart by
SEED_APART_UM = 1.8        # centres of two nuclei lie at least so far apart
DARKNESS = 1.5             # µm of depth inside the mask that one unit of haematoxylin counts for, when nuclei are told apart
DEPTH_UM = 3.0             # about where depth fades and haematoxylin tells nuclei apart: dense tissue has no ground between them
MIN_AREA_UM2 = 5.0         # smaller is debris
LEAST_THRESHOLD = 0.25     # haematoxylin below it is ground, also on patches without a nucleus
FIT_PATCHES = 1000         # at most: enough for a histogram
STATISTICS = ("nuclei", "nuclear_area_um2", "nuclear_haematoxylin", "haematoxylin", "eosin")
SAID = dict(zip(STATISTICS, ("nuclei a patch", "area of a nucleus, µm²", "haematoxylin in nuclei", "haematoxylin of the patch",
                             "eosin of the patch"), strict=True))             # how pages name them
UNMIX = np.linalg.pinv(np.array(TARGET_VECTORS)).T         # (3, 2): optical density -> haematoxylin, eosin


@dataclass(frozen=True)
class NucleiSettings:
    """How nuclei of one set of patches are found."""

    um_per_px: float
    threshold: float           # haematoxylin above it is nucleus


def stain_amounts(patch: np.ndarray) -> np.ndarray:
    """float64 (H, W, 2): haematoxylin and eosin of uint8 (H, W, 3)."""
    return optical_density(patch) @ UNMIX


def fit_nuclei(patches: Sequence[np.ndarray], um_per_px: float, seed: int = 0) -> NucleiSettings:
    """Otsu's threshold over the haematoxylin of all patches together (of 1,000 of them, drawn with `seed`)."""
    rows = np.random.default_rng(seed).permutation(len(patches))[:FIT_PATCHES]
    values = np.concatenate([_blurred(stain_amounts(patches[row])[..., 0], BLUR_UM / um_per_px).ravel().astype(np.float32) for row in rows])
    return NucleiSettings(um_per_px, max(float(threshold_otsu(values)), LEAST_THRESHOLD))


def segment_nuclei(patch: np.ndarray, settings: NucleiSettings) -> np.ndarray:
    """int (H, W): 0 is ground, other numbers are nuclei, those cut by the border too; debris is gone."""
    return _segment(stain_amounts(patch)[..., 0], settings)


def _segment(haematoxylin: np.ndarray, settings: NucleiSettings) -> np.ndarray:
    px = settings.um_per_px
    mask = ndimage.binary_fill_holes(_blurred(haematoxylin, BLUR_UM / px) > settings.threshold)
    if not mask.any():
        return np.zeros(mask.shape, np.int32)
    depth = ndimage.distance_transform_edt(np.pad(mask, 1, mode="edge"))[1:-1, 1:-1] * px      # the tissue goes on beyond the border
    depth = depth / (1 + depth / DEPTH_UM)
    relief = _blurred(depth, SEED_BLUR_UM / px) + DARKNESS * _blurred(haematoxylin, SEED_BLUR_UM / px)
    peaks = peak_local_max(relief, min_distance=max(1, round(SEED_APART_UM / px)), labels=mask.astype(np.int32), exclude_border=False)
    seeds = np.zeros(mask.shape, np.int32)
    seeds[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    nuclei = watershed(-relief, seeds, mask=mask)
    small = np.bincount(nuclei.ravel()) * px ** 2 < MIN_AREA_UM2
    return np.where(small[nuclei], 0, nuclei)


def _blurred(values: np.ndarray, sigma_px: float) -> np.ndarray:
    return gaussian(values, sigma_px, mode="nearest", preserve_range=True)


def measure_patch(patch: np.ndarray, settings: NucleiSettings) -> np.ndarray:
    """(5,) float64, `STATISTICS` of a patch. Without a nucleus: 0 nuclei, the two numbers about nuclei NaN.

    A nucleus on the right or lower border is left to the neighbouring patch, so that a tiled section counts each once; area and
    darkness are those of nuclei that no border cuts.
    """
    amounts = stain_amounts(patch)
    nuclei = _segment(amounts[..., 0], settings)
    found = regionprops_table(nuclei, amounts[..., 0], properties=("bbox", "area", "mean_intensity"))
    height, width = nuclei.shape
    counted = (found["bbox-2"] < height) & (found["bbox-3"] < width)
    whole = counted & (found["bbox-0"] > 0) & (found["bbox-1"] > 0)
    area, dark = (float(found[name][whole].mean()) if whole.any() else np.nan for name in ("area", "mean_intensity"))
    return np.array([counted.sum(), area * settings.um_per_px ** 2, dark, *amounts.mean(axis=(0, 1))])


def measure_nuclei(patches: Iterable[np.ndarray], settings: NucleiSettings, *, workers: int = 1, progress: bool = True,
                   count: int | None = None) -> np.ndarray:
    """(N, 5) float64, `STATISTICS` of each patch, in order."""
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(lambda patch: measure_patch(patch, settings), patches)
        total = len(patches) if isinstance(patches, Sequence | np.ndarray) else count
        rows = list(ProgressBar(found, total=total, desc="nuclei", unit="patch", disable=not progress))
    return np.array(rows).reshape(-1, len(STATISTICS))


def outlined(patch: np.ndarray, settings: NucleiSettings) -> np.ndarray:
    """The patch with the borders of its nuclei drawn in yellow: to see what was counted."""
    picture = patch.copy()
    picture[find_boundaries(segment_nuclei(patch, settings), mode="inner")] = (255, 225, 0)
    return picture
