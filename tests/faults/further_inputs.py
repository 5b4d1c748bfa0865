"""Files that the commands beside the walk read besides what the walk leaves (`walk.py`). Not a test file."""
from __future__ import annotations

import csv
import shutil
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

SPOTS, STEP_PX = [(x, y) for y in range(2, 6) for x in range(3, 8)], 120


def write_further_inputs(folder: Path) -> None:
    """What the commands above read beside the walk's own files, in the folder of a finished walk."""
    beside = folder / "beside"
    (beside / "held").mkdir(parents=True)
    with h5py.File(folder / "data" / "gex_filt.h5ad") as file:
        barcodes, genes = (file[group][file[group].attrs["_index"]].asstr()[:] for group in ("obs", "var"))
    (beside / "genes.txt").write_text(f"{genes[0]}:+2\n{genes[3]}:0\n")
    (beside / "genes_few.txt").write_text("\n".join(genes[:9]) + "\n")
    rows(beside / "clusters.csv", ["barcode", "cluster"], [(barcode, row % 3) for row, barcode in enumerate(barcodes)])
    shutil.copy(folder / "data" / "gex_filt.h5ad", beside / "held" / "gex_filt.h5ad")
    for split, sample, place in (("train", "A", "../data"), ("val", "SIM", "held")):
        rows(beside / f"{split}.csv", ["sample_id", "images", "gex", "split"],
             [(sample, "../data/patches", f"{place}/gex_filt.h5ad", split)])
    write_st_section(beside)
    rows(beside / "cohort.csv", ["sample_id", "space_ranger_dir", "wsi_file"], [("SIM", "../SIM", "../SIM/slide.tif")])
    shutil.copytree(folder / "data", folder / "cohort" / "SIM")
    (folder / "foreign").mkdir()
    for row, path in enumerate(sorted((folder / "data" / "patches").glob("*.png"))):
        shutil.copy(path, folder / "foreign" / f"{row}.png")


def write_st_section(folder: Path) -> None:
    """Legacy Spatial Transcriptomics: 20 spots, three genes, an image of squares."""
    random = np.random.default_rng(0)
    counts = ["\t".join((f"{x}x{y}", *map(str, random.integers(1, 9, 3)))) for x, y in SPOTS]
    (folder / "counts.tsv").write_text("\n".join(["\tACTB\tERBB2\tCD3E", *counts]) + "\n")
    places = ["\t".join(map(str, (x, y, x, y, STEP_PX * (x - 2), STEP_PX * (y - 1), 1))) for x, y in SPOTS]
    (folder / "spots.tsv").write_text("\n".join(["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected", *places]) + "\n")
    Image.fromarray(random.integers(0, 256, (STEP_PX * 5, STEP_PX * 6, 3), dtype=np.uint8)).save(folder / "image.png")


def rows(path: Path, names: list[str], values: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *values])
