"""Lay a capture array over a simulated section: Visium's hexagons of spots or Visium HD's 2 µm bins.

Touches no files. A position of the array is known by its number; what belongs to it is made when asked for, so that an
array of eleven million bins takes no memory. Positions in µm from the slide's corner.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from preprocessing.simulation.config import BIN_UM, SimulateConfig
from preprocessing.simulation.space_ranger_files import hd_barcodes, visium_barcodes

COLUMN_STEP_UM, ROW_STEP_UM = 50.0, 50.0 * 3 ** 0.5     # Visium: neighbours in a row are two column steps apart
CLUSTER_BLOCK_BINS = 16                                 # Visium HD: side of the squares that are clustered, in bins
BLOCK_BINS, BLOCK_SPOTS = 200_000, 512                  # positions whose counts are in memory at a time


@dataclass(frozen=True)
class Positions:
    """Some positions of an array; each field (N,)."""

    barcodes: np.ndarray
    row: np.ndarray
    col: np.ndarray
    x_um: np.ndarray
    y_um: np.ndarray


class VisiumArray:
    """Spots 100 µm apart in rows 86.6 µm apart; `col` has the parity of `row`, as on 10x's slides."""

    def __init__(self, config: SimulateConfig):
        margin = 60.0
        rows, cols = int((config.height_um - 2 * margin) / ROW_STEP_UM) + 1, int((config.width_um - 2 * margin) / COLUMN_STEP_UM) + 1
        row, col = (part.ravel() for part in np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"))
        here = (row + col) % 2 == 0
        self._row, self._col, self._first_um = row[here], col[here], config.rim_um + margin

    def __len__(self) -> int:
        return len(self._row)

    def at(self, numbers: np.ndarray) -> Positions:
        row, col = self._row[numbers], self._col[numbers]
        return Positions(visium_barcodes(row, col), row, col, self._first_um + COLUMN_STEP_UM * col, self._first_um + ROW_STEP_UM * row)

    def ordered(self, in_tissue: np.ndarray) -> np.ndarray:
        """The numbers in tissue, by barcode."""
        numbers = np.flatnonzero(in_tissue)
        return numbers[np.argsort(self.at(numbers).barcodes)]

    def blocks(self, in_tissue: np.ndarray) -> Iterator[np.ndarray]:
        """The numbers in tissue, ordered, a block at a time."""
        numbers = self.ordered(in_tissue)
        yield from np.array_split(numbers, len(numbers) // BLOCK_SPOTS + 1)

    def cluster_unit(self, positions: Positions) -> np.ndarray:
        """(N,) int from 0, what is clustered together: every spot on its own."""
        return np.arange(len(positions.row))


class HDArray:
    """Bins side by side over the whole slide but its rim; columns run against x, as in real Visium HD output."""

    def __init__(self, config: SimulateConfig):
        self.rows, self.cols, self._rim_um = int(config.height_um / BIN_UM), int(config.width_um / BIN_UM), config.rim_um

    def __len__(self) -> int:
        return self.rows * self.cols

    def at(self, numbers: np.ndarray) -> Positions:
        row, col = (part.astype(np.int32) for part in divmod(np.asarray(numbers), self.cols))
        x_um, y_um = self._rim_um + (self.cols - col - 0.5) * BIN_UM, self._rim_um + (row + 0.5) * BIN_UM
        return Positions(hd_barcodes(row, col), row, col, x_um, y_um)

    def ordered(self, in_tissue: np.ndarray) -> np.ndarray:
        """The numbers in tissue, by barcode, which is how they lie."""
        return np.flatnonzero(in_tissue)

    def blocks(self, in_tissue: np.ndarray) -> Iterator[np.ndarray]:
        """The numbers in tissue, ordered, a block of whole bands of array rows at a time, so that no square of bins is torn."""
        band = CLUSTER_BLOCK_BINS * max(1, BLOCK_BINS // (self.cols * CLUSTER_BLOCK_BINS)) * self.cols
        for first in range(0, len(self), band):
            numbers = first + np.flatnonzero(in_tissue[first:first + band])
            if len(numbers):
                yield numbers

    def cluster_unit(self, positions: Positions) -> np.ndarray:
        """(N,) int from 0, what is clustered together: the bins of a square."""
        square = (positions.row // CLUSTER_BLOCK_BINS).astype(np.int64) << 32 | (positions.col // CLUSTER_BLOCK_BINS)
        return np.unique(square, return_inverse=True)[1]


def capture_array(config: SimulateConfig) -> VisiumArray | HDArray:
    return (HDArray if config.is_hd else VisiumArray)(config)
