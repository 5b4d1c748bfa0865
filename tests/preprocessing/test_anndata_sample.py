"""Any h5ad with positions is a sample; mpp comes from what the file says, and normalised counts are refused."""
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from extract_runs import run
from hd_phantoms import phantom_hd_folder
from visium_folders import MPP, counts_of, hd_positions, visium_positions, write_visium

from preprocessing.anndata_sample import read_anndata_sample
from preprocessing.errors import InputError
from preprocessing.space_ranger import read_sample
from preprocessing.spot_expression import spot_expression


def write(path, table=None, **changes):
    """An h5ad of the tiny Visium positions; `changes` go to the AnnData before it is written."""
    table = visium_positions() if table is None else table
    adata = ad.AnnData(counts_of(len(table)).astype(np.float32), obs=table.set_index("barcode")[["in_tissue", "array_row", "array_col"]])
    adata.var_names = ["Actb", "Umod", "Nphs1", "Nphs2"]
    adata.obsm["spatial"] = table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float)
    for name, value in changes.items():
        setattr(adata, name, value)
    adata.write_h5ad(path)
    return path


def test_counts_positions_and_mpp_of_an_array_are_read(tmp_path):
    table, sample = visium_positions(), read_anndata_sample(write(tmp_path / "KIDNEY.h5ad"))
    assert (sample.counts.toarray() == counts_of(24).toarray()).all() and sample.counts.dtype == np.int32
    assert (sample.centre_xy_px == table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()).all()
    assert list(sample.in_tissue) == list(table["in_tissue"] == 1) and sample.sample_id == "KIDNEY" and sample.bin_um is None
    assert sample.mpp == pytest.approx(MPP, rel=2e-3)


def test_raw_counts_in_a_layer_go_before_a_normalised_x(tmp_path):
    path = write(tmp_path / "s.h5ad", layers={"counts": counts_of(24)}, X=np.log1p(counts_of(24).toarray()).astype(np.float32))
    assert (read_anndata_sample(path).counts.toarray() == counts_of(24).toarray()).all()


@pytest.mark.parametrize("matrix", [sp.csc_matrix(counts_of(24)), counts_of(24).toarray()], ids=["csc", "dense"])
def test_the_form_of_the_matrix_does_not_matter(tmp_path, matrix):
    assert (read_anndata_sample(write(tmp_path / "s.h5ad", X=matrix)).counts.toarray() == counts_of(24).toarray()).all()


def scattered(path, uns):
    """Positions without an array."""
    table = visium_positions()
    adata = ad.AnnData(counts_of(24), obs=pd.DataFrame(index=table["barcode"]), uns=uns)
    adata.obsm["spatial"] = np.random.default_rng(0).uniform(0, 500, (24, 2))
    adata.write_h5ad(path)
    return path


@pytest.mark.parametrize("uns, options, mpp", [
    ({}, {"mpp": 0.4}, 0.4), ({"morphology": {"mpp": 0.3}}, {}, 0.3),
    ({"spatial": {"s": {"scalefactors": {"microns_per_pixel": 0.27}}}}, {}, 0.27),
    ({"spatial": {"s": {"scalefactors": {"spot_diameter_fullres": 130.0}}}}, {}, 0.5),
    ({"spatial": {"s": {"scalefactors": {"spot_diameter_fullres": 130.0}}}}, {"spot_um": 52}, 0.4),
], ids=["option", "our-own-record", "hd-scale-factors", "spot-diameter", "spot-um"])
def test_mpp_comes_from_what_the_file_says_or_the_user(tmp_path, uns, options, mpp):
    sample = read_anndata_sample(scattered(tmp_path / "s.h5ad", uns), **options)
    assert sample.mpp == pytest.approx(mpp) and set(sample.array_row) == {-1}


def test_without_any_source_mpp_is_asked_for(tmp_path):
    with pytest.raises(InputError, match="mpp: expected a source.*Give it with --mpp"):
        read_anndata_sample(scattered(tmp_path / "s.h5ad", {}))


