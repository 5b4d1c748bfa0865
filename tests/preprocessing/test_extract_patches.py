"""extract_patches from folder to files: every patch shows the tissue whose molecules were counted, and nothing else is written."""
import json
import re
import shutil
from dataclasses import replace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from click.testing import CliRunner
from extract_runs import WRITTEN, fails, run
from hd_phantoms import MPP, phantom_hd_folder
from PIL import Image

from preprocessing.block_extraction import make_blocks
from preprocessing.done_manifests import fingerprint
from preprocessing.extract_patches import main
from preprocessing.extraction import ExtractConfig, choose_spots
from preprocessing.hd_barcodes import as_text
from preprocessing.patch_file import read_patch_file
from preprocessing.pseudo_spots import group_bins, take_spots
from preprocessing.sample import Spots
from preprocessing.slide import open_slide
from preprocessing.space_ranger import read_sample
from preprocessing.spot_sums import sum_spots

# ---- the edge of the slide ------------------------------------------------------------------------------------------

def cropped(slide_file, target, rows, columns):
    """The same slide with fewer pixels on the right and at the bottom."""
    pixels = tifffile.imread(slide_file)[:rows, :columns]
    tifffile.imwrite(target, pixels, tile=(64, 64), resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER", photometric="rgb")
    return target


def test_patches_over_the_slides_edge_are_dropped_counted_and_listed(tmp_path):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    everything = tmp_path / "whole"
    run("--space-ranger-dir", folder, "--wsi-file", slide_file, "--out-dir", everything)
    crop = cropped(slide_file, tmp_path / "crop.tif", 1000, 215)
    said = run("--space-ranger-dir", folder, "--wsi-file", crop, "--out-dir", tmp_path / "out")
    all_spots, kept = (ad.read_h5ad(path / "gex.h5ad") for path in (everything, tmp_path / "out"))
    inside = all_spots.obsm["spatial"][:, 0] + 55 / MPP / 2 <= 215
    assert 0 < inside.sum() < len(inside) and kept.obs_names.tolist() == all_spots.obs_names[inside].tolist()
    n_incomplete = int(re.search(r"(\d+) have a bin outside tissue", said)[1])
    assert f"kept {inside.sum()} of {len(inside) + n_incomplete} pseudo-spots; " in said
    assert f"; {(~inside).sum()} reach over the slide's edge" in said
    listed = pd.read_csv(tmp_path / "out" / "dropped_spots.tsv", sep="\t")
    assert listed["barcode"].tolist() == all_spots.obs_names[~inside].tolist()
    assert set(listed["reason"]) == {"reach over the slide's edge"}


def test_padded_patches_are_white_beyond_the_edge_and_never_black(tmp_path):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    crop = cropped(slide_file, tmp_path / "crop.tif", 1000, 215)
    run("--space-ranger-dir", folder, "--wsi-file", crop, "--out-dir", tmp_path / "out", "--edge", "pad", "--patch-sz-px", 110)
    with read_patch_file(tmp_path / "out" / "imgs.h5") as patches:
        reach = (patches.coords[:, 0] + 110 - 215).clip(0)
        assert reach.max() > 10
        for row in range(len(patches)):
            patch = patches.images(row)
            assert (patch[:, 110 - reach[row]:] == 255).all() and (patch[..., 2] >= 199).all()


def test_a_slide_that_ends_before_the_tissue_is_an_input_error(tmp_path):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(30, 30))
    crop = cropped(slide_file, tmp_path / "crop.tif", 100, 100)
    fails(3, "--space-ranger-dir", folder, "--wsi-file", crop, "--out-dir", tmp_path / "out")
    assert not any((tmp_path / "out" / name).exists() for name in WRITTEN)


def test_patches_that_were_cut_where_nothing_was_scanned_are_said(tmp_path):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    pixels = tifffile.imread(slide_file)
    pixels[:, :200] = 0
    tifffile.imwrite(tmp_path / "black.tif", pixels, tile=(64, 64), photometric="rgb")
    said = run("--space-ranger-dir", folder, "--wsi-file", tmp_path / "black.tif", "--out-dir", tmp_path / "out")
    assert "patches are mostly black" in said
    assert "patches are mostly black" in (tmp_path / "out" / "qc.html").read_text()


