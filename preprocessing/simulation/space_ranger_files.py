"""Write counts and positions as Space Ranger does: Visium 1.x and 2.x folders, and Visium HD `square_002um`.

Datasets, columns and dtypes are those of 10x's own files. Counts come in blocks of barcodes, so that a matrix
larger than memory can be written.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from PIL import Image

from preprocessing.simulation.parquet_blocks import ParquetBlocks

POSITION_COLUMNS = ("barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres")
SPOT_DIAMETER_UM, FIDUCIAL_UM, HD_FIDUCIAL_UM = 65.0, 105.0, 330.0     # as measured on 10x's scale factors
HD_LIMIT, HIRES_LIMIT, LOWRES_LIMIT = 6000, 2000, 600                  # longest side of the PNGs, px
HIRES_SCALE = 0.5                                                      # of small slides, which would fit whole
HD_FOLDER = Path("binned_outputs") / "square_002um"


def write_count_matrix(path: Path, blocks: Iterable[tuple[np.ndarray, sp.csr_matrix]], *, gene_names: Sequence[str],
                       gene_ids: Sequence[str], library_id: str, chemistry: str, software: str, genome: str) -> int:
    """Write 10x HDF5 from blocks of (barcodes, counts (N, G)); a column of the file is a barcode. Returns the barcodes written."""
    genes = len(gene_names)
    with h5py.File(path, "w") as file:
        file.attrs.update({"chemistry_description": chemistry, "filetype": "matrix", "software_version": software, "version": np.int64(2)})
        file.attrs["library_ids"] = np.array([library_id.encode()])
        matrix = file.create_group("matrix")
        features = matrix.create_group("features")
        features["_all_tag_keys"] = np.array([b"genome"])
        columns = {"feature_type": ["Gene Expression"] * genes, "genome": [genome] * genes, "id": gene_ids, "name": gene_names}
        for name, values in columns.items():
            features.create_dataset(name, data=np.array([value.encode() for value in values]), compression="gzip", chunks=True)
        data = _growing(matrix, "data", np.int32)
        indices = _growing(matrix, "indices", np.int64)
        indptr = _growing(matrix, "indptr", np.int64)
        names, entries = None, 0
        _append(indptr, np.zeros(1, np.int64))
        for barcodes, counts in blocks:
            encoded = np.char.encode(np.asarray(barcodes, dtype=str), "ascii")
            names = names or _growing(matrix, "barcodes", encoded.dtype)
            counts.sort_indices()
            _append(names, encoded)
            _append(data, counts.data)
            _append(indices, counts.indices)
            _append(indptr, counts.indptr[1:].astype(np.int64) + entries)
            entries += counts.nnz
        matrix["shape"] = np.array([genes, len(indptr) - 1], np.int32)
        return len(indptr) - 1


def _growing(group: h5py.Group, name: str, dtype) -> h5py.Dataset:
    return group.create_dataset(name, shape=(0,), maxshape=(None,), dtype=dtype, chunks=(1 << 16,), compression="gzip", compression_opts=1)


def _append(dataset: h5py.Dataset, values: np.ndarray) -> None:
    start = len(dataset)
    dataset.resize((start + len(values),))
    dataset[start:] = values


def positions_table(barcodes, in_tissue, array_row, array_col, row_px, col_px, *, whole_px: bool) -> pd.DataFrame:
    """The table of positions in 10x's columns; Visium's are whole pixels, Visium HD's are not."""
    columns = [np.asarray(barcodes, dtype=str), *(np.asarray(part).astype(np.int32) for part in (in_tissue, array_row, array_col))]
    pixels = [np.rint(part).astype(np.int64) if whole_px else np.asarray(part, np.float64) for part in (row_px, col_px)]
    return pd.DataFrame(dict(zip(POSITION_COLUMNS, [*columns, *pixels], strict=True)))


