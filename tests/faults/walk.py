"""The whole walk in small, and the commands beside it, as a user types them: with relative paths, each
with its own way to go on after an interruption."""
from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from fault_runs import CommandServer, Run
from output_contents import contents
from safetensors.torch import load

GAN_RUN = "gan/00000-SIM@16-custom-gpus1-b8"
TINY_CLIP = ("model.image_encoder=random_tiny", "model.gene_encoder=bottleneck", "model.gene_hidden=16", "model.gene_width=16",
             "model.projection=8", "data.patch_px=16", "optimizer.lr=1e-3", "trainer.max_epochs=3", "trainer.batch_size=32",
             "trainer.val_every_steps=2", "trainer.accelerator=cpu", "trainer.num_threads=1")
WALK = {
    "simulate": ("--out-dir", "SIM", "--platform", "visium-hd", "--sample-id", "SIM", "--seed", 1, "--width-um", 420, "--height-um", 380,
                 "--genes", 60, "--region-um", 150),
    "extract": ("--space-ranger-dir", "SIM", "--wsi-file", "SIM/slide.tif", "--sample-id", "SIM", "--out-dir", "data", "--stride", 7,
                "--patch-sz-px", 16, "--workers", 2),
    "vocabulary": ("--gex", "data/gex.h5ad", "--out", "data/vocab.txt", "--min-counts", 10),
    "filter": ("--raw-file", "data/gex.h5ad", "--vocab-file", "data/vocab.txt"),
    "dump": ("--images", "data/imgs.h5", "--wsi", "SIM/slide.tif", "--out-dir", "data/patches"),
    "clip": ("data.train_gex=data/gex_filt.h5ad", "data.train_image_dir=data/patches", "run_dir=clip", "ckpt_path=auto", *TINY_CLIP),
    "embeddings": ("--network", "clip/clip", "--gex", "data/gex_filt.h5ad", "--images", "data/patches", "--out-dir", "embeddings"),
    "gan": ("--outdir", "gan", "--resume", "auto", "--data", "data/patches", "--gex", "data/gex_filt.h5ad", "--network", "clip/clip",
            "--img-resolution", 16, "--batch", 8, "--cfg", "custom", "--cbase", 128, "--cmax", 8, "--res-blocks", 1,
            "--backbone", "random_tiny", "--kimg", 0.16, "--device", "cpu"),
    "gen_images": ("--network", GAN_RUN, "--gex", "data/gex_filt.h5ad", "--n-samples", 32, "--seeds", 0, "--batch-sz", 8,
                   "--images", "data/patches", "--outdir", "generated", "--device", "cpu"),
    "diffusion": ("--train-data-dir", "data/patches", "--dataset-embs", "embeddings/gene_clip_emb.npy", "--from-scratch", "small",
                  "--pixel-space", "--resolution", 8, "--train-batch-size", 4, "--max-train-steps", 8, "--checkpointing-steps", 2,
                  "--power-ema", "--mixed-precision", "no", "--output-dir", "diffusion", "--resume-from-checkpoint", "latest"),
    "generate_img": ("--model-checkpoint", "diffusion", "--prompt-file", "embeddings/gene_clip_emb.npy", "--n-prompts", 8, "--num-imgs", 1,
                     "--steps", 4, "--batch-size", 2, "--gen-img-path", "drawn", "--device", "cpu"),
    "metrics": ("--experiment", "walk", "--ref-img-path", "data/patches", "--gen-img-path", "generated", "--features", "random_tiny",
                "--out-dir", "scores", "--report", "scores/index.html", "--device", "cpu"),
}
# those that read what a walk leaves, and `further_inputs.py`
FURTHER = {
    "perturb": ("--network", GAN_RUN, "--gex", "data/gex_filt.h5ad", "--genes", "beside/genes.txt", "--spots", "0,5", "--controls", 0,
                "--seeds", "0-1", "--outdir", "perturbed", "--device", "cpu"),
    "interpolate": ("--network", GAN_RUN, "--prompt1", "data/gex_filt.h5ad:0", "--prompt2", "data/gex_filt.h5ad:9", "--n-steps", 3,
                    "--seeds", "0-3", "--outdir", "between", "--device", "cpu"),
    "interpretability": ("--network", "clip/clip", "--gex", "data/gex_filt.h5ad", "--cluster-labs", "beside/clusters.csv", "--out-file",
                         "attributions/genes.csv", "--device", "cpu"),
    "evaluate_sections": ("--train", "beside/train.csv", "--val", "beside/val.csv", "--network", "clip/clip", "--generated", "generated",
                          "--features", "random_tiny", "--out", "sections/results.json", "--report", "sections/index.html",
                          "--device", "cpu"),
    "import_st": ("--counts", "beside/counts.tsv", "--spots", "beside/spots.tsv", "--image", "beside/image.png", "--sample-id", "ST",
                  "--out-dir", "imported", "--patch-sz-um", 100, "--patch-sz-px", 64),
    "cohort_report": ("--samples", "beside/cohort.csv", "--out-dir", "cohort"),
    "choose_ema": ("--run-dir", "diffusion", "--sigma-rel", 0.15, "--out-dir", "averaged/pipeline"),
    "dump_metadata": ("--image-dir", "foreign", "--gex", "data/gex_filt.h5ad"),
}
COMMANDS = WALK | FURTHER
WRITES = {"simulate": "SIM", "clip": "clip", "embeddings": "embeddings", "gan": "gan", "gen_images": "generated", "diffusion": "diffusion",
          "generate_img": "drawn", "metrics": "scores", "perturb": "perturbed", "interpolate": "between",
          "interpretability": "attributions", "evaluate_sections": "sections", "import_st": "imported", "choose_ema": "averaged"}