# ---- simulated and real samples -------------------------------------------------------------------------------------

@pytest.mark.parametrize("fixture", ["sim_v1", "sim_v2", "sim_hd"])
def test_a_simulated_sample_becomes_paired_files_and_a_page(fixture, request, tmp_path):
    simulated = request.getfixturevalue(fixture)
    said = run("--space-ranger-dir", simulated.space_ranger_dir, "--wsi-file", simulated.slide, "--out-dir", tmp_path,
               "--sample-id", "TENX1", "--workers", 2)
    assert said.startswith("TENX1: Visium") and said.rstrip().endswith("qc.html")
    expression = ad.read_h5ad(tmp_path / "gex.h5ad")
    with read_patch_file(tmp_path / "imgs.h5") as patches:
        assert patches.barcodes == expression.obs_names.tolist() and len(patches) > 5
        assert patches.images(slice(0, 4)).shape == (4, 128, 128, 3)
        assert float(patches.attrs["pixel_size"]) == pytest.approx(simulated.mpp, rel=0.02)
    assert {"in_tissue", "array_row", "array_col", "sample_id", "n_members"} <= set(expression.obs)
    page = (tmp_path / "qc.html").read_text()
    assert page.count("data:image/png;base64,") == 2
    assert "http:" not in page and "https:" not in page and f"of {expression.n_obs:,} patches" in page
    assert all(json.loads((tmp_path / f"{name}.done.json").read_text())["rows"] == expression.n_obs for name in WRITTEN)


def test_without_an_out_dir_files_go_into_the_space_ranger_folder(sim_v2, tmp_path):
    folder = shutil.copytree(sim_v2.space_ranger_dir, tmp_path / "SR")
    run("--space-ranger-dir", folder, "--wsi-file", sim_v2.slide)
    assert all((folder / name).is_file() for name in WRITTEN)


@pytest.mark.parametrize("name", ["derived_spaceranger_v1", "derived_spaceranger_v2"])
def test_real_visium_spots_keep_their_counts_clusters_and_place(name, shared_data, tmp_path):
    folder = shared_data / "mouse-brain-crop" / name
    slide_file = folder.parent / "fullres.tif"
    run("--space-ranger-dir", folder, "--wsi-file", slide_file, "--out-dir", tmp_path)
    truth = pd.read_csv(folder.parent / "true_spot_counts.tsv.gz", sep="\t", index_col=0)
    expression = ad.read_h5ad(tmp_path / "gex.h5ad")
    assert set(expression.obs_names) <= set(truth.index)
    assert np.array_equal(expression.to_df()[truth.columns], truth.loc[expression.obs_names])
    clusters = pd.read_csv(folder / "analysis/clustering/gene_expression_graphclust/clusters.csv", index_col=0)["Cluster"]
    assert expression.obs["cluster"].tolist() == clusters[expression.obs_names].astype(str).tolist()
    listed = pd.read_csv(tmp_path / "dropped_spots.tsv", sep="\t")["barcode"]
    assert len(listed) + expression.n_obs == len(truth) and not set(listed) & set(expression.obs_names)


def test_an_h5ad_with_positions_serves_instead_of_a_space_ranger_folder(shared_data, tmp_path):
    folder = shared_data / "mouse-brain-crop"
    slide = ("--wsi-file", folder / "fullres.tif")
    run("--space-ranger-dir", folder / "derived_spaceranger_v2", *slide, "--out-dir", tmp_path / "a")
    said = run("--gex-file", tmp_path / "a" / "gex.h5ad", *slide, "--out-dir", tmp_path / "b", "--mpp", 0.7269)
    a, b = (ad.read_h5ad(tmp_path / name / "gex.h5ad") for name in "ab")
    assert "0.7269 mpp, 49 spots" in said and a.obs_names.equals(b.obs_names) and (a.X != b.X).nnz == 0
    with read_patch_file(tmp_path / "a" / "imgs.h5") as first, read_patch_file(tmp_path / "b" / "imgs.h5") as second:
        difference = first.images(slice(None)).astype(float) - second.images(slice(None))
        assert np.abs(difference).mean() < 3                          # the two mpp differ by 0.3 %


