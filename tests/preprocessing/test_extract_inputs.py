"""Every file that results depend on is an input of their done-manifest, wherever the Space Ranger folder keeps it."""
import shutil

import pytest
from visium_folders import visium_positions, write_clusters, write_hd, write_visium

from preprocessing.extraction import Request


def inputs(tmp_path, folder) -> set[str]:
    """Recorded inputs but the slide, relative to the test's folder."""
    slide = tmp_path / "slide.png"
    slide.write_bytes(b"only its name is looked at")
    recorded = Request(slide, space_ranger_dir=folder, out_dir=tmp_path / "out").sample_inputs()
    assert recorded.pop("slide") == slide
    return {path.relative_to(tmp_path).as_posix() for path in recorded.values()}


def visium_parts(folder, prefix=""):
    return {f"{folder}/spatial/{prefix}tissue_positions.csv", f"{folder}/spatial/{prefix}scalefactors_json.json"}


@pytest.mark.parametrize("name", ["raw_feature_bc_matrix.h5", "S7_filtered_feature_bc_matrix.h5"], ids=["raw", "prefixed"])
def test_the_matrix_is_an_input_under_any_name_it_is_read_by(tmp_path, name):
    folder = write_visium(tmp_path / "S")
    (folder / "filtered_feature_bc_matrix.h5").rename(folder / name)
    assert inputs(tmp_path, folder) == visium_parts("S") | {f"S/{name}"}


def test_every_member_of_an_mtx_folder_is_an_input(tmp_path):
    folder = write_visium(tmp_path / "S", matrix="mtx.gz")
    members = {f"S/filtered_feature_bc_matrix/{name}.gz" for name in ("matrix.mtx", "features.tsv", "barcodes.tsv")}
    assert inputs(tmp_path, folder) == visium_parts("S") | members


@pytest.mark.parametrize("given", [".", "binned_outputs", "binned_outputs/square_002um"])
def test_clusters_of_larger_bins_are_inputs_from_every_folder_that_may_be_given(tmp_path, given):
    bins = write_hd(tmp_path / "S", prefix="Kidney_")
    write_clusters(bins.parent / "square_008um", ["s_008um_00000_00000-1"], ["1"])
    here = "S/binned_outputs/square_002um"
    assert inputs(tmp_path, tmp_path / "S" / given) == {
        f"{here}/Kidney_filtered_feature_bc_matrix.h5", f"{here}/spatial/Kidney_tissue_positions.parquet",
        f"{here}/spatial/Kidney_scalefactors_json.json",
        "S/binned_outputs/square_008um/analysis/clustering/gene_expression_graphclust/clusters.csv"}


def test_images_and_clusters_of_a_visium_folder_are_inputs(tmp_path, sim_v2):
    folder = shutil.copytree(sim_v2.space_ranger_dir, tmp_path / "S")
    found = inputs(tmp_path, folder)
    assert {"S/spatial/tissue_hires_image.png", "S/spatial/tissue_lowres_image.png", "S/filtered_feature_bc_matrix.h5",
            "S/analysis/clustering/gene_expression_graphclust/clusters.csv"} <= found
    assert len(found) == 6


def test_positions_that_another_file_of_the_folder_replaces_are_no_input(tmp_path):
    folder = write_visium(tmp_path / "S")
    visium_positions().to_csv(folder / "spatial" / "tissue_positions_list.csv", index=False, header=False)
    assert inputs(tmp_path, folder) == visium_parts("S") | {"S/filtered_feature_bc_matrix.h5"}
