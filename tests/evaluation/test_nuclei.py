"""Nuclei: counts and areas of simulated tissue whose truth is known, at two magnifications; borders, blank and solid patches."""
import numpy as np
import pytest

from evaluation.nuclei import STATISTICS, NucleiSettings, fit_nuclei, measure_nuclei, outlined, segment_nuclei
from preprocessing.simulation.slide import SlidePainter, slide_stains
from preprocessing.simulation.tissue import Tissue
from preprocessing.stain import TARGET_VECTORS, estimate_stain, normalise_stain

PATCH_UM = 55.0


def tissue_patches(seed, mpp, side_um=(500, 450)):
    """Stain-normalised patches that tile a simulated section, (N,) true nuclei of each and their mean true area, µm²."""
    tissue = Tissue(*side_um, seed=seed)
    cells = tissue.place_cells()
    painter = SlidePainter(tissue, cells, slide_stains(seed), mpp=mpp)
    slide = painter.paint(0, 0, painter.width_px, painter.height_px)
    slide = normalise_stain(slide, estimate_stain(slide))
    side = round(PATCH_UM / mpp)
    corners = [(x, y) for y in range(0, slide.shape[0] - side + 1, side) for x in range(0, slide.shape[1] - side + 1, side)]
    has_nucleus, cell_x, cell_y = cells.darkness > 0, cells.x_um / mpp, cells.y_um / mpp
    inside = [has_nucleus & (cell_x >= x) & (cell_x < x + side) & (cell_y >= y) & (cell_y < y + side) for x, y in corners]
    area = np.pi * cells.major_um * cells.minor_um
    patches = np.stack([slide[y:y + side, x:x + side] for x, y in corners])
    return patches, np.array([part.sum() for part in inside]), area[has_nucleus].mean()


@pytest.mark.parametrize("mpp", [PATCH_UM / 128, PATCH_UM / 64], ids=["128 px", "64 px"])
@pytest.mark.parametrize("seed", [1, 2])
def test_counts_are_within_ten_percent_of_the_truth_and_follow_it_from_patch_to_patch(seed, mpp):
    patches, truth, area = tissue_patches(seed, mpp)
    found = measure_nuclei(patches, fit_nuclei(patches, mpp), progress=False)
    counts = found[:, STATISTICS.index("nuclei")]
    assert counts.sum() == pytest.approx(truth.sum(), rel=0.1)
    assert np.corrcoef(counts, truth)[0, 1] > 0.95
    assert np.nanmean(found[:, STATISTICS.index("nuclear_area_um2")]) == pytest.approx(area, rel=0.35)


def drawn(nuclei, px=64, h=1.2, eosin=0.35):
    """A patch of stain-target colours at 1 µm a pixel: round nuclei at (x, y, radius) on eosin."""
    y, x = np.mgrid[:px, :px]
    amount = np.full((px, px), 0.05)
    for centre_x, centre_y, radius in nuclei:
        amount[np.hypot(x - centre_x, y - centre_y) < radius] = h
    density = np.stack([amount, np.full((px, px), eosin)], axis=-1) @ np.array(TARGET_VECTORS).T
    return np.clip(240 * np.exp(-density) - 1, 0, 255).astype(np.uint8)


def one(patch, threshold=0.5):
    return dict(zip(STATISTICS, measure_nuclei(patch[None], NucleiSettings(1.0, threshold), progress=False)[0], strict=True))


def test_a_drawn_nucleus_has_its_area_and_the_patch_its_stain():
    found = one(drawn([(20, 20, 5), (40, 44, 5), (44, 20, 5)]))
    assert found["nuclei"] == 3
    assert found["nuclear_area_um2"] == pytest.approx(np.pi * 25, rel=0.15)
    assert found["nuclear_haematoxylin"] == pytest.approx(1.2, rel=0.15) and found["eosin"] == pytest.approx(0.35, abs=0.03)
    assert found["haematoxylin"] == pytest.approx(0.05 + 3 * np.pi * 25 * 1.15 / 64 ** 2, abs=0.02)


def test_touching_nuclei_are_told_apart():
    assert one(drawn([(24, 30, 6), (35, 30, 6)]))["nuclei"] == 2


def test_a_nucleus_on_a_border_is_counted_by_one_of_two_neighbours():
    left, right = drawn([(64, 30, 5)]), drawn([(0, 30, 5)])
    assert (one(left)["nuclei"], one(right)["nuclei"]) == (0, 1)
    assert np.isnan(one(right)["nuclear_area_um2"])               # its area is not known


def test_a_blank_patch_has_no_nuclei_and_a_solid_one_does_not_fail():
    blank = np.full((64, 64, 3), 243, np.uint8)
    assert one(blank)["nuclei"] == 0 and np.isnan(one(blank)["nuclear_haematoxylin"])
    assert fit_nuclei(blank[None], 1.0).threshold == 0.25
    assert np.isfinite(one(np.full((64, 64, 3), 60, np.uint8))["nuclei"])


def test_what_was_counted_can_be_seen():
    patch = drawn([(30, 30, 6)])
    settings = NucleiSettings(1.0, 0.5)
    yellow = (outlined(patch, settings) == (255, 225, 0)).all(axis=-1)
    assert yellow.any() and (segment_nuclei(patch, settings)[yellow] == 1).all() and not yellow[30, 30]
