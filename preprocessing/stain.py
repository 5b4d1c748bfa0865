"""Estimate a slide's H&E stain vectors and bring patches to a common stain (Macenko et al., ISBI 2009).

Pixels are uint8 RGB. Optical density is OD = -ln((I + 1) / 240); a pixel's OD is HE @ (haematoxylin, eosin), so two stain
vectors and the 99th percentiles of the two amounts describe a slide. They are estimated once per slide on tissue, without glass.
"""
from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from skimage.color import rgb2hsv
from skimage.filters import threshold_otsu

from preprocessing.done_manifests import fingerprint
from preprocessing.errors import InputError, OptionError
from preprocessing.inputs import read_json
from preprocessing.slide import Slide, SlideReadError, open_slide

LIGHT = 240.0                                     # intensity of unstained glass, "Io"
TRANSPARENT_OD = 0.15                             # "beta": pixels with a channel below it do not shape the vectors
ANGLE_PERCENTILE = 1.0                            # "alpha"
MAX_PERCENTILE = 99.0
TARGET_VECTORS = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))     # (RGB, H and E)
TARGET_MAXIMA = (1.9705, 1.0308)
SETTINGS = {"method": "macenko", "light": LIGHT, "beta": TRANSPARENT_OD, "alpha": ANGLE_PERCENTILE, "max_percentile": MAX_PERCENTILE}
MIN_PIXELS = 100                                  # stained pixels needed to speak of stain vectors
MIN_ANGLE_DEG = 3.0                               # between H and E; 22 in the target, below this the pixels show one colour
MASK_PX, TILE_PX, TILES = 2048, 256, 64           # side of the tissue mask; up to 64 tiles = 4 M pixels are looked at
MAX_GLASS_SATURATION = 0.1                        # on a slide without glass Otsu would split the tissue
MAX_EXPONENT = 230.0                              # of one of three factors, so that their product is finite; T is 40 and more beyond it
OPTICAL_DENSITY = -np.log((np.arange(256) + 1) / LIGHT)                     # by grey level


class NoStainError(InputError):
    """The pixels do not show two stains: blank glass, or a single colour."""


@dataclass(frozen=True)
class StainVectors:
    """What a slide is stained with, as Macenko sees it; `normalise_stain` needs nothing else."""

    vectors: tuple[tuple[float, float], ...]      # (3, 2): RGB optical density of pure haematoxylin, of pure eosin
    maxima: tuple[float, float]                   # 99th percentile of the amount of each
    n_pixels: int = 0                             # pixels they were estimated on
    settings: dict = field(default_factory=lambda: dict(SETTINGS))

    def to_json(self) -> dict:
        """Content of `stain.json`."""
        return {"normalised": True, **asdict(self), "target_vectors": TARGET_VECTORS, "target_maxima": TARGET_MAXIMA}


def read_stain_file(path: Path | str) -> StainVectors:
    """The stain vectors a `stain.json` holds."""
    content = read_json(path, "a stain.json")
    if isinstance(content, dict) and content.get("normalised") is False:
        raise InputError(path, "normalised", "stain vectors", "false: those patches were not normalised")
    try:
        vectors, maxima = np.array(content["vectors"], dtype=float), np.array(content["maxima"], dtype=float)
        n_pixels = int(content.get("n_pixels", 0))
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(path, "content", "numbers as vectors, maxima and n_pixels", f"other JSON ({error})") from error
    if vectors.shape != (3, 2) or maxima.shape != (2,) or not (np.isfinite(vectors).all() and (maxima > 0).all()):
        raise InputError(path, "vectors, maxima", "3 x 2 and 2 positive numbers", f"{vectors.tolist()}, {maxima.tolist()}"[:200])
    _require_two_stains(path, vectors)
    return StainVectors(tuple(map(tuple, vectors.tolist())), tuple(maxima.tolist()), n_pixels)


