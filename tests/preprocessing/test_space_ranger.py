"""Reading Space Ranger folders: every version gives the same sample, and what cannot be trusted is refused with the reason."""
import re
import shutil

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from PIL import Image
from visium_folders import (
    COLUMNS,
    MPP,
    counts_of,
    counts_of_rows,
    hd_positions,
    visium_positions,
    write_clusters,
    write_h5,
    write_hd,
    write_mtx,
    write_visium,
)

from preprocessing import space_ranger
from preprocessing.errors import InputError, OptionError
from preprocessing.hd_barcodes import as_text
from preprocessing.space_ranger import read_sample
from preprocessing.tenx_matrix import StoredCounts


def by_barcode(sample) -> pd.DataFrame:
    """Everything a row of the sample says, by barcode: two equal samples have equal tables."""
    table = pd.DataFrame(counts_of_rows(sample), index=as_text(sample.barcodes), columns=sample.gene_names)
    table[["x", "y"]] = sample.centre_xy_px
    return table.assign(in_tissue=sample.in_tissue, row=sample.array_row, col=sample.array_col).sort_index()


def assert_same(first, second):
    pd.testing.assert_frame_equal(by_barcode(first), by_barcode(second))
    assert first.mpp == pytest.approx(second.mpp) and first.bin_um == second.bin_um
    assert list(first.gene_ids) == list(second.gene_ids)


def shuffled(table: pd.DataFrame) -> pd.DataFrame:
    return table.sample(frac=1, random_state=0)


# ---- one sample, many folders ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("options", [
    {"version": 1}, {"version": 1, "header": True}, {"version": 2}, {"version": 2, "header": False},
    {"version": 1, "positions": shuffled(visium_positions())}, {"version": 2, "positions": shuffled(visium_positions())},
    {"version": 2, "positions": visium_positions()[COLUMNS[::-1]]},
    {"matrix": "mtx"}, {"matrix": "mtx.gz"}, {"matrix": "mtx called gz"}, {"version": 1, "matrix": "mtx.gz"},
], ids=["v1", "v1-with-header", "v2", "v2-without-header", "v1-shuffled", "v2-shuffled", "v2-columns-reversed", "mtx", "mtx-gz",
        "mtx-plain-but-named-gz", "v1-mtx-gz"])
