"""Peak memory of every command on a simulated section, beside the bound that README's "Memory" states for it: of the walk, then of
those that read what a walk leaves (and `memory_inputs.py`).

A bound is MB = base + share x what the command handles (patches, bins, or pixels of a picture), for the demo's settings: patches of 128 px,
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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from benchmarks.memory_inputs import ST_HEIGHT_PX, ST_WIDTH_PX, write_further_inputs

ROOT = Path(__file__).resolve().parents[1]
BIN_UM = 2
MB = 1e6
EVERY_S = 0.2
HEADER = "| command | grows with | s | peak MB | bound MB |\n|---|---|---|---|---|"
GAN_RUN = "gan/00000-SIM@64-small-gpus1-b8"
PER = {"patches": (1e3, "thousand"), "bins": (1e3, "thousand"), "pixels": (1e6, "million")}    # what a share is of


@dataclass(frozen=True)
class Bound:
    """At most `base` MB and `share` MB for each thousand (pixels: million) of `thing`; never more than `most`, where that is known."""

    base: int
    share: float = 0.0
    thing: str = "patches"        # a key of PER
    most: int | None = None

    def mb(self, **handled: int) -> float:
        grown = self.base + self.share * handled[self.thing] / PER[self.thing][0]
        return grown if self.most is None else min(grown, self.most)

    def __str__(self) -> str:
        share = f" + {self.share:g} a {PER[self.thing][1]} {self.thing}" if self.share else ""
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
    "perturb": Bound(1500, 10),
    "interpolate_prompts": Bound(1300, 10),
    "interpretability": Bound(1500, 10),
    "import_st": Bound(1000, 5, "pixels"),
    "cohort_report": Bound(500),
    "choose_ema": Bound(1600),
    "dump_metadata": Bound(1000, 10),
    "evaluate_sections": Bound(1700, 150),
}


def walk(um: int, workers: int) -> dict[str, tuple]:
    """Every command of the walk with its options, to be run in one folder, in this order."""
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
        "gen_images": ("gen_images.py", "--network", GAN_RUN, "--gex", "data/gex_filt.h5ad", "--n-samples", 64,
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


def beside() -> dict[str, tuple]:
    """Every command that is no part of the walk but reads what it leaves, and `write_further_inputs`."""
    return {
        "perturb": ("perturb.py", "--network", GAN_RUN, "--gex", "data/gex_filt.h5ad", "--genes", "beside/genes.txt", "--outdir",
                    "perturbed"),
        "interpolate_prompts": ("interpolate_prompts.py", "--network", GAN_RUN, "--prompt1", "data/gex_filt.h5ad:0", "--prompt2",
                                "data/gex_filt.h5ad:9", "--outdir", "between"),
        "interpretability": ("interpretability.py", "--network", "clip/clip", "--gex", "data/gex_filt.h5ad", "--cluster-labs",
                             "beside/clusters.csv", "--out-file", "attributions/genes.csv"),
        "import_st": ("preprocessing/import_st.py", "--counts", "beside/counts.tsv", "--spots", "beside/spots.tsv", "--image",
                      "beside/image.jpg", "--sample-id", "ST", "--out-dir", "imported"),
        "cohort_report": ("preprocessing/cohort_report.py", "--samples", "beside/cohort.csv", "--out-dir", "cohort"),
        "choose_ema": ("-m", "diffusion_utils.choose_ema", "--run-dir", "diffusion", "--sigma-rel", 0.15),
        "dump_metadata": ("-m", "diffusion_utils.dump_metadata", "--image-dir", "foreign", "--gex", "data/gex_filt.h5ad"),
        "evaluate_sections": ("evaluate_sections.py", "--train", "beside/train.csv", "--val", "beside/val.csv", "--network", "clip/clip",
                              "--generated", "generated", "--out", "sections/results.json", "--report", "sections/index.html"),
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
    """Run every command once and print a line of each; exit code 1 if one exceeds its bound."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) if work is None else work
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise click.UsageError(f"{folder} is not empty: a command that finds its work done would measure nothing")
        click.echo(HEADER)
        exceeded = [name for name, command in commands(folder, um, workers) if not within(name, command, folder, (um // BIN_UM) ** 2)]
    raise SystemExit(f"above their bounds: {', '.join(exceeded)}" if exceeded else 0)


def commands(folder: Path, um: int, workers: int) -> Iterator[tuple[str, tuple]]:
    """The walk, then the commands beside it, whose inputs are written in between."""
    yield from walk(um, workers).items()
    write_further_inputs(folder)
    yield from beside().items()


def within(name: str, command: tuple, folder: Path, bins: int) -> bool:
    """Measure one command and print its line; whether it stayed within its bound."""
    seconds, mb = peak(command, folder)
    patches = len(list((folder / "data" / "patches").glob("*.png"))) or _rows(folder / "data" / "gex.h5ad")
    handled = {"patches": patches, "bins": bins, "pixels": ST_WIDTH_PX * ST_HEIGHT_PX}
    stated = BOUNDS[name]
    bound, grows_with = stated.mb(**handled), f"{handled[stated.thing]:,} {stated.thing}" if stated.share else ""
    verdict = "" if mb <= bound else " **exceeded**"
    click.echo(f"| `{name}` | {grows_with} | {seconds:.0f} | {mb:,.0f} | {bound:,.0f}{verdict} |")
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
