"""Resample windows of decoded pixels to patches by Lanczos over each pixel's footprint: the compiled loop beneath `windows.py`.

The filter is Pillow's `crop` and `resize(LANCZOS, box=)`: rows first, rounded to 8 bits, then columns; a window sees no pixel beyond
its own whole pixels. Weights are rounded to 1 / 2^22 and sums are whole numbers, as Pillow's are, so the patches are the same.
Lanes of the processor run over 32 rows of a window at a time, which lie transposed: tap after tap is one row of numbers times one
weight. Pixels are uint32: R, G, B and a byte without meaning, in the order of memory. Nothing here checks its arguments.
"""
from __future__ import annotations

import math

import numpy as np

from preprocessing.kernels import kernel

LANES = 32           # rows of a window resampled side by side
LOBES = 3            # of Lanczos's filter, to each side
BITS = 22            # of a weight, behind the point: 255 times a sum of weights fits into 32
HALF = np.int32(1 << (BITS - 1))


@kernel(error_model="numpy")
def resample_windows(pixels, left, top, windows, boxes, which, patches):
    """Resample those windows (float64 (n, 4)) that `which` lists into patches[which], uint8 (n, patch_px, patch_px, 3).

    `pixels` uint32 (h, w) begin at (left, top) of level 0 and hold the `boxes` (int64 (n, 4)) of these windows."""
    patch_px, most_columns, most_rows = patches.shape[1], 1, 1
    for n in which:
        most_columns = max(most_columns, boxes[n, 2] - boxes[n, 0])
        most_rows = max(most_rows, boxes[n, 3] - boxes[n, 1])
    most_taps = int(2 * LOBES * max(max(most_columns, most_rows) / patch_px, 1.0)) + 3
    first, count, weights = np.empty(patch_px, np.int64), np.empty(patch_px, np.int64), np.empty((patch_px, most_taps), np.int32)
    turned = np.empty((most_columns, LANES), np.uint32)                            # a block of rows, transposed; lanes beyond it are stale
    lanes = np.empty((most_columns, 4 * LANES), np.int32)                          # the same, a channel each
    narrow = np.empty((most_rows, 3 * patch_px), np.int32)                         # all rows of a window, resampled
    sums, bytes_of_column = np.empty(4 * LANES, np.int32), np.empty((patch_px, 4 * LANES), np.uint8)
    row_sums, bytes_of_row = np.empty(3 * patch_px, np.int32), np.empty(3 * patch_px, np.uint8)
    for n in which:
        x0, y0, x1, y1 = boxes[n, 0], boxes[n, 1], boxes[n, 2], boxes[n, 3]
        lanczos_weights(windows[n, 0] - x0, windows[n, 2] - x0, x1 - x0, first, count, weights)
        for row in range(y0, y1, LANES):
            n_rows = min(LANES, y1 - row)
            _transpose(pixels[row - top:row - top + n_rows, x0 - left:x1 - left], turned, lanes)
            for column in range(patch_px):
                _weigh(lanes, first[column], count[column], weights[column], sums)
                _round(sums, bytes_of_column[column])
            for lane in range(n_rows):
                _transpose_back(bytes_of_column, 4 * lane, bytes_of_row, narrow[row - y0 + lane])
        lanczos_weights(windows[n, 1] - y0, windows[n, 3] - y0, y1 - y0, first, count, weights)
        patch = patches[n].reshape(patch_px, 3 * patch_px)
        for row in range(patch_px):
            _weigh(narrow, first[row], count[row], weights[row], row_sums)
            _round(row_sums, patch[row])


@kernel(error_model="numpy")
def lanczos_weights(start, stop, n_px, first, count, weights):
    """Weights, times 2^BITS, of the taps of len(first) outputs that share [start, stop) of n_px pixels: `count` taps from `first`.

    A tap is sinc(x) sinc(x / 3) with x in pixels, or in outputs where these are larger; its angle is a = pi x / 3. Angles of
    neighbours differ by `turn`, so each sine follows from the one before, and sin(3 a) = sin(a) (3 - 4 sin²(a))."""
    start, stop = np.float32(max(start, 0.0)), np.float32(min(stop, float(n_px)))       # a rounding error may stick out
    step = np.float64(stop - start) / len(first)                                        # Pillow takes a box as float32
    scale = max(step, 1.0)
    reach, turn = LOBES * scale, math.pi / (LOBES * scale)
    cos_turn, sin_turn = math.cos(turn), math.sin(turn)
    exact = np.empty(weights.shape[1])
    for output in range(len(first)):
        centre = start + (output + 0.5) * step
        begin, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), n_px)
        angle = (begin - centre + 0.5) * turn
        sine, cosine, total = math.sin(angle), math.cos(angle), 0.0
        for tap in range(end - begin):
            angle, weight = (begin + tap - centre + 0.5) * turn, 1.0
            if angle < -math.pi or angle >= math.pi:
                weight = 0.0
            elif angle != 0.0:
                weight = sine * sine * (3.0 - 4.0 * sine * sine) / (3.0 * angle * angle)
            exact[tap] = weight
            total += weight
            sine, cosine = sine * cos_turn + cosine * sin_turn, cosine * cos_turn - sine * sin_turn
        for tap in range(end - begin):
            weight = exact[tap] / total * (1 << BITS)
            weights[output, tap] = int(weight + 0.5) if weight >= 0 else int(weight - 0.5)
        first[output], count[output] = begin, end - begin


@kernel(error_model="numpy")
def _weigh(lines, first, count, weights, sums):
    """sums = one half, for `_round`, + the weighted sum of `count` lines. Four taps at a time, as sums are read and written."""
    weight, line = weights[0], lines[first]
    for i in range(len(sums)):
        sums[i] = HALF + weight * line[i]
    tap = 1
    while tap + 3 < count:
        w0, w1, w2, w3 = weights[tap], weights[tap + 1], weights[tap + 2], weights[tap + 3]
        at = first + tap
        a, b, c, d = lines[at], lines[at + 1], lines[at + 2], lines[at + 3]
        for i in range(len(sums)):
            sums[i] += w0 * a[i] + w1 * b[i] + w2 * c[i] + w3 * d[i]
        tap += 4
    while tap < count:
        weight, line = weights[tap], lines[first + tap]
        for i in range(len(sums)):
            sums[i] += weight * line[i]
        tap += 1


@kernel(error_model="numpy")
def _round(sums, out):
    """Drop the bits behind the point, clip to 0 ... 255."""
    for i in range(len(out)):
        out[i] = max(min(sums[i] >> BITS, 255), 0)


@kernel(error_model="numpy")
def _transpose(rows, turned, lanes):
    """At most LANES `rows` of pixels -> lanes[column, 4 * row + channel]."""
    for row in range(rows.shape[0]):
        line = rows[row]
        for column in range(len(line)):
            turned[column, row] = line[column]
    channels = turned.view(np.uint8)
    for column in range(rows.shape[1]):
        for i in range(4 * LANES):
            lanes[column, i] = channels[column, i]


@kernel(error_model="numpy")
def _transpose_back(columns, lane, buffer, row):
    """Three channels of one row out of `columns` (patch_px, 4 * LANES)."""
    for column in range(len(columns)):
        for channel in range(3):
            buffer[3 * column + channel] = columns[column, lane + channel]
    for i in range(len(row)):
        row[i] = buffer[i]
