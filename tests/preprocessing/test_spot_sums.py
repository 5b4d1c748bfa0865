"""Sums of pseudo-spots: equal to adding up bin by bin, whatever the order, the memory, the blocks or the file."""
import tempfile
from dataclasses import replace

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hd_phantoms import hd_sample, member_rows, with_holes
from visium_folders import COLUMNS

from preprocessing import bin_bands
from preprocessing.anndata_sample import read_anndata_sample
from preprocessing.errors import InputError
from preprocessing.pseudo_spots import as_spots, group_bins, take_spots
from preprocessing.sample import Sample
from preprocessing.spot_sums import sum_blocks, sum_spots
from preprocessing.tenx_matrix import open_matrix

G = 300
OFFSETS = [(0, 0), (3, 0), (10, 20), (30, 30), (80, 90)]
TINY_GB = 2e-4                # 200 kB: many bands, all on disk, slices of a few bins


def sparse_counts(array_row, array_col):
    """(bins, G) few counts a bin, different in every one; some bins have none, some genes are never seen."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(0.2, 0.5, G) * (np.arange(G) % 7 > 0), (len(array_row), G))
    counts[rng.random(len(array_row)) < 0.05] = 0
    return counts


def bin_by_bin(sample: Sample, spots) -> np.ndarray:
    """(P, G) the plain double loop: one member after the other."""
    counts, sums = sample.counts.toarray().astype(np.int64), np.zeros((len(spots), sample.counts.shape[1]), np.int64)
    for spot, members in enumerate(member_rows(sample, spots)):
        for row in members:
            sums[spot] += counts[row]
    return sums


def row_by_row(counts: sp.csr_matrix, members: np.ndarray) -> sp.csr_matrix:
    """(P, G) the way of one sparse row slice a spot."""
    return sp.vstack([sp.csr_matrix(counts[rows].sum(axis=0)) for rows in members], format="csr")


def consecutive(n_spots: int, length: int, start: int = 0) -> list[slice]:
    return [slice(first, min(first + length, n_spots)) for first in range(start, n_spots, length)]


def write_matrix(path, sample: Sample, *, duplicates=False, extra_features=False, data_dtype=np.int32):
    """The counts of a sample as 10x HDF5, its rows in the sample's order; returns the sample with its counts on disk."""
    counts = sample.counts.tocsr()
    if extra_features:                                                    # a protein before the genes, one among them, one behind
        protein = sp.csr_matrix(np.full((counts.shape[0], 1), 9))
        counts = sp.hstack([protein, counts[:, :5], protein, counts[:, 5:], protein], format="csr")
    data, indices, indptr = counts.data, counts.indices, counts.indptr
    if duplicates:                                                        # every count in two parts, the second behind all first ones
        row = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
        order = np.argsort(np.concatenate([row, row]), kind="stable")
        data, indices = np.concatenate([data - data // 2, data // 2])[order], np.concatenate([indices, indices])[order]
        indptr = 2 * indptr
    types = np.array(["Gene Expression"] * counts.shape[1], "S")
    types[[0, 6, -1]] = "Antibody Capture" if extra_features else "Gene Expression"
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"], group["indices"], group["indptr"] = data.astype(data_dtype), indices.astype(np.int64), indptr.astype(np.int64)
        group["shape"], group["barcodes"] = np.array(counts.shape[::-1]), sample.barcodes.astype("S")
        names = np.array([f"gene{g}" for g in range(counts.shape[1])], "S")
        group["features/id"], group["features/name"], group["features/feature_type"] = names, names, types
    return replace(sample, counts=open_matrix(path).counts)


@pytest.fixture(scope="module")
def phantom() -> Sample:
    return hd_sample(with_holes(), offset=(10, 20), counts=sparse_counts)


@pytest.mark.parametrize("stride", [1, 3, 5, 27])
@pytest.mark.parametrize("columns_run_left", [False, True], ids=["columns right", "columns left"])
@pytest.mark.parametrize("offset", OFFSETS, ids=str)
def test_sums_equal_adding_up_bin_by_bin(offset, columns_run_left, stride):
    in_tissue = with_holes((61, 57), ((3, 40), (38, 2)))
    sample = hd_sample(in_tissue, offset=offset, columns_run_left=columns_run_left, counts=sparse_counts, seed=stride)
    spots = group_bins(sample, 54, stride)
    sums = sum_spots(sample, spots)
    assert len(spots) > 0 and sums.dtype == np.int32
    some = np.arange(0, len(spots), 13 if stride == 1 else 1)
    assert np.array_equal(sums.toarray()[some], bin_by_bin(sample, take_spots(spots, some, {})))
    assert sums.has_sorted_indices and (np.diff(sums.indices) > 0).sum() >= sums.nnz - len(spots) and sums.data.all()


@pytest.mark.parametrize("options", [
    {"memory_gb": TINY_GB}, {"memory_gb": TINY_GB, "workers": 3}, {"workers": 4}], ids=["bands on disk", "both", "several workers"])
@pytest.mark.parametrize("length", [1, 7, 10_000])
def test_neither_blocks_nor_memory_nor_workers_change_the_sums(phantom, options, length):
    spots = group_bins(phantom, 18, 2)
    blocks = list(sum_blocks(phantom, spots, consecutive(len(spots), length), **options))
    assert [block.shape for block in blocks] == [(s.stop - s.start, G) for s in consecutive(len(spots), length)]
    assert np.array_equal(sp.vstack(blocks).toarray(), bin_by_bin(phantom, spots))


def test_little_memory_means_many_bands_in_a_temporary_file_that_is_gone_afterwards(phantom, tmp_path, monkeypatch):
    opened, loaded = [], []
    make, load = tempfile.TemporaryFile, bin_bands.BinBands.load
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: opened.append(dir) or make(dir=dir))
    monkeypatch.setattr(bin_bands.BinBands, "load", lambda self, number: loaded.append(load(self, number)) or loaded[-1])
    spots = group_bins(phantom, 18, 2)
    list(sum_blocks(phantom, spots, consecutive(len(spots), 20), memory_gb=TINY_GB, folder=tmp_path))
    assert opened == [tmp_path] and len(loaded) == len(np.unique(spots.array_row)) and list(tmp_path.iterdir()) == []
    list(sum_blocks(phantom, spots, consecutive(len(spots), 20)))
    assert len(opened) == 1 and len(loaded) == len(np.unique(spots.array_row)) + 1          # with memory enough: one band, no file


def test_bands_hold_no_more_than_the_budget_allows(phantom):
    spots = group_bins(phantom, 10, 1)
    tops, lefts = spots.array_row - 2, spots.array_col - 2
    with bin_bands.BinBands(phantom, tops, lefts, 5, memory_gb=1e-3) as bands:
        bands.fill()
        sizes = [len(bands.load(number).genes) for number in range(len(bands))]
    assert len(sizes) > 1 and max(sizes) * bin_bands.ENTRY_BYTES <= 1e6 / bin_bands.BAND_SHARE


def test_a_disk_too_small_for_the_bands_is_said_before_anything_is_read(phantom, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 10})())
    spots = group_bins(phantom, 18, 2)
    monkeypatch.setattr(bin_bands.BinBands, "fill", lambda self: pytest.fail("bins were read"))
    with pytest.raises(OSError, match="GB are free"):
        next(sum_blocks(phantom, spots, consecutive(len(spots), 20), memory_gb=TINY_GB))


