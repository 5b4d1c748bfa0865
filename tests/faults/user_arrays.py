"""HDF5 files and arrays as a user hands them over, and who reads them; as `user_files.py`. Not a test file."""
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import torch
from user_files import BARCODES, gex, patches, section, visium
from visium_folders import GENES, write_hd

from diffusion_utils.prompts import read_embeddings, read_null_prompt
from evaluation.spot_embedding import SampleCounts, read_samples, read_scgpt
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from preprocessing.anndata_sample import read_anndata_sample
from preprocessing.expression import read_expression, recorded_scale
from preprocessing.patch_file import read_patch_file, write_patch_file
from training.data import ImageGeneDataset, expression_only
from training.prompts import read_labels, read_prompts, read_rows
from training.sample_sheet import SampleFiles
from training.spot_choice import read_mask


def read_images(path: Path) -> None:
    with read_patch_file(path) as file:
        file.images(slice(0, len(file)))
        assert file.barcodes is None or len(file.barcodes) == len(file)
        file.recorded_xy_px  # noqa: B018


def expression(path: Path) -> None:
    data = read_expression(path)
    assert np.isfinite(data.X.sum())


def patch_file(path: Path) -> None:
    corners = np.arange(12).reshape(6, 2) * 100 - 4
    write_patch_file(path, np.zeros((6, 8, 8, 3), np.uint8), count=6, patch_px=8, coords=corners, barcodes=BARCODES, patch_size_src=8.0,
                     pixel_size=0.5, name="S")


def scgpt(path: Path) -> None:
    made = ad.AnnData(np.ones((3, 2), np.float32), obsm={"X_scGPT": np.ones((3, 4), np.float32)})
    made.obs_names = ["S__b0", "S__b1", "S__b2"]
    made.write_h5ad(path)


SAMPLES_OF_SCGPT = [SampleCounts("S", Path("gex.h5ad"), ad.AnnData(np.ones((3, 2), np.float32)), np.array(["a"] * 3))]
SAMPLES_OF_SCGPT[0].adata.obs_names = ["b0", "b1", "b2"]
MODEL = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=4, gene_width=4, projection=5, image_encoder="random_tiny")
SNAPSHOT = SimpleNamespace(is_unconditional=False, generator=SimpleNamespace(config=SimpleNamespace(c_dim=5)),
                           gene_encoder=CLIP(MODEL, [*GENES[:3], "Xkr4"], image_encoder=build_encoder("random_tiny")).eval())

HDF5 = {
    "10x matrix": (lambda f: visium(f / "v"), "v/filtered_feature_bc_matrix.h5", lambda f: section(f / "v")),
    "10x matrix of Visium HD": (lambda f: write_hd(f / "v"), "v/binned_outputs/square_002um/filtered_feature_bc_matrix.h5",
                                lambda f: section(f / "v")),
    "imgs.h5": (lambda f: patch_file(f / "f"), "f", lambda f: read_images(f / "f")),
    "h5ad as a sample": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: read_anndata_sample(f / "f.h5ad")),
    "h5ad as expression": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: expression(f / "f.h5ad")),
    "h5ad with its patches": (lambda f: (gex(f / "gex.h5ad"), patches(f)), "gex.h5ad",
                              lambda f: ImageGeneDataset([SampleFiles("S", f / "patches", f / "gex.h5ad")])),
    "h5ad as prompts": (lambda f: gex(f / "gex.h5ad"), "gex.h5ad", lambda f: read_prompts(f / "gex.h5ad", SNAPSHOT, clusters="cluster")),
    "h5ad with clusters": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: read_samples({"S": f / "f.h5ad"})),
    "scale of patches": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: recorded_scale(f / "f.h5ad")),
    "h5ad of scGPT": (lambda f: scgpt(f / "f.h5ad"), "f.h5ad", lambda f: read_scgpt(f / "f.h5ad", SAMPLES_OF_SCGPT)),
    "imgs.h5 with its expression": (lambda f: (gex(f / "gex.h5ad"), patch_file(f / "imgs.h5")), "imgs.h5",
                                    lambda f: ImageGeneDataset([SampleFiles("S", f / "imgs.h5", f / "gex.h5ad")])),
    "h5ad to train on": (lambda f: gex(f / "f.h5ad"), "f.h5ad", lambda f: expression_only(f / "f.h5ad")),
}

NPY = {"embeddings": lambda f: read_embeddings(f / "f.npy", 5), "expression rows": lambda f: read_rows(f / "f.npy", 5, False),
       "labels": lambda f: read_labels(str(f / "f.npy"), None, f / "f.npy", 6), "mask": lambda f: read_mask(str(f / "f.npy"), 6, None, "f"),
       "prompts": lambda f: read_prompts(f / "f.npy", SNAPSHOT, encoded=True),
       "null prompt": lambda f: read_null_prompt(str(f / "f.npy"), torch.zeros(2, 5)),
       "rows of scGPT": lambda f: read_scgpt(f / "f.npy", SAMPLES_OF_SCGPT)}
