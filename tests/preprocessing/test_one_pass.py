"""extract_patches --dump-dir: the patch folder of one pass is that of two; damaged tiles cost their patches and no others."""
import json
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import tifffile
from click.testing import CliRunner
from extract_runs import fails, run
from hd_phantoms import MPP, phantom_hd_folder
from PIL import Image

from preprocessing.dump_patches import main as dump_patches
from preprocessing.patch_file import read_patch_file
from preprocessing.patches import pair, read_patch_folder


def pictures(folder: Path) -> dict:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted(folder.glob("*.png"))}


@pytest.mark.parametrize("options", [(), ("--no-normalize",)], ids=["normalised", "colours as they are"])
def test_a_folder_of_one_pass_is_that_of_two(sim_hd, tmp_path, options):
    sample = ("--space-ranger-dir", sim_hd.space_ranger_dir, "--wsi-file", sim_hd.slide, "--patch-sz-px", 40)
    run(*sample, "--out-dir", tmp_path / "two", "--workers", 1)
    dumped = CliRunner().invoke(dump_patches, ["--images", str(tmp_path / "two" / "imgs.h5"), "--wsi", str(sim_hd.slide), "--out-dir",
                                               str(tmp_path / "two" / "patches"), *options])
    assert dumped.exit_code == 0, dumped.output
    run(*sample, "--out-dir", tmp_path / "one", "--dump-dir", tmp_path / "elsewhere" / "patches", "--no-h5", "--workers", 2, *options)
    one, two = tmp_path / "elsewhere" / "patches", tmp_path / "two" / "patches"
    assert pictures(one) == pictures(two) and len(pictures(one)) > 100
    assert (one / "metadata.jsonl").read_text() == (two / "metadata.jsonl").read_text()
    assert json.loads((one / "stain.json").read_text()) == json.loads((two / "stain.json").read_text())
    assert not (tmp_path / "one" / "imgs.h5").exists()
    expression = ad.read_h5ad(tmp_path / "one" / "gex.h5ad")
    assert len(pair(read_patch_folder(one), expression.obs_names.tolist(), "gex.h5ad")) == expression.n_obs


def test_a_finished_folder_is_kept_and_a_damaged_one_made_again(sim_v2, tmp_path):
    arguments = ("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path, "--dump-dir",
                 tmp_path / "patches", "--patch-sz-px", 40)
    run(*arguments)
    assert "already extracted" in run(*arguments)
    first = sorted((tmp_path / "patches").glob("*.png"))[0]
    before = first.read_bytes()
    first.write_bytes(b"")
    assert "already extracted" not in run(*arguments) and first.read_bytes() == before


def test_random_patches_have_a_folder_too(sim_v2, tmp_path):
    run("--wsi-file", sim_v2.slide, "--tissue-seg-file", "auto", "--out-dir", tmp_path, "--dump-dir", tmp_path / "patches", "--no-h5",
        "--n-pts", 30, "--patch-sz-px", 40)
    folder = read_patch_folder(tmp_path / "patches")
    assert len(folder.paths) == 30 and folder.barcodes is None and not (tmp_path / "random_imgs.h5").exists()
    assert (tmp_path / "random_imgs_qc.html").exists()


