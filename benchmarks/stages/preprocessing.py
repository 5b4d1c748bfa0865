"""Measure one stage of preprocessing in this process, ours or the naive way; prints one line of JSON.

Run by `benchmarks/preprocessing.py`: `python -m benchmarks.stages.preprocessing STAGE SAMPLE OUT WORKERS SPOTS`. What a stage
needs but does not do itself (finding windows before sums, say) is made before the clock starts; memory counts from the start.

The naive way is that of the published pipeline: for each spot on its own, rows of its bins sliced from the matrix and summed
into a list-of-lists row; one read of the slide, resized and kept in memory; a least-squares fit of its pixels' stains and a
PNG of Pillow's defaults. Its spots are consecutive, so that the slide's tile cache helps it as it would over a whole run.
"""
from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PATCH_UM, PATCH_PX, STRIDE_BINS, BLOCK_SPOTS = 55.0, 128, 5, 1000
VOCABULARY_GENES = 18_248
STAINED_PATCHES = 6000                     # of a stage whose cost a patch does not depend on the size of the sample


@dataclass(frozen=True)
class Job:
    """What a stage is given."""

    sample: Path       # a simulated sample
    out: Path          # what the commands write
    workers: int
    spots: int         # that the naive way is timed on

    def read(self):
        """The sample, as the extraction reads it."""
        from preprocessing.slide import open_slide
        from preprocessing.space_ranger import read_sample
        with open_slide(self.sample / "slide.tif") as slide:
            return read_sample(self.sample / "outs", slide=slide)

    def windows(self):
        """(sample, pseudo-spots whose patches lie on the slide)."""
        from preprocessing.pseudo_spots import group_bins, take_spots
        from preprocessing.slide import open_slide
        from preprocessing.windows import windows_inside
        sample = self.read()
        spots = group_bins(sample, PATCH_UM, STRIDE_BINS)
        with open_slide(self.sample / "slide.tif") as slide:
            inside, _ = windows_inside(slide, spots.centre_xy_px, PATCH_UM, sample.mpp)
        return sample, take_spots(spots, inside, {})


def clock() -> tuple[float, float]:
    """Seconds on the wall, and of CPU time of this process and its finished children."""
    return time.perf_counter(), time.process_time() + sum(os.times()[2:4])


def measured(units: int, unit: str, started: tuple[float, float], **facts) -> dict:
    wall_s, cpu_s = (end - start for start, end in zip(started, clock(), strict=True))
    return {"units": int(units), "unit": unit, "wall_s": wall_s, "cpu_s": cpu_s, **facts}


def blocks_of(count: int) -> list[slice]:
    return [slice(first, min(first + BLOCK_SPOTS, count)) for first in range(0, count, BLOCK_SPOTS)]


