"""Outline the tissue of a slide, and read and write outlines as GeoJSON (HEST, TRIDENT, QuPath, ours).

An outline is a shapely MultiPolygon in level-0 pixels (x, y), holes included, its parts disjoint. Segmentation is Otsu's
threshold on colour saturation at low resolution: glass is grey, tissue is not.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from preprocessing.errors import InputError
from preprocessing.inputs import read_json
from preprocessing.outputs import finished_file

if TYPE_CHECKING:
    from shapely import MultiPolygon

    from preprocessing.slide import Slide

MASK_PX = 1500                      # longer side of the picture that is segmented
SMOOTHING_PX = 2.0                  # bridges the gaps between fibres and nuclei
SATURATION_RANGE = (0.05, 0.20)     # the threshold stays in it: a slide that is all tissue, or all glass, is not split in two
SMALLEST_PX = 256                   # connected pixels: smaller specks and holes are removed (70 µm square on a 10 mm slide)


@dataclass(frozen=True)
class TissueMask:
    """Where a slide is tissue, at low resolution."""

    mask: np.ndarray                # (h, w) bool
    width_px: int                   # of the slide at level 0
    height_px: int

    def share(self, centre_xy_px: np.ndarray, side_px: float) -> np.ndarray:
        """Share of each square window that is tissue, (P,) in 0..1; what lies off the slide is none."""
        height, width = self.mask.shape
        integral = np.zeros((height + 1, width + 1))
        integral[1:, 1:] = np.cumsum(np.cumsum(self.mask, axis=0, dtype=np.float64), axis=1)
        step = np.array([self.width_px / width, self.height_px / height])
        low, high = (np.clip((centre_xy_px + sign * side_px / 2) / step, 0, (width, height)) for sign in (-1, 1))
        area = (_between(integral, high[:, 0], high[:, 1]) - _between(integral, low[:, 0], high[:, 1])
                - _between(integral, high[:, 0], low[:, 1]) + _between(integral, low[:, 0], low[:, 1]))
        return np.clip(area / np.prod(side_px / step), 0, 1)

    def outline(self) -> MultiPolygon:
        """The mask's border lines, half-way between pixels, in level-0 pixels."""
        import shapely
        from skimage.measure import find_contours

        height, width = self.mask.shape
        scale = np.array([self.width_px / width, self.height_px / height])
        padded = np.pad(self.mask, 1).astype(np.float32)
        rings = [shapely.LinearRing(np.clip(ring[:, ::-1] - 0.5, 0, (width, height)) * scale)      # (row, col) -> (x, y)
                 for ring in find_contours(padded, 0.5)]
        area = shapely.build_area(shapely.GeometryCollection(rings))
        return _polygons_of(shapely.make_valid(shapely.simplify(area, scale.max() / 4)))