def test_every_visium_folder_gives_the_same_sample(tmp_path, options):
    expected = read_sample(write_visium(tmp_path / "reference"))
    assert_same(read_sample(write_visium(tmp_path / "sample", **options)), expected)
    truth = visium_positions().set_index("barcode")
    assert expected.counts.sum() == counts_of(18).sum()
    assert (expected.centre_xy_px == truth.loc[expected.barcodes, ["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()).all()
    assert expected.mpp == pytest.approx(MPP, rel=2e-3)


@pytest.mark.parametrize("prefix", ["", "Visium_HD_Mouse_Kidney_"], ids=["3.1.2-names", "3.0-names"])
@pytest.mark.parametrize("given", ["sample folder", "outs", "bin folder"])
@pytest.mark.parametrize("segmented", [False, True], ids=["unsegmented", "v4-segmented"])
def test_every_hd_folder_gives_the_same_sample(tmp_path, prefix, given, segmented):
    expected = read_sample(write_hd(tmp_path / "reference"))
    bins = write_hd(tmp_path / "SAMPLE" / "outs", prefix=prefix, positions=shuffled(hd_positions()))
    if segmented:
        (tmp_path / "SAMPLE" / "outs" / "segmented_outputs" / "spatial").mkdir(parents=True)
    folder = {"sample folder": tmp_path / "SAMPLE", "outs": tmp_path / "SAMPLE" / "outs", "bin folder": bins}[given]
    sample = read_sample(folder)
    assert_same(sample, expected)
    assert sample.sample_id == "SAMPLE" and sample.bin_um == 2.0 and sample.mpp == MPP


def test_barcodes_of_bins_join_in_any_case(tmp_path):
    truth = hd_positions()
    upper = [barcode.upper() for barcode in truth["barcode"][truth["in_tissue"] == 1][:-1]]
    assert_same(read_sample(write_hd(tmp_path / "upper", barcodes=upper)), read_sample(write_hd(tmp_path / "lower")))


def test_a_visium_folder_is_found_in_outs_and_named_after_its_sample(tmp_path):
    write_visium(tmp_path / "KIDNEY" / "outs", version=1)
    sample = read_sample(tmp_path / "KIDNEY")
    assert sample.sample_id == "KIDNEY" and sample.platform == "Visium (Space Ranger 1.x)" and sample.bin_um is None


def test_the_raw_matrix_is_read_and_said_where_there_is_no_filtered_one(tmp_path):
    folder = write_visium(tmp_path)
    (folder / "filtered_feature_bc_matrix.h5").rename(folder / "raw_feature_bc_matrix.h5")
    assert any("raw one is read" in notice for notice in read_sample(folder).notices)


# ---- counts ---------------------------------------------------------------------------------------------------------

def test_positions_without_counts_are_zero_rows_and_counted(tmp_path):
    sample = read_sample(write_visium(tmp_path, n_counted=18))
    unread = visium_positions()["barcode"][18:20]
    assert sample.counts[np.isin(sample.barcodes, unread)].nnz == 0 and len(sample.barcodes) == 24 and sample.in_tissue.sum() == 20
    assert "2 of 20 positions in tissue are not in the matrix: rows of zeros" in sample.notices


def test_duplicate_symbols_become_unique_and_ids_are_kept(tmp_path):
    sample = read_sample(write_visium(tmp_path))
    assert list(sample.gene_names) == ["Actb", "Umod", "Nphs1", "Umod-1"]
    assert list(sample.gene_ids) == ["ENSMUSG01", "ENSMUSG02", "ENSMUSG03", "ENSMUSG04"]


def test_only_gene_expression_features_are_kept(tmp_path):
    folder = write_visium(tmp_path)
    barcodes = visium_positions()["barcode"][:18]
    types = ["Gene Expression", "Antibody Capture", "Gene Expression", "Gene Expression"]
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts_of(18), barcodes, feature_types=types)
    sample = read_sample(folder)
    assert list(sample.gene_names) == ["Actb", "Nphs1", "Umod"] and sample.counts.sum() == counts_of(18)[:, [0, 2, 3]].sum()


def test_whole_counts_stored_as_floats_are_read_and_fractions_are_refused(tmp_path):
    folder, barcodes = write_visium(tmp_path), visium_positions()["barcode"][:18]
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts_of(18), barcodes, data_dtype=np.float64)
    assert read_sample(folder).counts.dtype == np.int32
    write_h5(folder / "filtered_feature_bc_matrix.h5", counts_of(18) * 0.5, barcodes, data_dtype=np.float64)
    with pytest.raises(InputError, match="raw UMI counts, whole numbers from 0 up; found values like"):
        read_sample(folder)


def test_two_samples_that_share_barcodes_keep_their_own_counts(tmp_path):
    barcodes = visium_positions()["barcode"][:18]
    first = read_sample(write_visium(tmp_path / "A"))
    second = read_sample(write_visium(tmp_path / "B", barcodes=barcodes[::-1]))
    assert set(first.barcodes) == set(second.barcodes) and (first.sample_id, second.sample_id) == ("A", "B")
    keyed = {f"{sample.sample_id}__{barcode}": counts for sample in (first, second)
             for barcode, counts in zip(sample.barcodes, sample.counts.toarray()[:, 0], strict=True)}
    assert len(keyed) == 48
    assert all((keyed[f"A__{barcode}"], keyed[f"B__{barcode}"]) == (i + 1, 18 - i) for i, barcode in enumerate(barcodes))


def test_counts_of_bins_stay_on_disk_and_those_of_spots_are_loaded(tmp_path):
    hd, visium = read_sample(write_hd(tmp_path / "hd")), read_sample(write_visium(tmp_path / "visium"))
    assert isinstance(hd.counts, StoredCounts) and hd.counts.shape == (79, 4) and hd.counts.nnz == counts_of(79).nnz
    assert hd.barcodes.dtype == "S21"
    assert sp.issparse(visium.counts) and visium.barcodes.dtype.kind == "U"


@pytest.mark.parametrize("max_entries", [1, 7, 10_000])
def test_slices_of_any_length_hold_the_matrix_once(tmp_path, max_entries):
    counts = read_sample(write_hd(tmp_path)).counts
    firsts, slices = zip(*counts.slices(max_entries), strict=True)
    assert firsts == tuple(np.cumsum([0, *(part.shape[0] for part in slices[:-1])]))
    assert (sp.vstack(slices) != counts_of(79)).nnz == 0
    assert all(part.nnz <= max_entries or part.shape[0] == 1 for part in slices) and {part.dtype for part in slices} == {np.dtype(np.int32)}


def test_positions_in_many_row_groups_read_as_in_one(tmp_path):
    expected = read_sample(write_hd(tmp_path / "one"))
    folder, table = write_hd(tmp_path / "many"), shuffled(hd_positions())
    table["barcode"] = [name[:-2] if i < 15 else name for i, name in enumerate(table["barcode"])]          # without -1: another width
    table.to_parquet(folder / "spatial" / "tissue_positions.parquet", index=False, row_group_size=15)
    sample = read_sample(folder)
    assert sorted(name.removesuffix("-1") for name in as_text(sample.barcodes)) == sorted(
        name.removesuffix("-1") for name in as_text(expected.barcodes))
    assert (counts_of_rows(sample) == counts_of_rows(expected)).all() and (sample.array_col[:79] == expected.array_col[:79]).all()


# ---- clusters and images --------------------------------------------------------------------------------------------

def test_clusters_are_aligned_to_barcodes_with_gaps_empty(tmp_path):
    folder, barcodes = write_visium(tmp_path), visium_positions()["barcode"]
    write_clusters(folder, barcodes[16::-1], [str(1 + i % 3) for i in range(17)][::-1])          # spot 17 is left out
    sample = read_sample(folder)
    assert dict(zip(sample.barcodes, sample.metadata["cluster"], strict=True)) == {
        barcode: str(1 + i % 3) if i < 17 else "" for i, barcode in enumerate(barcodes)}
    assert any("1 of 18 barcodes with counts have no cluster label" in notice for notice in sample.notices)


def test_small_bins_take_the_cluster_of_the_large_bin_they_lie_in(tmp_path):
    bins = write_hd(tmp_path)
    large = [(row, col) for row in range(3) for col in range(3)]
    write_clusters(bins.parent / "square_008um", [f"s_008um_{row:05d}_{col:05d}-1" for row, col in large],
                   [f"{row}{col}" for row, col in large])
    sample = read_sample(tmp_path)
    read = counts_of_rows(sample).sum(axis=1) > 0
    assert list(sample.metadata["cluster"][read]) == [
        f"{row // 4}{col // 4}" for row, col in zip(sample.array_row[read], sample.array_col[read], strict=True)]


def test_images_and_scale_factors_come_along_for_drawing(tmp_path, monkeypatch):
    folder = write_visium(tmp_path)
    Image.fromarray(np.full((600, 500, 4), 200, np.uint8)).save(folder / "spatial" / "tissue_hires_image.png")
    sample = read_sample(folder)
    assert sample.images["hires"].shape == (600, 500, 3) and sample.scalefactors["tissue_hires_scalef"] == 0.5
    with monkeypatch.context() as patch, pytest.raises(InputError, match="tissue_hires_image.png: image: expected a small overview"):
        patch.setattr(space_ranger, "LARGEST_OVERVIEW_PX", 599)
        _ = read_sample(folder).images["hires"]


# ---- refusals -------------------------------------------------------------------------------------------------------

def edit(folder, change):
    """Rewrite the positions of a folder after `change(table)`."""
    path = next((folder / "spatial").glob("tissue_positions*"))
    table = change(pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path))
    table.to_parquet(path, index=False) if path.suffix == ".parquet" else table.to_csv(path, index=False)


