"""The quality page: squares where patches lie apart, an outline where they overlap or are many; histograms of whole numbers."""
import numpy as np
import pytest

from preprocessing.quality_page import (
    MAP_PX,
    MOST_SQUARES,
    PatchQuality,
    _overview,
    covered_area,
    whole_number_bins,
    write_quality_page,
)


def quality(**details):
    given = {"title": "S", "lines": (), "thumbnail": np.full((100, 100, 3), 200, np.uint8), "slide_px": (2000, 2000), "side_px": 110.0,
             "centre_xy_px": grid(200), "patches": np.zeros((1, 8, 8, 3), np.uint8), "dropped_xy_px": {}, "numbers": {}, "settings": {}}
    return PatchQuality(**given | details)


def drawn(tmp_path, centres, side_px, monkeypatch):
    """Which way the kept patches of a 2,000 px slide are drawn, and the page's size in bytes."""
    import preprocessing.quality_page as module

    called = []
    for name in ("_draw_squares", "_draw_outline"):
        draw = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, name=name, draw=draw: (called.append(name), draw(*given)))
    write_quality_page(tmp_path / "qc.png", tmp_path / "qc.html", quality(side_px=side_px, centre_xy_px=centres))
    return called, (tmp_path / "qc.html").stat().st_size


def grid(step):
    places = np.arange(100.0, 1900, step)
    return np.stack(np.meshgrid(places, places), axis=-1).reshape(-1, 2)


@pytest.mark.parametrize(("step", "side_px", "way"), [(200, 110, "_draw_squares"), (110, 110, "_draw_squares"), (22, 110, "_draw_outline")],
                         ids=["apart", "edge to edge", "overlapping"])
def test_patches_that_overlap_are_outlined_and_others_are_squares(tmp_path, monkeypatch, step, side_px, way):
    assert drawn(tmp_path, grid(step), side_px, monkeypatch)[0] == [way]


def test_a_page_of_very_many_patches_stays_small(tmp_path, monkeypatch):
    centres = grid(2.68)
    way, size = drawn(tmp_path, centres, 2.68, monkeypatch)
    assert len(centres) > 450_000 > MOST_SQUARES and way == ["_draw_outline"] and size < 300_000


def test_the_covered_area_is_that_of_the_patches():
    covered = covered_area(np.array([[100.0, 50.0], [110.0, 50.0]]), 20.0, (200, 100))
    expected = np.zeros((100, 200))
    expected[40:60, 90:120] = 1
    np.testing.assert_array_equal(covered, expected)


def test_patches_over_the_edge_cover_what_lies_on_the_slide():
    covered = covered_area(np.array([[0.0, 0.0], [200.0, 100.0]]), 20.0, (200, 100))
    assert covered.shape == (100, 200) and covered.sum() == 2 * 10 * 10


def test_the_map_of_a_large_slide_is_no_larger_than_the_picture():
    assert covered_area(np.array([[50_000.0, 20_000.0]]), 200.0, (100_000, 40_000)).shape == (round(MAP_PX * 0.4), MAP_PX)


@pytest.mark.parametrize("values", [np.arange(100, 175), np.arange(0, 5000), np.array([7]), np.array([0, 60]), np.array([3, 1_000_003])],
                         ids=["75 numbers", "5,000 numbers", "one number", "61 numbers", "a million"])
def test_every_bin_of_a_histogram_holds_as_many_whole_numbers(values):
    edges = whole_number_bins(values, 60)
    low, high = values.min(), values.max()
    widths = np.diff(edges)
    assert len(widths) <= 60 and (widths == widths[0]).all() and widths[0] == int(widths[0]) and (edges % 1 == 0.5).all()
    assert edges[0] < low <= edges[1] and edges[-2] < high < edges[-1]


def test_an_outline_of_tissue_stands_once_in_the_legend():
    from shapely import MultiPolygon, box

    tissue = MultiPolygon([box(100, 100, 900, 900), box(1000, 1000, 1500, 1500)])
    legend = _overview(quality(tissue=tissue)).axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == ["outline of tissue", "kept (81)"]


@pytest.mark.parametrize("shape", [(100, 100), (60, 140), (140, 60)], ids=["square", "wide", "high"])
def test_the_histograms_keep_their_words_apart(shape):
    counts = np.arange(81)
    figure = _overview(quality(thumbnail=np.full((*shape, 3), 200, np.uint8), library_sizes=counts, n_genes=counts))
    figure.draw_without_rendering()
    upper, lower = figure.axes[:2]
    gap_px = upper.xaxis.label.get_window_extent().y0 - lower.title.get_window_extent().y1
    assert gap_px > lower.title.get_window_extent().height
