"""Pseudo-spots: which bins belong to a window, and that their place is where their patch is."""
import numpy as np
import pytest
from hd_phantoms import BIN_UM, hd_sample, member_rows, position_code, with_holes

from preprocessing.errors import InputError, OptionError
from preprocessing.pseudo_spots import as_spots, bins_per_side, group_bins, take_spots
from preprocessing.spot_sums import sum_spots

OFFSETS = [(0, 0), (3, 0), (10, 20), (30, 30), (80, 90)]


def windows_by_definition(in_tissue: np.ndarray, offset, n: int, stride: int) -> set[tuple[int, int]]:
    """Centres (array row, array col) of complete windows, found the slow way."""
    tops = range(-(-offset[0] // stride) * stride - offset[0], in_tissue.shape[0] - n + 1, stride)
    lefts = range(-(-offset[1] // stride) * stride - offset[1], in_tissue.shape[1] - n + 1, stride)
    return {(top + n // 2 + offset[0], left + n // 2 + offset[1])
            for top in tops for left in lefts if in_tissue[top:top + n, left:left + n].all()}


@pytest.mark.parametrize("stride", [1, 2, 5, 9])
@pytest.mark.parametrize("in_tissue", [np.ones((40, 45), dtype=bool), with_holes()], ids=["full", "holes"])
@pytest.mark.parametrize("columns_run_left", [False, True])
@pytest.mark.parametrize("offset", OFFSETS, ids=str)
def test_members_surround_the_centre_wherever_tissue_starts(offset, columns_run_left, in_tissue, stride):
    sample = hd_sample(in_tissue, offset=offset, columns_run_left=columns_run_left, counts=position_code)
    spots = group_bins(sample, patch_um=9 * BIN_UM, stride_bins=stride)

    assert set(zip(spots.array_row.tolist(), spots.array_col.tolist(), strict=True)) == windows_by_definition(in_tissue, offset, 9, stride)
    sums = sum_spots(sample, spots).toarray()
    assert (sums[:, 0] == 81).all() and spots.n_members == 81
    assert np.array_equal(sums[:, 1] / 81, spots.array_row) and np.array_equal(sums[:, 2] / 81, spots.array_col)
    assert spots.barcodes.tolist() == [f"s_002um_{row:05d}_{col:05d}-1" for row, col in zip(spots.array_row, spots.array_col, strict=True)]
    assert np.allclose(sample.centre_xy_px[member_rows(sample, spots)].mean(axis=1), spots.centre_xy_px)


def test_a_window_with_one_bin_outside_tissue_is_skipped_and_counted():
    full, holed = np.ones((12, 12), dtype=bool), np.ones((12, 12), dtype=bool)
    holed[6, 6] = False
    whole = group_bins(hd_sample(full), patch_um=6, stride_bins=3)
    spots = group_bins(hd_sample(holed), patch_um=6, stride_bins=3)
    assert len(whole) == 16 and len(spots) == 15
    assert (7, 7) not in set(zip(spots.array_row, spots.array_col, strict=True))
    assert spots.dropped == {"have a bin outside tissue": 1}


def test_windows_never_wrap_around_the_array():
    """The last columns and the first columns of the next rows are neighbours in memory, never in a window."""
    in_tissue = np.zeros((6, 10), dtype=bool)
    in_tissue[:, :2] = in_tissue[:, -1:] = True
    assert len(group_bins(hd_sample(in_tissue), patch_um=6, stride_bins=1)) == 0


def test_a_bin_in_tissue_without_reads_counts_as_tissue_with_zero_counts():
    in_tissue = np.ones((3, 3), dtype=bool)
    sample = hd_sample(in_tissue, counts=lambda row, col: np.where((row == 1) & (col == 2), 0, 5)[:, None].astype(np.int32))
    spots = group_bins(sample, patch_um=6, stride_bins=1)
    assert len(spots) == 1 and sum_spots(sample, spots).toarray().tolist() == [[8 * 5]]


def test_the_order_of_the_samples_rows_does_not_matter():
    first, second = (hd_sample(with_holes(), counts=position_code, seed=seed) for seed in (1, 2))
    a, b = group_bins(first, 10, 2), group_bins(second, 10, 2)
    assert np.array_equal(a.barcodes, b.barcodes)
    assert (sum_spots(first, a) != sum_spots(second, b)).nnz == 0


@pytest.mark.parametrize(("patch_um", "bin_um", "expected"), [
    (55, 2, 27), (54, 2, 27), (2, 2, 1), (55.9, 2, 27), (0.9, 0.3, 3), (56, 8, 7), (55, 16, 3)])
def test_bins_per_side_is_the_floor(patch_um, bin_um, expected):
    assert bins_per_side(patch_um, bin_um) == expected


@pytest.mark.parametrize(("patch_um", "bin_um", "message"), [
    (56, 2, r"--patch-sz-um: .*54 µm \(27 bins\) or 58 µm \(29 bins\); found 56 µm = 28 bins"),
    (1, 2, r"nearest: 2 µm \(1 bin\); found 1 µm = 0 bins"),
    (0, 2, "a positive number of µm; found 0"),
    (-55, 2, "a positive number of µm; found -55"),
    (float("nan"), 2, "a positive number of µm; found nan"),
], ids=["even", "smaller than a bin", "zero", "negative", "not a number"])
def test_a_patch_of_an_even_or_zero_number_of_bins_is_refused_with_the_nearest_valid_sizes(patch_um, bin_um, message):
    with pytest.raises(OptionError, match=message):
        bins_per_side(patch_um, bin_um)


def test_a_stride_below_one_bin_is_refused():
    with pytest.raises(OptionError, match="--stride: expected at least 1 bin; found 0"):
        group_bins(hd_sample(with_holes()), 10, 0)


def test_two_bins_at_one_position_are_refused():
    sample = hd_sample(np.ones((5, 5), dtype=bool))
    sample.array_row[:2], sample.array_col[:2] = 0, 0
    with pytest.raises(InputError, match="one bin at each position"):
        group_bins(sample, 6, 1)


def test_a_sample_without_tissue_has_no_pseudo_spots():
    assert len(group_bins(hd_sample(np.zeros((5, 5), dtype=bool)), 6, 1)) == 0


def test_visium_spots_pass_through_in_their_order_without_those_outside_tissue():
    in_tissue = np.array([[True, False, True], [True, True, False]])
    sample = hd_sample(in_tissue, counts=position_code)
    spots = as_spots(sample, 55)
    kept = np.flatnonzero(sample.in_tissue)
    assert spots.barcodes.tolist() == sample.barcodes[kept].tolist()
    assert spots.sample_rows.tolist() == kept.tolist() and spots.n_members == 1
    assert np.array_equal(sum_spots(sample, spots).toarray(), sample.counts[kept].toarray())


def test_spots_taken_keep_their_rows_and_add_their_reasons():
    spots = group_bins(hd_sample(with_holes()), 10, 4)
    taken = take_spots(spots, np.arange(len(spots)) % 2 == 1, {"reach over the slide's edge": 3, "never": 0})
    assert taken.barcodes.tolist() == spots.barcodes[1::2].tolist() and taken.sample_rows.tolist() == spots.sample_rows[1::2].tolist()
    assert taken.bins_per_side == 5 and taken.dropped == {**spots.dropped, "reach over the slide's edge": 3}
