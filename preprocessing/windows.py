"""Cut square patches around positions on a slide, correct to a fraction of a pixel.

A position (x, y) is a point of the continuous level-0 plane whose origin is the outer corner of the first pixel:
pixel (column j, row i) covers [j, j + 1) × [i, i + 1) and has its middle at (j + 0.5, i + 0.5). A window of side s about
(x, y) is [x - s/2, x + s/2) × [y - s/2, y + s/2) with s = side_um / mpp a float, even or odd or neither; it is read from
level 0 and resampled with an antialiasing filter to patch_px × patch_px.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal

import numpy as np
from PIL import Image

from preprocessing.errors import OptionError

if TYPE_CHECKING:
    from preprocessing.slide import Slide

EDGE_TOLERANCE_PX = 1e-6     # a window that touches the edge is inside in spite of rounding
STRIP_WINDOWS = 64           # windows one worker cuts at a time, from one read where they overlap
MAX_STRIP_PX = 1 << 25       # largest region read at once: 100 MB of RGB
WHITE = 255

Edge = Literal["drop", "pad"]


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


def cut_patches(slide: Slide, centre_xy_px: np.ndarray, side_um: float, mpp: float, patch_px: int, edge: Edge = "drop",
                workers: int = 1) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (row of `centre_xy_px`, uint8 (patch_px, patch_px, 3)) for every window of `windows_inside`, in row order.

    `workers` threads read and resample strips of consecutive windows; decoding and resampling both leave the
    interpreter free. The pictures do not depend on their number.
    """
    if patch_px < 1:
        raise OptionError("--patch-sz-px", "at least 1 px", str(patch_px))
    inside, _ = windows_inside(slide, centre_xy_px, side_um, mpp, edge)
    rows = np.flatnonzero(inside)
    half_px = _side_px(side_um, mpp) / 2
    centres = np.asarray(centre_xy_px, dtype=np.float64).reshape(-1, 2)[rows]
    windows = np.concatenate([centres - half_px, centres + half_px], axis=1)        # (P, 4) x0 y0 x1 y1
    if edge == "drop":                                   # the tolerance of windows_inside must not read past the edge
        windows = np.clip(windows, 0, np.array([slide.width_px, slide.height_px] * 2))
    strips = [slice(start, start + STRIP_WINDOWS) for start in range(0, len(rows), STRIP_WINDOWS)]
    if workers <= 1:
        for strip in strips:
            yield from zip(rows[strip].tolist(), _cut_strip(slide, windows[strip], patch_px), strict=True)
        return
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        for strip in strips:
            pending.append((strip, pool.submit(_cut_strip, slide, windows[strip], patch_px)))
            if len(pending) > 2 * workers:
                yield from _next_strip(pending, rows)
        while pending:
            yield from _next_strip(pending, rows)


def _next_strip(pending: deque, rows: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    strip, patches = pending.popleft()
    return zip(rows[strip].tolist(), patches.result(), strict=True)


def _side_px(side_um: float, mpp: float) -> float:
    """Side of a window in level-0 pixels; both arguments are checked here, once."""
    if not (np.isfinite(side_um) and side_um > 0):
        raise OptionError("--patch-sz-um", "a positive number of µm", f"{side_um:g}")
    if not (np.isfinite(mpp) and mpp > 0):
        raise OptionError("--mpp", "a positive number of µm per pixel", f"{mpp:g}")
    return side_um / mpp


def _cut_strip(slide: Slide, windows: np.ndarray, patch_px: int) -> list[np.ndarray]:
    """Patches of a few consecutive windows (P, 4). Where they overlap, their common region is decoded once."""
    lower, upper = np.floor(windows[:, :2]).astype(int), np.ceil(windows[:, 2:]).astype(int)
    x, y = lower.min(axis=0)
    width, height = upper.max(axis=0) - (x, y)
    if width * height > min(np.prod(upper - lower, axis=1).sum(), MAX_STRIP_PX):
        return [_resample(_read_padded(slide, *low, *(up - low)), window - np.tile(low, 2), patch_px)
                for low, up, window in zip(lower, upper, windows, strict=True)]
    region = _read_padded(slide, x, y, width, height)
    return [_resample(region[low[1] - y:up[1] - y, low[0] - x:up[0] - x], window - np.tile(low, 2), patch_px)
            for low, up, window in zip(lower, upper, windows, strict=True)]


def _read_padded(slide: Slide, x: int, y: int, width: int, height: int) -> np.ndarray:
    """uint8 (height, width, 3) of level 0; what lies off the slide is white."""
    x, y, width, height = int(x), int(y), int(width), int(height)
    x0, y0 = max(x, 0), max(y, 0)
    x1, y1 = min(x + width, slide.width_px), min(y + height, slide.height_px)
    region = slide.read_region(x0, y0, x1 - x0, y1 - y0)
    if region.shape[:2] == (height, width):
        return region
    padded = np.full((height, width, 3), WHITE, dtype=np.uint8)
    padded[y0 - y:y1 - y, x0 - x:x1 - x] = region
    return padded


def _resample(region: np.ndarray, box: np.ndarray, patch_px: int) -> np.ndarray:
    """The float `box` (x0, y0, x1, y1) of a region -> uint8 (patch_px, patch_px, 3), by Lanczos over each pixel's footprint."""
    image = Image.fromarray(np.ascontiguousarray(region))
    box = np.clip(box, 0, np.tile(image.size, 2))        # a box may not stick out by a rounding error
    return np.asarray(image.resize((patch_px, patch_px), Image.Resampling.LANCZOS, box=tuple(box.tolist())))
