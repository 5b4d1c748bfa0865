"""Write a slide as a tiled pyramidal TIFF that OpenSlide reads (generic-tiff): JPEG tiles, halved levels, mpp in the resolution tags.

The slide is drawn row of tiles by row of tiles and never held whole; the reduced levels wait in temporary files beside the output.
"""
from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from preprocessing.simulation.slide import SlidePainter

TILE_PX = 256
STRIP_PX = 2048          # widest rectangle drawn at once


def write_pyramid(painter: SlidePainter, path: Path, *, overview_px: int, jpeg_quality: int = 90,
                  rows_done: Callable[[int], object] = lambda height: None) -> np.ndarray:
    """Draw the whole slide and write its pyramid.

    Returns an overview of the slide, uint8 (H, W, 3): the smallest reduced level whose longer side is at least `overview_px`,
    or level 1. `rows_done` is called with the height of each row of tiles.
    """
    import tifffile

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        levels = [_level_file(Path(scratch), painter.height_px >> k, painter.width_px >> k, k) for k in range(1, _level_count(painter))]
        options = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": jpeg_quality},
                   "dtype": np.uint8, "metadata": None, "software": "genes-to-morphology simulate_sample", "resolutionunit": "CENTIMETER"}
        with tifffile.TiffWriter(path, bigtiff=painter.width_px * painter.height_px > 1 << 30) as tiff:
            rows = _painted_rows(painter, levels[0], rows_done)
            tiff.write(_tiles(rows), shape=(painter.height_px, painter.width_px, 3), resolution=(1e4 / painter.mpp,) * 2, **options)
            for k, level in enumerate(levels):
                if k:
                    _halve(levels[k - 1], level)
                rows = (level[y:y + TILE_PX] for y in range(0, len(level), TILE_PX))
                tiff.write(_tiles(rows), shape=level.shape, subfiletype=1, resolution=(1e4 / painter.mpp / 2 ** (k + 1),) * 2, **options)
        return np.array([level for k, level in enumerate(levels) if k == 0 or max(level.shape) >= overview_px][-1])


def _level_count(painter: SlidePainter) -> int:
    """Levels down to about one tile; at least two."""
    return max(2, int(np.log2(max(painter.width_px, painter.height_px) / TILE_PX)) + 1)


def _level_file(folder: Path, height: int, width: int, level: int) -> np.ndarray:
    return np.memmap(folder / f"level{level}", np.uint8, "w+", shape=(height, width, 3))


def _painted_rows(painter: SlidePainter, half: np.ndarray, rows_done) -> Iterator[np.ndarray]:
    """Level 0, one row of tiles at a time; fills level 1 on the way."""
    for y in range(0, painter.height_px, TILE_PX):
        height = min(TILE_PX, painter.height_px - y)
        strips = [painter.paint(x, y, min(STRIP_PX, painter.width_px - x), height) for x in range(0, painter.width_px, STRIP_PX)]
        row = np.concatenate(strips, axis=1)
        _halve(row, half[y // 2:y // 2 + height // 2])
        yield row
        rows_done(height)


def _halve(large: np.ndarray, small: np.ndarray) -> None:
    """Mean of 2 x 2 pixels, in slices; an odd last row or column is left out, as slide scanners do."""
    for first in range(0, len(small), TILE_PX):
        part = small[first:first + TILE_PX]
        block = large[2 * first:2 * first + 2 * len(part), :2 * small.shape[1]].astype(np.uint16)
        part[:] = (block[0::2, 0::2] + block[1::2, 0::2] + block[0::2, 1::2] + block[1::2, 1::2] + 2) // 4


def _tiles(rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Cut rows of tiles into tiles, the last ones filled up with their own border."""
    for row in rows:
        height, width = row.shape[:2]
        row = np.pad(row, ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0)), mode="edge")
        for x in range(0, row.shape[1], TILE_PX):
            yield np.ascontiguousarray(row[:, x:x + TILE_PX])
