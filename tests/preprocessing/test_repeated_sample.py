"""The simulated sample at the size of real slides: repeated tissue, a rim of glass, blocks of any number, random barcode order."""
from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import openslide
import pandas as pd
import pyarrow.parquet as pq
import pytest
import scipy.sparse as sp
from scipy.spatial import cKDTree

from preprocessing.errors import OptionError
from preprocessing.simulate_sample import SimulateConfig, simulate_sample
from preprocessing.simulation import array, counting, shuffling
from preprocessing.simulation.outline import Outline
from preprocessing.simulation.repeat import RepeatedPainter, RepeatedTissue, unfolded, whole_tiles_um
from preprocessing.simulation.shuffling import in_random_order
from preprocessing.simulation.slide import slide_stains
from preprocessing.simulation.tissue import CELL_NAMES, CELL_TYPES, GLASS, REGIONS, Layout

HD = Path("outs/binned_outputs/square_002um")


@pytest.fixture(scope="module")
def repeated():
    """1.2 mm of tissue from a block of 320 µm, which is 5 tiles of 64 µm."""
    outline = Outline(1300, 1200, seed=3, rim_um=40, margin_um=30, is_torn=True)
    return RepeatedTissue(outline, whole_tiles_um(300, mpp=0.25))


@pytest.fixture(scope="module")
def painter(repeated):
    return RepeatedPainter(repeated, slide_stains(3), mpp=0.25)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repeated") / "sample"
    return simulate_sample(SimulateConfig(folder, "visium-hd", width_um=900, height_um=800, mpp=0.5, genes=60, seed=2, rim_um=100,
                                          margin_um=40, repeat_um=300, umis=20))


def barcodes_of(sample) -> np.ndarray:
    with h5py.File(sample.folder / HD / "filtered_feature_bc_matrix.h5") as file:
        return file["matrix/barcodes"][:].astype(str)


def test_the_period_is_a_whole_number_of_tiles():
    assert whole_tiles_um(300, mpp=0.25) == 320 and whole_tiles_um(320, mpp=0.25) == 320
    assert whole_tiles_um(1500, mpp=0.274) / 0.274 / 256 == pytest.approx(22)


def test_layout_repeats_in_mirror_images_and_only_the_outline_does_not(repeated):
    x, y = (part.ravel() for part in np.meshgrid(np.linspace(1, 319, 40), np.linspace(1, 319, 40)))
    at = [repeated.layout(unfolded(x, column, 320), unfolded(y, row, 320)) for column, row in ((1, 1), (2, 1), (2, 2))]
    for name in Layout.__dataclass_fields__:
        same = [np.allclose(getattr(at[0], name), getattr(other, name), atol=1e-3) for other in at[1:]]
        assert same == [name != "edge"] * 2, name


def test_the_outline_of_a_repeated_section_has_glass_all_around_and_tears_within(repeated):
    x, y = np.arange(0, 1300, 5.0), np.arange(0, 1200, 5.0)
    depth = repeated.edge_depth(x[None, :], y[:, None])
    assert (depth[[0, -1]] < 0).all() and (depth[:, [0, -1]] < 0).all() and (depth[:8] < 0).all()
    large = {torn: Outline(6700, 6700, 1, 0, 100, is_torn=torn).depth(np.arange(0, 6700, 20.0)[None], np.arange(0, 6700, 20.0)[:, None]) > 0
             for torn in (False, True)}
    assert not (large[True] & ~large[False]).any()
    assert 0.005 < (large[False] & ~large[True]).mean() < 0.08 and 0.7 < large[True].mean() < 0.95
    assert large[False][60:-60, 60:-60].all() and not large[True][60:-60, 60:-60].all()     # the tears are inside


def test_a_repeated_rectangle_drawn_in_pieces_equals_the_rectangle_drawn_whole(painter):
    whole = painter.paint(100, 130, 900, 700)
    pieces = [[painter.paint(x, y, w, h) for x, w in ((100, 333), (433, 567))] for y, h in ((130, 200), (330, 500))]
    assert np.array_equal(whole, np.concatenate([np.concatenate(row, axis=1) for row in pieces], axis=0))
    assert whole.std() > 20


def test_tissue_far_from_the_outline_is_its_own_mirror_image_about_every_seam(painter):
    seam = 2 * 320 * 4                                        # px: the second seam, near the middle of the slide
    right, left = painter.paint(seam, 1500, 400, 300), painter.paint(seam - 400, 1500, 400, 300)
    assert np.array_equal(right, left[:, ::-1]) and right.std() > 20
    below, above = painter.paint(1500, seam, 300, 400), painter.paint(1500, seam - 400, 300, 400)
    assert np.array_equal(below, above[::-1]) and below.std() > 20