def test_a_disk_that_fills_up_under_the_bands_is_named(phantom, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir: open("/dev/full", "w+b"))
    spots = group_bins(phantom, 18, 2)
    with pytest.raises(OSError, match="a temporary file of counts could not be written .No space left on device.") as caught:
        list(sum_blocks(phantom, spots, consecutive(len(spots), 20), memory_gb=TINY_GB, folder=tmp_path))
    assert caught.value.filename == str(tmp_path)


def test_blocks_may_start_late_and_end_early(phantom):
    spots = group_bins(phantom, 18, 2)
    late = sp.vstack(list(sum_blocks(phantom, spots, consecutive(100, 9, start=37), memory_gb=TINY_GB)))
    assert np.array_equal(late.toarray(), bin_by_bin(phantom, spots)[37:100])
    assert list(sum_blocks(phantom, spots, [])) == []


@pytest.mark.parametrize("written", [{}, {"duplicates": True}, {"extra_features": True}, {"data_dtype": np.float64}],
                         ids=["plain", "counts in two parts, unsorted", "proteins among the genes", "floats"])
@pytest.mark.parametrize("memory_gb", [TINY_GB, 2.0], ids=["little memory", "memory"])
def test_counts_left_on_disk_give_the_sums_of_counts_in_memory(phantom, tmp_path, written, memory_gb):
    stored, spots = write_matrix(tmp_path / "matrix.h5", phantom, **written), group_bins(phantom, 18, 3)
    sums = sp.vstack(list(sum_blocks(stored, spots, consecutive(len(spots), 50), memory_gb=memory_gb)))
    assert np.array_equal(sums.toarray(), bin_by_bin(phantom, spots)) and stored.counts.shape == phantom.counts.shape
    assert (stored.counts.load() != phantom.counts).nnz == 0


