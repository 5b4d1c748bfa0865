"""Repeat a block of tissue over a section of any size, so that a slide of gigapixels is laid out and painted in minutes.

Touches no files. The plane is covered with the block and its mirror images, alternating in both directions, so tissue
continues across every seam; the outline and the tears of the section are its own and are never repeated. Layout, cells
and pixels follow the same repetition, so the truth stays true. Positions in µm from the slide's corner, or level-0 px.
"""
from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from threading import Lock

import numpy as np

from preprocessing.simulation.outline import Outline
from preprocessing.simulation.pyramid import STRIP_PX, TILE_PX
from preprocessing.simulation.slide import SlidePainter, Stains
from preprocessing.simulation.tissue import CELL_TYPES, GLASS, Cells, Layout, Tissue

DEEP_UM = 1e3            # "edge depth" within the block: nothing of the outline is seen from there
EDGE_REACH_UM = 24.0     # the outline shapes what is drawn up to this depth (its capsule, ragged), and nothing at this height over glass
STEEPEST = 3.0           # the edge depth changes by at most this much a µm (the border of a tear)
CELL_EDGE_UM = 4.0       # no cell is nearer to the outline, as in `Tissue`


class RepeatedTissue:
    """A section whose inside repeats after two periods of `period_um` (a block and its mirror image); stands in for `Tissue`."""

    def __init__(self, outline: Outline, period_um: float, region_um: float = 280.0):
        self.width_um, self.height_um, self.seed, self.outline, self.period_um = (
            outline.width_um, outline.height_um, outline.seed, outline, period_um)
        self.block = Tissue(period_um, period_um, self.seed, region_um, outline=_Everywhere())

    def edge_depth(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        return self.outline.depth(x_um, y_um)

    def layout(self, x_um: np.ndarray, y_um: np.ndarray) -> Layout:
        """What lies at the points (N,)."""
        inside = self.block.layout(self._fold(x_um), self._fold(y_um))
        return _within(self.outline.depth(x_um, y_um), inside)

    def _fold(self, position_um: np.ndarray) -> np.ndarray:
        """Where in the block a position of the section is copied from."""
        return self.period_um - np.abs(self.period_um - np.asarray(position_um) % (2 * self.period_um))

    @cached_property
    def block_cells(self) -> Cells:
        """The cells of the block that do not overlap their own mirror images."""
        cells = self.block.place_cells()
        to_seam = np.minimum.reduce([cells.x_um, cells.y_um, self.period_um - cells.x_um, self.period_um - cells.y_um])
        return chosen(cells, to_seam >= np.array([kind.spacing for kind in CELL_TYPES])[cells.cell_type])

    def place_cells(self) -> Cells:
        """The cells of the block and of all its mirror images that lie within the outline."""
        copies = [self._copy(self.block_cells, column, row) for row in range(int(self.height_um / self.period_um) + 1)
                  for column in range(int(self.width_um / self.period_um) + 1)]
        cells = Cells(*(np.concatenate([getattr(copy, name) for copy in copies]) for name in Cells.__dataclass_fields__))
        by_y = np.lexsort((cells.x_um, cells.y_um))
        return chosen(cells, by_y)

    def _copy(self, cells: Cells, column: int, row: int) -> Cells:
        x, y = unfolded(cells.x_um, column, self.period_um), unfolded(cells.y_um, row, self.period_um)
        angle = np.where(column % 2, np.pi - cells.angle, cells.angle)
        moved = replace(cells, x_um=x, y_um=y, angle=np.where(row % 2, -angle, angle).astype(np.float32))
        return chosen(moved, self.outline.depth(x, y) > CELL_EDGE_UM)


def chosen(cells: Cells, which: np.ndarray) -> Cells:
    """Some of the cells: `which` is a mask or an order."""
    return Cells(*(getattr(cells, name)[which] for name in Cells.__dataclass_fields__))


def unfolded(position_um: np.ndarray, number: int, period_um: float) -> np.ndarray:
    """Where the copy `number` of the block, counted along one axis, has a position of the block."""
    return number * period_um + (period_um - position_um if number % 2 else position_um)


def _within(edge: np.ndarray, layout: Layout) -> Layout:
    return replace(layout, edge=edge, region=np.where(edge > 0, layout.region, GLASS).astype(np.int8))


class _Everywhere:
    """The outline of the block: tissue without an end."""

    def depth(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        return np.full(np.broadcast(x_um, y_um).shape, DEEP_UM, np.float32)


@dataclass(frozen=True)
class _Copy:
    """One copy of the block as a tissue of its own: positions of the block, edge depths of the section."""

    whole: RepeatedTissue
    column: int
    row: int

    @property
    def seed(self) -> int:
        return self.whole.seed

    def fibre_coordinates(self, x_um: np.ndarray, y_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.whole.block.fibre_coordinates(x_um, y_um)

    def layout(self, x_um: np.ndarray, y_um: np.ndarray) -> Layout:
        period = self.whole.period_um
        edge = self.whole.outline.depth(unfolded(x_um, self.column, period), unfolded(y_um, self.row, period))
        return _within(edge, self.whole.block.layout(x_um, y_um))


def whole_tiles_um(length_um: float, mpp: float) -> float:
    """The length, rounded up to whole tiles of the slide."""
    return float(np.ceil(length_um / (TILE_PX * mpp)) * TILE_PX * mpp)


class RepeatedPainter:
    """Draws rectangles of a repeated section's slide: copies of the painted block, and its edges painted one by one.

    The tissue's period must be a whole number of tiles. Safe to call from several threads.
    """

    def __init__(self, tissue: RepeatedTissue, stains: Stains, mpp: float):
        self.tissue, self.stains, self.mpp = tissue, stains, mpp
        self.width_px, self.height_px = int(tissue.width_um / mpp), int(tissue.height_um / mpp)
        self._tiles = round(tissue.period_um / mpp / TILE_PX)                  # of a period
        self._painter = SlidePainter(tissue.block, tissue.block_cells, stains, mpp)
        self._glass = self._painter.paint_glass(0, 0, TILE_PX, TILE_PX)
        self._rows: dict[int, np.ndarray] = {}                                 # painted rows of tiles of the block
        self._lock = Lock()
        self._copy_painter = lru_cache(maxsize=64)(self._new_copy_painter)

    def paint(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The rectangle with top left (x, y), level-0 px: uint8 (height, width, 3)."""
        picture = np.empty((height, width, 3), np.uint8)
        for tile_row in range(y // TILE_PX, (y + height - 1) // TILE_PX + 1):
            for tile_column in range(x // TILE_PX, (x + width - 1) // TILE_PX + 1):
                top, left = tile_row * TILE_PX - y, tile_column * TILE_PX - x
                rows, columns = slice(max(top, 0), top + TILE_PX), slice(max(left, 0), left + TILE_PX)
                target = picture[rows, columns]
                tile = self._tile(tile_column, tile_row)[max(-top, 0):, max(-left, 0):]
                target[:] = tile[:target.shape[0], :target.shape[1]]
        return picture

    def _tile(self, tile_column: int, tile_row: int) -> np.ndarray:
        """(TILE_PX, TILE_PX, 3) of the slide."""
        low, high = self._depths(tile_column, tile_row)
        if high < -EDGE_REACH_UM:
            return self._glass
        (column, across), (row, down) = divmod(tile_column, self._tiles), divmod(tile_row, self._tiles)
        across, down = (self._tiles - 1 - across if column % 2 else across), (self._tiles - 1 - down if row % 2 else down)
        if low > EDGE_REACH_UM:
            tile = self._block_row(down)[:, across * TILE_PX:(across + 1) * TILE_PX]
        else:
            tile = self._copy_painter(column, row).paint(across * TILE_PX, down * TILE_PX, TILE_PX, TILE_PX)
        return tile[::-1 if row % 2 else 1, ::-1 if column % 2 else 1]

    def _depths(self, tile_column: int, tile_row: int) -> tuple[float, float]:
        """Bounds of the edge depth within a tile, from five points a side and the steepest slope."""
        side, along = TILE_PX * self.mpp, np.linspace(0, TILE_PX * self.mpp, 5)
        depth = self.tissue.edge_depth(tile_column * side + along[None, :], tile_row * side + along[:, None])
        unseen = STEEPEST * side / 8 * 2 ** 0.5
        return float(depth.min()) - unseen, float(depth.max()) + unseen

    def _block_row(self, down: int) -> np.ndarray:
        with self._lock:
            if down not in self._rows:
                width = self._tiles * TILE_PX
                strips = [self._painter.paint(x, down * TILE_PX, min(STRIP_PX, width - x), TILE_PX) for x in range(0, width, STRIP_PX)]
                self._rows[down] = np.concatenate(strips, axis=1)
            return self._rows[down]

    def _new_copy_painter(self, column: int, row: int) -> SlidePainter:
        """Draws one copy of the block with the section's outline, in positions of the block."""
        cells, period = self.tissue.block_cells, self.tissue.period_um
        depth = self.tissue.edge_depth(unfolded(cells.x_um, column, period), unfolded(cells.y_um, row, period))
        return self._painter.of(_Copy(self.tissue, column, row), chosen(cells, depth > CELL_EDGE_UM))
