"""Peak memory of every command of the walk on a simulated section, beside the bound that README's "Memory" states for it.

A bound is MB = base + share x what the command handles (thousands of patches or of bins), for the demo's settings: patches of 128 px,
500 genes, GAN `small` at 64 px and batch 8, diffusion `small` at 32 px and batch 16. Training takes a few steps: its memory is that of
a step, of the data and of a snapshot. The peak is the larger of the kernel's figure for one process and the sum over the process tree,
looked at five times a second; pages that processes share count once for each. Linux only.
Example: python -m benchmarks.memory --um 2000 --work bench
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
BIN_UM = 2
MB = 1e6
EVERY_S = 0.2
HEADER = "| command | patches | bins, thousands | s | peak MB | bound MB |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class Bound:
    """At most `base` MB and `share` MB for each thousand of `thing`; never more than `most`, where that is known."""

    base: int
    share: float = 0.0
    thing: str = "patches"        # patches or bins
    most: int | None = None

    def mb(self, patches: int, bins: int) -> float:
        grown = self.base + self.share * {"patches": patches, "bins": bins}[self.thing] / 1000
        return grown if self.most is None else min(grown, self.most)

    def __str__(self) -> str:
        share = f" + {self.share:g} a thousand {self.thing}" if self.share else ""
        return f"{self.base:,}{share}{f', at most {self.most:,}' if self.most else ''}"


BOUNDS = {
    "simulate_sample": Bound(500, 1.5, "bins", 3000),
    "extract_patches": Bound(800, 1.5, "bins", 4000),
    "gene_vocab": Bound(500),
    "gex_preprocessing": Bound(500, 10),
    "dump_patches": Bound(800, 5),
    "train_clip": Bound(1600, 100),
    "clip_embeddings": Bound(1300, 20),
    "train_gan": Bound(2000, 40),
    "gen_images": Bound(1300, 10),
    "train_diffusion": Bound(1700, 20),
    "generate_img": Bound(1500, 5),
    "calculate_image_quality_metrics": Bound(1500, 40),
}


def walk(um: int, workers: int) -> dict[str, tuple]:
    """Every command with its options, to be run in one folder, in this order."""
    return {
        "simulate_sample": ("preprocessing/simulate_sample.py", "--out-dir", "SIM", "--platform", "visium-hd", "--sample-id", "SIM",
                            "--seed", 1, "--width-um", um, "--height-um", um),
        "extract_patches": ("preprocessing/extract_patches.py", "--space-ranger-dir", "SIM", "--wsi-file", "SIM/slide.tif", "--sample-id",
                            "SIM", "--out-dir", "data", "--stride", 13, "--workers", workers),
        "gene_vocab": ("preprocessing/gene_vocab.py", "--gex", "data/gex.h5ad", "--out", "data/vocab.txt", "--min-counts", 10),
        "gex_preprocessing": ("preprocessing/gex_preprocessing.py", "--raw-file", "data/gex.h5ad", "--vocab-file", "data/vocab.txt"),
        "dump_patches": ("preprocessing/dump_patches.py", "--images", "data/imgs.h5", "--wsi", "SIM/slide.tif", "--out-dir", "data/patches",
                         "--workers", workers),
        "train_clip": ("train_clip.py", "--config-name", "clip_demo", "data.train_gex=data/gex_filt.h5ad",
                       "data.train_image_dir=data/patches", "run_dir=clip", "data.max_size=null", "image.cache_features=1",
                       "trainer.max_epochs=1", "trainer.progress_bar=false"),
        "clip_embeddings": ("clip_embeddings.py", "--network", "clip/clip", "--gex", "data/gex_filt.h5ad", "--out-dir", "embeddings"),
        "train_gan": ("train_gan.py", "--outdir", "gan", "--data", "data/patches", "--gex", "data/gex_filt.h5ad", "--network", "clip/clip",
                      "--img-resolution", 64, "--cfg", "small", "--batch", 8, "--kimg", 0.016),
        "gen_images": ("gen_images.py", "--network", "gan/00000-SIM@64-small-gpus1-b8", "--gex", "data/gex_filt.h5ad", "--n-samples", 64,
                       "--images", "data/patches", "--seeds", 0, "--outdir", "generated"),
        "train_diffusion": ("-m", "diffusion_utils.train_diffusion", "--train-data-dir", "data/patches", "--dataset-embs",
                            "embeddings/gene_clip_emb.npy", "--from-scratch", "small", "--pixel-space", "--resolution", 32,
                            "--train-batch-size", 16, "--max-train-steps", 3, "--output-dir", "diffusion"),
        "generate_img": ("-m", "diffusion_utils.generate_img", "--model-checkpoint", "diffusion", "--prompt-file",
                         "embeddings/gene_clip_emb.npy", "--n-prompts", 16, "--num-imgs", 1, "--steps", 4, "--gen-img-path", "drawn"),
        "calculate_image_quality_metrics": (
            "calculate_image_quality_metrics.py", "--experiment", "memory", "--ref-img-path", "data/patches", "--gen-img-path", "generated",
            "--features", "efficientnet_lite0", "--match-px", 64, "--out-dir", "scores", "--report", "scores/index.html"),
    }


def peak(command: tuple, folder: Path) -> tuple[float, float]:
    """(seconds, peak MB) of a command and all that it starts; it must succeed."""
    import psutil

    began, highest = time.monotonic(), 0
    with open(folder / "memory.log", "ab") as log:
        script = command[:2] if command[0] == "-m" else (ROOT / command[0],)
        process = subprocess.Popen([sys.executable, *map(str, (*script, *command[len(script):]))], cwd=folder, stdout=log, stderr=log,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            processes = [watched, *_children(watched)]
            highest = max(highest, sum(_bytes(one, "VmRSS") for one in processes), *(_bytes(one, "VmHWM") for one in processes))
            time.sleep(EVERY_S)
    if process.returncode:
        tail = (folder / "memory.log").read_text(errors="replace")[-1500:]
        raise click.ClickException(f"{' '.join(map(str, script))} failed ({process.returncode}):\n{tail}")
    return time.monotonic() - began, highest / MB


def _bytes(process, what: str) -> int:
    """VmRSS (now) or VmHWM (highest since the program began) of a process. In getrusage's figure a child begins with its parent's."""
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    except OSError:                          # it ended meanwhile
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(what)), 0)


def _children(process) -> list:
    import psutil

    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


@click.command()
@click.option("--um", default=2000, show_default=True, help="Side of the section, µm; 2000 are 1 M bins, 3,493 patches.")
@click.option("--workers", default=2, show_default=True, help="Of extraction and stain normalisation.")
@click.option("--work", type=click.Path(path_type=Path), help="Folder for what the walk makes; default: a temporary one.")
def main(um: int, workers: int, work: Path | None):
    """Walk once and print a line a command; exit code 1 if one exceeds its bound."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise click.UsageError(f"{folder} is not empty: a command that finds its work done would measure nothing")
        click.echo(HEADER)
        exceeded = [name for name, command in walk(um, workers).items() if not within(name, command, folder, bins=(um // BIN_UM) ** 2)]
    raise SystemExit(f"above their bounds: {', '.join(exceeded)}" if exceeded else 0)


def within(name: str, command: tuple, folder: Path, bins: int) -> bool:
    """Measure one command and print its line; whether it stayed within its bound."""
    seconds, mb = peak(command, folder)
    patches = len(list((folder / "data" / "patches").glob("*.png"))) or _rows(folder / "data" / "gex.h5ad")
    bound = BOUNDS[name].mb(patches, bins)
    verdict = "" if mb <= bound else " **exceeded**"
    click.echo(f"| `{name}` | {patches:,} | {bins / 1000:,.0f} | {seconds:.0f} | {mb:,.0f} | {bound:,.0f}{verdict} |")
    return mb <= bound


def _rows(path: Path) -> int:
    """Spots of an .h5ad, 0 before there is one."""
    import h5py

    if not path.is_file():
        return 0
    with h5py.File(path) as file:
        return len(file["obs"][file["obs"].attrs["_index"]])


if __name__ == "__main__":
    main()
