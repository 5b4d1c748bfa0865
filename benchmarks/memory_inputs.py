"""What the commands beside the walk read and the walk does not leave: `benchmarks/memory.py` writes it before it runs them.

The section of legacy Spatial Transcriptomics is of the size of a real one (her2st: 92 Mpx, 16 thousand genes), with every place of the
array taken; its size does not depend on that of the simulated section.
"""
from __future__ import annotations

import csv
import os
from pathlib import Path

import numpy as np

ST_COLUMNS, ST_ROWS, ST_STEP_PX, ST_GENES = 31, 33, 290, 16_000
ST_WIDTH_PX, ST_HEIGHT_PX = (ST_COLUMNS + 1) * ST_STEP_PX, (ST_ROWS + 1) * ST_STEP_PX
CLUSTERS = 5
KEPT_AVERAGES = 3


def write_further_inputs(folder: Path) -> None:
    """Into the folder of a finished walk. Patches and tables that lie there already are linked, not copied."""
    import h5py

    beside = folder / "beside"
    (beside / "held").mkdir(parents=True)
    with h5py.File(folder / "data" / "gex_filt.h5ad") as file:
        barcodes, genes = (file[group][file[group].attrs["_index"]].asstr()[:] for group in ("obs", "var"))
    (beside / "genes.txt").write_text(f"{genes[0]}:+2\n{genes[3]}:0\n")
    write_rows(beside / "clusters.csv", ["barcode", "cluster"], [(barcode, row % CLUSTERS) for row, barcode in enumerate(barcodes)])
    write_sheets(folder, beside)
    link_foreign_patches(folder)
    link_cohort(folder, beside)
    write_st_section(beside)
    keep_averages(folder / "diffusion")


def write_sheets(folder: Path, beside: Path) -> None:
    """The section twice, under two names: a held-out section must be another file than those of the training."""
    os.link(folder / "data" / "gex_filt.h5ad", beside / "held" / "gex_filt.h5ad")
    for split, sample, place in (("train", "A", "../data"), ("val", "SIM", "held")):
        write_rows(beside / f"{split}.csv", ["sample_id", "images", "gex", "split"],
                   [(sample, "../data/patches", f"{place}/gex_filt.h5ad", split)])


def link_foreign_patches(folder: Path) -> None:
    """The patches under row numbers, without metadata.jsonl: a folder that was not made by this project."""
    (folder / "foreign").mkdir()
    for row, path in enumerate(sorted((folder / "data" / "patches").glob("*.png"))):
        os.link(path, folder / "foreign" / f"{row}.png")


def link_cohort(folder: Path, beside: Path) -> None:
    """A cohort of this one section, whose steps have all ended: else the report would read nothing."""
    sample = (folder / "cohort" / "SIM").resolve()
    (sample / "steps").mkdir(parents=True)
    for step in ("extract", "genes"):
        (sample / "steps" / f"{step}.txt").write_text("finished\n")
    for path in (folder / "data").iterdir():
        (sample / path.name).symlink_to(path.resolve())
    write_rows(beside / "cohort.csv", ["sample_id", "space_ranger_dir", "wsi_file"], [("SIM", "../SIM", "../SIM/slide.tif")])


def write_st_section(folder: Path) -> None:
    """counts.tsv, spots.tsv and image.jpg of a full array of legacy Spatial Transcriptomics."""
    from PIL import Image

    random = np.random.default_rng(0)
    places = [(x, y) for y in range(1, ST_ROWS + 1) for x in range(1, ST_COLUMNS + 1)]
    with (folder / "counts.tsv").open("w") as stream:
        stream.write("".join(f"\tGene{number}" for number in range(ST_GENES)) + "\n")
        for x, y in places:
            stream.write("\t".join((f"{x}x{y}", *map(str, random.poisson(0.3, ST_GENES).tolist()))) + "\n")
    rows = ["\t".join(map(str, (x, y, x, y, ST_STEP_PX * x, ST_STEP_PX * y, 1))) for x, y in places]
    (folder / "spots.tsv").write_text("\n".join(["x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected", *rows]) + "\n")
    tile = random.integers(0, 256, (ST_STEP_PX, ST_STEP_PX, 3), dtype=np.uint8)
    Image.fromarray(np.tile(tile, (ST_ROWS + 1, ST_COLUMNS + 1, 1))).save(folder / "image.jpg", quality=50)


def keep_averages(run: Path) -> None:
    """What a run with --power-ema keeps, of the weights as they are: the walk trains too few steps to keep several."""
    from diffusion_utils.denoisers import load_denoiser
    from diffusion_utils.power_ema import PowerEma

    denoiser = load_denoiser(run / "pipeline")
    averages = PowerEma(denoiser)
    for _ in range(KEPT_AVERAGES):
        averages.update(denoiser)
        averages.keep(run)


def write_rows(path: Path, names: list[str], values: list[tuple]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([names, *values])