def test_counts_without_a_position_are_refused_with_number_and_first_five(tmp_path):
    folder = write_visium(tmp_path, positions=visium_positions()[7:])
    five = ", ".join(visium_positions()["barcode"][:5])
    with pytest.raises(InputError, match=f"18 barcodes of .*filtered_feature_bc_matrix.h5; found none for 7, first 5 .{five}"):
        read_sample(folder)


def swap(table, first, second):
    return table.rename(columns={first: second, second: first})


@pytest.mark.parametrize("change, message", [
    (lambda table: pd.concat([table, table[:2]]), r"every barcode once; found repeated 2 \(ACGTACGTACGTAAAA-1, ACGTACGTACGTAAAC-1\)"),
    (lambda table: swap(table, "array_row", "array_col"), r"lattice stretched 3\.\d\d : 1 .*swapped"),
    (lambda table: table.drop(columns="array_col"), "no array_col among"),
    (lambda table: table.assign(in_tissue=0), "positions in tissue; found none of 24"),
    (lambda table: table.assign(in_tissue=2), r"in_tissue: expected 0 or 1; found 1 \(2\)"),
    (lambda table: table.assign(array_row="one"), "array_row: expected numbers; found words"),
    (lambda table: table.assign(array_row=table["array_row"] + 2 ** 31), "array_row: expected whole numbers up to 2,147,483,647; found 2"),
    (lambda table: table.assign(pxl_row_in_fullres=table["pxl_row_in_fullres"].where(table.index != 3)), "a place for every.*1 without"),
    (lambda table: table[:0], "one row a position; found none"),
], ids=["duplicates", "array-axes-swapped", "column-missing", "no-tissue", "in-tissue-2", "words", "too-large", "gap", "empty"])
def test_positions_that_cannot_be_trusted_are_refused(tmp_path, change, message):
    folder = write_visium(tmp_path)
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        read_sample(folder)