def true_spots_as_windows(sample, positions, n=27) -> Spots:
    """The n x n bins about each true spot centre."""
    centre = np.array([np.argmin(((sample.centre_xy_px - xy) ** 2).sum(axis=1)) for xy in positions])
    return Spots(barcodes=as_text(sample.barcodes[centre]), centre_xy_px=sample.centre_xy_px[centre], array_row=sample.array_row[centre],
                 array_col=sample.array_col[centre], sample_rows=centre, bins_per_side=n, patch_um=54)


def test_bins_about_a_true_spot_return_its_molecules(shared_data):
    folder = shared_data / "mouse-brain-crop"
    with open_slide(folder / "fullres.tif") as slide:
        spots, bins = (read_sample(folder / name, slide=slide) for name in ("derived_spaceranger_v1", "derived_visium_hd"))
    truth = pd.read_csv(folder / "true_spot_counts.tsv.gz", sep="\t", index_col=0)
    in_tissue = spots.in_tissue & np.isin(spots.barcodes, truth.index)
    windows = true_spots_as_windows(bins, spots.centre_xy_px[in_tissue])
    everywhere = replace(bins, in_tissue=np.ones(len(bins.barcodes), dtype=bool))        # true spots reach over the tissue's edge
    sums = pd.DataFrame(sum_spots(everywhere, windows).toarray(), columns=bins.gene_names)[truth.columns].to_numpy()
    true = truth.loc[spots.barcodes[in_tissue]].to_numpy()
    assert len(true) == 49
    assert (np.minimum(sums, true).sum(axis=1) >= 0.99 * true.sum(axis=1)).all()


def test_pseudo_spots_of_the_real_hd_folder_include_its_spots(shared_data):
    """Windows of the tool's own choosing, tissue rule and all; 8 of the 49 spots reach over the tissue's edge."""
    folder = shared_data / "mouse-brain-crop"
    with open_slide(folder / "fullres.tif") as slide:
        spots, bins = (read_sample(folder / name, slide=slide) for name in ("derived_spaceranger_v1", "derived_visium_hd"))
    true_xy = spots.centre_xy_px[spots.in_tissue]
    every = group_bins(bins, 55, stride_bins=1)
    nearest = np.array([np.argmin(((every.centre_xy_px - xy) ** 2).sum(axis=1)) for xy in true_xy])
    found = np.linalg.norm(every.centre_xy_px[nearest] - true_xy, axis=1) <= 2.0          # within the centre bin, 2.75 px wide
    truth = pd.read_csv(folder / "true_spot_counts.tsv.gz", sep="\t", index_col=0).loc[spots.barcodes[spots.in_tissue][found]]
    sums = sum_spots(bins, take_spots(every, nearest[found], {}))
    sums = pd.DataFrame(sums.toarray(), columns=bins.gene_names)[truth.columns].to_numpy()
    assert found.sum() == 41
    assert (np.minimum(sums, truth.to_numpy()).sum(axis=1) >= 0.99 * truth.to_numpy().sum(axis=1)).all()


