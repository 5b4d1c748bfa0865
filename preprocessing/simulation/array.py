"""Lay a capture array over a simulated section and count: Visium's hexagons of spots or Visium HD's 2 µm bins.

Writes the counts, positions and clusters of a Space Ranger folder and the truth of every spot or bin in tissue. Counts are made
in blocks of rows, so memory does not grow with the number of bins times genes. Positions in µm from the slide's corner.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree
from tqdm import tqdm

from preprocessing.simulation.config import BIN_UM, SimulateConfig
from preprocessing.simulation.expression import (
    COMPONENTS,
    Genes,
    bin_weights,
    cluster_by_expression,
    sample_bin_counts,
    sample_spot_counts,
    slide_profiles,
    spot_weights,
)
from preprocessing.simulation.space_ranger_files import (
    hd_barcodes,
    positions_table,
    visium_barcodes,
    write_clusters,
    write_count_matrix,
    write_positions,
)
from preprocessing.simulation.tissue import CELL_NAMES, REGIONS, Cells, Tissue

COLUMN_STEP_UM, ROW_STEP_UM = 50.0, 50.0 * 3 ** 0.5     # Visium: neighbours in a row are two column steps apart
CLUSTER_BLOCK_BINS = 16                                 # Visium HD: side of the squares that are clustered, in bins
BLOCK_BINS, BLOCK_SPOTS = 200_000, 512                  # rows whose counts are in memory at a time
SOFTWARE = {"visium-v1": ("spaceranger-1.3.1", "Spatial 3' v1"), "visium-v2": ("spaceranger-2.1.0", "Spatial 3' v2"),
            "visium-hd": ("spaceranger-3.0.0", "Visium HD v1")}


@dataclass(frozen=True)
class CaptureArray:
    """Every position of the array on the slide, in barcode rows; each field (N,)."""

    barcodes: np.ndarray
    row: np.ndarray
    col: np.ndarray
    x_um: np.ndarray
    y_um: np.ndarray


def visium_array(width_um: float, height_um: float) -> CaptureArray:
    """Spots 100 µm apart in rows 86.6 µm apart; `col` has the parity of `row`, as on 10x's slides."""
    margin = 60.0
    rows, cols = int((height_um - 2 * margin) / ROW_STEP_UM) + 1, int((width_um - 2 * margin) / COLUMN_STEP_UM) + 1
    row, col = (part.ravel() for part in np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"))
    here = (row + col) % 2 == 0
    row, col = row[here], col[here]
    return CaptureArray(visium_barcodes(row, col), row, col, margin + COLUMN_STEP_UM * col, margin + ROW_STEP_UM * row)


def hd_array(width_um: float, height_um: float) -> CaptureArray:
    """Bins side by side over the whole slide; columns run against x, as in real Visium HD output."""
    rows, cols = int(height_um / BIN_UM), int(width_um / BIN_UM)
    row, col = (part.ravel().astype(np.int32) for part in np.meshgrid(np.arange(rows), np.arange(cols), indexing="ij"))
    return CaptureArray(hd_barcodes(row, col), row, col, (cols - col - 0.5) * BIN_UM, (row + 0.5) * BIN_UM)


def write_expression(config: SimulateConfig, tissue: Tissue, cells: Cells, genes: Genes, folder: Path, truth: Path, progress: bool) -> dict:
    """Write the array's files into the Space Ranger `folder` and `spots.parquet` into `truth`; returns how many of what."""
    array = (hd_array if config.is_hd else visium_array)(config.width_um, config.height_um)
    in_tissue = tissue.edge_depth(array.x_um, array.y_um) > 0
    write_positions(folder / "spatial", positions_table(
        array.barcodes, in_tissue, array.row, array.col, array.y_um / config.mpp, array.x_um / config.mpp, whole_px=not config.is_hd,
    ), config.platform)

    spots, units, unit_of = [], [], []

    def blocks() -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        for spot_table, counts, unit in _count_blocks(config, tissue, cells, genes, array, in_tissue, progress):
            spots.append(spot_table)
            unit_of.append(unit + sum(part.shape[0] for part in units))
            units.append(_sum_units(counts, unit))
            listed = spot_table["in_matrix"].to_numpy()
            yield spot_table["barcode"].to_numpy()[listed], counts[listed]

    software, chemistry = SOFTWARE[config.platform]
    written = write_count_matrix(folder / "filtered_feature_bc_matrix.h5", blocks(), gene_names=genes.names, gene_ids=genes.ids,
                                 library_id=config.sample_id, chemistry=chemistry, software=software, genome="simulated")
    table = pd.concat(spots, ignore_index=True)
    label = cluster_by_expression(sp.vstack(units, format="csr"), config.clusters, config.seed)
    table["cluster"] = label[np.concatenate(unit_of)]
    table.to_parquet(truth / "spots.parquet", index=False)
    listed = table[table["in_matrix"]]
    write_clusters(folder, listed["barcode"].to_numpy(), listed["cluster"].to_numpy())
    return {"positions": len(array.row), "in_tissue": len(table), "barcodes_in_matrix": written,
            "zero_read": int((table["umis"] == 0).sum()), "umis": int(table["umis"].sum())}


def _count_blocks(config: SimulateConfig, tissue: Tissue, cells: Cells, genes: Genes, array: CaptureArray, in_tissue: np.ndarray,
                  progress: bool) -> Iterator[tuple[pd.DataFrame, sp.csr_matrix, np.ndarray]]:
    """Per block of rows in tissue, ordered by barcode: their truth, their counts (N, G), and the unit each is clustered with."""
    rows = np.flatnonzero(in_tissue)
    if not config.is_hd:
        rows = rows[np.argsort(array.barcodes[rows])]         # HD bins are in barcode order as they lie
    caught_nothing, unlisted = _zero_read(rows, config)
    profiles = slide_profiles(genes, config.slide_effect, config.seed)
    tree = cKDTree(np.stack([cells.x_um, cells.y_um], axis=1))
    with tqdm(total=len(rows), desc="counts", unit="bin" if config.is_hd else "spot", disable=not progress) as bar:
        for number, part in enumerate(_row_blocks(rows, array, config.is_hd)):
            rng = np.random.default_rng([config.seed, 0xC0, number])
            x, y = array.x_um[part], array.y_um[part]
            layout = tissue.layout(x, y)
            if config.is_hd:
                weights = bin_weights(cells, layout, tree, x, y)
                counts = sample_bin_counts(weights, profiles, config.mean_umis / 0.78, rng)   # 0.78: mean weight of a bin
            else:
                weights = spot_weights(cells, layout, x, y)
                counts = sample_spot_counts(weights, profiles, config.mean_umis, rng)
            counts = sp.csr_matrix(sp.diags(1 - caught_nothing[part].astype(np.int32), dtype=np.int32) @ counts)
            counts.eliminate_zeros()
            dominant = weights[:, :len(CELL_NAMES)].argmax(axis=1)
            names = np.where(weights[:, :len(CELL_NAMES)].sum(axis=1) > 0, np.array(COMPONENTS)[dominant], "none")
            table = pd.DataFrame({
                "barcode": array.barcodes[part], "x_px": x / config.mpp, "y_px": y / config.mpp, "region": np.array(REGIONS)[layout.region],
                "cell_type": names, "dilation": layout.dilation, "fibrosis": layout.fibrosis, "inflammation": layout.inflammation,
                "umis": np.asarray(counts.sum(axis=1)).ravel().astype(np.int64), "in_matrix": ~unlisted[part]})
            yield table, counts, _cluster_unit(array, part, config.is_hd)
            bar.update(len(part))


def _zero_read(rows: np.ndarray, config: SimulateConfig) -> tuple[np.ndarray, np.ndarray]:
    """(array positions,) bool each: caught nothing; and, of these every second, not even a column in the matrix."""
    caught_nothing, unlisted = (np.zeros(rows.max() + 1, bool) for _ in range(2))
    if config.zero_read_fraction > 0:
        number = max(2, round(config.zero_read_fraction * len(rows)))
        chosen = np.random.default_rng([config.seed, 0x0]).choice(rows, min(number, len(rows)), replace=False)
        caught_nothing[chosen], unlisted[chosen[::2]] = True, True
    return caught_nothing, unlisted


def _row_blocks(rows: np.ndarray, array: CaptureArray, is_hd: bool) -> Iterator[np.ndarray]:
    """Blocks of array positions; of Visium HD whole bands of array rows, so that no square of bins is torn."""
    if not is_hd:
        yield from np.array_split(rows, len(rows) // BLOCK_SPOTS + 1)
        return
    cols = int(array.col.max()) + 1
    band = CLUSTER_BLOCK_BINS * max(1, BLOCK_BINS // (cols * CLUSTER_BLOCK_BINS))
    edges = np.searchsorted(array.row[rows], np.arange(0, int(array.row.max()) + band + 1, band))
    yield from (rows[first:end] for first, end in zip(edges[:-1], edges[1:], strict=True) if end > first)


def _cluster_unit(array: CaptureArray, part: np.ndarray, is_hd: bool) -> np.ndarray:
    """(N,) int from 0: the square of bins a bin is clustered with, or the spot itself."""
    if not is_hd:
        return np.arange(len(part))
    square = (array.row[part] // CLUSTER_BLOCK_BINS).astype(np.int64) << 32 | (array.col[part] // CLUSTER_BLOCK_BINS)
    return np.unique(square, return_inverse=True)[1]


def _sum_units(counts: sp.csr_matrix, unit: np.ndarray) -> sp.csr_matrix:
    member = sp.csr_matrix((np.ones(len(unit), np.int32), (unit, np.arange(len(unit)))), shape=(unit.max() + 1, len(unit)))
    return member @ counts
