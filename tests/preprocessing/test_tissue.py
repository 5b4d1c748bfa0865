"""Tissue: outlines in and out, segmentation, and squares placed at random inside."""
import json

import numpy as np
import pytest
import shapely

from preprocessing.errors import InputError, OptionError
from preprocessing.random_patches import sample_squares
from preprocessing.tissue import TissueMask, read_tissue, segment_tissue, write_tissue

PINK = (220, 120, 180)


class ThumbnailSlide:
    """A slide of which only the low-resolution picture is asked for."""

    def __init__(self, picture: np.ndarray, downsample: int = 10):
        self.path, self.picture = "slide.tif", picture
        self.height_px, self.width_px = picture.shape[0] * downsample, picture.shape[1] * downsample

    def thumbnail(self, max_px):
        return self.picture


def glass(height=300, width=400, grey=235) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-4, 5, (height, width, 3))
    return (np.full((height, width, 3), grey) + noise).astype(np.uint8)


def write_geojson(path, *geometries, collection=True):
    features = [{"type": "Feature", "properties": {}, "geometry": geometry} for geometry in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features} if collection else features))
    return path


def ring(*corners) -> dict:
    return {"type": "Polygon", "coordinates": [[*map(list, corners), list(corners[0])]]}


def square(x0, y0, x1, y1) -> dict:
    return ring((x0, y0), (x1, y0), (x1, y1), (x0, y1))


# --- outlines in and out -----------------------------------------------------------------------------------------------

def test_outlines_survive_a_round_trip_with_their_holes(tmp_path):
    tissue = shapely.MultiPolygon([shapely.box(0, 0, 100, 100) - shapely.box(20, 20, 40, 40), shapely.box(200, 0, 250, 80)])
    write_tissue(tmp_path / "tissue.geojson", tissue)
    assert shapely.equals(read_tissue(tmp_path / "tissue.geojson"), tissue)


@pytest.mark.parametrize("content", [
    {"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": square(0, 0, 10, 10), "properties": {"tissue_id": 0}}]},
    [{"type": "Feature", "geometry": square(0, 0, 10, 10)}],
    {"type": "Feature", "geometry": square(0, 0, 10, 10)},
    square(0, 0, 10, 10),
    {"type": "MultiPolygon", "coordinates": [square(0, 0, 10, 5)["coordinates"], square(0, 5, 10, 10)["coordinates"]]},
    {"type": "GeometryCollection", "geometries": [square(0, 0, 10, 10), {"type": "Point", "coordinates": [50, 50]}]},
    {"type": "Polygon", "coordinates": [[[0, 0, 7], [10, 0, 7], [10, 10, 7], [0, 10, 7], [0, 0, 7]]]},
], ids=["FeatureCollection", "QuPath list", "Feature", "Polygon", "MultiPolygon", "GeometryCollection", "with z"])
def test_every_common_form_of_geojson_is_read(tmp_path, content):
    path = tmp_path / "tissue.geojson"
    path.write_text(json.dumps(content))
    assert shapely.equals(shapely.union_all(read_tissue(path)), shapely.box(0, 0, 10, 10))


def test_a_self_crossing_ring_is_repaired(tmp_path):
    bow_tie = ring((0, 0), (10, 10), (10, 0), (0, 10))
    tissue = read_tissue(write_geojson(tmp_path / "tissue.geojson", bow_tie))
    assert shapely.is_valid(tissue) and tissue.area == pytest.approx(50)


def test_overlapping_polygons_count_once(tmp_path):
    tissue = read_tissue(write_geojson(tmp_path / "tissue.geojson", square(0, 0, 10, 10), square(5, 0, 15, 10)))
    assert tissue.area == pytest.approx(150) and len(tissue.geoms) == 1


def test_outlines_are_clipped_to_the_slide(tmp_path):
    path = write_geojson(tmp_path / "tissue.geojson", square(3900, 0, 5000, 100))
    assert read_tissue(path, ThumbnailSlide(glass())).bounds == (3900, 0, 4000, 100)


