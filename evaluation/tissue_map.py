"""Put patches back where they lie on the slide: real and generated side by side, small."""
from __future__ import annotations

import numpy as np
from scipy.spatial import cKDTree

from evaluation.features import resize_by_area

LARGEST_PX = 470           # side of one map: two are as wide as the page
SMALLEST_CELL, LARGEST_CELL = 4, 32


def tissue_map(patches: np.ndarray, centre_xy: np.ndarray) -> np.ndarray:
    """uint8 (n, px, px, 3) at (n, 2) -> one uint8 (H, W, 3) on white; a patch is as wide as neighbouring spots lie apart."""
    spacing = _spacing(centre_xy)
    extent = np.ptp(centre_xy, axis=0) / spacing + 1                               # in spots
    cell = int(np.clip(LARGEST_PX // extent.max(), SMALLEST_CELL, LARGEST_CELL))
    corners = np.rint((centre_xy - centre_xy.min(axis=0)) / spacing * cell).astype(int)
    width, height = corners.max(axis=0) + cell
    picture = np.full((height, width, 3), 255, np.uint8)
    for patch, (x, y) in zip(resize_by_area(patches, cell), corners, strict=True):
        picture[y:y + cell, x:x + cell] = patch
    return picture


def maps_side_by_side(real: np.ndarray, generated: np.ndarray, centre_xy: np.ndarray) -> np.ndarray:
    """The real map, a gap, the generated one."""
    left, right = tissue_map(real, centre_xy), tissue_map(generated, centre_xy)
    return np.concatenate([left, np.full((left.shape[0], 16, 3), 255, np.uint8), right], axis=1)


def _spacing(centre_xy: np.ndarray) -> float:
    """Median distance to the nearest spot along the wider axis: squares of that side do not overlap on a grid."""
    distance, _ = cKDTree(centre_xy).query(centre_xy, k=2, p=np.inf)
    return max(float(np.median(distance[:, 1])), 1e-9)
