"""Count a simulated section: what every spot or bin of its array caught, written as Space Ranger's files and as the truth.

Counts, positions and truth pass through in blocks, so memory does not grow with the number of bins times genes. What is
held whole: the cells, a few bytes a position, and the sums that are clustered. The matrix of Visium HD lists its
barcodes in random order, as real ones do.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
from scipy.spatial import cKDTree

from preprocessing.progress import ProgressBar
from preprocessing.simulation.array import HDArray, VisiumArray, capture_array
from preprocessing.simulation.config import SimulateConfig
from preprocessing.simulation.expression import (
    COMPONENTS,
    Genes,
    bin_weights,
    cluster_by_expression,
    sample_bin_counts,
    sample_spot_counts,
    slide_profiles,
    spot_weights,
    telling_genes,
)
from preprocessing.simulation.parquet_blocks import ParquetBlocks, read_blocks
from preprocessing.simulation.shuffling import in_random_order
from preprocessing.simulation.space_ranger_files import positions_table, write_clusters, write_count_matrix, write_positions
from preprocessing.simulation.tissue import CELL_NAMES, REGIONS, Cells, Tissue

BLOCK_POSITIONS = 1 << 19        # rows of the table of positions in memory at a time
SOFTWARE = {"visium-v1": ("spaceranger-1.3.1", "Spatial 3' v1"), "visium-v2": ("spaceranger-2.1.0", "Spatial 3' v2"),
            "visium-hd": ("spaceranger-3.0.0", "Visium HD v1")}


def write_expression(config: SimulateConfig, tissue: Tissue, cells: Cells, genes: Genes, folder: Path, truth: Path, progress: bool) -> dict:
    """Write the array's files into the Space Ranger `folder` and `spots.parquet` into `truth`; returns how many of what."""
    array = capture_array(config)
    in_tissue = np.empty(len(array), bool)
    write_positions(folder / "spatial", _positions(config, tissue, array, in_tissue), config.platform)

    collected = _Collected(truth / "unlabelled.parquet", telling_genes(genes))
    blocks = collected.passing(_count_blocks(config, tissue, cells, genes, array, in_tissue, progress))
    if config.is_hd:
        blocks = in_random_order(blocks, rows=int(in_tissue.sum()), rng=np.random.default_rng([config.seed, 0x5F]), scratch=truth,
                                 progress=progress)
    software, chemistry = SOFTWARE[config.platform]
    written = write_count_matrix(folder / "filtered_feature_bc_matrix.h5", blocks, gene_names=genes.names, gene_ids=genes.ids,
                                 library_id=config.sample_id, chemistry=chemistry, software=software, genome="simulated")
    label = cluster_by_expression(sp.vstack(collected.units, format="csr"), config.clusters, config.seed)
    write_clusters(folder, collected.labelled(label, truth / "spots.parquet"))
    return {"positions": len(array), "in_tissue": collected.number, "barcodes_in_matrix": written,
            "zero_read": collected.zero_read, "umis": collected.umis}


def _positions(config: SimulateConfig, tissue: Tissue, array: VisiumArray | HDArray, in_tissue: np.ndarray) -> Iterator[pd.DataFrame]:
    """The table of positions, block by block; fills `in_tissue` on the way."""
    for first in range(0, len(array), BLOCK_POSITIONS):
        at = array.at(np.arange(first, min(first + BLOCK_POSITIONS, len(array))))
        here = in_tissue[first:first + BLOCK_POSITIONS]
        here[:] = tissue.edge_depth(at.x_um, at.y_um) > 0
        yield positions_table(at.barcodes, here, at.row, at.col, at.y_um / config.mpp, at.x_um / config.mpp, whole_px=not config.is_hd)