def middle(count: int, wanted: int) -> slice:
    """Consecutive rows from the middle."""
    first = max(0, (count - wanted) // 2)
    return slice(first, min(count, first + wanted))


# ---- ours -----------------------------------------------------------------------------------------------------------

def read(job: Job) -> dict:
    started = clock()
    sample = job.read()
    return measured(len(sample.barcodes), "bins", started)


def sums(job: Job) -> dict:
    from preprocessing.spot_sums import sum_blocks
    sample, spots = job.windows()
    warm = slice(0, min(8, len(spots)))
    list(sum_blocks(sample, spots, [warm]))                                  # kernels are compiled once a machine
    started, entries = clock(), 0
    for counts in sum_blocks(sample, spots, blocks_of(len(spots)), workers=job.workers, folder=job.out):
        entries += counts.nnz
    return measured(len(spots), "spots", started, entries=entries)


def cutting(job: Job) -> dict:
    from preprocessing.slide import open_slide
    from preprocessing.windows import cut_blocks
    sample, spots = job.windows()
    with open_slide(job.sample / "slide.tif") as slide:
        started = clock()
        readable = sum(int(block.readable.sum()) for block in cut_blocks(
            slide, spots.centre_xy_px, PATCH_UM, sample.mpp, PATCH_PX, blocks_of(len(spots)), workers=job.workers))
    return measured(readable, "patches", started)


def stain_png(job: Job) -> dict:
    from concurrent.futures import ThreadPoolExecutor

    from preprocessing.png_folder import write_pngs
    from preprocessing.stain import normalise_stain
    patches, stain = _stained_patches(job, STAINED_PATCHES)
    normalise_stain(patches[:1], stain)
    folder = _empty(job.out / "pngs")
    started = clock()
    with ThreadPoolExecutor(job.workers) as pool:
        for block in blocks_of(len(patches)):
            write_pngs(folder, block.start, pool.map(lambda patch: normalise_stain(patch, stain), patches[block]), 6, job.workers)
    found = measured(len(patches), "patches", started)
    shutil.rmtree(folder)
    return found


def _stained_patches(job: Job, wanted: int):
    """Patches of consecutive spots, and the slide's stain."""
    import numpy as np

    from preprocessing.slide import open_slide
    from preprocessing.stain import slide_stain
    from preprocessing.windows import cut_blocks
    sample, spots = job.windows()
    centres = spots.centre_xy_px[middle(len(spots), wanted)]
    with open_slide(job.sample / "slide.tif") as slide:
        cut = cut_blocks(slide, centres, PATCH_UM, sample.mpp, PATCH_PX, blocks_of(len(centres)), workers=job.workers)
        return np.concatenate([block.patches for block in cut]), slide_stain(slide)


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _command(job: Job, script: str, *options: str | Path) -> tuple[float, float]:
    """Run a command of preprocessing to its end; returns the start. Its peak memory is this process's children's."""
    started = clock()
    run = subprocess.run([sys.executable, f"preprocessing/{script}.py", *map(str, options)], capture_output=True, text=True)
    if run.returncode:
        raise SystemExit(run.stderr[-2000:] or run.stdout[-2000:])
    return started


def extraction(job: Job) -> dict:
    _empty(job.out / "extracted")
    started = _command(job, "extract_patches", "--space-ranger-dir", job.sample / "outs", "--wsi-file", job.sample / "slide.tif",
                       "--out-dir", job.out / "extracted", "--stride", STRIDE_BINS, "--workers", job.workers, "--no-resume")
    return measured(json.loads((job.out / "extracted/imgs.h5.done.json").read_text())["rows"], "spots", started)


def genes(job: Job) -> dict:
    import csv
    with open(job.sample / "truth/genes.csv", newline="") as stream:
        names = [row["gene"] for row in csv.DictReader(stream)]
    (job.out / "vocabulary.txt").write_text("\n".join(sorted(names, key=lambda name: name[::-1])[:VOCABULARY_GENES]) + "\n")
    (job.out / "extracted/gex_filt.h5ad.done.json").unlink(missing_ok=True)
    started = _command(job, "gex_preprocessing", "--raw-file", job.out / "extracted/gex.h5ad", "--vocab-file", job.out / "vocabulary.txt",
                       "--workers", job.workers)
    return measured(json.loads((job.out / "extracted/gex_filt.h5ad.done.json").read_text())["rows"], "spots", started)


def dump(job: Job) -> dict:
    shutil.rmtree(job.out / "patches", ignore_errors=True)
    started = _command(job, "dump_patches", "--images", job.out / "extracted/imgs.h5", "--wsi", job.sample / "slide.tif",
                       "--out-dir", job.out / "patches", "--workers", job.workers)
    return measured(json.loads((job.out / "extracted/imgs.h5.done.json").read_text())["rows"], "patches", started)


# ---- the naive way --------------------------------------------------------------------------------------------------

def naive_read(job: Job) -> dict:
    """The whole matrix and all positions into memory, joined by barcode. Counted by the spots they serve."""
    count, folder, started = len(job.windows()[1]), job.sample / "outs/binned_outputs/square_002um", clock()
    import pandas as pd
    import scanpy as sc
    counts = sc.read_10x_h5(folder / "filtered_feature_bc_matrix.h5")
    positions = pd.read_parquet(folder / "spatial/tissue_positions.parquet").set_index("barcode")
    counts.obs = counts.obs.join(positions)
    return measured(count, "spots", started)


def naive_windows(job: Job) -> dict:
    """Try every window of a strip of the array on its own and list the rows of its bins."""
    import numpy as np
    sample, spots = job.windows()
    in_tissue, row_of_bin = _grids(sample)
    side, centre_row = spots.bins_per_side, int(spots.array_row[len(spots) // 2])
    members, started = [], clock()
    for top in range(centre_row - side // 2, in_tissue.shape[0] - side + 1, STRIDE_BINS):
        for left in range(0, in_tissue.shape[1] - side + 1, STRIDE_BINS):
            if in_tissue[top:top + side, left:left + side].all():
                members.append(np.ravel(row_of_bin[top:top + side, left:left + side]))
        if len(members) >= job.spots:
            break
    return measured(len(members), "spots", started)


def naive_sums(job: Job) -> dict:
    import scipy.sparse as sp
    sample, spots = job.windows()
    _, row_of_bin = _grids(sample)
    counts = sample.counts if sp.issparse(sample.counts) else sample.counts.load()
    chosen, half = range(*middle(len(spots), job.spots).indices(len(spots))), spots.bins_per_side // 2
    rows = [row_of_bin[spots.array_row[k] - half:spots.array_row[k] + half + 1,
                       spots.array_col[k] - half:spots.array_col[k] + half + 1].ravel() for k in chosen]
    rows = [part[part < counts.shape[0]] for part in rows]                    # bins beyond have no counts
    started = clock()
    expression = sp.lil_matrix((len(rows), counts.shape[1]), dtype=counts.dtype)
    for k, part in enumerate(rows):
        expression[k] = counts[part].sum(axis=0)
    return measured(len(rows), "spots", started, entries=expression.tocsr().nnz)


def _grids(sample):
    """bool and int grids over the array: in tissue, and row of the sample."""
    import numpy as np
    shape = int(sample.array_row.max()) + 1, int(sample.array_col.max()) + 1
    in_tissue, row_of_bin = np.zeros(shape, bool), np.zeros(shape, np.int64)
    in_tissue[sample.array_row, sample.array_col] = sample.in_tissue
    row_of_bin[sample.array_row, sample.array_col] = np.arange(len(sample.array_row))
    return in_tissue, row_of_bin


def naive_cutting(job: Job) -> dict:
    import numpy as np
    import openslide
    from PIL import Image
    sample, spots = job.windows()
    side_px = round(PATCH_UM / sample.mpp)
    corners = np.rint(spots.centre_xy_px[middle(len(spots), job.spots)] - side_px / 2).astype(int)
    patches = []
    with openslide.OpenSlide(job.sample / "slide.tif") as slide:
        started = clock()
        for x, y in corners.tolist():
            region = slide.read_region((x, y), 0, (side_px, side_px)).convert("RGB")
            patches.append(np.asarray(region.resize((PATCH_PX, PATCH_PX), Image.Resampling.LANCZOS)))
        np.stack(patches)
    return measured(len(patches), "patches", started)


def naive_writing(job: Job) -> dict:
    """Counts and stacked patches in one piece each, uncompressed, as `write_h5ad` and h5py do without being asked for more."""
    import anndata as ad
    import h5py

    from preprocessing.spot_sums import sum_blocks
    sample, spots = job.windows()
    patches, _ = _stained_patches(job, job.spots)
    [counts] = sum_blocks(sample, spots, [middle(len(spots), job.spots)])
    listed, started = counts.tolil(), clock()
    ad.AnnData(listed.tocsr()).write_h5ad(job.out / "naive.h5ad")
    with h5py.File(job.out / "naive.h5", "w") as file:
        file.create_dataset("img", data=patches)
    return measured(len(patches), "spots", started)


def naive_stain_png(job: Job) -> dict:
    """Least squares with the slide's own stain vectors, as the published pipeline does."""
    import numpy as np
    from PIL import Image

    from preprocessing.stain import TARGET_MAXIMA, TARGET_VECTORS
    patches, stain = _stained_patches(job, job.spots)
    vectors, ratio = np.array(stain.vectors), (np.array(TARGET_MAXIMA) / np.array(stain.maxima))[:, None]
    target, folder = np.array(TARGET_VECTORS), _empty(job.out / "naive_pngs")
    started = clock()
    for k, patch in enumerate(patches):
        density = -np.log((patch.reshape(-1, 3).astype(float) + 1) / 240)
        concentrations = np.linalg.lstsq(vectors, density.T, rcond=None)[0]
        light = 240 * np.exp(-target @ (concentrations * ratio))
        Image.fromarray(light.clip(0, 255).T.reshape(patch.shape).astype(np.uint8)).save(folder / f"patch_{k:06d}.png")
    found = measured(len(patches), "patches", started)
    shutil.rmtree(folder)
    return found


def torchstain_png(job: Job) -> dict:
    """torchstain's numpy backend, which estimates the stains of every patch anew."""
    from PIL import Image
    from torchstain.numpy.normalizers import NumpyMacenkoNormalizer
    patches, _ = _stained_patches(job, job.spots)
    normaliser, folder = NumpyMacenkoNormalizer(), _empty(job.out / "torchstain_pngs")
    started = clock()
    for k, patch in enumerate(patches):
        Image.fromarray(normaliser.normalize(patch, stains=False)[0]).save(folder / f"patch_{k:06d}.png")
    found = measured(len(patches), "patches", started)
    shutil.rmtree(folder)
    return found


STAGES = {stage.__name__: stage for stage in (read, sums, cutting, stain_png, extraction, genes, dump, naive_read, naive_windows,
                                              naive_sums, naive_cutting, naive_writing, naive_stain_png, torchstain_png)}


def main(stage: str, sample: str, out: str, workers: str, spots: str) -> None:
    found = STAGES[stage](Job(Path(sample), Path(out), int(workers), int(spots)))
    usage = [resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({**found, "peak_gib": max(usage)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