def test_rows_beyond_the_matrix_are_bins_without_counts(phantom):
    cut = 1000
    shorter, spots = replace(phantom, counts=phantom.counts[:cut]), group_bins(phantom, 18, 3)
    zeroed = phantom.counts.tolil()
    zeroed[cut:] = 0
    assert np.array_equal(sum_spots(shorter, spots).toarray(), bin_by_bin(replace(phantom, counts=zeroed.tocsr()), spots))
    each = as_spots(phantom, 2)
    assert np.array_equal(sum_spots(shorter, each).toarray(), zeroed.tocsr()[each.sample_rows].toarray())
    assert shorter.counts.shape == (cut, G)


def test_bins_outside_tissue_and_the_order_of_spots_do_not_matter(phantom):
    spots = group_bins(phantom, 18, 3)
    order = np.random.default_rng(3).permutation(len(spots))
    mixed = take_spots(spots, order, {})
    loud = phantom.counts.tolil()
    loud[np.flatnonzero(~phantom.in_tissue)] = 7
    assert np.array_equal(sum_spots(replace(phantom, counts=loud.tocsr()), mixed).toarray(), bin_by_bin(phantom, spots)[order])


def test_single_bins_can_be_pseudo_spots(phantom, tmp_path):
    spots = group_bins(phantom, 2, 3)
    stored = write_matrix(tmp_path / "matrix.h5", phantom)
    expected = phantom.counts[spots.sample_rows].toarray()
    assert np.array_equal(sum_spots(phantom, spots).toarray(), expected) and np.array_equal(sum_spots(stored, spots).toarray(), expected)


def test_sums_equal_those_of_one_row_slice_a_spot(phantom):
    spots = group_bins(phantom, 18, 5)
    assert (row_by_row(phantom.counts, member_rows(phantom, spots)) != sum_spots(phantom, spots)).nnz == 0


def test_more_genes_than_sixteen_bits_can_number_are_summed():
    many = 70_000
    sample = hd_sample(np.ones((6, 6), dtype=bool))
    counts = sp.csr_matrix((np.arange(1, 37), (np.arange(36), many - 1 - 1900 * np.arange(36))), shape=(36, many))
    sample = replace(sample, counts=counts)
    spots = group_bins(sample, 6, 1)
    assert (sum_spots(sample, spots) != row_by_row(counts, member_rows(sample, spots))).nnz == 0 and spots.n_members == 9


def test_a_spot_without_reads_is_an_empty_row(phantom):
    silent = replace(phantom, counts=sp.csr_matrix(phantom.counts.shape, dtype=np.int32))
    spots = group_bins(silent, 18, 5)
    assert sum_spots(silent, spots).getnnz(axis=1).tolist() == [0] * len(spots)


# ---- refusals -------------------------------------------------------------------------------------------------------

def test_the_largest_int32_is_summed_and_one_more_is_refused():
    largest = np.iinfo(np.int32).max
    for extra in (0, 1):
        counts = np.zeros((9, 2), dtype=np.int64)
        counts[0, 0], counts[1, 0] = largest - 5, 5 + extra
        sample = hd_sample(np.ones((3, 3), dtype=bool), counts=lambda row, col, counts=counts: counts)
        spots = group_bins(sample, 6, 1)
        if extra == 0:
            assert sum_spots(sample, spots).toarray().tolist() == [[largest, 0]]
        else:
            with pytest.raises(InputError, match=f"^{sample.sample_id}: counts: expected sums of 9 bins up to 2,147,483,647;"):
                sum_spots(sample, spots)


def test_sums_beyond_int32_of_counts_left_on_disk_name_their_file(phantom, tmp_path):
    stored, spots = write_matrix(tmp_path / "matrix.h5", phantom), group_bins(phantom, 18, 3)
    with h5py.File(tmp_path / "matrix.h5", "r+") as file:
        file["matrix/data"].write_direct(np.full(file["matrix/data"].shape, 2 ** 31 - 1, file["matrix/data"].dtype))
    with pytest.raises(InputError, match=r"matrix\.h5: counts: expected sums of 81 bins up to 2,147,483,647; found a larger one"):
        list(sum_blocks(stored, spots, consecutive(len(spots), 50), memory_gb=TINY_GB))