# beside those of preprocessing, which have tests of their own
BESIDE = {"vocabulary": ("data/vocab.txt",), "cohort_report": ("cohort/cohort.csv", "cohort/cohort.html"),
          "dump_metadata": ("foreign/metadata.jsonl",)}          # what is written into folders of others
LONGEST_S = 600          # of one command, on a machine that does other work too
RECORDS = ("stats.jsonl", "log.txt", "events.out.tfevents", "metrics.csv", "hparams.yaml")   # logs: they tell how often a run was stopped
WALL_TIME = re.compile(rb'"evaluate sections": [\d.]+|evaluate sections</th><td>[\d.]+')
TIMES = ("elapsed_s", "last_tick", "last_snap")


def start(server: CommandServer, name: str, folder: Path, *more: str) -> Run:
    """A command under way in `folder`, with more arguments, in a process group of its own."""
    return server.start(name, *COMMANDS[name], *more, before=f"import os; os.setpgid(0, 0); os.chdir({str(folder)!r})")


def remove_output(name: str, folder: Path) -> None:
    """What the command leaves in the folder of a walk."""
    if name in WRITES:
        shutil.rmtree(folder / WRITES[name])
    else:
        for file in BESIDE[name]:
            (folder / file).unlink(missing_ok=True)


def succeeds(run: Run) -> None:
    assert run.wait(LONGEST_S) == 0 and run.errors == [], (run.code, run.said[-3000:])


def walk(server: CommandServer, folder: Path) -> Iterator[tuple[str, float]]:
    """The walk from end to end; yields every command with the seconds it took."""
    folder.mkdir()
    for name in WALK:
        began = time.monotonic()
        succeeds(start(server, name, folder))
        yield name, time.monotonic() - began


def was_killed(run: Run, after_s: float) -> bool:
    """Kill the command and what it started after a while; whether it was still running."""
    deadline = time.monotonic() + after_s
    while time.monotonic() < deadline and not run.is_over():
        time.sleep(0.001)
    if run.is_over():
        return False
    for kill in (os.killpg, os.kill):        # the second for one that has not come so far as to have a group
        try:
            kill(run.child, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return run.wait() == -signal.SIGKILL


# ---- what a walk leaves ---------------------------------------------------------------------------------------------

def walk_contents(folder: Path) -> dict:
    """Name -> content of everything a walk leaves, but times, logs, and what follows from these."""
    found = {}
    for name, content in contents(folder).items():
        path = Path(name)
        if path.name.startswith(RECORDS) or path.name in ("SHA256SUMS",) and "checkpoint-" in name or name.endswith(".ckpt.sha256"):
            continue
        if path.parts[0] == "sections" and path.name in ("results.json", "index.html"):
            content = WALL_TIME.sub(b"", content)
        elif path.name == "state.json":
            content = {key: value for key, value in json.loads(content).items() if key not in TIMES}
        elif path.suffix == ".safetensors":
            content = tensors_of(load(content))
        elif path.suffix in (".pt", ".ckpt"):
            content = _trained(torch.load(folder / name, weights_only=True))
        found[name] = content
    return found


def _trained(saved: dict) -> dict:
    """Of an optimiser's state all, of a Lightning checkpoint weights, optimisers and clock: it also counts how often it was resumed."""
    return tensors_of({key: saved[key] for key in ("state_dict", "optimizer_states", "global_step")} if "state_dict" in saved else saved)


def tensors_of(tree: object) -> object:
    """A tree of tensors as one that can be compared."""
    if isinstance(tree, torch.Tensor):
        bits = tree.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(tree.dtype), tuple(tree.shape), hashlib.sha256(bits).hexdigest()
    if isinstance(tree, dict):
        return {key: tensors_of(value) for key, value in tree.items()}
    return [tensors_of(value) for value in tree] if isinstance(tree, list | tuple) else tree