@pytest.mark.parametrize("name", ["derived_spaceranger_v1", "derived_spaceranger_v2", "derived_visium_hd"])
def test_patches_of_real_tissue_are_the_pixels_about_their_centre(name, shared_data, tmp_path):
    slide_file = shared_data / "mouse-brain-crop" / "fullres.tif"
    run("--space-ranger-dir", shared_data / "mouse-brain-crop" / name, "--wsi-file", slide_file, "--out-dir", tmp_path,
        *(("--stride", 20) if name.endswith("hd") else ()), "--patch-sz-px", 64)
    expression = ad.read_h5ad(tmp_path / "gex.h5ad")
    pixels, side = tifffile.imread(slide_file), 55 / expression.uns["morphology"]["mpp"]
    with read_patch_file(tmp_path / "imgs.h5") as patches:
        for row in range(0, len(patches), max(1, len(patches) // 40)):
            x, y = expression.obsm["spatial"][row]
            window = pixels[round(y - side / 2):round(y + side / 2), round(x - side / 2):round(x + side / 2), :3]
            small = np.asarray(Image.fromarray(window).resize((16, 16), Image.Resampling.BOX), dtype=float)
            found = np.asarray(Image.fromarray(patches.images(row)).resize((16, 16), Image.Resampling.BOX), dtype=float)
            assert np.corrcoef(small.ravel(), found.ravel())[0, 1] > 0.97 and np.abs(small - found).mean() < 6


# ---- random patches -------------------------------------------------------------------------------------------------

@pytest.fixture
def tissue_slide(tmp_path):
    """Glass with two pink squares of tissue, 800 x 600 px at 0.5 mpp."""
    pixels = np.random.default_rng(0).integers(228, 240, (600, 800, 1)).astype(np.uint8).repeat(3, axis=2)
    pixels[50:350, 50:350], pixels[300:500, 500:750] = (220, 120, 180), (170, 90, 170)
    tifffile.imwrite(tmp_path / "slide.tif", pixels, tile=(64, 64), photometric="rgb")
    return tmp_path / "slide.tif"


def geojson(path, *boxes):
    rings = [[[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]] for x0, y0, x1, y1 in boxes]
    features = [{"type": "Feature", "properties": {}, "geometry": {"type": "Polygon", "coordinates": [ring]}} for ring in rings]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_random_patches_need_a_slide_and_outlines_only(tissue_slide, tmp_path):
    outlines = geojson(tmp_path / "tissue.geojson", (50, 50, 350, 350), (500, 300, 750, 500))
    out_file = tmp_path / "deep" / "random.h5"
    said = run("--wsi-file", tissue_slide, "--tissue-seg-file", outlines, "--out-file", out_file, "--mpp", 0.5, "--n-pts", 60)
    assert "0.035 mm² of tissue in 2 parts" in said.replace("0.04", "0.035")
    with read_patch_file(out_file) as patches:
        assert len(patches) == 60 and patches.barcodes is None
        assert (patches.images(slice(None)).max(axis=3) < 225).all()                # no glass
        assert 10 < (patches.coords[:, 0] > 400).sum() < 35                          # both polygons, by area
    assert sorted(path.name for path in out_file.parent.glob("[!.]*") if "done" not in path.name) == [
        "random.h5", "random_qc.html", "random_qc.png"]


def test_auto_segments_the_slide_and_writes_its_outlines(tissue_slide, tmp_path):
    run("--wsi-file", tissue_slide, "--tissue-seg-file", "auto", "--out-dir", tmp_path / "out", "--mpp", 0.5, "--n-pts", 40)
    with read_patch_file(tmp_path / "out" / "random_imgs.h5") as patches:
        assert (patches.images(slice(None)).mean(axis=(1, 2))[:, 1] < 130).all()
    again = tmp_path / "out" / "random_imgs_tissue.geojson"
    run("--wsi-file", tissue_slide, "--tissue-seg-file", again, "--out-file", tmp_path / "again.h5", "--mpp", 0.5, "--n-pts", 40)
    with read_patch_file(tmp_path / "again.h5") as first, read_patch_file(tmp_path / "out" / "random_imgs.h5") as second:
        assert np.array_equal(first.coords, second.coords)
    before = (tmp_path / "again.h5").read_bytes()
    run("--wsi-file", tissue_slide, "--tissue-seg-file", again, "--out-file", tmp_path / "again.h5", "--mpp", 0.5, "--n-pts", 41)
    assert (tmp_path / "again.h5").read_bytes() != before          # other random patches take the place of the older ones


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--n-pts", 50, "--patch-sz-um", 200], 3, "room for 50 squares of 400 px, wholly inside"),
    (["--n-pts", 0], 2, "--n-pts: expected at least 1"),
    (["--patch-sz-px", 0], 2, "--patch-sz-px: expected at least 1"),
    (["--min-tissue", 2], 2, "--min-tissue: expected a share between 0 and 1"),
    (["--mpp", "nan"], 2, "--mpp: expected a finite number"),
    (["--mpp", "200"], 2, "--mpp: expected a positive number of µm per pixel, 0.05 to 100"),
], ids=lambda value: str(value)[:24])
def test_random_patches_that_cannot_be_leave_nothing_behind(arguments, code, message, tissue_slide, tmp_path):
    out_file = tmp_path / "out" / "random.h5"
    said = fails(code, "--wsi-file", tissue_slide, "--tissue-seg-file", "auto", "--out-file", out_file, "--mpp", 0.5, *arguments)
    assert message in said
    assert not [path for path in out_file.parent.glob("[!.]*")]