@pytest.mark.parametrize("of_bins", [True, False], ids=["bins", "spots"])
@pytest.mark.parametrize(("value", "message"), [
    (0.5, "whole numbers from 0 up; found values like 0.5"), (-1, "whole numbers from 0 up; found values like -1"),
    (np.nan, "whole numbers from 0 up; found values like nan"), (3e9, "up to 2,147,483,647; found 3,000,000,000"),
], ids=["fractions", "negative", "not a number", "beyond int32"])
def test_what_is_no_count_is_not_summed_and_the_reason_said(of_bins, value, message):
    sample = hd_sample(np.ones((5, 5), dtype=bool))
    sample = replace(sample, counts=sp.csr_matrix(np.full((25, 2), value)))
    with pytest.raises(InputError, match=f"counts: expected raw UMI counts,? {message}"):
        sum_spots(sample, group_bins(sample, 6, 1) if of_bins else as_spots(sample, 55))


def damaged(file, name, value):
    file["matrix"][name][len(file["matrix"][name]) // 2] = value


@pytest.mark.parametrize(("damage", "message"), [
    (lambda file: damaged(file, "indices", G), f"matrix/indices: expected features 0 to {G - 1}; found .*damaged"),
    (lambda file: damaged(file, "indices", -1), f"matrix/indices: expected features 0 to {G - 1}; found -1 to .*damaged"),
    (lambda file: damaged(file, "data", -3), "counts: expected raw UMI counts, whole numbers from 0 up; found values like -3"),
    (lambda file: file["matrix/data"].write_direct(np.zeros(file["matrix/data"].shape, np.int32)), "counts: expected at least one count"),
], ids=["index too large", "index negative", "count negative", "only stored zeros"])
def test_damage_found_while_streaming_names_the_file(phantom, tmp_path, damage, message):
    stored, spots = write_matrix(tmp_path / "matrix.h5", phantom), group_bins(phantom, 18, 3)
    with h5py.File(tmp_path / "matrix.h5", "r+") as file:
        damage(file)
    with pytest.raises(InputError, match=rf"matrix\.h5: {message}"):
        list(sum_blocks(stored, spots, consecutive(len(spots), 50), memory_gb=TINY_GB))


def test_a_file_cut_short_after_it_was_opened_names_the_file(phantom, tmp_path):
    path = tmp_path / "matrix.h5"
    stored, spots = write_matrix(path, phantom), group_bins(phantom, 18, 3)
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(InputError, match=r"matrix\.h5: file: expected a whole 10x HDF5 matrix"):
        list(sum_blocks(stored, spots, consecutive(len(spots), 50)))


def test_pointers_that_lead_outside_the_counts_are_refused_at_opening(phantom, tmp_path):
    write_matrix(tmp_path / "matrix.h5", phantom)
    with h5py.File(tmp_path / "matrix.h5", "r+") as file:
        file["matrix/indptr"][3] = 10 ** 9
    with pytest.raises(InputError, match="matrix/indptr: expected pointers into .* counts; found pointers that lead outside"):
        open_matrix(tmp_path / "matrix.h5")


# ---- any form of .h5ad, same numbers (row 11) -----------------------------------------------------------------------

@pytest.mark.parametrize("form", [sp.csr_matrix, sp.csc_matrix, np.asarray, lambda counts: sp.csr_matrix(counts).astype(np.float64)],
                         ids=["csr", "csc", "dense", "float64"])
@pytest.mark.parametrize("patch_um", [2, 18])
def test_the_form_of_an_h5ad_does_not_matter_and_spots_without_counts_stay(phantom, tmp_path, form, patch_um):
    counts = phantom.counts.toarray()
    counts[:50] = 0
    obs = pd.DataFrame({"in_tissue": phantom.in_tissue.astype(int), "array_row": phantom.array_row, "array_col": phantom.array_col},
                       index=phantom.barcodes)[COLUMNS[1:4]]
    adata = ad.AnnData(form(counts), obs=obs, obsm={"spatial": phantom.centre_xy_px})
    adata.write_h5ad(tmp_path / "bins.h5ad")
    sample = read_anndata_sample(tmp_path / "bins.h5ad")
    spots = group_bins(sample, patch_um, 3)
    assert np.array_equal(sum_spots(sample, spots).toarray(), bin_by_bin(replace(phantom, counts=sp.csr_matrix(counts)), spots))


def test_the_counts_of_spots_are_passed_on_sorted_and_without_zeros():
    sample = hd_sample(np.ones((4, 4), dtype=bool))
    counts = sp.csr_matrix((np.array([0, 3, 2, 1]), np.array([2, 1, 0, 0]), np.array([0, 3, 4] + [4] * 14)), shape=(16, 3))
    sums = sum_spots(replace(sample, bin_um=None, counts=counts), as_spots(sample, 55))
    assert sums.data.tolist() == [2, 3, 1] and sums.indices.tolist() == [0, 1, 0] and sums.dtype == np.int32
