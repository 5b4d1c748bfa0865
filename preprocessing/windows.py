"""Cut square patches around positions on a slide, correct to a fraction of a pixel.

A position (x, y) is a point of the continuous level-0 plane whose origin is the outer corner of the first pixel:
pixel (column j, row i) covers [j, j + 1) × [i, i + 1) and has its middle at (j + 0.5, i + 0.5). A window of side s about
(x, y) is [x - s/2, x + s/2) × [y - s/2, y + s/2) with s = side_um / mpp a float, even or odd or neither; it is read from
level 0 and resampled with an antialiasing filter to patch_px × patch_px. Overlapping windows share one decode (`strips.py`).
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np

from preprocessing.errors import OptionError
from preprocessing.resampling import resample_windows
from preprocessing.slide import Slide, SlideReadError
from preprocessing.strips import Chunk, Strip, chunks_of, overlap, plan_strips, read_padded

EDGE_TOLERANCE_PX = 1e-6     # a window that touches the edge is inside in spite of rounding
CHUNKS_AHEAD = 24            # chunks (of 64 windows or 4 MB) cut while the caller is busy: more than a block of 64 MB
WHITE = 255

Edge = Literal["drop", "pad"]


@dataclass(frozen=True)
class CutBlock:
    """The patches of a block of windows, in the order of its rows."""

    patches: np.ndarray        # uint8 (n, patch_px, patch_px, 3); white where not readable
    readable: np.ndarray       # bool (n,): False where a tile under the patch cannot be decoded
    reasons: tuple[str, ...]   # one for each patch that is not readable, naming the region


def windows_inside(slide: Slide, centre_xy_px: np.ndarray, side_um: float, mpp: float,
                   edge: Edge = "drop") -> tuple[np.ndarray, np.ndarray]:
    """Which windows are cut (bool (P,)) and the top-left corner of each, rounded (int64 (P, 2) of (x, y)).

    With `drop` a window must lie wholly on the slide; with `pad` its centre must.
    """
    side_px = _side_px(side_um, mpp)
    if edge not in ("drop", "pad"):
        raise OptionError("--edge", "drop or pad", edge)
    centre_xy_px = np.asarray(centre_xy_px, dtype=np.float64).reshape(-1, 2)
    reach_px = side_px / 2 if edge == "drop" else 0.0
    size = np.array([slide.width_px, slide.height_px])
    inside = ((centre_xy_px - reach_px >= -EDGE_TOLERANCE_PX)
              & (centre_xy_px + reach_px <= size + EDGE_TOLERANCE_PX)).all(axis=1)      # NaN is never inside
    top_left = np.nan_to_num(np.round(centre_xy_px - side_px / 2)).astype(np.int64)
    return inside, top_left


def cut_blocks(slide: Slide, centre_xy_px: np.ndarray, side_um: float, mpp: float, patch_px: int, blocks: Sequence[slice], *,
               edge: Edge = "drop", workers: int = 1) -> Iterator[CutBlock]:
    """Cut the windows about positions (P, 2), one `CutBlock` for each slice of their rows. Every window must be one of `windows_inside`.

    `workers` threads decode strips of the slide and resample from them; both leave the interpreter free. The pictures depend
    neither on their number nor on the blocks nor on the order of the windows, but windows near to each other in order decode least.
    Memory, whatever P and the slide: two strips (`strips.MAX_STRIP_PX`, 134 MB each), one block of patches, CHUNKS_AHEAD chunks of at
    most 4 MB, and for each worker a piece of 1 Mpx or the rows of one window. A slide decoded when it was opened adds itself.
    """
    if patch_px < 1:
        raise OptionError("--patch-sz-px", "at least 1 px", str(patch_px))
    windows = _float_windows(slide, centre_xy_px, side_um, mpp, edge)
    parts = [windows[block] for block in blocks]                 # views
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError(f"{slide.path}: blocks hold windows that are not inside (edge={edge}); keep those of windows_inside")
    return _assembled(parts, patch_px, _cut_in_order(slide, parts, patch_px, workers))


def _side_px(side_um: float, mpp: float) -> float:
    """Side of a window in level-0 pixels; both arguments are checked here, once."""
    if not (np.isfinite(side_um) and side_um > 0):
        raise OptionError("--patch-sz-um", "a positive number of µm", f"{side_um:g}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise OptionError("--mpp", "a positive number of µm per pixel", f"{mpp:g}")
    return side_um / mpp


def _float_windows(slide: Slide, centre_xy_px: np.ndarray, side_um: float, mpp: float, edge: Edge) -> np.ndarray:
    """float64 (P, 4) of (x0, y0, x1, y1); NaN for a window that is not inside."""
    inside, _ = windows_inside(slide, centre_xy_px, side_um, mpp, edge)
    half_px = _side_px(side_um, mpp) / 2
    centres = np.asarray(centre_xy_px, dtype=np.float64).reshape(-1, 2)
    windows = np.concatenate([centres - half_px, centres + half_px], axis=1)
    if edge == "drop":                                   # the tolerance of windows_inside must not read past the edge
        windows = np.clip(windows, 0, np.array([slide.width_px, slide.height_px] * 2))
    windows[~inside] = np.nan
    return windows


# ---- from windows to chunks, to strips, to patches, to blocks -------------------------------------------------------

Cut = tuple[np.ndarray, np.ndarray, dict[int, str]]         # rows of the block (n,), patches (n, px, px, 3), reason by row


def _assembled(parts: list[np.ndarray], patch_px: int, cuts: Iterator[Cut]) -> Iterator[CutBlock]:
    """Chunks, which come in the order of their blocks, put together to blocks."""
    for windows in parts:
        patches, reasons, n_cut = np.empty((len(windows), patch_px, patch_px, 3), np.uint8), {}, 0
        while n_cut < len(windows):
            rows, cut, unreadable = next(cuts)
            patches[rows] = cut
            reasons |= unreadable
            n_cut += len(rows)
        readable = np.ones(len(windows), bool)
        readable[list(reasons)] = False
        yield CutBlock(patches, readable, tuple(reasons[row] for row in sorted(reasons)))


def _cut_in_order(slide: Slide, parts: list[np.ndarray], patch_px: int, workers: int) -> Iterator[Cut]:
    """Chunks cut by workers, in order. The jobs of a strip are its pieces, then its chunks, which wait for the pieces: the pool
    takes jobs in the order in which they were handed in, so none waits for one behind it."""
    pool = ThreadPoolExecutor(max(1, workers))
    pending: deque = deque()                                 # (number of the strip, future)
    try:
        chunks = (chunk for windows in parts for chunk in chunks_of(windows, patch_px))
        for number, strip in enumerate(plan_strips(chunks)):
            while pending and pending[0][0] < number - 1:    # no more than two strips at a time
                yield pending.popleft()[1].result()
            if strip.is_shared:
                strip.start_decoding(slide, pool)
            for chunk in strip.chunks:
                pending.append((number, pool.submit(_cut_chunk, slide, strip, chunk, patch_px)))
                if len(pending) > max(CHUNKS_AHEAD, 2 * workers):
                    yield pending.popleft()[1].result()
        while pending:
            yield pending.popleft()[1].result()
    finally:                                                 # also where the caller stops early
        pool.shutdown(cancel_futures=True)


def _cut_chunk(slide: Slide, strip: Strip, chunk: Chunk, patch_px: int) -> Cut:
    undecoded, boxes = strip.wait(), chunk.boxes.tolist()
    shared = np.array([strip.pixels is not None and not any(overlap(box, piece) for piece in undecoded) for box in boxes])
    patches, reasons = np.empty((len(chunk.rows), patch_px, patch_px, 3), np.uint8), {}
    if shared.any():
        resample_windows(strip.pixels, *strip.box[:2], chunk.windows, chunk.boxes, np.flatnonzero(shared), patches)
    for alone in np.flatnonzero(~shared):
        try:
            pixels = read_padded(slide, boxes[alone])
        except SlideReadError as error:
            patches[alone] = WHITE
            reasons[int(chunk.rows[alone])] = str(error)
        else:
            resample_windows(pixels, *boxes[alone][:2], chunk.windows, chunk.boxes, np.array([alone]), patches)
    return chunk.rows, patches, reasons