def _count_blocks(config: SimulateConfig, tissue: Tissue, cells: Cells, genes: Genes, array: VisiumArray | HDArray, in_tissue: np.ndarray,
                  progress: bool) -> Iterator[tuple[pd.DataFrame, sp.csr_matrix, np.ndarray]]:
    """Per block of positions in tissue: their truth, their counts (N, G), and the unit each is clustered with."""
    caught_nothing, unlisted = _zero_read(array.ordered(in_tissue), config)
    profiles = slide_profiles(genes, config.slide_effect, config.seed)
    tree = cKDTree(np.stack([cells.x_um, cells.y_um], axis=1))
    unit = "bin" if config.is_hd else "spot"
    with ProgressBar(total=int(in_tissue.sum()), desc="counts", unit=unit, unit_scale=True, disable=not progress) as bar:
        for number, part in enumerate(array.blocks(in_tissue)):
            rng = np.random.default_rng([config.seed, 0xC0, number])
            at = array.at(part)
            layout = tissue.layout(at.x_um, at.y_um)
            if config.is_hd:
                weights = bin_weights(cells, layout, tree, at.x_um, at.y_um)
                counts = sample_bin_counts(weights, profiles, config.mean_umis / 0.78, rng)   # 0.78: mean weight of a bin
            else:
                weights = spot_weights(cells, layout, at.x_um, at.y_um)
                counts = sample_spot_counts(weights, profiles, config.mean_umis, rng)
            counts = sp.csr_matrix(sp.diags(1 - caught_nothing[part].astype(np.int32), dtype=np.int32) @ counts)
            counts.eliminate_zeros()
            dominant = weights[:, :len(CELL_NAMES)].argmax(axis=1)
            names = np.where(weights[:, :len(CELL_NAMES)].sum(axis=1) > 0, np.array(COMPONENTS)[dominant], "none")
            table = pd.DataFrame({
                "barcode": at.barcodes, "x_px": at.x_um / config.mpp, "y_px": at.y_um / config.mpp,
                "region": np.array(REGIONS)[layout.region], "cell_type": names, "dilation": layout.dilation, "fibrosis": layout.fibrosis,
                "inflammation": layout.inflammation, "umis": np.asarray(counts.sum(axis=1)).ravel().astype(np.int64),
                "in_matrix": ~unlisted[part]})
            yield table, counts, array.cluster_unit(at)
            bar.update(len(part))


def _zero_read(numbers: np.ndarray, config: SimulateConfig) -> tuple[np.ndarray, np.ndarray]:
    """(array positions,) bool each: caught nothing; and, of these every second, not even a column in the matrix."""
    caught_nothing, unlisted = (np.zeros(numbers.max() + 1, bool) for _ in range(2))
    if config.zero_read_fraction > 0:
        wanted = max(2, round(config.zero_read_fraction * len(numbers)))
        chosen = np.random.default_rng([config.seed, 0x0]).choice(numbers, min(wanted, len(numbers)), replace=False)
        caught_nothing[chosen], unlisted[chosen[::2]] = True, True
    return caught_nothing, unlisted


@dataclass
class _Collected:
    """What is kept of the blocks of counts that pass by: the truth in a file, the sums that are clustered in memory."""

    unlabelled: Path                                                # the truth without its clusters, removed once they are known
    genes: np.ndarray                                               # (genes that are clustered on,) columns of the counts
    units: list[sp.csr_matrix] = field(default_factory=list)        # per block (units, clustered genes)
    unit_of: list[np.ndarray] = field(default_factory=list)         # per block (N,) int32, row of all the units stacked
    number: int = 0
    zero_read: int = 0
    umis: int = 0

    def passing(self, blocks) -> Iterator[tuple[np.ndarray, sp.csr_matrix]]:
        """The barcodes and counts that the matrix lists, of `_count_blocks`' blocks."""
        units = 0
        with ParquetBlocks(self.unlabelled) as truth:
            for table, counts, unit in blocks:
                truth.write(table)
                self.unit_of.append((units + unit).astype(np.int32))
                self.units.append(_sum_units(counts[:, self.genes], unit))
                units += self.units[-1].shape[0]
                self.number += len(table)
                self.zero_read += int((table["umis"] == 0).sum())
                self.umis += int(table["umis"].sum())
                listed = table["in_matrix"].to_numpy()
                yield table["barcode"].to_numpy()[listed], counts[listed]

    def labelled(self, label: np.ndarray, path: Path) -> Iterator[pd.DataFrame]:
        """Write the truth with the cluster of every unit, `label` (units,), and pass on its blocks' rows of the matrix."""
        with ParquetBlocks(path) as truth:
            for table, unit in zip(read_blocks(self.unlabelled), self.unit_of, strict=True):
                table["cluster"] = label[unit]
                truth.write(table)
                yield table[table["in_matrix"]]
        self.unlabelled.unlink()


def _sum_units(counts: sp.csr_matrix, unit: np.ndarray) -> sp.csr_matrix:
    member = sp.csr_matrix((np.ones(len(unit), np.int32), (unit, np.arange(len(unit)))), shape=(unit.max() + 1, len(unit)))
    return member @ counts
