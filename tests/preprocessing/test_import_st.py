"""Importing legacy Spatial Transcriptomics: a patch shows its own spot, counts stay exact, and what does not fit together is refused."""
import gzip
import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import tifffile
from click.testing import CliRunner
from PIL import Image

from preprocessing.import_st import main
from preprocessing.patch_file import read_patch_file
from preprocessing.st_sample import read_counts, read_spots

MPP, STEP_PX, COLS, ROWS = 1.0, 200, 5, 4
GENES = ["ACTB", "ERBB2", "CD3E"]


def spot_colour(x: int, y: int) -> np.ndarray:
    return np.array([30 * x, 30 * y, 120], np.uint8)


def spots_table() -> pd.DataFrame:
    """20 spots from 3x2 on, each the middle of a 120 px square of its own colour."""
    places = [(x + 3, y + 2) for y in range(ROWS) for x in range(COLS)]
    return pd.DataFrame([(x, y, x - 0.02, y + 0.01, 100 + STEP_PX * (x - 3), 100 + STEP_PX * (y - 2), 1) for x, y in places],
                        columns=["x", "y", "new_x", "new_y", "pixel_x", "pixel_y", "selected"])


def counts_table() -> pd.DataFrame:
    """17 spots (the last three were not read), in another order than the positions."""
    names = [f"{x}x{y}" for x, y in spots_table()[["x", "y"]].to_numpy()][:17][::-1]
    return pd.DataFrame({gene: np.arange(17) * (i + 1) + (i == 0) for i, gene in enumerate(GENES)}, index=names)


def write_section(folder, *, spots=None, counts=None, clusters=None):
    """A folder in the her2st layout; returns the options of the command."""
    folder.mkdir(parents=True, exist_ok=True)
    table = spots_table() if spots is None else spots
    table.to_csv(folder / "spots.tsv", sep="\t", index=False)
    (counts_table() if counts is None else counts).to_csv(folder / "counts.tsv.gz", sep="\t")
    picture = np.full((STEP_PX * ROWS, STEP_PX * COLS, 3), 250, np.uint8)
    for x, y, px, py in spots_table()[["x", "y", "pixel_x", "pixel_y"]].to_numpy():
        picture[py - 60:py + 60, px - 60:px + 60] = spot_colour(x, y)
    Image.fromarray(picture).save(folder / "image.png")
    if clusters is not None:
        clusters.to_csv(folder / "clusters.tsv.gz", sep="\t")
    return ["--counts", folder / "counts.tsv.gz", "--spots", folder / "spots.tsv", "--image", folder / "image.png",
            *(["--clusters", folder / "clusters.tsv.gz"] if clusters is not None else [])]


def run(options, out, *more, sample_id="S1"):
    return CliRunner().invoke(main, [*map(str, options), "--out-dir", str(out), "--sample-id", sample_id, *map(str, more)])


def test_every_patch_shows_its_own_spot_and_counts_are_exact(tmp_path):
    result = run(write_section(tmp_path), tmp_path / "out")
    assert result.exit_code == 0, result.output
    gex, truth = ad.read_h5ad(tmp_path / "out" / "gex.h5ad"), counts_table()
    with read_patch_file(tmp_path / "out" / "imgs.h5") as patches:
        assert list(gex.obs_names) == patches.barcodes == list(truth.index)
        for patch, barcode, centre in zip(patches.images(slice(0, None)), patches.barcodes, patches.centre_xy_px, strict=True):
            assert patch.shape == (128, 128, 3) and (patch == spot_colour(*map(int, barcode.split("x")))).all()
            assert np.abs(centre - gex.obsm["spatial"][gex.obs_names.get_loc(barcode)]).max() <= 0.5
    assert (gex.X.toarray() == truth.to_numpy()).all() and list(gex.var_names) == GENES
    assert gex.uns["morphology"]["mpp"] == pytest.approx(MPP) and (gex.obs["sample_id"] == "S1").all()
    assert set(gex.uns["spatial"]["S1"]["images"]) == {"hires", "lowres"}