def test_a_tile_at_the_outline_joins_its_neighbours_inside(painter, repeated):
    """Edge tiles are painted with the outline and inner tiles without: where they meet, they are the same picture."""
    kinds = np.array([[painter._depths(column, row) for column in range(20)] for row in range(18)])
    inner, edge = kinds[..., 0] > 24, (kinds[..., 0] <= 24) & (kinds[..., 1] >= -24)
    row, column = np.argwhere(inner[:, :-1] & edge[:, 1:])[0]
    inside, seen = painter._tile(column, row), painter.paint(column * 256, row * 256, 512, 256)
    assert np.array_equal(seen[:, :256], inside)
    steps = np.abs(np.diff(seen.astype(int), axis=1)).mean(axis=(0, 2))
    assert steps[255] < np.percentile(steps, 99.5)


def test_no_cell_of_a_repeated_section_lies_outside_it_or_overlaps_another(repeated):
    cells = repeated.place_cells()
    xy, spacing = np.stack([cells.x_um, cells.y_um], axis=1), np.array([cell.spacing for cell in CELL_TYPES])[cells.cell_type]
    pairs = cKDTree(xy).query_pairs(2 * spacing.max(), output_type="ndarray")
    assert (np.hypot(*(xy[pairs[:, 0]] - xy[pairs[:, 1]]).T) >= spacing[pairs].sum(axis=1) - 1e-3).all()
    assert len(cells) > 2 * len(repeated.block_cells)
    assert (repeated.edge_depth(cells.x_um, cells.y_um) > 0).all() and (np.diff(cells.y_um) >= 0).all()
    kinds = np.bincount(cells.cell_type, minlength=len(CELL_NAMES)) / len(cells)
    block = np.bincount(repeated.block_cells.cell_type, minlength=len(CELL_NAMES)) / len(repeated.block_cells)
    assert np.abs(kinds - block).max() < 0.12


def test_nuclei_of_a_repeated_slide_are_dark_where_the_truth_says(sample):
    cells = pd.read_parquet(sample.truth / "cells.parquet")
    stain = json.loads((sample.truth / "stain.json").read_text())
    with openslide.OpenSlide(sample.slide) as slide:
        assert slide.dimensions == (2200, 2000) and slide.level_count >= 2
        pixels = np.asarray(slide.read_region((0, 0), 0, slide.dimensions).convert("RGB"))
    density = -np.log(np.maximum(pixels, 1) / np.array(stain["light"]))
    haematoxylin = (density @ np.linalg.pinv(np.array([stain["haematoxylin"], stain["eosin"]])))[..., 0]
    at_centre = haematoxylin[np.floor(cells["y_px"]).astype(int), np.floor(cells["x_px"]).astype(int)]
    nucleated = cells["has_nucleus"].to_numpy()
    assert nucleated.sum() > 1000 and np.mean(at_centre[nucleated] > 0.5) > 0.97
    assert (pixels[:190].mean(axis=(0, 1)) > 225).all() and (pixels[:, -190:].mean(axis=(0, 1)) > 225).all()     # the rim


def test_bins_of_a_repeated_section_have_the_cell_nearest_to_them_and_counts_of_their_own(sample):
    cells, spots = pd.read_parquet(sample.truth / "cells.parquet"), pd.read_parquet(sample.truth / "spots.parquet")
    distance, nearest = cKDTree(cells[["x_px", "y_px"]]).query(spots[["x_px", "y_px"]])
    clear = distance < 10                                                  # 5 µm, of the 21 a cell reaches
    assert clear.sum() > 10_000
    assert (cells["cell_type"].to_numpy()[nearest[clear]] == spots["cell_type"].to_numpy()[clear]).all()
    assert set(spots["region"]) <= set(REGIONS) - {REGIONS[GLASS]}
    at = {(x, y): umis for x, y, umis in zip(spots["x_px"], spots["y_px"], spots["umis"], strict=True)}
    seam = 3 * 256                                                         # period: 384 µm
    twins = [(umis, at[2 * seam - x, y]) for (x, y), umis in at.items() if x < seam and (2 * seam - x, y) in at]
    assert len(twins) > 5000 and 0.2 < np.corrcoef(np.array(twins).T)[0, 1] < 0.9      # same expectation, drawn anew


def test_the_rim_moves_every_position_and_adds_no_bins(sample):
    table = pd.read_parquet(sample.folder / HD / "spatial/tissue_positions.parquet")
    assert len(table) == 450 * 400
    first = table.iloc[0]
    assert (first["pxl_row_in_fullres"], first["pxl_col_in_fullres"]) == (202.0, 1998.0)     # 100 µm of rim, 900 of array


