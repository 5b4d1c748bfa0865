"""Position-coded Visium HD phantoms: the molecules of every patch come from where its picture was taken."""
import anndata as ad
import numpy as np
import pytest
from extract_runs import WRITTEN, fails, run
from hd_phantoms import MPP, bright_code, decode_colour, decode_counts, inverted_code, n_windows, phantom_hd_folder

from preprocessing.patch_file import read_patch_file
from preprocessing.pseudo_spots import group_bins
from preprocessing.simulation.space_ranger_files import hd_barcodes
from preprocessing.slide import open_slide
from preprocessing.space_ranger import read_sample
from preprocessing.spot_sums import sum_spots
from preprocessing.windows import cut_blocks

OFFSETS = [(0, 0), (3, 0), (10, 20), (30, 30), (80, 90)]
HOLES = ((5, 38), (36, 3), (37, 3))


@pytest.mark.parametrize("holes", [(), HOLES], ids=["full", "holes"])
@pytest.mark.parametrize("columns_run_left", [False, True], ids=["columns right", "columns left"])
@pytest.mark.parametrize("offset", OFFSETS, ids=str)
def test_the_molecules_of_every_hd_patch_come_from_where_its_picture_was_taken(tmp_path, offset, columns_run_left, holes):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=offset, columns_run_left=columns_run_left, holes=holes)
    with open_slide(slide_file) as slide:
        sample = read_sample(folder, slide=slide)
        for patch_um, stride in ((55, 5), (55, 2), (18, 1), (18, 7)):
            spots = group_bins(sample, patch_um, stride)
            [cut] = cut_blocks(slide, spots.centre_xy_px, patch_um, sample.mpp, 64, [slice(0, len(spots))])
            assert len(spots) == len(cut.patches) == n_windows(offset, (40, 45), holes, int(patch_um // 2), stride) > 0
            error_bins = np.abs(decode_counts(sum_spots(sample, spots)) - decode_colour(cut.patches))
            assert error_bins.max() <= 0.5, (patch_um, stride)


@pytest.mark.parametrize("direction", [{}, {"columns_run_left": True}, {"rows_run_up": True}], ids=["plain", "columns left", "rows up"])
def test_rows_of_the_hd_files_pair_the_picture_with_its_molecules(tmp_path, direction):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(10, 20), holes=HOLES, **direction)
    said = run("--space-ranger-dir", folder, "--wsi-file", slide_file, "--stride", 3, "--out-dir", tmp_path / "out")
    expression = ad.read_h5ad(tmp_path / "out" / "gex.h5ad")
    with read_patch_file(tmp_path / "out" / "imgs.h5") as patches:
        assert patches.barcodes == expression.obs_names.tolist()
        assert np.abs(decode_counts(expression.X) - decode_colour(patches.images(slice(None)))).max() <= 0.5
        assert np.abs(patches.centre_xy_px - expression.obsm["spatial"]).max() <= 0.5
    centre = expression.obs[["array_row", "array_col"]].to_numpy()
    assert np.array_equal(decode_counts(expression.X), centre) and (expression.obs["n_members"] == 729).all()
    assert expression.obs_names.tolist() == hd_barcodes(*centre.T).tolist()
    record = expression.uns["morphology"]
    assert (record["mpp"], record["patch_um"], record["patch_px"], record["stride_bins"], record["bin_um"]) == (MPP, 55, 128, 3, 2)
    kept = n_windows((10, 20), (40, 45), HOLES, 27, 3)
    assert expression.n_obs == kept and f"kept {kept} of " in said and "have a bin outside tissue" in said


@pytest.mark.parametrize("offset", [(10, 20), (30, 30)], ids=str)
@pytest.mark.parametrize("direction", [{}, {"columns_run_left": True}, {"rows_run_up": True}], ids=["plain", "columns left", "rows up"])
@pytest.mark.parametrize("code", [bright_code, inverted_code])
def test_bright_and_inverted_pictures_are_not_taken_for_exchanged_columns(tmp_path, code, direction, offset):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=offset, code=code, **direction)
    run("--space-ranger-dir", folder, "--wsi-file", slide_file, "--stride", 9, "--out-dir", tmp_path / "out", "--patch-sz-px", 64)
    with read_patch_file(tmp_path / "out" / "imgs.h5") as patches:
        expression = ad.read_h5ad(tmp_path / "out" / "gex.h5ad")
        assert len(patches) > 0
        assert np.abs(decode_counts(expression.X) - decode_colour(patches.images(slice(None)).astype(float), code)).max() <= 0.5


def test_any_of_the_hd_folders_names_the_sample(tmp_path):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    run("--space-ranger-dir", folder / "binned_outputs" / "square_002um", "--wsi-file", slide_file, "--out-dir", tmp_path / "a")
    run("--space-ranger-dir", folder, "--wsi-file", slide_file, "--out-dir", tmp_path / "b")
    a, b = (ad.read_h5ad(tmp_path / name / "gex.h5ad") for name in "ab")
    assert a.obs_names.equals(b.obs_names) and (a.X != b.X).nnz == 0


@pytest.mark.parametrize(("patch_um", "message"), [(56, r"54 µm (27 bins) or 58 µm (29 bins); found 56 µm = 28 bins"),
                                                   (1.5, "2 µm (1 bin); found 1.5 µm = 0 bins")], ids=["even", "zero"])
def test_a_patch_of_an_impossible_number_of_bins_is_a_usage_error(tmp_path, patch_um, message):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    said = fails(2, "--space-ranger-dir", folder, "--wsi-file", slide_file, "--patch-sz-um", patch_um, "--out-dir", tmp_path / "out")
    assert message in said and not any((tmp_path / "out" / name).exists() for name in WRITTEN)