def optical_density(pixels: np.ndarray) -> np.ndarray:
    """float64 of the same shape. 0 at the intensity of glass, slightly negative above it."""
    return OPTICAL_DENSITY[pixels]


def estimate_stain(pixels: np.ndarray, path: Path | str = "pixels") -> StainVectors:
    """Stain vectors of uint8 (n, 3) pixels; `path` names their source in errors. Does not look for tissue.

    The vectors are the extreme directions of stained pixels in the plane of the two leading eigenvectors of their covariance.
    """
    density = optical_density(pixels.reshape(-1, 3))                        # (n, 3)
    stained = density[(density >= TRANSPARENT_OD).all(axis=1)]
    if len(stained) < MIN_PIXELS:
        raise _no_stain(path, f"{len(stained)} of {len(density):,} pixels stained (blank glass?)")
    _, eigenvectors = np.linalg.eigh(np.cov(stained.T))                     # ascending eigenvalues
    plane = eigenvectors[:, [2, 1]]                                         # (3, 2)
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)                  # light is absorbed: angles lie about 0, far from the wrap at pi
    along, across = (stained @ plane).T
    angles = np.percentile(np.arctan2(across, along), [ANGLE_PERCENTILE, 100 - ANGLE_PERCENTILE])
    extremes = plane @ np.array([np.cos(angles), np.sin(angles)])           # (3, 2)
    vectors = extremes[:, ::-1] if extremes[0, 0] < extremes[0, 1] else extremes     # haematoxylin absorbs more red
    _require_two_stains(path, vectors)
    maxima = np.percentile(density @ np.linalg.pinv(vectors).T, MAX_PERCENTILE, axis=0)
    if not (maxima > 0).all():
        raise _no_stain(path, f"amounts of haematoxylin and eosin of {maxima[0]:.3g} and {maxima[1]:.3g}")
    return StainVectors(tuple(map(tuple, vectors.tolist())), tuple(maxima.tolist()), len(density))


def _require_two_stains(path: Path | str, vectors: np.ndarray) -> None:
    haematoxylin, eosin = (vectors / np.maximum(np.linalg.norm(vectors, axis=0), 1e-12)).T
    angle = np.degrees(np.arccos(np.clip(haematoxylin @ eosin, -1, 1)))
    if not angle >= MIN_ANGLE_DEG:
        raise _no_stain(path, f"a single colour (two directions {angle:.1f} degrees apart)")


def _no_stain(path: Path | str, found: str) -> NoStainError:
    return NoStainError(path, "stain", "tissue in two stains, haematoxylin and eosin", found,
                      "Use --on-stain-failure skip to keep the colours, or --stain-file with vectors of a like slide")


def normalise_stain(images: np.ndarray, stain: StainVectors) -> np.ndarray:
    """uint8 (..., 3), one patch or many, as if stained like the target. Releases the GIL.

    Macenko's least squares in closed form is one matrix T from OD to OD, so that a channel of the result is a product,
    Io * exp(-T OD) = Io * A(red) * B(green) * C(blue), of tables with an entry a grey level: exact, and no exponential a pixel.
    """
    from preprocessing.stain_kernel import multiply_tables

    images = np.ascontiguousarray(images)
    normalised = np.empty_like(images)
    multiply_tables(images.reshape(-1, 3), _tables(stain.vectors, stain.maxima), normalised.reshape(-1, 3))
    return normalised


@lru_cache(maxsize=8)
def _tables(vectors: tuple[tuple[float, float], ...], maxima: tuple[float, float]) -> np.ndarray:
    """float64 (3 channels of the result, 3 of the pixel, 256 grey levels). Their product never overflows to infinity times 0."""
    ratio = np.array(TARGET_MAXIMA) / np.array(maxima)
    transfer = np.array(TARGET_VECTORS) * ratio @ np.linalg.pinv(np.array(vectors))      # (3, 3)
    tables = np.exp(np.clip(-transfer[:, :, None] * OPTICAL_DENSITY, -MAX_EXPONENT, MAX_EXPONENT))
    tables[:, 0] *= LIGHT
    tables.flags.writeable = False
    return tables


