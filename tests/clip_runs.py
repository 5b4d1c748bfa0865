"""What the tests of train_clip.py share: tiny samples whose first genes are the patch's colour, a configuration, the command."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from omegaconf import OmegaConf

from preprocessing.expression import write_expression
from preprocessing.png_folder import write_patch_folder

ROOT = Path(__file__).resolve().parent.parent
GENES = [f"g{i}" for i in range(12)]
MODEL = ["model.image_encoder=random_tiny", "model.gene_encoder=bottleneck", "model.gene_hidden=16", "model.gene_width=16",
         "model.projection=8", "model.dropout=0", "model.image_dropout=0", "model.temperature=0.1", "data.patch_px=32"]
TRAINER = ["optimizer.lr=1e-3", "trainer.max_epochs=2", "trainer.batch_size=16", "trainer.accelerator=cpu", "trainer.select=last",
           "trainer.progress_bar=false", "trainer.val_every_steps=3"]


def write_sample(folder: Path, sample_id: str, n_spots: int, seed: int, genes=GENES) -> dict[str, str]:
    """Spots on a grid; the first three genes are the patch's colour."""
    generator = np.random.default_rng(seed)
    counts = generator.poisson(20, (n_spots, len(genes))).astype(np.float32)
    colours = generator.integers(20, 235, (n_spots, 3))
    counts[:, :3] = colours * 4
    barcodes = [f"{sample_id}{i:03d}-1" for i in range(n_spots)]
    adata = ad.AnnData(sp.csr_matrix(counts), obs=pd.DataFrame({"sample_id": sample_id}, index=barcodes), var=pd.DataFrame(index=genes))
    adata.obsm["spatial"] = np.stack([np.arange(n_spots) % 8, np.arange(n_spots) // 8], 1) * 100.0
    (folder / sample_id).mkdir(parents=True)
    write_expression(folder / sample_id / "gex_filt.h5ad", adata)
    patches = (np.full((32, 32, 3), colour, dtype=np.uint8) for colour in colours)
    write_patch_folder(folder / sample_id / "patches", patches, barcodes=barcodes, sample_id=sample_id, xy=adata.obsm["spatial"],
                       stain={"normalised": False})
    return {"gex": f"{sample_id}/gex_filt.h5ad", "images": f"{sample_id}/patches"}


def write_samples(folder: Path, n_spots: int = 32) -> Path:
    """Samples A and B to train on, C to validate; returns the folder."""
    for seed, name in enumerate(("A", "B", "C")):
        write_sample(folder, name, n_spots, seed)
    return folder


def config(train_samples="A,B", val="C", **sections):
    data = {"train_gex": ",".join(f"{name}/gex_filt.h5ad" for name in train_samples.split(",")),
            "train_image_dir": ",".join(f"{name}/patches" for name in train_samples.split(",")), "patch_px": 32}
    if val:
        data |= {"val_gex": f"{val}/gex_filt.h5ad", "val_image_dir": f"{val}/patches"}
    base = {"data": data, "model": {"gene_encoder": "bottleneck", "gene_hidden": 16, "gene_width": 16, "projection": 8, "dropout": 0.1,
                                    "image_dropout": 0.1, "temperature": 0.1, "image_encoder": "random_tiny"},
            "image": {"augment": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}},
            "optimizer": {"lr": 1e-2}, "logger": "none",
            "trainer": {"max_epochs": 2, "batch_size": 16, "accelerator": "cpu", "progress_bar": False, "val_every_steps": 3}}
    return OmegaConf.merge(base, sections)


def start(samples, *arguments, script=ROOT / "train_clip.py", **environment):
    names = {"data.train_gex": "A/gex_filt.h5ad,B/gex_filt.h5ad", "data.train_image_dir": "A/patches,B/patches",
             "data.val_gex": "C/gex_filt.h5ad", "data.val_image_dir": "C/patches"}
    command = [sys.executable, str(script), *(f"{key}={value}" for key, value in names.items()), *MODEL, *TRAINER, *arguments]
    inherited = {name: value for name, value in os.environ.items() if name not in ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")}
    return subprocess.Popen(command, cwd=samples, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**inherited, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment})


def finish(process) -> tuple[str, str]:
    try:
        return process.communicate(timeout=200)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the run hangs")