@pytest.mark.parametrize(("options", "message"), [
    (["--no-h5"], "--no-h5: expected --dump-dir"),
    (["--no-normalize"], "--normalize: expected --dump-dir beside it"),
    (["--on-stain-failure", "skip"], "--on-stain-failure: expected --dump-dir beside it"),
    (["--dump-dir", "d", "--tissue-seg-file", "auto"], "--dump-dir: expected the patches of a sample or random ones in one run"),
    (["--max-bad", 2], "--max-bad: expected a share between 0 and 1; found 2"),
    (["--memory-gb", 0], "--memory-gb: expected a number above 0, up to 1,000,000; found 0"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_an_option_that_cannot_have_an_effect_is_refused(sim_v2, tmp_path, options, message):
    assert message in fails(2, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path, *options)
    assert not list(tmp_path.glob("[!.]*"))


def test_a_folder_of_something_else_is_never_replaced(sim_v2, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("ten years of work")
    said = fails(3, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out", "--dump-dir",
                 tmp_path / "mine")
    assert "thesis.tex" in said and (tmp_path / "mine" / "thesis.tex").read_text() == "ten years of work"
    assert not (tmp_path / "out" / "gex.h5ad").exists()


def test_little_memory_and_many_workers_change_nothing(sim_hd, tmp_path):
    sample = ("--space-ranger-dir", sim_hd.space_ranger_dir, "--wsi-file", sim_hd.slide, "--patch-sz-px", 32)
    run(*sample, "--out-dir", tmp_path / "a", "--workers", 1)
    run(*sample, "--out-dir", tmp_path / "b", "--workers", 5, "--memory-gb", 0.05)
    a, b = (ad.read_h5ad(tmp_path / name / "gex.h5ad") for name in "ab")
    assert (a.X != b.X).nnz == 0 and a.obs.equals(b.obs)


# ---- row 16: a corrupt tile -----------------------------------------------------------------------------------------

@pytest.fixture
def damaged(tmp_path):
    """A phantom whose slide has JPEG tiles, one of them overwritten; the box of that tile in px."""
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0), shape=(60, 60))
    pixels = tifffile.imread(slide_file)
    tifffile.imwrite(slide_file, pixels, tile=(64, 64), photometric="rgb", compression="jpeg", resolution=(1e4 / MPP, 1e4 / MPP),
                     resolutionunit="CENTIMETER")
    with tifffile.TiffFile(slide_file) as tiff:
        page = tiff.pages[0]
        across = -(-page.imagewidth // 64)
        number = 3 * across + 3
        offset, length = page.dataoffsets[number], page.databytecounts[number]
    content = bytearray(slide_file.read_bytes())
    content[offset:offset + length] = bytes(length)
    (tmp_path / "damaged.tif").write_bytes(content)
    return folder, slide_file, tmp_path / "damaged.tif", (192, 192, 256, 256)


def test_patches_on_a_corrupt_tile_are_left_out_and_named_and_all_others_are_right(damaged, tmp_path):
    folder, whole, broken, (x0, y0, x1, y1) = damaged
    run("--space-ranger-dir", folder, "--wsi-file", whole, "--out-dir", tmp_path / "whole", "--stride", 3)
    said = run("--space-ranger-dir", folder, "--wsi-file", broken, "--out-dir", tmp_path / "out", "--stride", 3, "--max-bad", 0.9,
               "--dump-dir", tmp_path / "out" / "patches", "--no-normalize")
    everything, kept = (ad.read_h5ad(tmp_path / name / "gex.h5ad") for name in ("whole", "out"))
    x, y = everything.obsm["spatial"].T
    reach = 55 / MPP / 2
    over = (x - reach < x1) & (x + reach > x0) & (y - reach < y1) & (y + reach > y0)
    assert 0 < over.sum() < len(over) and kept.obs_names.tolist() == everything.obs_names[~over].tolist()
    assert (kept.X != everything[~over].X).nnz == 0
    listed = pd.read_csv(tmp_path / "out" / "dropped_spots.tsv", sep="\t").set_index("barcode")["reason"]
    assert set(listed.index[listed == "lie on tiles that cannot be decoded"]) == set(everything.obs_names[over])
    assert f"warning: {over.sum()} patches lie on tiles that cannot be decoded" in said and everything.obs_names[over][0] in said
    with read_patch_file(tmp_path / "whole" / "imgs.h5") as a, read_patch_file(tmp_path / "out" / "imgs.h5") as b:
        assert np.array_equal(a.images(slice(None))[~over], b.images(slice(None))) and b.barcodes == kept.obs_names.tolist()
    assert len(pictures(tmp_path / "out" / "patches")) == kept.n_obs == len(read_patch_folder(tmp_path / "out" / "patches").paths)


def test_too_many_patches_on_corrupt_tiles_end_the_run_and_more_may_be_allowed_later(damaged, tmp_path):
    folder, _, broken, _ = damaged
    arguments = ("--space-ranger-dir", folder, "--wsi-file", broken, "--out-dir", tmp_path / "out", "--stride", 3)
    said = fails(3, *arguments)
    assert f"{broken}: tiles: expected at most 1.00% of " in said and "(--max-bad)" in said
    assert not list((tmp_path / "out").glob("[!.]*"))
    assert "tiles: expected at most 1.00%" in fails(3, *arguments)                  # blocks of the first run make no difference
    run(*arguments, "--max-bad", 1)
    assert (tmp_path / "out" / "gex.h5ad").exists()
    assert "tiles: expected at most 0.00%" in fails(3, *arguments, "--max-bad", 0)
    assert "already extracted" in run(*arguments, "--max-bad", 0.95)


def test_patches_of_other_settings_do_not_stay_beside_new_expression(sim_v2, tmp_path):
    arguments = ("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path, "--patch-sz-px", 40)
    run(*arguments)
    before = (tmp_path / "gex.h5ad").read_bytes()
    folder = ("--dump-dir", tmp_path / "patches", "--no-h5")
    said = fails(3, *arguments, *folder, "--patch-sz-um", 70)
    assert f"{tmp_path / 'imgs.h5'}: --no-h5: expected no HDF5 file, or one of these settings" in said
    assert (tmp_path / "gex.h5ad").read_bytes() == before
    run(*arguments, *folder)                                                         # of these settings it may stay


def test_a_link_to_a_patch_folder_stays_a_link(sim_v2, tmp_path):
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "patches").symlink_to(tmp_path / "large_disk")
    arguments = ("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out",
                 "--patch-sz-px", 40, "--dump-dir", tmp_path / "patches")
    run(*arguments)
    assert (tmp_path / "patches").is_symlink() and len(pictures(tmp_path / "large_disk")) > 3
    assert "already extracted" in run(*arguments)


# ---- what the files are like ----------------------------------------------------------------------------------------

def test_files_are_read_by_any_hdf5_reader(sim_hd, tmp_path):
    run("--space-ranger-dir", sim_hd.space_ranger_dir, "--wsi-file", sim_hd.slide, "--out-dir", tmp_path, "--patch-sz-px", 32)
    with h5py.File(tmp_path / "imgs.h5") as file:
        assert file["img"].compression == "gzip" and file["img"].chunks == (1, 32, 32, 3)
    with h5py.File(tmp_path / "gex.h5ad") as file:
        assert file["X/data"].compression == "gzip" and file["X/data"].dtype == file["X/indices"].dtype == np.int32
    counts = ad.read_h5ad(tmp_path / "gex.h5ad").X
    assert counts.has_canonical_format and counts.data.min() > 0
