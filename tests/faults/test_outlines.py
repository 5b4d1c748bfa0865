"""Row 18: outlines that are empty, crossing themselves, off the slide or too small, given to the command."""
import time

import h5py
import numpy as np
import pytest
import shapely
import tifffile
from click.testing import CliRunner

from preprocessing.extract_patches import main

pytestmark = pytest.mark.fault("odd outline")
WIDTH, HEIGHT, SIDE = 900, 700, 55             # of the slide and of a patch, px, at 1 µm per px
SECONDS = 20                                   # 0.1 to 4 on an idle machine


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("outlines") / "slide.tif"
    pixels = np.random.default_rng(0).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    tifffile.imwrite(path, pixels, tile=(64, 64), photometric="rgb")
    return path


def cut(slide, tmp_path, outline, count=40):
    (tmp_path / "tissue.geojson").write_text(outline if isinstance(outline, str) else shapely.to_geojson(outline))
    start = time.monotonic()
    result = CliRunner().invoke(main, ["--wsi-file", str(slide), "--tissue-seg-file", str(tmp_path / "tissue.geojson"), "--mpp", "1",
                                       "--out-dir", str(tmp_path / "out"), "--n-pts", str(count), "--patch-sz-px", "16"])
    assert time.monotonic() - start < SECONDS and "Traceback" not in result.output
    return result


def polygon(*corners):
    return shapely.Polygon(corners)


REPAIRED = {
    "crossing itself": (polygon((50, 50), (650, 650), (650, 50), (50, 650)),
                        shapely.union(polygon((50, 50), (350, 350), (50, 650)), polygon((650, 650), (350, 350), (650, 50)))),
    "reaching over the slide": (shapely.box(600, 500, 5000, 5000), shapely.box(600, 500, WIDTH, HEIGHT)),
    "around the slide": (shapely.box(-1e7, -1e7, 1e7, 1e7), shapely.box(0, 0, WIDTH, HEIGHT)),
    "a hole outside its ring": (shapely.Polygon(shapely.box(0, 0, 200, 200).exterior, [shapely.box(300, 300, 400, 400).exterior]),
                                shapely.box(0, 0, 400, 400)),
    "overlapping itself, with crumbs": (shapely.MultiPolygon([shapely.box(0, 0, 300, 200), shapely.box(100, 0, 400, 200),
                                                              shapely.box(500, 500, 500.5, 501)]), shapely.box(0, 0, 400, 200)),
    "with a spike": (polygon((0, 0), (300, 0), (300, 100), (800, 100), (300, 100), (300, 300), (0, 300)), shapely.box(0, 0, 300, 300)),
}


@pytest.mark.parametrize("case", REPAIRED)
def test_an_outline_that_can_be_repaired_gives_patches_inside_what_it_means(slide, tmp_path, case):
    outline, meant = REPAIRED[case]
    result = cut(slide, tmp_path, outline)
    assert result.exit_code == 0, result.output
    with h5py.File(tmp_path / "out" / "random_imgs.h5") as file:
        corners = file["coords"][:]
    assert len(corners) == 40 and shapely.covers(meant.buffer(1), shapely.box(*corners.T, *(corners + SIDE).T)).all()


TOO_SMALL = shapely.box(100, 100, 100 + SIDE - 1, 600)
REFUSED = {
    "no features": ('{"type": "FeatureCollection", "features": []}', "at least one polygon with an area; found 0 geometries"),
    "no geometry": ('{"type": "FeatureCollection", "features": [{"type": "Feature", "geometry": null}]}', "found 0 geometries"),
    "an empty polygon": ('{"type": "Polygon", "coordinates": []}', "at least one polygon with an area"),
    "no bytes": ("", "file: expected GeoJSON; found text that is not JSON"),
    "a folded line": (shapely.LineString([(0, 0), (9, 9), (0, 0)]), "at least one polygon with an area"),
    "off the slide": (shapely.box(2000, 2000, 3000, 3000), "off it (x0, y0, x1, y1 = 2,000"),
    "touching the slide's edge": (shapely.box(WIDTH, 0, 2000, 500), "off it"),
    "narrower than a patch": (TOO_SMALL, "room for 40 squares of 55 px, wholly inside; found 0"),
    "a thin diagonal": (polygon((0, 0), (600, 600), (640, 600), (40, 0)), "room for 40 squares of 55 px, wholly inside; found 0"),
    "many crumbs": (shapely.MultiPolygon([shapely.box(x, y, x + 9, y + 9) for x in range(0, 880, 10) for y in range(0, 680, 10)]),
                    "room for 40 squares of 55 px, wholly inside; found 0"),
    "infinite": ('{"type": "Polygon", "coordinates": [[[0, 0], [1e999, 0], [9, 9], [0, 0]]]}', "geometry 0"),
    "lists in lists": ("[" * 900 + "]" * 900, "GeoJSON: expected a list of features; found lists in lists"),
    "nested without end": ("[" * 100_000, "file: expected GeoJSON; found text that is not JSON"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_outline_without_room_for_patches_is_refused_in_bounded_time_and_nothing_is_written(slide, tmp_path, case):
    outline, message = REFUSED[case]
    result = cut(slide, tmp_path, outline)
    assert result.exit_code == 3, result.output
    said = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and message in said[0] and "tissue.geojson" in said[0]
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_an_outline_with_room_for_one_place_only_gives_that_place_or_a_refusal_in_bounded_time(slide, tmp_path):
    exact = cut(slide, tmp_path, shapely.box(100, 100, 100 + SIDE, 100 + SIDE), count=3)
    assert exact.exit_code in (0, 3)
    if exact.exit_code == 0:
        with h5py.File(tmp_path / "out" / "random_imgs.h5") as file:
            assert file["coords"][:].tolist() == [[100, 100]] * 3