def test_exchanged_pixel_columns_are_refused_where_the_image_shows_it(tmp_path, monkeypatch):
    rows, cols = (part.ravel() for part in np.indices((30, 30)))
    on = (rows + cols) % 2 == 0
    positions = pd.DataFrame({"barcode": [f"{i:016d}-1" for i in range(on.sum())], "in_tissue": 0, "array_row": rows[on],
                              "array_col": cols[on]})
    positions["pxl_row_in_fullres"], positions["pxl_col_in_fullres"] = 20 + 17 * rows[on], 20 + 10 * cols[on]
    positions["in_tissue"] = (positions["pxl_row_in_fullres"] > 300).astype(int)
    picture = np.full((560, 560, 3), 240, np.uint8)
    picture[300:] = 120                                                                  # the tissue is the lower half
    barcodes = positions["barcode"][positions["in_tissue"] == 1]
    folder = write_visium(tmp_path, positions=positions, barcodes=barcodes, factors={"tissue_lowres_scalef": 1.0})
    Image.fromarray(picture).save(folder / "spatial" / "tissue_lowres_image.png")
    assert read_sample(folder).in_tissue.sum() == len(barcodes)
    edit(folder, lambda table: swap(table, "pxl_row_in_fullres", "pxl_col_in_fullres"))
    for compared in (len(positions), 200):                                               # of millions of bins only some are compared
        monkeypatch.setattr(space_ranger, "COMPARED", compared)
        with pytest.raises(InputError, match="the two pixel columns of the positions are swapped"):
            read_sample(folder)


@pytest.mark.parametrize("change, message", [
    (lambda table: swap(table, "array_row", "array_col"), r"expected the row and column that the barcode names.*are swapped"),
    (lambda table: table.assign(array_row=table["array_row"] + (table.index == 25)),
     r"1 of 120 that differ.*s_002um_00002_00005-1 at row 3, column 5"),
    (lambda table: table.assign(barcode=table["barcode"].str.replace("002um", "008um")), "found none for 79"),
    (lambda table: pd.concat([table, table[5:6].assign(barcode=lambda part: part["barcode"].str.upper())]), "every bin once"),
], ids=["axes-swapped", "one-row-differs", "other-bin-size", "one-bin-twice"])
def test_bins_that_disagree_with_their_barcodes_are_refused(tmp_path, change, message):
    folder = write_hd(tmp_path)
    edit(folder, change)
    with pytest.raises(InputError, match=message):
        read_sample(folder)