# ---- where on the slide to look -------------------------------------------------------------------------------------

def tissue_mask(thumbnail: np.ndarray) -> np.ndarray:
    """bool (h, w) of uint8 (h, w, 3): more saturated than glass, by Otsu's threshold. Grey and black are not tissue."""
    saturation = rgb2hsv(thumbnail)[..., 1]
    if saturation.max() == saturation.min():
        return np.full(saturation.shape, saturation.max() > MAX_GLASS_SATURATION)
    return saturation > min(threshold_otsu(saturation), MAX_GLASS_SATURATION)


def tissue_pixels(slide: Slide, seed: int = 0) -> np.ndarray:
    """uint8 (n, 3): level-0 pixels of up to 64 tiles spread at random over the tissue, those on glass left out."""
    mask = tissue_mask(slide.thumbnail(MASK_PX))
    rows, columns = np.nonzero(mask)
    if not len(rows):
        raise _no_stain(slide.path, "no tissue")
    scale_x, scale_y = slide.width_px / mask.shape[1], slide.height_px / mask.shape[0]
    per_side = (max(1, slide.width_px // TILE_PX), max(1, slide.height_px // TILE_PX))
    tile_column = np.minimum(columns * scale_x // TILE_PX, per_side[0] - 1).astype(int)
    tile_row = np.minimum(rows * scale_y // TILE_PX, per_side[1] - 1).astype(int)
    tiles, tissue_in_tile = np.unique(tile_row * per_side[0] + tile_column, return_counts=True)
    tiles = tiles[tissue_in_tile >= 0.1 * tissue_in_tile.max()]
    chosen = np.random.default_rng(seed).permutation(tiles)[:TILES]
    pixels, unreadable = [], None
    for tile in chosen:
        x, y = int(tile % per_side[0]) * TILE_PX, int(tile // per_side[0]) * TILE_PX
        width, height = min(TILE_PX, slide.width_px - x), min(TILE_PX, slide.height_px - y)
        try:
            region = slide.read_region(x, y, width, height)
        except SlideReadError as error:           # one bad tile of many does not speak for the slide
            unreadable = error
            continue
        in_x = np.minimum((np.arange(x, x + width) / scale_x).astype(int), mask.shape[1] - 1)
        in_y = np.minimum((np.arange(y, y + height) / scale_y).astype(int), mask.shape[0] - 1)
        pixels.append(region[mask[np.ix_(in_y, in_x)]])
    if not pixels:
        raise unreadable
    return np.concatenate(pixels)


def slide_stain(slide: Slide, seed: int = 0) -> StainVectors:
    """Stain vectors of the tissue of a slide."""
    return estimate_stain(tissue_pixels(slide, seed), slide.path)


def find_stain(wsi_path: Path | str | None, stain_file: Path | str | None, on_stain_failure: str = "error",
               slide: Slide | None = None) -> tuple[StainVectors | None, dict]:
    """(stain vectors, content of `stain.json`) from a `stain.json`, else from the slide, which `slide` is where it is open already.

    A slide without two stains is an InputError, or gives no vectors with `on_stain_failure="skip"`: its colours are to be kept.
    """
    if stain_file is not None:
        stain = read_stain_file(stain_file)
        return stain, stain.to_json() | {"from_stain_file": Path(stain_file).name}
    if wsi_path is None:
        raise OptionError("--wsi", "the slide, to estimate its stain on (or --stain-file, or --no-normalize)", "nothing")
    try:
        with open_slide(wsi_path) if slide is None else nullcontext(slide) as opened:
            stain = slide_stain(opened)
    except NoStainError as error:
        if on_stain_failure != "skip":
            raise
        return None, {"normalised": False, "reason": str(error)}
    return stain, stain.to_json() | {"slide": fingerprint(wsi_path)}
