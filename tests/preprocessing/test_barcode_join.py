"""Rows are found by barcode: bins by their place in a grid, or one by one where the grid would not fit in memory."""
import numpy as np
import pytest

from preprocessing import barcode_join
from preprocessing.barcode_join import match, match_bins
from preprocessing.hd_barcodes import HdBarcodes


def bins(places, bin_um=2) -> HdBarcodes:
    row, col = np.asarray(places, dtype=np.int32).T
    return HdBarcodes(np.full(len(row), bin_um, np.int16), row, col)


def test_barcodes_are_found_whatever_the_order_and_the_width():
    keys = np.array([b"TTT-1", b"AC-1", b"GGGGGG-1"])
    assert match(keys, np.array([b"GGGGGG-1", b"GGGGGG-2", b"AC-1", b"A", b"TTT-1"])).tolist() == [2, -1, 1, -1, 0]


@pytest.mark.parametrize("grid_cells", [barcode_join.SMALL_GRID, 0], ids=["grid", "bisection"])
def test_bins_are_found_by_their_place(monkeypatch, grid_cells):
    monkeypatch.setattr(barcode_join, "SMALL_GRID", grid_cells)
    monkeypatch.setattr(barcode_join, "GRID_CELLS_PER_BIN", min(barcode_join.GRID_CELLS_PER_BIN, grid_cells))
    rng = np.random.default_rng(0)
    taken = rng.random((30, 40)) < 0.7
    places = rng.permutation(np.argwhere(taken))
    wanted = rng.permutation(len(places))[:200]
    assert match_bins(bins(places), bins(places[wanted])).tolist() == wanted.tolist()
    elsewhere = np.array([[30, 0], [0, 40], [99_999, 99_999], *np.argwhere(~taken)[:3]])
    assert match_bins(bins(places), bins(elsewhere)).tolist() == [-1] * 6
    assert match_bins(bins(places), bins(places[:4], bin_um=8)).tolist() == [-1] * 4


def test_one_damaged_barcode_far_away_does_not_ask_for_a_grid_of_forty_gigabytes(monkeypatch):
    monkeypatch.setattr(np, "full", lambda *arguments, **options: pytest.fail("a grid was made"))
    places = HdBarcodes(np.array([2, 2, 2], np.int16), np.array([0, 1, 99_999], np.int32), np.array([0, 1, 99_999], np.int32))
    assert match_bins(places, places).tolist() == [0, 1, 2]


def test_bins_of_several_sizes_at_one_place_are_not_mixed_up():
    mixed = HdBarcodes(np.array([2, 8], np.int16), np.array([5, 5], np.int32), np.array([6, 6], np.int32))
    assert match_bins(mixed, bins([(5, 6)], bin_um=8)).tolist() == [1]
