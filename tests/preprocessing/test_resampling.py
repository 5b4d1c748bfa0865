"""Resampling: Pillow's Lanczos over a window's own pixels, whatever the window."""
import numpy as np
import pytest
from numba import njit
from numba.core.caching import CacheImpl
from PIL import Image

from preprocessing.kernels import kernel
from preprocessing.resampling import BITS, LANES, lanczos_weights, resample_windows
from preprocessing.strips import packed

LEFT, TOP = 1000, 70_000         # where the pixels begin at level 0


def noise(rng, height=420, width=500) -> np.ndarray:
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def black_and_white(rng, height=420, width=500) -> np.ndarray:
    """Sharp edges: every filter overshoots, in both directions."""
    return np.repeat(np.where(rng.random((height, width, 1)) < 0.5, 0, 255).astype(np.uint8), 3, axis=2)


def tissue(rng, height=420, width=500) -> np.ndarray:
    """Pink ground with dark round nuclei and white gaps."""
    y, x = np.indices((height, width))
    pixels = np.clip(rng.normal((225, 165, 200), 8, (height, width, 3)), 0, 255)
    for number in range(400):
        row, column, radius = rng.uniform(0, height), rng.uniform(0, width), rng.uniform(3, 9)
        pixels[(y - row) ** 2 + (x - column) ** 2 < radius ** 2] = (245, 244, 246) if number % 5 == 0 else (90, 60, 130)
    return pixels.astype(np.uint8)


def resampled(pixels: np.ndarray, windows: np.ndarray, patch_px: int, which=None) -> np.ndarray:
    """Windows (n, 4) in pixels of the picture, which stands at (LEFT, TOP) of the slide."""
    windows = windows + np.tile((LEFT, TOP), 2)
    boxes = np.concatenate([np.floor(windows[:, :2]), np.ceil(windows[:, 2:])], axis=1).astype(np.int64)
    patches = np.full((len(windows), patch_px, patch_px, 3), 7, np.uint8)
    which = np.arange(len(windows)) if which is None else np.array(which)
    resample_windows(packed(Image.fromarray(pixels)).copy(), LEFT, TOP, windows, boxes, which, patches)
    return patches


def by_pillow(pixels: np.ndarray, window, patch_px: int) -> np.ndarray:
    x0, y0, x1, y1 = window
    left, top = int(np.floor(x0)), int(np.floor(y0))
    region = Image.fromarray(pixels).crop((left, top, int(np.ceil(x1)), int(np.ceil(y1))))
    return np.asarray(region.resize((patch_px, patch_px), Image.Resampling.LANCZOS, box=(x0 - left, y0 - top, x1 - left, y1 - top)))


def random_windows(rng, count: int, side: float, whole: bool) -> np.ndarray:
    starts = rng.uniform(0, 1, (count, 2)) * (np.array([500, 420]) - np.ceil(side))
    starts = np.floor(starts) if whole else starts
    return np.concatenate([starts, starts + side], axis=1)


@pytest.mark.parametrize("picture", [noise, black_and_white, tissue])
@pytest.mark.parametrize("side, patch_px", [
    (201, 128), (200.74, 128), (55, 128), (54.3, 32), (128, 128), (128.5, 128), (400.2, 32), (110.9, 512), (300, 224), (33, 33), (31.9, 32),
    (7, 64), (5.5, 16), (3.2, 32), (1.7, 32), (1, 32), (0.3, 32), (60.2, 1), (40.4, 3)], ids=str)
def test_patches_are_those_of_pillow(picture, side, patch_px):
    rng = np.random.default_rng(int(side * 10) + patch_px)
    pixels = picture(rng)
    windows = random_windows(rng, 10, side, whole=side == int(side))
    assert np.array_equal(resampled(pixels, windows, patch_px), np.stack([by_pillow(pixels, window, patch_px) for window in windows]))


def test_a_window_sees_no_pixel_beyond_its_own():
    rng = np.random.default_rng(0)
    pixels, window = noise(rng), np.array([[100.5, 90.25, 164.75, 154.5]])
    other = np.full_like(pixels, 255)
    other[90:155, 100:165] = pixels[90:155, 100:165]
    assert np.array_equal(resampled(pixels, window, 32), resampled(other, window, 32))


def test_one_window_does_not_depend_on_those_resampled_with_it_and_the_rest_is_left_alone():
    rng = np.random.default_rng(1)
    pixels = noise(rng)
    windows = np.concatenate([random_windows(rng, 4, side, whole=False) for side in (200.7, 20.1, LANES, 3 * LANES + 1.5, 2.2)])
    together, some = resampled(pixels, windows, 48), resampled(pixels, windows, 48, which=[17, 3, 9])
    for row in (17, 3, 9):
        assert np.array_equal(together[row], some[row])
        assert np.array_equal(together[row], resampled(pixels, windows[row:row + 1], 48)[0])
    assert (np.delete(some, [3, 9, 17], axis=0) == 7).all()


def test_one_colour_stays_that_colour_and_a_window_that_sticks_out_by_rounding_is_cut_off():
    pixels = np.full((420, 500, 3), (13, 128, 255), np.uint8)
    for window in ([0, 0, 90.5, 90.5], [499.5, 419.5, 500, 420]):
        assert (resampled(pixels, np.array([window], float), 40) == (13, 128, 255)).all()
    edge = np.array([[-1e-9, -1e-9, 420 + 1e-9, 420 + 1e-9]]) + np.tile((LEFT, TOP), 2)
    patches, boxes = np.empty((1, 40, 40, 3), np.uint8), np.array([[LEFT, TOP, LEFT + 420, TOP + 420]])
    resample_windows(packed(Image.fromarray(pixels)).copy(), LEFT, TOP, edge, boxes, np.array([0]), patches)
    assert (patches == (13, 128, 255)).all()


@pytest.mark.parametrize("n_px, n_out", [(202, 128), (20, 128), (3000, 7), (1, 5)])
def test_weights_are_lanczos_and_sum_to_one(n_px, n_out):
    first, count, weights = np.empty(n_out, np.int64), np.empty(n_out, np.int64), np.zeros((n_out, 6 * n_px + 6), np.int32)
    lanczos_weights(0.4 * (n_px > 1), n_px - 0.3 * (n_px > 1), n_px, first, count, weights)
    start, stop = 0.4 * (n_px > 1), n_px - 0.3 * (n_px > 1)
    step = (stop - start) / n_out
    for output in range(n_out):
        x = (np.arange(n_px) + 0.5 - (start + (output + 0.5) * step)) / max(step, 1)
        expected = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0)
        found = np.zeros(n_px)
        found[first[output]:first[output] + count[output]] = weights[output, :count[output]] / 2 ** BITS
        assert np.allclose(found, expected / expected.sum(), atol=1e-6)


def test_kernels_work_where_compiled_code_cannot_be_kept(monkeypatch):
    def double(x):
        return 2 * x
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])               # as numba finds it on a read-only installation
    with pytest.raises(RuntimeError, match="cannot cache function"):
        njit(cache=True)(double)
    assert kernel(double)(21) == 42 and kernel(error_model="numpy")(double)(21) == 42
