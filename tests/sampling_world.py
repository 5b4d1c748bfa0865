"""What the tests of gen_images.py and interpolate_prompts.py share: one sample, a gene encoder and an untrained snapshot."""
from __future__ import annotations

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from click.testing import CliRunner
from PIL import Image

from networks.clip import CLIP, ClipModelConfig, clip_weights_sha256
from networks.generator import Generator, GeneratorConfig
from networks.histo_models import build_encoder
from networks.snapshot import save_snapshot
from preprocessing.expression import morphology_record, write_expression
from preprocessing.patch_file import write_patch_file

GENES, N, PX, WIDTH = 12, 16, 16, 8        # WIDTH of an embedding
MPP, PATCH_UM = 0.5, 10.0


def make_world(folder: Path) -> Path:
    """gex.h5ad and imgs.h5 of sample S, clip/, and the snapshots `snapshot` and `other`, of other weights."""
    order = np.random.default_rng(0)
    barcodes = [f"AAAC{i:04d}-1" for i in range(N)]
    obs = pd.DataFrame({"sample_id": "S", "cluster": pd.Categorical(["stroma", "tumour/a"] * (N // 2))}, index=barcodes)
    genes = ad.AnnData(sp.csr_matrix(order.poisson(3, (N, GENES)).astype(np.float32)), obs=obs,
                       var=pd.DataFrame(index=[f"gene{i}" for i in range(GENES)]))
    genes.obsm["spatial"] = order.random((N, 2)) * 1000
    genes.uns["morphology"] = morphology_record(barcodes=barcodes, mpp=MPP, patch_um=PATCH_UM, patch_px=PX, slide={}, settings={})
    write_expression(folder / "gex.h5ad", genes)
    side = PATCH_UM / MPP
    write_patch_file(folder / "imgs.h5", order.integers(0, 256, (N, PX, PX, 3), dtype=np.uint8), count=N, patch_px=PX,
                     coords=(genes.obsm["spatial"] - side / 2).astype(np.int64), barcodes=barcodes, patch_size_src=side, pixel_size=MPP,
                     name="S")
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=WIDTH, image_encoder="random_tiny")
    CLIP(config, genes.var_names.tolist(), image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / "clip")
    encoder = {"path": folder / "clip", "sha256": clip_weights_sha256(folder / "clip"), "target_sum": 100.0}
    for name in ("snapshot", "other"):
        generator = Generator(GeneratorConfig(PX, c_dim=WIDTH, cbase=128, cmax=8, res_blocks=1, noise_init=0.3)).requires_grad_(False)
        for conv in (conv for block in generator.blocks for conv in block.convs):     # the same seen from four sides: a turned input
            conv.weight.copy_(sum(torch.rot90(conv.weight, turn, (2, 3)) for turn in range(4)) / 4)   # gives the turned picture
        save_snapshot(folder / name, generator, gene_encoder=encoder)
    return folder


def arguments(**options) -> list[str]:
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def call(command, **options):
    return CliRunner().invoke(command.main, arguments(**options), catch_exceptions=False)


def pictures(folder: Path, pattern: str = "prompt*.png") -> dict[str, np.ndarray]:
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).astype(int) for path in sorted(folder.rglob(pattern))}


def apart(first: dict, second: dict) -> int:
    """Largest difference of any two pictures of one name, grey levels."""
    assert first.keys() == second.keys() and first
    return max(int(np.abs(first[name] - second[name]).max()) for name in first)