def test_spots_without_counts_are_left_out_and_said(tmp_path):
    result = run(write_section(tmp_path), tmp_path / "out")
    assert "3 of 20 positions have no counts and are left out" in result.output
    assert "kept 17 of 17 spots" in result.output and "Spatial Transcriptomics, 1 mpp, 17 spots in tissue, 3 genes" in result.output
    assert result.stdout.splitlines()[-3:] == [str(tmp_path / "out" / name) for name in ("imgs.h5", "gex.h5ad", "dropped_spots.tsv")]


def test_patches_over_the_edge_and_unselected_spots_are_dropped_and_listed(tmp_path):
    spots = spots_table().assign(selected=lambda table: (table["x"] != 5).astype(int))
    result = run(write_section(tmp_path, spots=spots), tmp_path / "out", "--patch-sz-um", 220)
    assert result.exit_code == 0, result.output
    dropped = pd.read_csv(tmp_path / "out" / "dropped_spots.tsv", sep="\t").set_index("barcode")["reason"]
    kept = ad.read_h5ad(tmp_path / "out" / "gex.h5ad").obs_names
    inner = {f"{x}x{y}" for x in (4, 6) for y in (3, 4)}
    assert set(kept) == inner and set(dropped.index) == set(counts_table().index) - inner
    assert set(dropped[dropped == "not selected as tissue"].index) == {f"5x{y}" for y in range(2, 6)} & set(counts_table().index)


def test_clusters_become_categories_of_strings_with_gaps(tmp_path):
    spots = spots_table()
    clusters = pd.DataFrame({"label": spots["x"] % 3, "x": spots["x"].astype(float), "y": spots["y"].astype(float)})[1:]
    result = run(write_section(tmp_path, clusters=clusters), tmp_path / "out")
    labels = ad.read_h5ad(tmp_path / "out" / "gex.h5ad").obs["cluster"]
    assert isinstance(labels.dtype, pd.CategoricalDtype) and list(labels.cat.categories) == ["0", "1", "2"]
    assert labels.isna()["3x2"] and labels.drop("3x2").to_dict() == {
        barcode: str(int(barcode.split("x")[0]) % 3) for barcode in labels.index if barcode != "3x2"}
    assert "1 of 17 spots have no cluster label" in result.output


def test_a_repeated_import_is_skipped_and_another_setting_is_not(tmp_path):
    options, out = write_section(tmp_path), tmp_path / "out"
    run(options, out)
    before = (out / "imgs.h5").stat().st_mtime_ns
    assert "nothing to do" in run(options, out).output and (out / "imgs.h5").stat().st_mtime_ns == before
    assert "nothing to do" not in run(options, out, "--patch-sz-px", 64).output
    with read_patch_file(out / "imgs.h5") as patches:
        assert patches.patch_px == 64
    write_section(tmp_path, counts=counts_table() + 1)
    assert "nothing to do" not in run(options, out, "--patch-sz-px", 64).output
    assert ad.read_h5ad(out / "gex.h5ad").X.sum() == counts_table().to_numpy().sum() + 51


def test_done_manifests_name_config_inputs_and_rows(tmp_path):
    run(write_section(tmp_path), tmp_path / "out")
    for name in ("imgs.h5", "gex.h5ad", "dropped_spots.tsv"):
        done = json.loads((tmp_path / "out" / f"{name}.done.json").read_text())
        assert done["rows"] == 17 and set(done["inputs"]) == {"counts", "spots", "image"} and done["config"]["sample_id"] == "S1"


def test_mpp_of_the_user_overrides_the_fit(tmp_path):
    run(write_section(tmp_path), tmp_path / "out", "--mpp", 0.8)
    with read_patch_file(tmp_path / "out" / "imgs.h5") as patches:
        assert patches.attrs["pixel_size"] == 0.8 and patches.attrs["patch_size_src"] == 125