def test_the_matrix_of_visium_hd_lists_its_barcodes_in_random_order(sample):
    barcodes = barcodes_of(sample)
    place = np.argsort(np.argsort(barcodes))
    assert len(set(barcodes)) == len(barcodes) == sample.facts["barcodes_in_matrix"]
    assert abs(np.corrcoef(place, np.arange(len(place)))[0, 1]) < 0.02
    assert np.ptp(place[:200]) > 0.9 * len(place)                                          # any few hundred are from all over


@pytest.mark.parametrize("bucket_rows", [7, 1000])
def test_a_matrix_in_random_order_has_the_same_rows_whatever_the_size_of_its_buckets(bucket_rows, tmp_path, monkeypatch):
    monkeypatch.setattr(shuffling, "BUCKET_ROWS", bucket_rows)
    counts = sp.random(90, 12, density=0.3, format="csr", random_state=0, data_rvs=lambda n: np.arange(1, n + 1)).astype(np.int32)
    names = np.array([f"b{k:02d}" for k in range(90)])
    blocks = [(names[part], counts[part]) for part in (slice(0, 50), slice(50, 50), slice(50, 90))]
    out = list(in_random_order(blocks, rows=90, rng=np.random.default_rng(1), scratch=tmp_path))
    order = np.concatenate([barcodes for barcodes, _ in out])
    shuffled = sp.vstack([part for _, part in out], format="csr")
    assert sorted(order) == list(names) and list(order) != list(names)
    assert (shuffled != counts[[int(name[1:]) for name in order]]).nnz == 0
    assert list(tmp_path.iterdir()) == [] and len(out) == 90 // bucket_rows + 1


def test_every_order_of_rows_is_equally_likely(tmp_path, monkeypatch):
    monkeypatch.setattr(shuffling, "BUCKET_ROWS", 2)
    rng, names = np.random.default_rng(0), np.array(["a", "b", "c"])
    seen = ["".join(np.concatenate([part for part, _ in in_random_order([(names, sp.eye(3, dtype=np.int32, format="csr"))], rows=3, rng=rng,
                                                                        scratch=tmp_path)])) for _ in range(600)]
    orders, times = np.unique(seen, return_counts=True)
    assert len(orders) == 6 and times.min() > 65 and times.max() < 140


def test_a_sample_written_in_many_blocks_equals_the_sample_written_in_one(tmp_path, monkeypatch):
    def simulate(name):
        return simulate_sample(SimulateConfig(tmp_path / name, "visium-hd", width_um=320, height_um=320, mpp=1.0, genes=40, seed=5))

    one = simulate("one")
    monkeypatch.setattr(counting, "BLOCK_POSITIONS", 1000)
    monkeypatch.setattr(shuffling, "BUCKET_ROWS", 300)
    many = simulate("many")
    monkeypatch.setattr(array, "BLOCK_BINS", 2000)
    bands = simulate("bands")
    assert one.facts == many.facts and sorted(barcodes_of(one)) == sorted(barcodes_of(many))
    for name in (HD / "spatial/tissue_positions.parquet", Path("truth/spots.parquet")):
        pd.testing.assert_frame_equal(*(pd.read_parquet(folder / name) for folder in (one.folder, many.folder)))
    assert pq.ParquetFile(many.folder / HD / "spatial/tissue_positions.parquet").num_row_groups == 26        # 25,600 positions
    assert pq.ParquetFile(bands.truth / "spots.parquet").num_row_groups > 5
    clusters = [pd.read_csv(folder.folder / HD / "analysis/clustering/gene_expression_graphclust/clusters.csv") for folder in (bands, one)]
    truth = pd.read_parquet(bands.truth / "spots.parquet").set_index("barcode")
    assert set(clusters[0]["Barcode"]) == set(clusters[1]["Barcode"]) == set(barcodes_of(bands))
    assert (truth.loc[clusters[0]["Barcode"], "cluster"].to_numpy() == clusters[0]["Cluster"].to_numpy()).all()


@pytest.mark.parametrize(("fields", "message"), [
    ({"repeat_um": 100}, "--repeat-um: expected 0 .never. or 300 to 10000; found 100"),
    ({"rim_um": -1}, "--rim-um: expected 0 to 20000; found -1"),
    ({"margin_um": 600}, "--margin-um: expected 10 to 500, a quarter of the shorter side; found 600"), ({"margin_um": 1}, "--margin-um"),
])
def test_impossible_sizes_of_a_repeated_sample_are_refused(fields, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        SimulateConfig(tmp_path, **fields)
