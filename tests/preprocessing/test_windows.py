"""Windows: the patch's middle is the position, to half a pixel; nothing black enters at the slide's edge."""
import numpy as np
import pytest
from PIL import Image

from preprocessing.errors import OptionError
from preprocessing.windows import cut_blocks, windows_inside


class ArraySlide:
    """A slide in memory that refuses, as a real one may, to read over its edge."""

    def __init__(self, pixels: np.ndarray):
        self.pixels, self.n_reads = pixels, 0
        self.height_px, self.width_px = pixels.shape[:2]

    def read_image(self, x, y, width, height):
        assert x >= 0 and y >= 0 and width > 0 and height > 0 and x + width <= self.width_px and y + height <= self.height_px
        self.n_reads += 1
        return Image.fromarray(np.ascontiguousarray(self.pixels[y:y + height, x:x + width]))


def grey_slide(width=400, height=300) -> ArraySlide:
    return ArraySlide(np.full((height, width, 3), 128, dtype=np.uint8))


def ramp_slide(width=256, height=200) -> ArraySlide:
    """Red is x + 0.5 and green y + 0.5 at the middle of each pixel (rounded down): colour names the place."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0], pixels[..., 1] = np.arange(width), np.arange(height)[:, None]
    return ArraySlide(pixels)


def cut_inside(slide, centres, side_um, mpp, patch_px, edge="drop", workers=1) -> dict[int, np.ndarray]:
    """The patch of every centre whose window is inside, by row."""
    rows = np.flatnonzero(windows_inside(slide, centres, side_um, mpp, edge)[0])
    [cut] = cut_blocks(slide, centres[rows], side_um, mpp, patch_px, [slice(0, len(rows))], edge=edge, workers=workers)
    assert cut.readable.all()
    return dict(zip(rows.tolist(), cut.patches, strict=True))


def one_patch(slide, centre, side_um, mpp=1.0, patch_px=64, **options) -> np.ndarray:
    [patch] = cut_inside(slide, np.array([centre]), side_um, mpp, patch_px, **options).values()
    assert patch.shape == (patch_px, patch_px, 3) and patch.dtype == np.uint8
    return patch


@pytest.mark.parametrize("patch_px", [32, 63, 128, 128 * 2])
@pytest.mark.parametrize("side_um", [54, 55, 54.6, 101.3])
@pytest.mark.parametrize("mpp", [0.5, 0.7269, 1.0])
def test_a_mark_at_the_position_is_in_the_middle_of_the_patch(mpp, side_um, patch_px):
    slide = grey_slide()
    slide.pixels[140:144, 210:214] = (255, 0, 0)                 # its centre is the point (212, 142)
    patch = one_patch(slide, (212, 142), side_um, mpp, patch_px)
    redness = (patch[..., 0].astype(float) - patch[..., 1]).clip(0)
    y, x = np.indices(redness.shape) + 0.5
    middle = np.array([(redness * x).sum(), (redness * y).sum()]) / redness.sum()
    level0_px = (middle - patch_px / 2) * (side_um / mpp) / patch_px
    assert np.abs(level0_px).max() <= 0.1


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5, 0.8])
@pytest.mark.parametrize("side_px", [20, 21, 20.4])
def test_positions_between_pixels_are_honoured(side_px, fraction):
    centre = (100 + fraction, 80 + fraction / 2)
    patch = one_patch(ramp_slide(), centre, side_px, patch_px=60).astype(float)
    found = patch[..., :2].mean(axis=(0, 1)) + 0.5
    assert np.abs(found - centre).max() <= 0.3       # grey levels are whole numbers


def test_the_side_is_patch_um_over_mpp_and_resampling_is_antialiased():
    stripes = ArraySlide(np.tile(np.array([0, 255], dtype=np.uint8)[None, :, None], (200, 100, 3)))
    patch = one_patch(stripes, (100, 100), side_um=55, mpp=0.5, patch_px=22)       # 110 px of 1 px stripes -> 22 px
    assert np.abs(patch.astype(float) - 127.5).max() < 20
    left = one_patch(ramp_slide(), (100, 100), side_um=55, mpp=0.5, patch_px=22)[11, 0, 0] + 0.5
    assert left == pytest.approx(100 - 55 + 2.5, abs=0.6)        # 110 px in 22 columns, the first one 5 px wide


@pytest.mark.parametrize(("centre", "inside"), [
    ((10, 150), True), ((9.9, 150), False), ((390, 150), True), ((390.1, 150), False),
    ((200, 10), True), ((200, 9), False), ((200, 290), True), ((200, 291), False),
    ((-50, 150), False), ((1000, 1000), False), ((np.nan, 150), False),
], ids=str)
def test_only_windows_wholly_on_the_slide_are_kept(centre, inside):
    mask, _ = windows_inside(grey_slide(), np.array([centre]), 20, 1.0)
    assert mask.tolist() == [inside]
    assert len(cut_inside(grey_slide(), np.array([centre]), 20, 1.0, 16)) == int(inside)


def test_a_window_that_touches_the_edge_is_inside_in_spite_of_rounding():
    side_um, mpp = 55.0, 0.2739
    reach = side_um / mpp / 2
    centre = np.array([[reach - 1e-9, reach], [400 - reach + 1e-9, 300 - reach]])
    assert windows_inside(grey_slide(), centre, side_um, mpp)[0].all()
    assert all((patch == 128).all() for patch in cut_inside(grey_slide(), centre, side_um, mpp, 64).values())


def test_padding_is_white_and_only_beyond_the_edge():
    patch = one_patch(grey_slide(), (5, 150), 20, patch_px=20, edge="pad")
    assert (patch[:, :3] == 255).all() and (patch[:, 8:] == 128).all()
    corner = one_patch(grey_slide(), (400, 300), 20, patch_px=20, edge="pad")
    assert (corner[:8, :8] == 128).all() and (corner[12:] == 255).all() and (corner[:, 12:] == 255).all()


def test_padding_never_makes_a_patch_of_a_spot_that_is_not_on_the_slide():
    centres = np.array([[-1.0, 150], [200, 150], [200, 301]])
    assert list(cut_inside(grey_slide(), centres, 20, 1.0, 16, edge="pad")) == [1]


def test_coordinates_are_the_rounded_top_left_corner():
    _, top_left = windows_inside(grey_slide(), np.array([[100.0, 80.0], [100.7, 80.2]]), 55, 0.5)
    assert top_left.dtype == np.int64 and top_left.tolist() == [[45, 25], [46, 25]]


@pytest.mark.parametrize("spacing", [2, 150], ids=["overlapping", "apart"])
def test_pictures_do_not_depend_on_workers_or_neighbours(spacing):
    rng = np.random.default_rng(0)
    slide = ArraySlide(rng.integers(0, 256, (400, 900, 3), dtype=np.uint8))
    x, y = np.meshgrid(np.arange(20, 900, spacing)[:90], np.arange(20, 400, 60))
    centres = np.stack([x.ravel(), y.ravel()], axis=1) + rng.uniform(0, 1, (x.size, 2))
    by_one, by_three = (cut_inside(slide, centres, 31.3, 1.0, 24, workers=workers) for workers in (1, 3))
    assert len(by_one) > 30 and all(np.array_equal(patch, by_three[row]) for row, patch in by_one.items())
    for row, patch in list(by_one.items())[::17]:
        assert np.array_equal(patch, one_patch(slide, centres[row], 31.3, patch_px=24))


def test_overlapping_windows_are_read_together():
    slide = ramp_slide()
    centres = np.stack([np.arange(50, 178, 2), np.full(64, 100)], axis=1)
    assert len(cut_inside(slide, centres, 40, 1.0, 16)) == 64
    assert slide.n_reads == 1


def test_an_error_in_a_worker_reaches_the_caller():
    slide = grey_slide()
    slide.pixels = slide.pixels[:100]                   # the slide is shorter than it says
    slide.read_image = lambda x, y, width, height: (_ for _ in ()).throw(OSError("damaged tile"))
    with pytest.raises(OSError, match="damaged tile"):
        cut_inside(slide, np.array([[200, 150]]), 20, 1.0, 16, workers=2)


@pytest.mark.parametrize(("options", "message"), [
    (dict(side_um=0), "--patch-sz-um"), (dict(mpp=0), "--mpp"), (dict(mpp=np.nan), "--mpp"),
    (dict(patch_px=0), "--patch-sz-px"), (dict(edge="wrap"), "--edge: expected drop or pad; found wrap"),
], ids=str)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        cut_inside(grey_slide(), np.array([[50, 50]]), **{"side_um": 20, "mpp": 1.0, "patch_px": 16, **options})