def test_a_repeated_barcode_of_the_matrix_is_refused(tmp_path):
    barcodes = list(visium_positions()["barcode"][:17])
    with pytest.raises(InputError, match=rf"matrix.h5: barcodes: expected every barcode once; found repeated 1 \({barcodes[0]}\)"):
        read_sample(write_visium(tmp_path, barcodes=[*barcodes, barcodes[0]]))


@pytest.mark.parametrize("claim, platform, message", [
    ({"is_hd": True}, "v2", "--is-hd: expected a Visium HD folder; found Visium .Space Ranger 2.x and later.: .*tissue_positions.csv"),
    ({"is_hd": False}, "hd", "a Visium folder, not Visium HD; found Visium HD: .*tissue_positions.parquet"),
    ({"below_v2": True}, "v2", "--below-v2: expected a folder of Space Ranger below 2.0 .*found Visium .Space Ranger 2.x"),
    ({"below_v2": True}, "hd", "--below-v2: expected .*; found Visium HD"),
    ({"below_v2": False}, "v1", "Space Ranger 2.0 or later; found Visium .Space Ranger 1.x"),
], ids=["hd-but-v2", "not-hd-but-hd", "below-v2-but-v2", "below-v2-but-hd", "v2-but-v1"])
def test_a_flag_that_contradicts_the_folder_is_an_error_that_says_both(tmp_path, claim, platform, message):
    write_hd(tmp_path) if platform == "hd" else write_visium(tmp_path, version=int(platform[1]))
    with pytest.raises(OptionError, match=message):
        read_sample(tmp_path, **claim)


@pytest.mark.parametrize("claim, platform", [
    ({"is_hd": True}, "hd"), ({"below_v2": True}, "v1"), ({"is_hd": False, "below_v2": False}, "v2")], ids=["hd", "v1", "v2"])
def test_a_flag_that_agrees_changes_nothing(tmp_path, claim, platform):
    write_hd(tmp_path) if platform == "hd" else write_visium(tmp_path, version=int(platform[1]))
    assert_same(read_sample(tmp_path, **claim), read_sample(tmp_path))


