"""Blocks of patches: equal to reading each window on its own, decoded once where windows overlap, right around damaged tiles."""
import threading

import numpy as np
import pytest
import tifffile
from PIL import Image

from preprocessing import strips
from preprocessing.slide import open_slide
from preprocessing.windows import cut_blocks

SIDE_PX = 40.4


class CountingSlide:
    """A slide in memory that counts the pixels read from it."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.n_px, self.path = pixels, 0, "counting"
        self.height_px, self.width_px = pixels.shape[:2]

    def read_image(self, x, y, width, height):
        assert x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= self.width_px and y + height <= self.height_px
        self.n_px += width * height
        return Image.fromarray(np.ascontiguousarray(self.pixels[y:y + height, x:x + width]))


def texture(height=500, width=700) -> np.ndarray:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 4, width // 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def grid(step: float, width=700, height=500, tilt=0.0137) -> np.ndarray:
    """Centres on a tilted grid, none at a whole pixel, by row, then column, far enough from the edge."""
    x, y = np.meshgrid(np.arange(35.13, width - 35, step), np.arange(35.29, height - 35, step))
    return np.stack([x.ravel() + tilt * y.ravel(), y.ravel() + tilt * x.ravel()], axis=1)


def blocks_of(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def plain(pixels: np.ndarray, centre) -> np.ndarray:
    """The window about one centre by itself: crop, then Lanczos; what lies off the slide is white."""
    reach = 100
    padded = Image.fromarray(np.pad(pixels, ((reach, reach), (reach, reach), (0, 0)), constant_values=255))
    x0, y0, x1, y1 = (value + reach for value in (*np.subtract(centre, SIDE_PX / 2), *np.add(centre, SIDE_PX / 2)))
    left, top = int(np.floor(x0)), int(np.floor(y0))
    part = padded.crop((left, top, int(np.ceil(x1)), int(np.ceil(y1))))
    return np.asarray(part.resize((24, 24), Image.Resampling.LANCZOS, box=(x0 - left, y0 - top, x1 - left, y1 - top)))


def cut(slide, centres, blocks, **options) -> list:
    return list(cut_blocks(slide, centres, SIDE_PX, 1.0, 24, blocks, **options))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("order", ["rows", "columns", "random"])
@pytest.mark.parametrize("step", [5, 40.4, 150], ids=["overlapping", "abutting", "apart"])
def test_patches_equal_each_window_read_on_its_own(step, order, workers):
    centres = grid(step)
    if order == "columns":
        centres = centres[np.lexsort((centres[:, 1], np.round(centres[:, 0])))]
    elif order == "random":
        centres = np.random.default_rng(1).permutation(centres)
    found = cut(CountingSlide(texture()), centres, blocks_of(len(centres), 100), workers=workers)
    assert [len(block.patches) for block in found] == [block.stop - block.start for block in blocks_of(len(centres), 100)]
    assert all(block.readable.all() and block.reasons == () for block in found)
    patches = np.concatenate([block.patches for block in found])
    for row in range(0, len(centres), max(1, len(centres) // 60)):
        assert np.array_equal(patches[row], plain(texture(), centres[row])), row


def test_padded_windows_are_white_beyond_the_edge_in_a_shared_strip_too():
    centres = np.array([[x, 3.3] for x in range(0, 700, 5)] + [[699.5, y] for y in range(0, 500, 5)], float)
    [block] = cut(CountingSlide(texture()), centres, [slice(0, len(centres))], edge="pad")
    assert all(np.array_equal(patch, plain(texture(), centre)) for patch, centre in zip(block.patches, centres, strict=True))


@pytest.mark.parametrize("size", [7, 100, 100_000])
def test_overlapping_windows_decode_every_pixel_about_once_whatever_the_blocks(size, monkeypatch):
    slide, centres = CountingSlide(texture()), grid(5)
    cut(slide, centres, blocks_of(len(centres), size), workers=2)
    assert slide.n_px <= 500 * 700
    monkeypatch.setattr(strips, "MAX_STRIP_PX", 700 * 150)               # strips of 150 rows repeat the 41 under the last windows
    slide.n_px = 0
    cut(slide, centres, blocks_of(len(centres), size), workers=2)
    assert 500 * 600 < slide.n_px <= 500 * 700 * 1.6


def test_sparse_windows_decode_nothing_between_them():
    slide, centres = CountingSlide(texture()), grid(150)
    cut(slide, centres, [slice(0, len(centres))])
    assert slide.n_px <= len(centres) * 42 ** 2


def test_a_distant_island_does_not_make_a_dense_one_sparse():
    slide = CountingSlide(np.zeros((300, 9000, 3), np.uint8))
    island = np.stack(np.meshgrid(np.arange(40, 160, 3), np.arange(40, 160, 3)), axis=-1).reshape(-1, 2).astype(float)
    centres = np.concatenate([island, island + (8800, 100)])
    cut(slide, centres, blocks_of(len(centres), 500))
    assert slide.n_px < 12 * 200 ** 2                                    # alone: 3200 windows of 41 px, 5.4 M


def test_blocks_may_start_late_and_be_empty():
    slide, centres = CountingSlide(texture()), grid(20)
    whole = np.concatenate([block.patches for block in cut(slide, centres, blocks_of(len(centres), 50))])
    late, empty = cut(slide, centres, [slice(100, 150), slice(150, 150)])
    assert np.array_equal(late.patches, whole[100:150]) and empty.patches.shape == (0, 24, 24, 3) and cut(slide, centres, []) == []


class GatedSlide(CountingSlide):
    """A slide whose reads, but the first three, wait for the gate."""

    def __init__(self, pixels: np.ndarray):
        super().__init__(pixels)
        self.gate, self.n_reads = threading.Event(), 0

    def read_image(self, *box):
        self.n_reads += 1
        if self.n_reads > 3:
            assert self.gate.wait(timeout=60)
        return super().read_image(*box)


def test_a_caller_that_stops_early_is_not_kept_waiting_for_the_rest():
    slide, centres = GatedSlide(texture()), grid(150)                    # sparse: one strip, a chunk a block, a read a window
    cutting = cut_blocks(slide, centres, SIDE_PX, 1.0, 24, blocks_of(len(centres), 3), workers=1)
    next(cutting)
    opening = threading.Timer(0.5, slide.gate.set)
    opening.start()
    cutting.close()                                                      # waits for the chunk under way, which waits for the gate
    opening.join()
    assert len(centres) == 15 and slide.n_reads <= 6


def test_a_window_that_is_not_inside_is_refused_before_anything_is_cut():
    with pytest.raises(ValueError, match="not inside .edge=drop."):
        cut_blocks(CountingSlide(texture()), np.array([[100.0, 100], [5, 100]]), SIDE_PX, 1.0, 24, [slice(0, 2)])


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("step", [8, 60], ids=["overlapping", "apart"])
def test_exactly_the_patches_over_a_corrupt_tile_are_unreadable(step, workers, tmp_path, monkeypatch):
    monkeypatch.setattr(strips, "PIECE_PX", 128)
    path = tmp_path / "s.tif"
    tifffile.imwrite(path, texture(), photometric="rgb", tile=(64, 64), compression="jpeg")
    centres = grid(step)
    with open_slide(path) as slide:
        whole = np.concatenate([block.patches for block in cut(slide, centres, blocks_of(len(centres), 200))])
    number = 11 * 3 + 4                                                  # 11 tiles a row: x 256-320, y 192-256
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[number], tiff.pages[0].databytecounts[number]
    content = bytearray(path.read_bytes())
    content[offset:offset + count] = bytes(count)
    path.write_bytes(content)
    with open_slide(path) as slide:
        found = cut(slide, centres, blocks_of(len(centres), 200), workers=workers)
    first, last = np.floor(centres - SIDE_PX / 2), np.ceil(centres + SIDE_PX / 2)
    over = ((first < (320, 256)) & (last > (256, 192))).all(axis=1)
    readable = np.concatenate([block.readable for block in found])
    patches = np.concatenate([block.patches for block in found])
    assert 0 < over.sum() < len(centres) / 4 and np.array_equal(readable, ~over)
    assert np.array_equal(patches[~over], whole[~over]) and (patches[over] == 255).all()
    reasons = [reason for block in found for reason in block.reasons]
    row = np.flatnonzero(over)[0]
    assert len(reasons) == over.sum() and f"region x={first[row, 0]:.0f} y={first[row, 1]:.0f} " in reasons[0]
