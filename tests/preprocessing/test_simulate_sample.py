"""The simulated sample: real formats, known truth, and the same sample from the same seed."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import openslide
import pandas as pd
import pytest
import scipy.sparse as sp
from click.testing import CliRunner
from scipy.spatial import cKDTree

from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.simulate_sample import SimulateConfig, main, simulate_sample
from preprocessing.simulation.expression import COMPONENTS, gene_programmes, slide_profiles
from preprocessing.simulation.slide import SlidePainter, slide_stains
from preprocessing.simulation.tissue import CELL_TYPES, Tissue

HD = Path("outs/binned_outputs/square_002um")


def read_counts(path: Path) -> tuple[sp.csr_matrix, list[str], list[str]]:
    """Counts (barcodes, genes), barcodes and genes of a 10x HDF5."""
    with h5py.File(path) as file:
        matrix = file["matrix"]
        shape = tuple(matrix["shape"][:][::-1])
        counts = sp.csr_matrix((matrix["data"][:], matrix["indices"][:], matrix["indptr"][:]), shape=shape)
        return counts, matrix["barcodes"][:].astype(str).tolist(), matrix["features/name"][:].astype(str).tolist()


def layout_of(path: Path) -> dict[str, str]:
    """Dataset -> kind of its dtype and its rank, for the part of a 10x HDF5 that readers use."""
    with h5py.File(path) as file:
        items = {}
        file.visititems(lambda name, item: items.update({name: item}))
        return {name: f"{item.dtype.kind}{item.ndim}" for name, item in items.items() if isinstance(item, h5py.Dataset)}


def slide_pixels(sample) -> np.ndarray:
    with openslide.OpenSlide(sample.slide) as slide:
        return np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))


@pytest.fixture(scope="module")
def painter() -> SlidePainter:
    tissue = Tissue(500, 450, seed=3)
    return SlidePainter(tissue, tissue.place_cells(), slide_stains(3), mpp=0.5)


@pytest.mark.parametrize(("platform", "real"), [
    ("sim_v1", "derived_spaceranger_v1"), ("sim_v2", "derived_spaceranger_v2"), ("sim_hd", "derived_visium_hd/binned_outputs/square_002um"),
])
def test_a_simulated_folder_has_the_files_datasets_and_columns_of_a_real_one(platform, real, request, shared_data):
    sample = request.getfixturevalue(platform)
    ours, real = sample.folder / (HD if platform == "sim_hd" else "outs"), shared_data / "mouse-brain-crop" / real
    real_files = {path.relative_to(real) for path in real.rglob("*") if path.is_file()}
    assert real_files <= {path.relative_to(ours) for path in ours.rglob("*")}
    assert layout_of(ours / "filtered_feature_bc_matrix.h5") == layout_of(real / "filtered_feature_bc_matrix.h5")
    factors, real_factors = (json.loads((root / "spatial/scalefactors_json.json").read_text()) for root in (ours, real))
    assert factors.keys() == real_factors.keys()
    for name in real_files:
        if name.suffix == ".csv":
            header = None if name.name == "tissue_positions_list.csv" else 0
            tables = [pd.read_csv(root / name, header=header) for root in (ours, real)]
        elif name.suffix == ".parquet":
            tables = [pd.read_parquet(root / name) for root in (ours, real)]
        else:
            continue
        assert [(str(k), t.kind) for k, t in tables[0].dtypes.items()] == [(str(k), t.kind) for k, t in tables[1].dtypes.items()], name


def test_the_slide_opens_in_openslide_with_several_levels_and_its_mpp(sim_v2):
    with openslide.OpenSlide(sim_v2.slide) as slide:
        assert slide.dimensions == (1600, 1400)
        assert slide.level_count >= 2 and slide.level_downsamples[1] == pytest.approx(2)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5, rel=1e-4)
        assert float(slide.properties["openslide.mpp-y"]) == pytest.approx(0.5, rel=1e-4)
        whole, half = (np.asarray(slide.read_region((0, 0), level, (400, 400)).convert("RGB"), float) for level in (0, 1))
    halved = whole.reshape(200, 2, 200, 2, 3).mean(axis=(1, 3))
    assert np.abs(half[:200, :200] - halved).mean() < 3      # the levels show the same picture


def test_images_and_scale_factors_agree_with_the_slide(sim_hd, sim_v1):
    from PIL import Image
    for sample, folder in ((sim_hd, HD), (sim_v1, Path("outs"))):
        spatial = sample.folder / folder / "spatial"
        factors = json.loads((spatial / "scalefactors_json.json").read_text())
        slide = Image.fromarray(slide_pixels(sample))
        for name in ("hires", "lowres"):
            image = Image.open(spatial / f"tissue_{name}_image.png")
            assert image.mode == "RGB" and image.width == pytest.approx(slide.width * factors[f"tissue_{name}_scalef"], abs=1)
            small = [np.asarray(picture.resize((100, 90), Image.Resampling.BOX), float) for picture in (slide, image)]
            assert np.abs(small[0] - small[1]).mean() < 2 < np.abs(small[0] - small[1][::-1]).mean()
    assert json.loads((sim_hd.folder / HD / "spatial/scalefactors_json.json").read_text())["microns_per_pixel"] == 0.5


@pytest.mark.parametrize("platform", ["visium-v1", "visium-hd"])
def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_sample(platform, tmp_path):
    def simulate(name, seed):
        return simulate_sample(SimulateConfig(tmp_path / name, platform, width_um=320, height_um=320, mpp=1.0, genes=60, seed=seed)).folder

    first, again, other = simulate("first", 5), simulate("again", 5), simulate("other", 6)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert [file_sha256(first / file) for file in files] == [file_sha256(again / file) for file in files]
    same = {file.name for file in files if file_sha256(first / file) == file_sha256(other / file)}
    assert same <= {"scalefactors_json.json", "genes.csv", "profiles.npz", "tissue_positions_list.csv"}   # the last: all spots in tissue


def test_v1_and_v2_hold_the_same_counts(sim_v1, sim_v2):
    one, two = (read_counts(sample.space_ranger_dir / "filtered_feature_bc_matrix.h5") for sample in (sim_v1, sim_v2))
    assert one[1:] == two[1:] and (one[0] != two[0]).nnz == 0


def test_a_rectangle_drawn_in_pieces_equals_the_rectangle_drawn_whole(painter):
    whole = painter.paint(301, 250, 300, 260)
    pieces = [[painter.paint(x, y, w, h) for x, w in ((301, 111), (412, 189))] for y, h in ((250, 37), (287, 223))]
    assert np.array_equal(whole, np.concatenate([np.concatenate(row, axis=1) for row in pieces], axis=0))
    assert whole.std() > 20                                  # not a blank corner


def test_nuclei_are_dark_where_the_truth_says(sim_v2):
    cells = pd.read_parquet(sim_v2.truth / "cells.parquet")
    stain = json.loads((sim_v2.truth / "stain.json").read_text())
    density = -np.log(np.maximum(slide_pixels(sim_v2), 1) / np.array(stain["light"]))
    haematoxylin = (density @ np.linalg.pinv(np.array([stain["haematoxylin"], stain["eosin"]])))[..., 0]
    x, y = (np.floor(cells[axis]).astype(int).clip(0, limit) for axis, limit in (("x_px", 1599), ("y_px", 1399)))
    at_centre, nucleated = haematoxylin[y, x], cells["has_nucleus"].to_numpy()
    away = cKDTree(cells[["x_px", "y_px"]]).query(np.stack([x + 19, y + 3], axis=1))[0] > 14
    beside = haematoxylin[(y + 3).clip(0, 1399), (x + 19).clip(0, 1599)]
    assert nucleated.sum() > 500 and away.sum() > 50
    assert np.mean(at_centre[nucleated] > 0.5) > 0.97
    assert np.mean(beside[away] > 0.5) < 0.1
    assert np.median(at_centre[~nucleated]) < 0.2            # erythrocytes take eosin alone


def test_no_two_cells_overlap():
    tissue = Tissue(400, 400, seed=1)
    cells = tissue.place_cells()
    xy, spacing = np.stack([cells.x_um, cells.y_um], axis=1), np.array([cell.spacing for cell in CELL_TYPES])[cells.cell_type]
    pairs = cKDTree(xy).query_pairs(2 * spacing.max(), output_type="ndarray")
    assert len(cells) > 300
    assert (np.hypot(*(xy[pairs[:, 0]] - xy[pairs[:, 1]]).T) >= spacing[pairs].sum(axis=1)).all()
    assert (tissue.edge_depth(cells.x_um, cells.y_um) > 0).all()


def test_the_slides_own_stain_vectors_can_be_found_in_its_pixels(sim_v2):
    stain = json.loads((sim_v2.truth / "stain.json").read_text())
    density = -np.log(np.maximum(slide_pixels(sim_v2).reshape(-1, 3), 1) / np.array(stain["light"]))
    density = density[(density > 0.12).all(axis=1)]
    plane = np.linalg.svd(np.cov(density.T))[0][:, :2] * [-1, 1]
    plane *= np.sign(plane.sum(axis=0))[0]
    angle = np.arctan2(*(density @ plane).T[::-1])
    found = [plane @ [np.cos(limit), np.sin(limit)] for limit in np.percentile(angle, (1, 99))]
    for true in (stain["haematoxylin"], stain["eosin"]):
        closeness = max(abs(np.dot(vector, true)) for vector in found)
        assert np.degrees(np.arccos(min(closeness, 1))) < 7


def test_genes_of_a_programme_are_enriched_where_its_cells_lie_and_in_their_clusters(sim_v2):
    counts, barcodes, genes = read_counts(sim_v2.space_ranger_dir / "filtered_feature_bc_matrix.h5")
    truth = pd.read_parquet(sim_v2.truth / "spots.parquet").set_index("barcode").loc[barcodes]
    programme = pd.read_csv(sim_v2.truth / "genes.csv").set_index("gene").loc[genes, "programme"].to_numpy()
    cpm = pd.DataFrame(counts.toarray() / np.maximum(counts.sum(axis=1), 1), index=barcodes)
    clusters = pd.read_csv(sim_v2.space_ranger_dir / "analysis/clustering/gene_expression_graphclust/clusters.csv", index_col="Barcode")
    tested = 0
    for cell_type, spots in truth.groupby("cell_type"):
        if len(spots) < 5 or cell_type == "none":
            continue
        share = cpm.loc[:, programme == cell_type].sum(axis=1)
        assert share[spots.index].mean() > 2 * share.drop(spots.index).mean(), cell_type
        by_cluster = share.groupby(clusters.loc[barcodes, "Cluster"].to_numpy()).mean()
        own = clusters.loc[spots.index, "Cluster"].mode()[0]
        assert by_cluster[own] > share.mean(), cell_type
        tested += 1
    assert tested >= 3


def test_some_spots_in_tissue_caught_nothing_with_and_without_a_column_in_the_matrix(sim_v1, sim_hd):
    for sample, folder in ((sim_v1, Path("outs")), (sim_hd, HD)):
        counts, barcodes, _ = read_counts(sample.folder / folder / "filtered_feature_bc_matrix.h5")
        truth = pd.read_parquet(sample.truth / "spots.parquet").set_index("barcode")
        assert (np.asarray(counts.sum(axis=1)).ravel() == truth.loc[barcodes, "umis"].to_numpy()).all()
        assert (truth.loc[barcodes, "umis"] == 0).any()
        assert (~truth["in_matrix"]).any() and set(truth.index[truth["in_matrix"]]) == set(barcodes)


def test_hd_barcodes_name_their_row_and_column_and_columns_run_against_x(sim_hd):
    table = pd.read_parquet(sim_hd.folder / HD / "spatial/tissue_positions.parquet")
    parsed = table["barcode"].str.extract(r"^s_002um_(\d{5})_(\d{5})-1$").astype(int)
    assert (parsed[0] == table["array_row"]).all() and (parsed[1] == table["array_col"]).all()
    assert table["barcode"].is_unique and len(table) == 250 * 300
    assert np.corrcoef(table["array_col"], table["pxl_col_in_fullres"])[0, 1] == pytest.approx(-1)
    first = table.iloc[0]
    assert (first["pxl_row_in_fullres"], first["pxl_col_in_fullres"]) == (2.0, 1198.0)     # centre of bin (0, 0), 4 px a bin


def test_visium_spots_are_a_hexagon_of_100_um_pitch_with_barcodes_of_their_own(sim_v1):
    table = pd.read_csv(sim_v1.space_ranger_dir / "spatial/tissue_positions_list.csv", header=None)
    assert table[0].is_unique and table[0].str.fullmatch(r"[ACGT]{16}-1").all()
    distance = cKDTree(table[[5, 4]]).query(table[[5, 4]], k=2)[0][:, 1] * sim_v1.mpp
    assert distance == pytest.approx(100, abs=1)
    assert ((table[2] + table[3]) % 2 == 0).all()


def test_the_outline_holds_exactly_the_positions_in_tissue(sim_v1):
    from shapely.geometry import Point, shape
    features = json.loads(sim_v1.tissue_geojson.read_text())["features"]
    table = pd.read_csv(sim_v1.space_ranger_dir / "spatial/tissue_positions_list.csv", header=None)
    outline = [shape(feature["geometry"]) for feature in features]
    inside = [any(piece.contains(Point(x, y)) for piece in outline) for x, y in zip(table[5], table[4], strict=True)]
    assert 0 < sum(inside) < len(table)
    assert np.mean(np.array(inside) == (table[1] == 1)) > 0.97
    border = slide_pixels(sim_v1)[[0, -1]].mean(axis=(0, 1))
    assert (border > 225).all()                                  # glass all around


def test_samples_of_a_cohort_share_their_programmes_and_differ_by_stain_and_batch():
    one, two, foreign = gene_programmes(100, 0), gene_programmes(100, 0), gene_programmes(100, 1)
    assert (one.programme == two.programme).all() and (one.programme != foreign.programme).any()
    assert set(one.programme) == {*COMPONENTS[:-1], "housekeeping"}
    assert np.allclose(slide_profiles(one, 0.0, seed=1), slide_profiles(two, 0.0, seed=2))
    shift = np.log(slide_profiles(one, 0.5, seed=1) / slide_profiles(two, 0.5, seed=2))
    assert 0.4 < shift.std(axis=1).mean() < 1.0                  # two batches of deviation 0.5 differ by about 0.7
    assert slide_stains(1) != slide_stains(2) and slide_stains(1) == slide_stains(1)


def test_a_finished_sample_is_not_made_again_and_another_config_replaces_it(tmp_path):
    def simulate(seed):
        sample = simulate_sample(SimulateConfig(tmp_path / "sample", width_um=300, height_um=300, mpp=1.0, genes=40, seed=seed))
        return sample, sample.slide.stat().st_mtime_ns

    (sample, written), (again, kept), (_, replaced) = simulate(1), simulate(1), simulate(2)
    assert kept == written < replaced and again.facts["cells"] == sample.facts["cells"]


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def change_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [Path.unlink, cut_short, change_a_byte], ids=["gone", "cut short", "changed"])
@pytest.mark.parametrize("name", ["slide.tif", "outs/filtered_feature_bc_matrix.h5", "truth/cells.parquet"])
def test_a_damaged_sample_is_made_again_and_a_whole_one_is_said_to_be_kept(tmp_path, name, damage):
    options = ["--out-dir", str(tmp_path / "s"), "--width-um", "300", "--height-um", "300", "--mpp", "1", "--genes", "40"]
    said = [CliRunner().invoke(main, options, catch_exceptions=False).output for _ in range(2)]
    whole = {path: path.read_bytes() for path in (tmp_path / "s").rglob("*") if path.is_file()}
    damage(tmp_path / "s" / name)
    said.append(CliRunner().invoke(main, options, catch_exceptions=False).output)
    assert [f"wrote {tmp_path}" in text for text in said] == [True, False, True] and f"kept {tmp_path}" in said[1]
    assert whole.keys() == {path for path in (tmp_path / "s").rglob("*") if path.is_file()}
    assert (tmp_path / "s" / name).read_bytes() == whole[tmp_path / "s" / name]


def test_a_folder_with_other_content_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="expected a new folder, or a simulated sample to replace; found 1 .* other entries"):
        simulate_sample(SimulateConfig(tmp_path, width_um=300, height_um=300, mpp=1.0, genes=40))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(("field", "value", "message"), [
    ("width_um", 10, "--width-um: expected 300 to 50000; found 10"), ("mpp", 5.0, "--mpp: expected 0.1 to 2; found 5.0"),
    ("platform", "xenium", "--platform: expected one of visium-v1"), ("seed", -1, "--seed: expected 0 to 4294967295; found -1"),
    ("umis", 0.0, "--umis: expected a number above 0"), ("umis", 1e19, "--umis: .* up to 1,000,000; found 1e.19"),
    ("umis", float("nan"), "--umis: .*found nan"), ("umis", float("inf"), "found inf"),
    ("sample_id", "a/b", "--sample-id: expected a name without a slash; found 'a/b'"), ("genes", 3, "--genes: expected 30"),
])
def test_an_impossible_option_is_refused_before_anything_is_written(field, value, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        SimulateConfig(tmp_path, **{field: value})


def test_the_folder_one_stands_in_can_become_the_sample(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for _ in range(2):
        result = CliRunner().invoke(main, ["--out-dir", ".", "--width-um", "300", "--height-um", "300", "--mpp", "1", "--genes", "40"])
        assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "here").iterdir()} >= {"outs", "slide.tif", "truth", "sample.json"}


def test_the_command_writes_a_sample_and_names_its_files(tmp_path):
    options = ["--out-dir", tmp_path / "s", "--platform", "visium-v2", "--sample-id", "KID7", "--width-um", 320, "--height-um", 300,
               "--mpp", 1, "--genes", 40, "--umis", 500, "--clusters", 2, "--stain-seed", 9, "--slide-effect", 0, "--zero-read-fraction", 0]
    result = CliRunner().invoke(main, [str(option) for option in options], catch_exceptions=False)
    assert result.exit_code == 0 and "KID7: visium-v2, 1 mpp" in result.output and "slide.tif" in result.output
    assert "0 without a read" in result.output
    wrong = CliRunner().invoke(main, ["--out-dir", str(tmp_path / "t"), "--genes", "1"])
    assert wrong.exit_code == 2 and not (tmp_path / "t").exists()


def test_help_answers_without_loading_heavy_packages():
    code = ("import sys; from preprocessing.simulate_sample import main; main(['--help'], standalone_mode=False); "
            "heavy = {'torch', 'scipy', 'pandas', 'sklearn', 'h5py'} & set(sys.modules); assert not heavy, heavy")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert "--platform" in result.stdout and "python -m preprocessing.simulate_sample" in result.stdout
