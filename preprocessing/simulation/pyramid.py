"""Write a slide as a tiled pyramidal TIFF that OpenSlide reads (generic-tiff): JPEG tiles, halved levels, mpp in the resolution tags.

The slide is drawn row of tiles by row of tiles and never held whole; the reduced levels wait in temporary files beside the output.
"""
from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from preprocessing.simulation.repeat import RepeatedPainter
    from preprocessing.simulation.slide import SlidePainter

    Painter = SlidePainter | RepeatedPainter

TILE_PX = 256
STRIP_PX = 2048          # widest rectangle drawn at once
THREADS = min(4, os.cpu_count() or 1)     # that paint and encode


def write_pyramid(painter: Painter, path: Path, *, overview_px: int, jpeg_quality: int = 90,
                  rows_done: Callable[[int], object] = lambda height: None) -> np.ndarray:
    """Draw the whole slide and write its pyramid.

    Returns an overview of the slide, uint8 (H, W, 3): the smallest reduced level whose longer side is at least `overview_px`,
    or level 1. `rows_done` is called with the height of each row of tiles.
    """
    import tifffile

    with tempfile.TemporaryDirectory(dir=path.parent) as scratch, ThreadPoolExecutor(THREADS) as pool:
        levels = [_Level(Path(scratch), painter.height_px >> k, painter.width_px >> k, k) for k in range(1, _level_count(painter))]
        options = {"tile": (TILE_PX, TILE_PX), "photometric": "rgb", "compression": "jpeg", "compressionargs": {"level": jpeg_quality},
                   "dtype": np.uint8, "metadata": None, "software": "genes-to-morphology simulate_sample", "resolutionunit": "CENTIMETER",
                   "maxworkers": THREADS}
        with tifffile.TiffWriter(path, bigtiff=painter.width_px * painter.height_px > 1 << 30) as tiff:
            rows = _painted_rows(painter, levels[0], pool, rows_done)
            tiff.write(_tiles(rows), shape=(painter.height_px, painter.width_px, 3), resolution=(1e4 / painter.mpp,) * 2, **options)
            for k, level in enumerate(levels):
                if k:
                    for rows in levels[k - 1].rows(2 * TILE_PX):
                        level.append(_halved(rows))
                tiff.write(_tiles(level.rows(TILE_PX)), shape=level.shape, subfiletype=1,
                           resolution=(1e4 / painter.mpp / 2 ** (k + 1),) * 2, **options)
        overview = [level for k, level in enumerate(levels) if k == 0 or max(level.shape) >= overview_px][-1]
        return next(overview.rows(overview.shape[0]))


def _level_count(painter: Painter) -> int:
    """Levels down to about one tile; at least two."""
    return max(2, int(np.log2(max(painter.width_px, painter.height_px) / TILE_PX)) + 1)


class _Level:
    """A reduced level in a file, appended to and read in rows of pixels: a memory map would count as memory."""

    def __init__(self, folder: Path, height: int, width: int, level: int):
        self.shape, self._path = (height, width, 3), folder / f"level{level}"

    def append(self, rows: np.ndarray) -> None:
        with open(self._path, "ab") as stream:
            stream.write(rows.tobytes())

    def rows(self, number: int) -> Iterator[np.ndarray]:
        """The whole level, `number` rows at a time."""
        height, width, channels = self.shape
        with open(self._path, "rb") as stream:
            for first in range(0, height, number):
                count = min(number, height - first)
                yield np.fromfile(stream, np.uint8, count * width * channels).reshape(count, width, channels)


def _painted_rows(painter: Painter, half: _Level, pool: ThreadPoolExecutor, rows_done) -> Iterator[np.ndarray]:
    """Level 0, one row of tiles at a time; fills level 1 on the way."""
    left = range(0, painter.width_px, STRIP_PX)
    widths = [min(STRIP_PX, painter.width_px - x) for x in left]
    for y in range(0, painter.height_px, TILE_PX):
        height = min(TILE_PX, painter.height_px - y)
        row = np.concatenate(list(pool.map(painter.paint, left, repeat(y), widths, repeat(height))), axis=1)
        half.append(_halved(row))
        rows_done(height)           # before it is handed on: nobody asks for more after the last row
        yield row


def _halved(large: np.ndarray) -> np.ndarray:
    """Mean of 2 x 2 pixels; an odd last row or column is left out, as slide scanners do."""
    block = large[:len(large) // 2 * 2, :large.shape[1] // 2 * 2]
    columns = block[:, 0::2].astype(np.uint16) + block[:, 1::2]
    return ((columns[0::2] + columns[1::2] + 2) // 4).astype(np.uint8)


def _tiles(rows: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Cut rows of tiles into tiles, the last ones filled up with their own border."""
    for row in rows:
        height, width = row.shape[:2]
        row = np.pad(row, ((0, -height % TILE_PX), (0, -width % TILE_PX), (0, 0)), mode="edge")
        for x in range(0, row.shape[1], TILE_PX):
            yield np.ascontiguousarray(row[:, x:x + TILE_PX])