def write_positions(spatial: Path, tables: pd.DataFrame | Iterable[pd.DataFrame], platform: str) -> Path:
    """Write the table, or its blocks, under the name and in the form of the platform: `visium-v1`, `visium-v2` or `visium-hd`."""
    tables = [tables] if isinstance(tables, pd.DataFrame) else tables
    if platform == "visium-hd":
        path = spatial / "tissue_positions.parquet"
        with ParquetBlocks(path) as file:
            for table in tables:
                file.write(table)
    else:
        path = spatial / ("tissue_positions_list.csv" if platform == "visium-v1" else "tissue_positions.csv")
        pd.concat(tables).to_csv(path, index=False, header=platform != "visium-v1")
    return path


def write_images(spatial: Path, overview: np.ndarray, width_px: int, height_px: int, mpp: float, *, bin_um: float | None) -> dict:
    """Write hires and lowres PNG from an overview of the slide, and the scale factors; returns those.

    `overview` is uint8 (H, W, 3), the whole slide at least as large as the hires image.
    """
    longest = max(width_px, height_px)
    scales = {}
    for name, limit in (("hires", HD_LIMIT if bin_um else HIRES_LIMIT), ("lowres", LOWRES_LIMIT)):
        scales[name] = min(HIRES_SCALE, limit / longest)
        size = max(1, round(width_px * scales[name])), max(1, round(height_px * scales[name]))
        Image.fromarray(overview).resize(size, Image.Resampling.BOX).save(spatial / f"tissue_{name}_image.png")
    factors = {"tissue_hires_scalef": scales["hires"], "tissue_lowres_scalef": scales["lowres"]}
    if bin_um:
        factors = {"spot_diameter_fullres": bin_um / mpp, "bin_size_um": float(bin_um), "microns_per_pixel": mpp,
                   "regist_target_img_scalef": scales["hires"], "fiducial_diameter_fullres": HD_FIDUCIAL_UM / mpp, **factors}
    else:
        factors = {"spot_diameter_fullres": SPOT_DIAMETER_UM / mpp, "fiducial_diameter_fullres": FIDUCIAL_UM / mpp, **factors}
    (spatial / "scalefactors_json.json").write_text(json.dumps(factors, indent=1) + "\n")
    return factors


def write_clusters(folder: Path, tables: Iterable[pd.DataFrame]) -> Path:
    """Write `analysis/clustering/gene_expression_graphclust/clusters.csv` from blocks with the columns `barcode` and `cluster`."""
    path = folder / "analysis" / "clustering" / "gene_expression_graphclust" / "clusters.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("Barcode,Cluster\n")
        for table in tables:
            table[["barcode", "cluster"]].to_csv(stream, index=False, header=False)
    return path


def visium_barcodes(array_row: np.ndarray, array_col: np.ndarray) -> np.ndarray:
    """Sixteen bases and `-1`; they depend on the array position alone, as on real slides, so samples share them."""
    code = (np.asarray(array_row, np.uint64) << np.uint64(16)) | np.asarray(array_col, np.uint64)
    code = (code * np.uint64(0x9E3779B1) + np.uint64(0x1B873593)) & np.uint64(0xFFFFFFFF)     # odd multiplier: one to one
    digits = (code[:, None] >> (2 * np.arange(15, -1, -1)).astype(np.uint64)) & np.uint64(3)
    letters = np.array(list("ACGT"))[digits.astype(np.int64)]
    return np.array(["".join(row) + "-1" for row in letters])


def hd_barcodes(array_row: np.ndarray, array_col: np.ndarray) -> np.ndarray:
    """`s_002um_RRRRR_CCCCC-1` of every bin, bytes (N,), built from digits without a loop over bins."""
    template = np.frombuffer(b"s_002um_00000_00000-1", np.uint8)
    text = np.tile(template, (len(array_row), 1))
    for start, values in ((8, array_row), (14, array_col)):
        for place in range(5):
            text[:, start + place] += ((np.asarray(values) // 10 ** (4 - place)) % 10).astype(np.uint8)
    return text.reshape(-1).view("S21").astype("U21")