@pytest.mark.parametrize(("text", "message"), [
    ('{"type": "FeatureCollection", "features": []}', "at least one polygon with an area; found 0 geometries"),
    ("", "file: expected GeoJSON; found text that is not JSON"),
    ("[1, 2]", "expected a FeatureCollection, a Feature or a geometry"),
    ('{"tissue": 1}', "expected a FeatureCollection, a Feature or a geometry; found type None"),
    (json.dumps({"type": "LineString", "coordinates": [[0, 0], [9, 9]]}), "at least one polygon with an area; found 1 geometries"),
    (json.dumps(ring((0, 0), (5, 5), (9, 9))), "at least one polygon with an area"),
    (json.dumps({"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}), "geometry 0: expected a GeoJSON geometry with closed rings"),
    (json.dumps({"type": "Polygon", "coordinates": "everywhere"}), "geometry 0: expected a GeoJSON geometry"),
    (json.dumps(square(9000, 9000, 9100, 9100)), r"all of them off it \(x0, y0, x1, y1 = 9,000"),
], ids=["empty collection", "empty file", "numbers", "other JSON", "line", "no area", "open ring", "no coordinates", "off the slide"])
def test_outlines_that_hold_no_tissue_of_this_slide_are_refused(tmp_path, text, message):
    path = tmp_path / "tissue.geojson"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_tissue(path, ThumbnailSlide(glass()))


# --- segmentation ------------------------------------------------------------------------------------------------------

def test_tissue_is_told_from_glass_without_specks_and_small_holes():
    picture = glass()
    picture[100:200, 100:260] = PINK
    picture[150:156, 150:156] = 235                  # a lumen
    picture[20:26, 30:36] = PINK                     # dust
    picture[110:170, 180:220] = 235                  # a true hole
    truth = np.zeros(picture.shape[:2], dtype=bool)
    truth[100:200, 100:260], truth[110:170, 180:220] = True, False
    found = segment_tissue(ThumbnailSlide(picture))
    assert (found.mask & truth).sum() / (found.mask | truth).sum() > 0.93
    assert not found.mask[20:26, 30:36].any() and found.mask[150:156, 150:156].all() and not found.mask[130:150, 190:210].any()


@pytest.mark.parametrize("grey", [255, 180, 0], ids=["white", "grey", "black"])
def test_a_slide_without_colour_has_no_tissue(grey):
    with pytest.raises(InputError, match="slide.tif: tissue: expected tissue more colourful than its glass"):
        segment_tissue(ThumbnailSlide(np.full((200, 200, 3), grey, dtype=np.uint8)))


def test_a_slide_that_is_all_tissue_is_not_split_in_two():
    picture = glass(200, 200)
    picture[:100], picture[100:] = (220, 120, 180), (150, 90, 160)
    assert segment_tissue(ThumbnailSlide(picture)).mask.all()


def test_the_outline_follows_the_mask_in_level_0_pixels():
    mask = np.zeros((300, 400), dtype=bool)
    mask[100:200, 100:260], mask[120:150, 150:200] = True, False
    mask[130:140, 170:180] = True                    # an island in the hole
    mask[:50, 300:] = True                           # reaches two edges of the slide
    outline = TissueMask(mask, 4000, 3000).outline()
    assert shapely.is_valid(outline) and outline.area == pytest.approx(mask.sum() * 100, rel=0.01)
    assert outline.bounds == pytest.approx((1000, 0, 4000, 2000), abs=10)
    y, x = np.indices(mask.shape) * 10 + 5
    assert np.mean(shapely.contains_xy(outline, x.ravel(), y.ravel()) == mask.ravel()) > 0.999


def test_share_is_the_fraction_of_the_window_that_is_tissue():
    mask = np.zeros((30, 40), dtype=bool)
    mask[:, 20:] = True
    tissue = TissueMask(mask, 400, 300)
    centres = np.array([[100, 150], [200, 150], [300, 150], [190, 150], [213, 150.7], [400, 300]], dtype=float)
    assert tissue.share(centres, 40) == pytest.approx([0, 0.5, 1, 0.25, 0.825, 0.25])


# --- random squares ----------------------------------------------------------------------------------------------------

def test_squares_lie_wholly_inside_the_tissue_and_not_over_its_holes():
    tissue = shapely.MultiPolygon([shapely.box(0, 0, 300, 300) - shapely.box(100, 100, 200, 200),
                                   shapely.Polygon([(400, 0), (700, 0), (400, 300)])])
    centres = sample_squares(tissue, 30, 500)
    assert centres.shape == (500, 2)
    squares = shapely.box(*(centres - 15).T, *(centres + 15).T)
    assert shapely.covers(tissue, squares).all()


def test_squares_are_spread_over_every_polygon_by_area():
    areas = [shapely.box(0, 0, 1000, 200), shapely.box(2000, 0, 2300, 200), shapely.box(0, 1000, 100, 1200)]
    centres = sample_squares(shapely.MultiPolygon(areas), 4, 20_000)
    share = np.array([shapely.contains_xy(area, *centres.T).mean() for area in areas])
    assert share == pytest.approx(np.array([1000, 300, 100]) / 1400, abs=0.012)
    first = centres[shapely.contains_xy(areas[0], *centres.T)]
    histogram, _, _ = np.histogram2d(first[:, 0], first[:, 1], bins=(10, 4), range=((2, 998), (2, 198)))
    assert ((histogram - histogram.mean()) ** 2 / histogram.mean()).sum() < 73      # chi square, 39 degrees of freedom, p = .001


def test_the_same_seed_gives_the_same_squares():
    tissue = shapely.MultiPolygon([shapely.box(0, 0, 300, 300)])
    first, again, other = (sample_squares(tissue, 30, 50, seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


@pytest.mark.parametrize("tissue", [
    shapely.box(0, 0, 20, 500), shapely.Polygon([(0, 0), (1000, 1000), (1000, 1010), (0, 10)]),
], ids=["narrower than a patch", "a thin diagonal"])
def test_a_tissue_too_small_for_one_patch_is_refused_after_bounded_tries(tissue):
    with pytest.raises(InputError, match="room for 10 squares of 30 px, wholly inside; found 0 in .* tries"):
        sample_squares(shapely.MultiPolygon([tissue]), 30, 10)


def test_squares_may_be_asked_to_pass_a_test_of_their_own():
    tissue = shapely.MultiPolygon([shapely.box(0, 0, 300, 300)])
    assert (sample_squares(tissue, 30, 50, accept=lambda centres: centres[:, 0] > 200)[:, 0] > 200).all()
    with pytest.raises(InputError, match="found 0 in"):
        sample_squares(tissue, 30, 5, accept=lambda centres: centres[:, 0] > 900)


def test_no_patches_at_all_is_a_mistake():
    with pytest.raises(OptionError, match="--n-pts: expected at least 1 patch; found 0"):
        sample_squares(shapely.MultiPolygon([shapely.box(0, 0, 300, 300)]), 30, 0)