@pytest.mark.parametrize(("text", "message"), [
    ('{"type": "FeatureCollection", "features": []}', "at least one polygon"), ("not json", "expected GeoJSON; found text that is not"),
], ids=["empty", "no JSON"])
def test_outlines_that_cannot_be_used_are_refused(text, message, tissue_slide, tmp_path):
    (tmp_path / "tissue.geojson").write_text(text)
    outlines = tmp_path / "tissue.geojson"
    said = fails(3, "--wsi-file", tissue_slide, "--tissue-seg-file", outlines, "--out-file", tmp_path / "o.h5", "--mpp", 1)
    assert f"{outlines}: " in said and message in said and not (tmp_path / "o.h5").exists()


def test_a_slide_without_mpp_asks_for_it(tissue_slide, tmp_path):
    said = fails(3, "--wsi-file", tissue_slide, "--tissue-seg-file", "auto", "--out-file", tmp_path / "o.h5")
    assert "--mpp" in said and not (tmp_path / "o.h5").exists()


@pytest.mark.parametrize(("arguments", "code", "message"), [
    (["--wsi-file", "SLIDE"], 2, "--space-ranger-dir"),
    (["--wsi-file", "SLIDE", "--out-file", "o.h5"], 2, "expected a sample"),
    (["--wsi-file", "SLIDE", "--tissue-seg-file", "auto"], 2, "--out-file: expected a file for the random patches"),
    (["--wsi-file", "SLIDE", "--space-ranger-dir", "SLIDE", "--gex-file", "SLIDE"], 2, "either --space-ranger-dir or --gex-file"),
    (["--wsi-file", "SLIDE", "--space-ranger-dir", "nowhere"], 3, "nowhere: path: expected a file or folder to read; found nothing there"),
    (["--wsi-file", "nowhere", "--space-ranger-dir", "SLIDE"], 3, "nowhere: path"),
    ([], 2, "--wsi-file"),
], ids=["no sample", "no outlines", "no output", "two samples", "no folder", "no slide", "nothing"])
def test_what_is_asked_must_be_complete(arguments, code, message, tissue_slide):
    assert message in fails(code, *(tissue_slide if argument == "SLIDE" else argument for argument in arguments))


# ---- options, resuming ----------------------------------------------------------------------------------------------

def test_min_tissue_leaves_out_patches_of_glass(tmp_path):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    pixels = tifffile.imread(slide_file)
    pixels[:, :180] = 240
    tifffile.imwrite(tmp_path / "glass.tif", pixels, tile=(64, 64), photometric="rgb")
    with open_slide(tmp_path / "glass.tif") as slide:
        sample = read_sample(folder, slide=slide)
        candidates = group_bins(sample, 55, 2)
        kept, _, lost = choose_spots(ExtractConfig(min_tissue=0.5), slide, sample, candidates)
    assert 0 < len(kept) < len(candidates) and list(lost) == ["have less tissue than --min-tissue"]
    assert abs(kept.centre_xy_px[:, 0].min() - 180) < 10
    assert candidates.centre_xy_px[lost["have less tissue than --min-tissue"], 0].max() < 190


def test_a_dry_run_writes_nothing(sim_v2, tmp_path):
    said = run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out", "--dry-run")
    assert "kept " in said and "nothing written" in said and not (tmp_path / "out").exists()