def test_bins_are_known_by_their_barcodes(tmp_path):
    sample = read_anndata_sample(write(tmp_path / "s.h5ad", table=hd_positions()))
    assert sample.bin_um == 2.0 and sample.mpp == pytest.approx(MPP)


def test_what_was_written_from_a_space_ranger_folder_reads_as_the_same_spots(tmp_path):
    from preprocessing.pseudo_spots import as_spots

    sample = read_sample(write_visium(tmp_path / "KIDNEY"))
    spots = as_spots(sample, 55)
    spot_expression(sample, spots, patch_px=128, slide={}, settings={}).write_h5ad(tmp_path / "gex.h5ad")
    again = read_anndata_sample(tmp_path / "gex.h5ad")
    assert (list(again.barcodes), again.sample_id, again.mpp) == (list(spots.barcodes), "KIDNEY", sample.mpp)
    assert (again.counts != sample.counts[np.isin(sample.barcodes, spots.barcodes)]).nnz == 0


@pytest.mark.parametrize("patch_um", [54, 2], ids=["27 x 27 bins", "single bins"])
def test_pseudo_spots_stay_what_they_are_however_often_they_are_read_again(tmp_path, patch_um):
    from preprocessing.expression import read_expression

    folder, slide = phantom_hd_folder(tmp_path, offset=(0, 0))
    run("--space-ranger-dir", folder, "--wsi-file", slide, "--out-dir", tmp_path / "0", "--patch-sz-um", patch_um, "--stride", 9)
    for number in (1, 2):
        run("--gex-file", tmp_path / str(number - 1) / "gex.h5ad", "--wsi-file", slide, "--out-dir", tmp_path / str(number),
            "--patch-sz-um", patch_um)
    first, *later = (read_expression(tmp_path / str(number) / "gex.h5ad") for number in (0, 1, 2))
    for expression in (first, *later):
        assert (expression.obs["n_members"] == (patch_um // 2) ** 2).all()
        assert {name: expression.uns["morphology"][name] for name in ("bin_um", "stride_bins")} == {"bin_um": 2.0, "stride_bins": 9}
        assert list(expression.obs_names) == list(first.obs_names) and (expression.X != first.X).nnz == 0
        assert (expression.obs[["array_row", "array_col"]] == first.obs[["array_row", "array_col"]]).all(axis=None)


@pytest.mark.parametrize("changes, message", [
    ({"obsm": {}}, r"obsm\['spatial'\]: expected level-0 pixel positions"),
    ({"obsm": {"spatial": np.full((24, 2), np.nan)}}, "finite numbers .N, 2.; found .* with gaps"),
    ({"obsm": {"spatial": np.zeros((24, 3))}}, r"found float64 \(24, 3\)"),
    ({"X": np.log1p(counts_of(24).toarray())}, "raw UMI counts, whole numbers.*Put the raw counts into layers.'counts'."),
    ({"X": -counts_of(24)}, "expected raw UMI counts; found .* negative values"),
    ({"X": np.full((24, 4), np.nan)}, "expected raw UMI counts; found 96 NaN or infinite values"),
    ({"layers": {"counts": np.log1p(counts_of(24).toarray())}}, "raw UMI counts, whole numbers.*Put the raw counts"),
], ids=["no-positions", "gaps", "three-columns", "logged", "negative", "nan", "logged layer"])
def test_files_that_cannot_be_a_sample_are_refused(tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        read_anndata_sample(write(tmp_path / "s.h5ad", **changes))


def test_several_sections_in_one_file_are_refused(tmp_path):
    obs = visium_positions().set_index("barcode").assign(sample_id=["A"] * 12 + ["B"] * 12)
    with pytest.raises(InputError, match=r"one section, as there is one slide; found 2 \(A, B\)"):
        read_anndata_sample(write(tmp_path / "s.h5ad", obs=obs))


def test_a_real_file_of_log_normalised_counts_is_refused(shared_data):
    with pytest.raises(InputError, match="normalised or logged already"):
        read_anndata_sample(shared_data / "mouse-brain-crop" / "original" / "test_data.h5ad")
