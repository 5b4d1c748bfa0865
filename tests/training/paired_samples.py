"""Tiny paired samples for the tests of training: grey patches whose level tells their row, counts that tell it too."""
import anndata as ad
import numpy as np
import scipy.sparse as sp

from preprocessing.expression import morphology_record, write_expression
from preprocessing.patch_file import write_patch_file
from preprocessing.png_folder import write_patch_folder
from training.sample_sheet import SampleFiles

GENES = ["Umod", "Actb", "Aqp2"]
BARCODES = [f"AAAC{i:02d}-1" for i in range(10)]


def write_sample(folder, sample_id, images="patches", genes=GENES, level=0, scale=1, barcodes=BARCODES):
    """Row i: a patch of grey level 20 i + level, and i + 1 counts (times scale) of the first gene, 1 of the others."""
    count = len(barcodes)
    counts = np.ones((count, len(genes)), int)
    counts[:, 0] = np.arange(1, count + 1)
    adata = ad.AnnData(sp.csr_matrix(counts * scale))
    adata.obs_names, adata.var_names = list(barcodes), list(genes)
    xy = np.stack([np.arange(count) * 100.0, np.zeros(count)], axis=1)
    adata.obs["sample_id"], adata.obs["cluster"], adata.obsm["spatial"] = sample_id, [str(i % 3) for i in range(count)], xy
    adata.uns["morphology"] = morphology_record(barcodes=barcodes, mpp=0.5, patch_um=55.0, patch_px=8, slide={}, settings={})
    folder.mkdir(parents=True)
    write_expression(folder / "gex_filt.h5ad", adata)
    patches = [np.full((8, 8, 3), 20 * i + level, np.uint8) for i in range(count)]
    if images == "patches":
        write_patch_folder(folder / images, patches, barcodes=barcodes, sample_id=sample_id, xy=xy, stain={"normalised": False})
    else:
        write_patch_file(folder / images, patches, count=count, patch_px=8, coords=xy.astype(int) - 8, barcodes=barcodes,
                         patch_size_src=16, pixel_size=0.5, name=sample_id)
    return SampleFiles(sample_id, folder / images, folder / "gex_filt.h5ad")


def two_samples(tmp_path):
    return [write_sample(tmp_path / "one", "S1"), write_sample(tmp_path / "two", "S2", "imgs.h5", level=7, scale=10)]
