"""An option of extract_patches that does nothing, or cannot be, is a usage error; a folder for a file is said to be one."""
import json
import shutil

import anndata as ad
import h5py
import numpy as np
import pytest
from extract_runs import fails, run
from hd_phantoms import phantom_hd_folder
from visium_folders import write_visium

from preprocessing.errors import InputError
from preprocessing.tenx_matrix import read_matrix


@pytest.mark.parametrize(("options", "message"), [
    (["--n-pts", 10], "--n-pts: expected --tissue-seg-file beside it"),
    (["--out-file", "o.h5"], "--tissue-seg-file: expected a GeoJSON file"),
    (["--spot-um", 55], "--spot-um: expected --gex-file beside it"),
    (["--workers", 0], "--workers: expected at least 1; found 0"), (["--workers", -3], "--workers: expected at least 1; found -3"),
    (["--dump-dir", "p", "--no-normalize", "--stain-file", "s"], "--stain-file: expected patches that are normalised"),
    (["--sample-id", "a/b"], "--sample-id: expected a name without a slash; found 'a/b'"),
    (["--sample-id", ""], "--sample-id: expected a name without a slash; found ''"),
    (["--memory-gb", "inf"], "--memory-gb: expected a finite number; found inf"),
    (["--memory-gb", "nan"], "--memory-gb: expected a finite number; found nan"),
    (["--mpp", 0.5, "--use-wsi-res"], "--mpp: expected either a number of µm per pixel or --use-wsi-res; found both"),
    (["--patch-sz-px", 4097], "--patch-sz-px: expected at most 4096, the largest that is read; found 4097"),
    (["--tissue-seg-file", "auto", "--seed", -1], "--seed: expected 0 or more; found -1"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_an_option_without_effect_or_sense_is_a_usage_error(sim_v2, tmp_path, options, message):
    said = fails(2, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out", *options)
    lines = said.strip().splitlines()
    assert lines[-1].startswith(f"error: {message}") and sum("error" in line for line in lines) == 1
    assert not list(tmp_path.glob("out/[!.]*"))


def test_options_of_other_platforms_are_taken_and_said_to_do_nothing(sim_v2, tmp_path):
    said = run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out", "--stride", 5,
               "--seed", 3, "--memory-gb", 1)
    assert "notice: --stride has no effect: Visium" in said and "notice: --seed has no effect" in said
    assert "notice: --memory-gb has no effect: only sums of bins" in said
    assert (tmp_path / "out" / "gex.h5ad").exists()


@pytest.mark.parametrize("option", ["--is-hd", "--below-v2"])
def test_what_is_said_of_a_space_ranger_folder_says_nothing_of_an_h5ad(sim_v2, tmp_path, option):
    run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "a")
    said = fails(2, "--gex-file", tmp_path / "a" / "gex.h5ad", "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "b", option)
    assert f"error: {option}: expected --space-ranger-dir beside it; found none" in said


@pytest.mark.parametrize("options", [("--stride", 5), ("--edge", "pad"), ("--is-hd",)], ids=lambda value: value[0])
def test_an_option_of_spots_says_nothing_of_random_patches(sim_v2, tmp_path, options):
    said = fails(2, "--wsi-file", sim_v2.slide, "--tissue-seg-file", "auto", "--out-file", tmp_path / "o.h5", *options)
    assert f"error: {options[0]}: expected --space-ranger-dir" in said and not (tmp_path / "o.h5").exists()


def test_memory_for_sums_is_said_to_do_nothing_for_random_patches(sim_v2, tmp_path):
    arguments = ("--wsi-file", sim_v2.slide, "--tissue-seg-file", "auto", "--out-file", tmp_path / "o.h5", "--mpp", 0.5, "--n-pts", 2)
    assert "notice: --memory-gb has no effect" in run(*arguments, "--dry-run", "--memory-gb", 1)
    assert "no effect" not in run(*arguments, "--dry-run")


def test_what_is_said_of_a_folder_is_checked_but_redoes_nothing(sim_v1, tmp_path):
    arguments = ("--space-ranger-dir", sim_v1.space_ranger_dir, "--wsi-file", sim_v1.slide, "--out-dir", tmp_path / "out")
    run(*arguments)
    recorded = json.loads((tmp_path / "out" / "gex.h5ad.done.json").read_text())["config"]
    settings = json.loads(ad.read_h5ad(tmp_path / "out" / "gex.h5ad").uns["morphology"]["settings"])
    assert recorded == settings and not {"is_hd", "below_v2", "n_patches", "seed"} & set(recorded)
    assert "already extracted" in run(*arguments, "--below-v2") and "already extracted" in run(*arguments, "--seed", 5)
    assert "--is-hd" in fails(2, *arguments, "--is-hd")
    assert "already extracted" not in run(*arguments, "--edge", "pad")


def test_a_dry_run_names_the_patch_folder_and_refuses_what_the_run_would_refuse(sim_v2, tmp_path):
    arguments = ("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out",
                 "--dump-dir", tmp_path / "patches", "--dry-run")
    [would] = [line for line in run(*arguments).splitlines() if line.startswith("dry run, nothing written; would write")]
    assert str(tmp_path / "out" / "gex.h5ad") in would and would.endswith(f", {tmp_path / 'patches'}") and not list(tmp_path.iterdir())
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "thesis.docx").write_text("precious")
    assert "a patch folder to replace; found 1 (thesis.docx) other entries" in fails(3, *arguments)


def test_options_that_have_an_effect_are_taken(tmp_path):
    folder, slide = phantom_hd_folder(tmp_path, offset=(0, 0))
    said = run("--space-ranger-dir", folder, "--wsi-file", slide, "--out-dir", tmp_path / "out", "--dry-run", "--is-hd", "--stride", 9,
               "--edge", "pad", "--sample-id", "KIDNEY")
    assert "KIDNEY: Visium HD" in said and "no effect" not in said


@pytest.mark.parametrize("options", [("--tissue-seg-file", "FOLDER", "--out-file", "o.h5"), ("--gex-file", "FOLDER")],
                         ids=lambda value: value[0])
def test_a_folder_in_place_of_a_file_is_said_to_be_one(sim_v2, tmp_path, options):
    options = [tmp_path if option == "FOLDER" else option for option in options]
    assert f"{tmp_path}: path: expected a file; found a folder" in fails(3, "--wsi-file", sim_v2.slide, *options)


@pytest.mark.parametrize(("name", "values"), [
    ("data", np.array([b"many", b"few"])), ("indices", np.array([b"zero"])), ("indptr", np.array([b"a", b"b"])),
    ("shape", np.array([b"a"])), ("data", np.zeros((3, 2))), ("barcodes", np.int64(3)),
], ids=["data of strings", "indices of strings", "indptr of strings", "shape of strings", "data of two dimensions", "a number as barcodes"])
def test_a_matrix_whose_datasets_are_of_another_kind_is_refused_naming_the_file(tmp_path, name, values):
    matrix = write_visium(tmp_path) / "filtered_feature_bc_matrix.h5"
    with h5py.File(matrix, "r+") as file:
        if name == "data" and values.ndim == 1:
            values = np.full(len(file["matrix/data"]), b"many")
        del file[f"matrix/{name}"]
        file[f"matrix/{name}"] = values
    with pytest.raises(InputError, match=f"{matrix.name}: "):
        read_matrix(matrix)


@pytest.mark.parametrize("link", [False, True], ids=["itself", "by a link"])
def test_an_input_named_as_an_output_is_never_written_over(sim_v2, tmp_path, link):
    run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "a")
    gex = tmp_path / "a" / "gex.h5ad"
    if link:
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "section.h5ad").symlink_to(gex)
    given, before = tmp_path / "b" / "section.h5ad" if link else gex, gex.read_bytes()
    out = ["--out-dir", tmp_path / "a"] if link else []
    said = fails(2, "--gex-file", given, "--wsi-file", sim_v2.slide, "--patch-sz-um", 40, *out)
    assert "error: --out-dir: expected another place for what is written than for what is read" in said and str(gex) in said
    assert gex.read_bytes() == before