def _between(integral: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The integral image at fractional places: exact for a picture of uniform pixels."""
    column, row = (np.minimum(place.astype(int), limit - 2) for place, limit in zip((x, y), integral.shape[::-1], strict=True))
    u, v = x - column, y - row
    return ((1 - v) * ((1 - u) * integral[row, column] + u * integral[row, column + 1])
            + v * ((1 - u) * integral[row + 1, column] + u * integral[row + 1, column + 1]))


def segment_tissue(slide: Slide) -> TissueMask:
    """Find the tissue of a slide; without any it is an `InputError`."""
    from scipy.ndimage import gaussian_filter
    from skimage.filters import threshold_otsu

    picture = slide.thumbnail(MASK_PX).astype(np.float32)
    brightest = picture.max(axis=2)
    saturation = (brightest - picture.min(axis=2)) / np.maximum(brightest, 1)          # HSV's, 0..1
    saturation = gaussian_filter(saturation, SMOOTHING_PX)
    threshold = float(np.clip(threshold_otsu(saturation), *SATURATION_RANGE))
    mask = ~_without_specks(~_without_specks(saturation > threshold))
    if not mask.any():
        raise InputError(slide.path, "tissue", f"tissue more colourful than its glass (saturation above {threshold:.2f})",
                         f"saturation up to {saturation.max():.2f} and nothing larger than specks",
                         "Give the outlines with --tissue-seg-file")
    return TissueMask(mask, slide.width_px, slide.height_px)


def _without_specks(mask: np.ndarray) -> np.ndarray:
    """Only the 4-connected regions of at least SMALLEST_PX (fewer on a tiny picture)."""
    from skimage.measure import label

    labels = label(mask, connectivity=1)
    large = np.bincount(labels.ravel()) >= min(SMALLEST_PX, mask.size / 100)
    large[0] = False
    return large[labels]


def read_tissue(path: Path | str, slide: Slide | None = None) -> MultiPolygon:
    """Every area of a GeoJSON file, united; invalid rings are repaired. With `slide`, clipped to it."""
    import shapely

    path = Path(path)
    try:
        geometries = _geometries(read_json(path, "GeoJSON"), path)
    except RecursionError as error:
        raise InputError(path, "GeoJSON", "a list of features", f"lists in lists ({error})") from error
    parts = []
    for number, geometry in enumerate(geometries):
        try:
            shape = shapely.force_2d(shapely.from_geojson(json.dumps(geometry)))
        except (shapely.errors.GEOSException, TypeError, ValueError, RecursionError) as error:
            raise InputError(path, f"geometry {number}", "a GeoJSON geometry with closed rings", f"an unreadable one ({error})") from error
        if not np.isfinite(shapely.get_coordinates(shape)).all():
            raise InputError(path, f"geometry {number}", "finite coordinates in level-0 pixels", "a coordinate that is not a number")
        parts.append(shape)
    try:
        tissue = _polygons_of(shapely.union_all([shapely.make_valid(part) for part in parts]))
    except (shapely.errors.GEOSException, ValueError) as error:
        raise InputError(path, "geometry", "outlines that can be repaired and united", f"others ({error})") from error
    if tissue.is_empty:
        raise InputError(path, "geometry", "at least one polygon with an area", f"{len(parts)} geometries and none")
    if slide is None:
        return tissue
    inside = _polygons_of(tissue & shapely.box(0, 0, slide.width_px, slide.height_px))
    if inside.is_empty:
        bounds = ", ".join(f"{value:,.0f}" for value in tissue.bounds)
        raise InputError(path, "geometry", f"outlines on {slide.path}, {slide.width_px:,} x {slide.height_px:,} px",
                         f"all of them off it (x0, y0, x1, y1 = {bounds})", "Outlines are read in level-0 pixels of this very slide")
    return inside


def _geometries(content: Any, path: Path) -> list[dict]:
    """The geometries of a FeatureCollection, a Feature, a list of features (QuPath) or a bare geometry."""
    if isinstance(content, list):
        return [geometry for item in content for geometry in _geometries(item, path)]
    kind = content.get("type") if isinstance(content, dict) else None
    if kind == "FeatureCollection":
        return _geometries(content.get("features") or [], path)
    if kind == "Feature":
        return [content["geometry"]] if content.get("geometry") else []
    if isinstance(kind, str) and ("coordinates" in content or "geometries" in content):
        return [content]
    raise InputError(path, "GeoJSON", "a FeatureCollection, a Feature or a geometry", f"type {kind!r}")


def _polygons_of(shape) -> MultiPolygon:
    """The areas of any geometry; points and lines, which repairs leave behind, are left out."""
    import shapely

    parts = shapely.get_parts(shapely.get_parts(np.atleast_1d(shape)))               # a collection may hold multipolygons
    return shapely.MultiPolygon([part for part in parts if part.geom_type == "Polygon" and part.area > 0])


def write_tissue(path: Path | str, tissue: MultiPolygon) -> None:
    """One GeoJSON feature a polygon, level-0 pixels; QuPath opens it as it is."""
    import shapely

    features = [{"type": "Feature", "properties": {"objectType": "annotation", "tissue_id": number},
                 "geometry": json.loads(shapely.to_geojson(part))} for number, part in enumerate(tissue.geoms)]
    with finished_file(path, validate=read_tissue) as temporary:
        temporary.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