def test_symbols_that_occur_twice_become_unique(tmp_path):
    options = write_section(tmp_path)
    lines = gzip.decompress((tmp_path / "counts.tsv.gz").read_bytes()).decode().replace("\tERBB2\t", "\tACTB\t", 1)
    (tmp_path / "counts.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    run(options, tmp_path / "out")
    assert list(ad.read_h5ad(tmp_path / "out" / "gex.h5ad").var_names) == ["ACTB", "ACTB-1", "CD3E"]


# ---- refusals: exit code 3, one line, no file left ------------------------------------------------------------------

def with_rows(table, **rows):
    return pd.concat([table, pd.DataFrame.from_dict(rows, orient="index", columns=table.columns)])


@pytest.mark.parametrize("change, message", [
    ({"counts": lambda table: with_rows(table, **{"30x1": [1, 2, 3], "31x1": [4, 5, 6]})}, "row of counts; found none for 2 (30x1, 31x1)"),
    ({"counts": lambda table: with_rows(table, **{"3x2": [1, 2, 3]})}, "every spot once; found repeated: 1 (3x2)"),
    ({"counts": lambda table: table.rename(index={"3x2": "AAACCC-1"})}, "rows named XxY, like 10x13; found 1 (AAACCC-1)"),
    ({"counts": lambda table: -table}, "raw counts, whole numbers from 0 up"),
    ({"counts": lambda table: np.log1p(table)}, "raw counts, whole numbers from 0 up"),
    ({"counts": lambda table: table.where(table != 4)}, "raw counts, whole numbers from 0 up"),
    ({"counts": lambda table: table.astype(str) + "?"}, "expected numbers; found words in column 3 (ACTB, ERBB2, CD3E)"),
    ({"counts": lambda table: table[:0]}, "rows of spots and columns of genes"),
    ({"spots": lambda table: pd.concat([table, table[:1]])}, "every spot once; found repeated: 1 (3x2)"),
    ({"spots": lambda table: table.drop(columns="pixel_y")}, "expected x, y, pixel_x, pixel_y; found no pixel_y"),
    ({"spots": lambda table: table.assign(x=table["x"] + 0.5)}, "x: expected whole array positions"),
    ({"spots": lambda table: table.assign(pixel_x="?")}, "pixel_x: expected a number in every row"),
    ({"spots": lambda table: table.assign(pixel_x=table["pixel_x"] + 5000)}, "Is it the image these positions were measured on"),
    ({"spots": lambda table: table.assign(pixel_x=table["pixel_x"] * 2)}, "a lattice stretched 2.00 : 1"),
], ids=["counts-without-spot", "counts-twice", "foreign-names", "negative", "logged", "gap", "words", "no-rows", "spots-twice",
        "no-pixel-y", "half-positions", "pixel-words", "off-the-image", "stretched"])
def test_sections_that_do_not_fit_together_are_refused(tmp_path, change, message):
    tables = {name: edit({"counts": counts_table, "spots": spots_table}[name]()) for name, edit in change.items()}
    result = run(write_section(tmp_path, **tables), tmp_path / "out")
    assert result.exit_code == 3 and message in result.output and "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not [file for file in (tmp_path / "out").glob("*") if not file.name.startswith(".")]


@pytest.mark.parametrize("name", ["counts.tsv.gz", "spots.tsv", "image.png", "clusters.tsv.gz"])
@pytest.mark.parametrize("damage", ["absent", "zero bytes", "cut in half", "a folder"])
def test_a_damaged_input_is_refused_naming_it(tmp_path, name, damage):
    options = write_section(tmp_path, clusters=spots_table()[["x", "y"]].assign(label=1))
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "absent":
        path.write_bytes(content[:len(content) // 2] if damage == "cut in half" else b"")
    result = run(options, tmp_path / "out")
    assert result.exit_code == 3 and name in result.output and "Traceback" not in result.output
    assert {"absent": "found nothing at this path", "a folder": "found a folder"}.get(damage, name) in result.output


def test_a_patch_on_a_tile_that_cannot_be_decoded_is_an_error(tmp_path):
    options, path = write_section(tmp_path), tmp_path / "image.tif"
    tifffile.imwrite(path, np.asarray(Image.open(tmp_path / "image.png")), photometric="rgb", tile=(64, 64), compression="jpeg")
    options[options.index(tmp_path / "image.png")] = path
    assert run(options, tmp_path / "whole").exit_code == 0
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[1 + 16], tiff.pages[0].databytecounts[1 + 16]      # x 64-128, y 64-128: the first spot
    path.write_bytes(path.read_bytes()[:offset] + bytes(count) + path.read_bytes()[offset + count:])
    result = run(options, tmp_path / "out")
    assert result.exit_code == 3 and "image.tif: patches: expected pixels under every one; found " in result.output
    assert "cannot be decoded" in result.output and not (tmp_path / "out" / "imgs.h5").exists()


@pytest.mark.parametrize("more, message", [
    (["--patch-sz-um", 0], "--patch-sz-um"), (["--patch-sz-um", "inf"], "--patch-sz-um"),
    (["--patch-sz-px", 0], "--patch-sz-px"), (["--mpp", -1], "--mpp")])
def test_impossible_options_end_with_usage_errors(tmp_path, more, message):
    result = run(write_section(tmp_path), tmp_path / "out", *more)
    assert result.exit_code == 2 and message in result.output


def test_labels_of_another_section_are_refused(tmp_path):
    clusters = spots_table()[["x", "y"]].assign(label=1, x=lambda table: table["x"] + 50)
    result = run(write_section(tmp_path, clusters=clusters), tmp_path / "out")
    assert result.exit_code == 3 and "labels for the spots of this section; found none of its 20 rows" in result.output


def test_two_sections_that_share_barcodes_stay_paired(tmp_path):
    from training.data import ImageGeneDataset
    from training.sample_sheet import sample_files

    for name, factor in (("A", 1), ("B", 100)):
        run(write_section(tmp_path / name, counts=counts_table() * factor + (factor > 1)), tmp_path / "out" / name, sample_id=name)
    files = sample_files(*(",".join(str(tmp_path / "out" / name / file) for name in "AB") for file in ("imgs.h5", "gex.h5ad")))
    data = ImageGeneDataset(files)
    assert len(data) == 34 and list(data.barcodes) == [f"{name}__{barcode}" for name in "AB" for barcode in counts_table().index]
    for i, barcode in enumerate(data.barcodes):
        assert (data[i][0][:, 64, 64].numpy() == spot_colour(*map(int, barcode.split("__")[1].split("x")))).all()


# ---- real sections --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("section, n_paired, n_positions, n_genes", [
    ("C2", 187, 187, 15_706), ("C3", 180, 182, 15_821), ("C4", 184, 187, 15_842)])
def test_spots_of_real_sections_pair_by_name(shared_data, section, n_paired, n_positions, n_genes):
    counts = read_counts(shared_data / "her2st" / section / "counts.tsv.gz")
    spots = read_spots(shared_data / "her2st" / section / "spots.tsv")
    assert counts.shape == (n_paired, n_genes) and len(spots) == n_positions
    assert counts.obs_names.isin(spots.index).all()


def test_a_real_section_is_imported_with_tissue_at_every_spot(shared_data, tmp_path):
    folder = shared_data / "her2st" / "C4"
    result = run(["--counts", folder / "counts.tsv.gz", "--spots", folder / "spots.tsv", "--image", folder / "image.jpg",
                  "--clusters", folder / "clusters.tsv.gz"], tmp_path, sample_id="C4")
    assert result.exit_code == 0 and "3 of 187 positions have no counts" in result.output, result.output
    gex = ad.read_h5ad(tmp_path / "gex.h5ad")
    assert gex.shape == (184, 15_842) and gex.uns["morphology"]["mpp"] == pytest.approx(0.690, rel=0.01)
    assert gex.X.sum() == pd.read_csv(folder / "counts.tsv.gz", sep="\t", index_col=0).to_numpy().sum()
    with read_patch_file(tmp_path / "imgs.h5") as patches:
        assert patches.barcodes == list(gex.obs_names)
        pixels = patches.images(slice(0, None)).astype(int)
        assert ((pixels.max(axis=3) - pixels.min(axis=3) > 20).mean(axis=(1, 2)) > 0.2).mean() > 0.95        # tissue, not glass