@pytest.mark.parametrize("read", ["slide", "tissue", "matrix"])
def test_random_patches_are_not_written_over_what_is_read(sim_v2, tmp_path, read):
    folder = shutil.copytree(sim_v2.folder, tmp_path / "S")
    path = folder / {"slide": "slide.tif", "tissue": "tissue.geojson", "matrix": "outs/filtered_feature_bc_matrix.h5"}[read]
    before = path.read_bytes()
    said = fails(2, "--space-ranger-dir", folder / "outs", "--wsi-file", folder / "slide.tif", "--tissue-seg-file",
                 folder / "tissue.geojson", "--out-file", path, "--n-pts", 4)
    assert f"error: --out-file: expected another place for what is written than for what is read; found {path}" in said
    assert path.read_bytes() == before


def test_a_patch_folder_does_not_replace_the_one_its_stain_file_lies_in(sim_v2, tmp_path):
    (tmp_path / "patches").mkdir()
    (tmp_path / "patches" / "stain.json").write_text("{}")
    said = fails(2, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out",
                 "--dump-dir", tmp_path / "patches", "--stain-file", tmp_path / "patches" / "stain.json")
    assert "error: --dump-dir: expected a folder without an input in it" in said and (tmp_path / "patches" / "stain.json").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gex.h5ad", "imgs.h5", "qc.png"])
def test_random_patches_never_go_where_the_files_of_the_sample_do(sim_v2, tmp_path, name):
    said = fails(2, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out",
                 "--tissue-seg-file", "auto", "--out-file", tmp_path / "out" / name)
    assert "--out-file: expected a file of its own" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["out", ".", "out/gex.h5ad"])
def test_the_patch_folder_never_holds_the_other_files(sim_v2, tmp_path, folder):
    said = fails(2, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out",
                 "--dump-dir", tmp_path / folder)
    assert "--dump-dir: expected a folder of its own" in said and not (tmp_path / "out").exists()
