"""Build tiny Space Ranger folders by hand, with counts and positions that a test can name.

Visium: `TINY` spots on a 6 x 8 hexagonal lattice, 0.5 µm/px, every count known. Visium HD: 2 µm bins whose columns run against
image x, as in real output. Options of the builders are what real folders differ in.
"""
from __future__ import annotations

import gzip
import json
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.io
import scipy.sparse as sp

MPP = 0.5
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
GENES = ["Actb", "Umod", "Nphs1", "Umod"]               # the second Umod becomes Umod-1
GENE_IDS = ["ENSMUSG01", "ENSMUSG02", "ENSMUSG03", "ENSMUSG04"]


def visium_positions() -> pd.DataFrame:
    """24 spots; the last four are outside tissue."""
    spots = [(row, col) for row in range(6) for col in range(8) if (row + col) % 2 == 0]
    bases = ["".join("ACGT"[(number >> shift) % 4] for shift in (4, 2, 0)) for number in range(len(spots))]
    table = pd.DataFrame({
        "barcode": [f"ACGTACGTACGTA{tail}-1" for tail in bases], "in_tissue": [1] * 20 + [0] * 4,
        "array_row": [row for row, _ in spots], "array_col": [col for _, col in spots]})
    table["pxl_row_in_fullres"] = np.rint(300 + table["array_row"] * 50 * np.sqrt(3) / MPP).astype(int)
    table["pxl_col_in_fullres"] = 200 + table["array_col"] * int(50 / MPP)
    return table[COLUMNS]


def hd_positions(rows: int = 12, cols: int = 10, bin_um: int = 2) -> pd.DataFrame:
    """Every bin of an array whose columns run against image x; the outermost bins are outside tissue."""
    array_row, array_col = (part.ravel() for part in np.indices((rows, cols)))
    inside = (array_row > 0) & (array_row < rows - 1) & (array_col > 0) & (array_col < cols - 1)
    step = bin_um / MPP
    return pd.DataFrame({
        "barcode": [f"s_{bin_um:03d}um_{row:05d}_{col:05d}-1" for row, col in zip(array_row, array_col, strict=True)],
        "in_tissue": inside.astype(np.int32), "array_row": array_row.astype(np.int32), "array_col": array_col.astype(np.int32),
        "pxl_row_in_fullres": 20.25 + step * array_row, "pxl_col_in_fullres": 90.75 - step * array_col})


def counts_of(n_spots: int) -> sp.csr_matrix:
    """(n, 4) counts: spot i has i + 1 of the first gene, and a few of the others."""
    dense = np.zeros((n_spots, len(GENES)), dtype=np.int32)
    dense[:, 0], dense[::2, 1], dense[1::3, 3] = np.arange(n_spots) + 1, 7, 2
    return sp.csr_matrix(dense)


def write_h5(path: Path, counts: sp.csr_matrix, barcodes, *, feature_types=None, data_dtype=np.int32) -> None:
    """A 10x matrix (features, barcodes) in compressed columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    by_barcode = sp.csr_matrix(counts)
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        group["data"] = by_barcode.data.astype(data_dtype)
        group["indices"], group["indptr"] = by_barcode.indices, by_barcode.indptr
        group["shape"] = np.array([counts.shape[1], counts.shape[0]], np.int32)
        group["barcodes"] = np.array([str(barcode).encode() for barcode in barcodes])
        features = group.create_group("features")
        features["id"], features["name"] = np.array(GENE_IDS, "S"), np.array(GENES, "S")
        features["feature_type"] = np.array(feature_types or ["Gene Expression"] * len(GENES), "S")
        file.attrs["software_version"] = "spaceranger-2.1.0"


def write_mtx(folder: Path, counts: sp.csr_matrix, barcodes, *, gzipped: bool = False, called_gz: bool = False) -> None:
    """An MTX folder; with `called_gz` the names end in .gz and the content is plain."""
    folder.mkdir(parents=True, exist_ok=True)
    scipy.io.mmwrite(folder / "matrix.mtx", sp.coo_matrix(counts.T), field="integer")
    (folder / "barcodes.tsv").write_text("".join(f"{barcode}\n" for barcode in barcodes))
    lines = [f"{gene_id}\t{gene}\tGene Expression\n" for gene_id, gene in zip(GENE_IDS, GENES, strict=True)]
    (folder / "features.tsv").write_text("".join(lines))
    for file in sorted(folder.iterdir()):
        if gzipped or called_gz:
            content = file.read_bytes()
            file.unlink()
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(content) if gzipped else content)


def write_visium(folder: Path, *, version: int = 2, header: bool | None = None, positions: pd.DataFrame | None = None, n_counted: int = 18,
                 barcodes=None, matrix: str = "h5", counts: sp.csr_matrix | None = None, factors: dict | None = None) -> Path:
    """A Visium folder; counts of the first `n_counted` in-tissue spots (so two of the twenty were not read)."""
    spatial = folder / "spatial"
    spatial.mkdir(parents=True, exist_ok=True)
    table = visium_positions() if positions is None else positions
    name = "tissue_positions_list.csv" if version == 1 else "tissue_positions.csv"
    table.to_csv(spatial / name, index=False, header=version > 1 if header is None else header)
    barcodes = visium_positions()["barcode"][:n_counted] if barcodes is None else barcodes
    counts = counts_of(len(barcodes)) if counts is None else counts
    if matrix == "h5":
        write_h5(folder / "filtered_feature_bc_matrix.h5", counts, barcodes)
    else:
        write_mtx(folder / "filtered_feature_bc_matrix", counts, barcodes, gzipped=matrix == "mtx.gz", called_gz=matrix == "mtx called gz")
    factors = {"spot_diameter_fullres": 65 / MPP, "tissue_hires_scalef": 0.5} if factors is None else factors
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors))
    return folder


def write_hd(outs: Path, *, positions: pd.DataFrame | None = None, barcodes=None, prefix: str = "", mpp: float = MPP) -> Path:
    """`outs/` with binned_outputs/square_002um; counts of every bin in tissue but the last. Returns the bin folder."""
    folder = outs / "binned_outputs" / "square_002um"
    (folder / "spatial").mkdir(parents=True)
    table = hd_positions() if positions is None else positions
    table.to_parquet(folder / "spatial" / f"{prefix}tissue_positions.parquet", index=False)
    truth = hd_positions()
    barcodes = truth["barcode"][truth["in_tissue"] == 1][:-1] if barcodes is None else barcodes
    write_h5(folder / f"{prefix}filtered_feature_bc_matrix.h5", counts_of(len(barcodes)), barcodes)
    (folder / "spatial" / f"{prefix}scalefactors_json.json").write_text(json.dumps(
        {"microns_per_pixel": mpp, "bin_size_um": 2.0, "spot_diameter_fullres": 2 / mpp, "tissue_hires_scalef": 0.5}))
    return folder


def write_clusters(folder: Path, barcodes, labels) -> None:
    """`analysis/clustering/gene_expression_graphclust/clusters.csv` of a folder."""
    path = folder / "analysis" / "clustering" / "gene_expression_graphclust" / "clusters.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame({"Barcode": list(barcodes), "Cluster": list(labels)}).to_csv(path, index=False)


def counts_of_rows(sample) -> np.ndarray:
    """(P, G) counts of every row of a sample, read from disk where they lie there."""
    counts = sample.counts if sp.issparse(sample.counts) else sample.counts.load()
    return np.pad(counts.toarray(), ((0, len(sample.barcodes) - counts.shape[0]), (0, 0)))
