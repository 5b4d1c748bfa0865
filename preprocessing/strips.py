"""Group windows of a slide into strips that are decoded once and shared by all windows over them.

A strip is the bounding box of consecutive windows, at most MAX_STRIP_PX large. It is decoded only where its windows together
have more pixels than it has; sparse windows (a Visium section, random places) stay alone and are read one by one.
Windows are floats (x0, y0, x1, y1) of the level-0 plane; boxes are whole pixels (left, top, right, bottom) of the same plane.
Decoded pixels are uint32 (h, w), as `resampling.py` takes them: R, G, B and a byte without meaning, in the order of memory.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from itertools import product

import numpy as np
from PIL import Image

from preprocessing.slide import Slide, SlideReadError

MAX_STRIP_PX = 1 << 25       # pixels of a strip: 134 MB of 4 bytes each
PIECE_PX = 1024              # a strip is decoded in squares of this side, on a grid that a slide's own tiles fit into
CHUNK_WINDOWS = 64           # windows one worker cuts at a time
CHUNK_BYTES = 4 << 20        # fewer where patches or windows are large
MAX_GROWTH = 2               # a joined strip may cost this many times its parts: a new row of windows widens it by little
BAND_PX = 256                # windows of a chunk are neighbours: sorted by bands of this height, then from left to right
WHITE = np.uint32(0xFFFFFFFF)

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Chunk:
    """A few windows of one block, next to each other on the slide."""

    rows: np.ndarray       # int (n,): which rows of the block
    windows: np.ndarray    # float64 (n, 4)
    boxes: np.ndarray      # int64 (n, 4): the whole pixels under each window

    @property
    def box(self) -> Box:
        return (*self.boxes[:, :2].min(axis=0).tolist(), *self.boxes[:, 2:].max(axis=0).tolist())

    @property
    def n_px(self) -> int:
        """Pixels of its windows together, shared ones counted for each."""
        return int(np.prod(self.boxes[:, 2:] - self.boxes[:, :2], axis=1).sum())


@dataclass
class Strip:
    """Consecutive chunks and their bounding box; decoded only if `is_shared`."""

    chunks: list[Chunk]
    box: Box
    n_px: int                                               # of all its windows together
    pixels: np.ndarray | None = None                        # those of the box, once `wait` returns
    pieces: list[Future] = field(default_factory=list)

    @property
    def is_shared(self) -> bool:
        return _area(self.box) <= min(self.n_px, MAX_STRIP_PX)

    @property
    def cost_px(self) -> int:
        """Pixels to decode."""
        return _area(self.box) if self.is_shared else self.n_px

    def start_decoding(self, slide: Slide, pool: Executor) -> None:
        """Hand the strip's pieces to the workers; `wait` for them before using `pixels`."""
        left, top, right, bottom = self.box
        self.pixels = np.full((bottom - top, right - left), WHITE)               # what lies off the slide stays white
        inside = (max(left, 0), max(top, 0), min(right, slide.width_px), min(bottom, slide.height_px))
        self.pieces = [pool.submit(self._decode, slide, piece) for piece in _grid(inside)]

    def wait(self) -> list[Box]:
        """Boxes of the pieces that could not be decoded. Called by a worker, it waits for jobs handed in before its own."""
        return [piece for piece in (future.result() for future in self.pieces) if piece is not None]

    def _decode(self, slide: Slide, piece: Box) -> Box | None:
        try:
            _paste(slide, piece, self.pixels, self.box)
        except SlideReadError:                   # whose windows those are is found out by reading each on its own
            return piece
        return None


def chunks_of(windows: np.ndarray, patch_px: int) -> Iterator[Chunk]:
    """The windows (n, 4) of one block as chunks of neighbours, whatever their order."""
    if not len(windows):
        return
    starts = np.floor(windows[:, :2])
    boxes = np.concatenate([starts, np.maximum(np.ceil(windows[:, 2:]), starts + 1)], axis=1).astype(np.int64)
    order = np.lexsort((boxes[:, 0], boxes[:, 1] // BAND_PX))
    largest = int(max(np.prod(boxes[:, 2:] - boxes[:, :2], axis=1).max() // 4, patch_px ** 2)) * 3
    step = int(np.clip(CHUNK_BYTES // largest, 1, CHUNK_WINDOWS))
    for start in range(0, len(order), step):
        rows = order[start:start + step]
        yield Chunk(rows, windows[rows], boxes[rows])


def plan_strips(chunks: Iterator[Chunk]) -> Iterator[Strip]:
    """Consecutive chunks joined while their box stays within MAX_STRIP_PX, what lies between them is little, and
    neither is dense without the other."""
    strip = None
    for chunk in chunks:
        alone = Strip([chunk], chunk.box, chunk.n_px)
        if strip is not None:
            joined = Strip(strip.chunks + alone.chunks, _around(strip.box, alone.box), strip.n_px + alone.n_px)
            if (_area(joined.box) <= MAX_STRIP_PX and joined.cost_px <= MAX_GROWTH * (strip.cost_px + alone.cost_px)
                    and (joined.is_shared or not (strip.is_shared or alone.is_shared))):
                strip = joined
                continue
            yield strip
        strip = alone
    if strip is not None:
        yield strip


def read_padded(slide: Slide, box: Box) -> np.ndarray:
    """The pixels of a box of level 0, uint32 (h, w); what lies off the slide is white."""
    left, top, right, bottom = box
    pixels = np.full((bottom - top, right - left), WHITE)
    inside = max(left, 0), max(top, 0), min(right, slide.width_px), min(bottom, slide.height_px)
    _paste(slide, inside, pixels, box)
    return pixels


def _paste(slide: Slide, piece: Box, pixels: np.ndarray, box: Box) -> None:
    """Decode a piece of the slide into the pixels of a box around it."""
    left, top, right, bottom = piece
    image = slide.read_image(left, top, right - left, bottom - top)
    pixels[top - box[1]:bottom - box[1], left - box[0]:right - box[0]] = packed(image)


def packed(image: Image.Image) -> np.ndarray:
    """The pixels of an RGB image of Pillow, uint32 (h, w)."""
    return np.frombuffer(image.tobytes("raw", "RGBX"), np.uint32).reshape(image.height, image.width)


def overlap(box: Sequence[int], other: Sequence[int]) -> bool:
    return box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def _around(box: Box, other: Box) -> Box:
    return min(box[0], other[0]), min(box[1], other[1]), max(box[2], other[2]), max(box[3], other[3])


def _grid(box: Box) -> list[Box]:
    """A box cut along the slide's grid of PIECE_PX."""
    left, top, right, bottom = box
    rows = range(top // PIECE_PX * PIECE_PX, bottom, PIECE_PX)
    columns = range(left // PIECE_PX * PIECE_PX, right, PIECE_PX)
    return [(max(x, left), max(y, top), min(x + PIECE_PX, right), min(y + PIECE_PX, bottom)) for y, x in product(rows, columns)]