def cut(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize("damage, message", [
    (lambda folder: cut(folder / "filtered_feature_bc_matrix.h5"), "matrix.h5: file: expected a whole 10x HDF5 matrix"),
    (lambda folder: (folder / "filtered_feature_bc_matrix.h5").write_bytes(b""), "matrix.h5: file: expected a whole 10x HDF5 matrix"),
    (lambda folder: (folder / "filtered_feature_bc_matrix.h5").unlink(), "counts: expected filtered_feature_bc_matrix.h5 or the folder"),
    (lambda folder: shutil.rmtree(folder / "spatial"), "positions: expected spatial/ with tissue_positions.parquet or"),
    (lambda folder: (folder / "spatial" / "tissue_positions.csv").write_bytes(b"\xff\xfe\x00"), "a table of positions"),
    (lambda folder: (folder / "spatial" / "scalefactors_json.json").write_text("{"), "scalefactors_json.json: file: expected a JSON"),
    (lambda folder: (folder / "spatial" / "scalefactors_json.json").write_text("[" * 100_000), "file: expected a JSON object of numbers"),
    (lambda folder: (folder / "spatial" / "scalefactors_json.json").write_text('{"a": [1]}'), "a JSON object of numbers; found other JSON"),
    (lambda folder: (folder / "spatial" / "tissue_hires_image.png").write_bytes(b"\x89PNG"), "tissue_hires_image.png: image: expected"),
], ids=["matrix-truncated", "matrix-empty", "no-matrix", "no-spatial", "positions-binary", "factors-broken",
        "factors-nested", "factors-of-lists", "hires-broken"])
def test_a_damaged_folder_is_refused_naming_the_file(tmp_path, damage, message):
    folder = write_visium(tmp_path)
    damage(folder)
    with pytest.raises(InputError, match=message):
        read_sample(folder)


@pytest.mark.parametrize("member", ["matrix.mtx.gz", "barcodes.tsv.gz"])
def test_a_truncated_mtx_folder_is_refused_naming_the_file(tmp_path, member):
    folder = write_visium(tmp_path, matrix="mtx.gz")
    cut(folder / "filtered_feature_bc_matrix" / member)
    with pytest.raises(InputError, match=re.escape(member)):
        read_sample(folder)


def test_an_mtx_folder_whose_lists_do_not_fit_its_matrix_is_refused(tmp_path):
    folder = write_visium(tmp_path, matrix="mtx")
    write_mtx(folder / "filtered_feature_bc_matrix", counts_of(18), visium_positions()["barcode"][:17])
    with pytest.raises(InputError, match="expected 4 features x 17 barcodes, as many as .*barcodes.tsv name; found 4 x 18"):
        read_sample(folder)


def test_a_matrix_without_a_single_count_is_refused(tmp_path):
    folder = write_visium(tmp_path, counts=sp.csr_matrix((18, 4), dtype=np.int32))
    with pytest.raises(InputError, match="at least one count; found 18 barcodes x 4 genes without a non-zero count"):
        read_sample(folder)


# ---- real folders ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("folder, n_positions, n_tissue, n_genes, total, mpp", [
    ("spaceranger/v1_scanpy_human", 4992, 4235, 100, 932, 0.7252), ("spaceranger/v1_seurat_mouse_brain", 4992, 2695, 100, 132_231, 0.7248),
    ("spaceranger/v1_visiumio_mouse_brain", 50, 22, 49, 607, 0.7251), ("spaceranger/v2_sfe_sample01", 12, 12, 5, 2951, 0.3437),
    ("mouse-brain-crop/derived_spaceranger_v1", 49, 49, 1999, 204_613, 0.7251),
    ("mouse-brain-crop/derived_spaceranger_v2", 49, 49, 1999, 204_613, 0.7251),
    ("mouse-brain-crop/derived_visium_hd", 215_280, 148_839, 1999, 204_613, 0.7269),
], ids=lambda value: value.split("/")[1] if isinstance(value, str) else "")
def test_real_folders_are_read(shared_data, folder, n_positions, n_tissue, n_genes, total, mpp):
    sample = read_sample(shared_data / folder)
    counts = sample.counts if sp.issparse(sample.counts) else sample.counts.load()
    assert counts.shape[1] == n_genes and sample.in_tissue.sum() == n_tissue and counts.sum() == total
    assert sample.mpp == pytest.approx(mpp, rel=1e-3) and len(set(sample.barcodes)) == n_positions >= counts.shape[0]


@pytest.mark.parametrize("folder, message", [
    ("hd_visiumio", "10 barcodes x 10 genes without a non-zero count"),
    ("hd_seurat", "expected Visium HD bins named s_002um_RRRRR_CCCCC-1; found Visium barcodes: 4,992 of 4,992"),
    ("hd_seurat/binned_outputs/square_016um", "found Visium barcodes: 1,248 of 1,248"),
], ids=["no-counts", "visium-barcodes-in-hd", "visium-barcodes-in-another-bin-folder"])
def test_real_folders_that_make_no_sense_are_refused_with_the_reason(shared_data, folder, message):
    with pytest.raises(InputError, match=message):
        read_sample(shared_data / "spaceranger" / folder)


def test_the_raw_matrix_of_a_real_folder_is_said(shared_data):
    assert any("raw one is read" in notice for notice in read_sample(shared_data / "spaceranger" / "v1_visiumio_mouse_brain").notices)


def test_the_three_layouts_of_one_real_section_agree(shared_data):
    v1, v2, hd = (read_sample(shared_data / "mouse-brain-crop" / f"derived_{name}")
                  for name in ("spaceranger_v1", "spaceranger_v2", "visium_hd"))
    assert_same(v1, v2)
    assert list(hd.gene_names) == list(v1.gene_names)
    assert (np.asarray(hd.counts.load().sum(axis=0)) == np.asarray(v1.counts.sum(axis=0))).all()
    assert dict(zip(v1.barcodes, v1.metadata["cluster"], strict=True)) == pd.read_csv(
        shared_data / "mouse-brain-crop/derived_spaceranger_v1/analysis/clustering/gene_expression_graphclust/clusters.csv",
        dtype=str).set_index("Barcode")["Cluster"].to_dict()