def test_finished_files_are_left_alone_until_a_setting_or_an_input_changes(sim_v2, tmp_path):
    folder = shutil.copytree(sim_v2.space_ranger_dir, tmp_path / "SR")
    arguments = ("--space-ranger-dir", folder, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / "out")
    images = tmp_path / "out" / "imgs.h5"

    def written_again(*more) -> bool:
        before = images.stat().st_mtime_ns
        run(*arguments, *more)
        return images.stat().st_mtime_ns != before

    run(*arguments)
    assert not written_again("--workers", 2)
    assert written_again("--no-resume") and written_again("--patch-sz-px", 64)
    with read_patch_file(images) as patches:
        assert patches.patch_px == 64
    images.write_bytes(images.read_bytes()[:1000])                     # damaged: the manifest no longer fits
    assert written_again("--patch-sz-px", 64)
    positions = folder / "spatial" / "tissue_positions.csv"
    positions.write_text(positions.read_text().rstrip("\n") + "\n\n")
    assert written_again("--patch-sz-px", 64)


@pytest.mark.parametrize(("n_squares", "said"), [(1, "in 1 part\n"), (2, "in 2 parts\n")])
def test_parts_of_the_tissue_are_counted(sim_v2, tmp_path, n_squares, said):
    squares = [[[[x, 50], [x + 300, 50], [x + 300, 350], [x, 350], [x, 50]]] for x in (50, 500)[:n_squares]]
    (tmp_path / "tissue.geojson").write_text(json.dumps({"type": "MultiPolygon", "coordinates": squares}))
    assert said in run("--wsi-file", sim_v2.slide, "--tissue-seg-file", tmp_path / "tissue.geojson", "--out-file", tmp_path / "o.h5",
                       "--n-pts", 2, "--dry-run")


def test_a_slide_replaced_while_it_is_cut_is_not_taken_for_the_one_that_was(sim_v2, tmp_path, monkeypatch):
    slide = shutil.copy(sim_v2.slide, tmp_path / "slide.tif")
    arguments = ("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", slide, "--out-dir", tmp_path / "out", "--dump-dir",
                 tmp_path / "patches", "--no-normalize")

    def replacing(*job):
        make_blocks(*job)
        new = shutil.copy(sim_v2.slide, tmp_path / "new.tif")
        with open(new, "ab") as stream:
            stream.write(b"another")
        new.replace(slide)

    with monkeypatch.context() as patched:
        patched.setattr("preprocessing.block_extraction.make_blocks", replacing)
        run(*arguments)
    written, before = fingerprint(slide), fingerprint(sim_v2.slide)
    recorded = ad.read_h5ad(tmp_path / "out" / "gex.h5ad").uns["morphology"]["slide"]
    assert written["sha256"] != before["sha256"] == recorded["sha256"]
    assert "already extracted" not in run(*arguments) and "already extracted" in run(*arguments)


def test_an_error_while_cutting_leaves_the_old_files_and_nothing_half_written(tmp_path, monkeypatch):
    folder, slide_file = phantom_hd_folder(tmp_path, offset=(0, 0))
    arguments = ("--space-ranger-dir", folder, "--wsi-file", slide_file, "--out-dir", tmp_path / "out")
    run(*arguments)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")}

    def fail(*_, **__):
        raise OSError("the disk went away")

    monkeypatch.setattr("preprocessing.block_extraction.compress_patch", fail)
    assert "the disk went away" in fails(4, *arguments, "--patch-sz-px", 64)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").glob("[!.]*")} == before
    fails(4, "--space-ranger-dir", folder, "--wsi-file", slide_file, "--out-dir", tmp_path / "new")
    assert not list((tmp_path / "new").glob("[!.]*"))


def test_the_same_input_gives_the_same_files(sim_v2, tmp_path):
    for name, workers in (("a", 1), ("b", 2)):
        run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", sim_v2.slide, "--out-dir", tmp_path / name, "--workers", workers)
    with read_patch_file(tmp_path / "a" / "imgs.h5") as a, read_patch_file(tmp_path / "b" / "imgs.h5") as b:
        assert np.array_equal(a.images(slice(None)), b.images(slice(None))) and a.barcodes == b.barcodes


def test_help_names_every_option_of_the_original():
    said = CliRunner().invoke(main, ["--help"]).output
    for option in ("--space-ranger-dir", "--wsi-file", "--is-hd", "--tissue-seg-file", "--out-file", "--n-pts", "--stride", "--patch-sz-px",
                   "--patch-sz-um", "--use-wsi-res", "--below-v2"):
        assert option in said
    for default in ("50000", "128", "55.0", "5]"):
        assert default in said
