"""Tiny patches with prompts, tiny denoisers and autoencoders, and runs on them, for the tests of diffusion."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from diffusion_utils import denoisers
from diffusion_utils.finetune import open_run
from diffusion_utils.finetune_config import FinetuneConfig
from preprocessing.done_manifests import strings_sha256
from preprocessing.png_folder import write_patch_folder

ROOT = Path(__file__).resolve().parent.parent
WIDTH, PX = 6, 8
TINY = {"block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "attention_head_dim": 2}
denoisers.SIZES["small"] = TINY       # the size that tests build; the real one has the same layout and more channels


def write_world(folder: Path, n: int = 12, seed: int = 0, record: bool = True) -> Path:
    """`patches/` of one colour each, and `emb.npy` that tells it; `embeddings.json` says which barcodes its rows are."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(20, 235, (n, 3))
    embeddings = rng.standard_normal((n, WIDTH)).astype(np.float32)
    embeddings[:, :3] = colours / 127.5 - 1
    barcodes = [f"B{row}-1" for row in range(n)]
    patches = [np.clip(colour + rng.integers(-9, 9, (PX, PX, 3)), 0, 255).astype(np.uint8) for colour in colours]
    folder.mkdir(parents=True, exist_ok=True)
    write_patch_folder(folder / "patches", patches, barcodes=barcodes, sample_id="S", xy=np.zeros((n, 2)), stain={"normalised": False})
    np.save(folder / "emb.npy", embeddings)
    if record:
        (folder / "embeddings.json").write_text(json.dumps({"barcode_sha256": strings_sha256(barcodes), "files": ["emb.npy"], "gex": None}))
    return folder


def config(world: Path, out: Path, **options) -> FinetuneConfig:
    """A run of 4 steps of 4 images in pixel space."""
    base = {} if "pretrained_model_name_or_path" in options else {"from_scratch": "small"}
    space = {} if {"pretrained_vae_path", "pretrained_model_name_or_path"} & options.keys() else {"pixel_space": True}
    return FinetuneConfig(**{"train_data_dir": str(world / "patches"), "dataset_embs": str(world / "emb.npy"), "output_dir": out,
                             "resolution": PX, "train_batch_size": 4, "max_train_steps": 4, "report_to": "none", "n_tokens": 3,
                             "checkpointing_steps": 100, "validation_steps": 100, "progress": False, "dataloader_num_workers": 1,
                             "mixed_precision": "no", **base, **space, **options})


def run(world: Path, out: Path, stop_after: int | None = None, **options):
    """Train; with `stop_after` save and leave after that many steps, as a stop in the middle does. Returns the run."""
    made = open_run(config(world, out, **options))
    for _ in made.train():
        if made.standing.step == stop_after:
            made.save()
            break
    return made


def weights(made) -> dict[str, torch.Tensor]:
    """Live weights, averaged ones and the optimiser's memory of a run, copied."""
    state = {f"live.{name}": tensor for name, tensor in made.live.state_dict().items()}
    state |= {} if made.ema is None else {f"ema.{name}": tensor for name, tensor in made.ema.average.state_dict().items()}
    for number, memory in made.optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{number}.{name}": tensor for name, tensor in memory.items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    """Names that are not equal bit for bit."""
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def tiny_vae(kind: str = "AutoencoderKL"):
    import diffusers
    torch.manual_seed(3)
    if kind == "AutoencoderTiny":
        return diffusers.AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                                         num_decoder_blocks=(1, 1), latent_channels=4).eval()
    return diffusers.AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=4,
                                   up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1).eval()


def start(*arguments: str, **environment: str) -> subprocess.Popen:
    """A command of diffusion_utils in a process of its own."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return subprocess.Popen([sys.executable, *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**inherited, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "HF_HUB_OFFLINE": "1",
                                 **environment})
