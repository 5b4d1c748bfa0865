"""What the GAN's two presets learn at equal images seen: the same small generator, backbone and prompts, several seeds.

Reads sections prepared by `assets/real_tissue.sh` or by the demo's commands (FOLDER/<section>/patches, gex_filt.h5ad with clusters)
and runs the project's own commands: a CLIP for the prompts, another that judges, `train_gan.py` for each preset and seed, patches for
every spot of the held-out section. Finished runs are kept in --out, so that a stopped benchmark goes on. Prints a line a preset, means
over seeds: cluster accuracy of generated patches as a share of that of real ones (a classifier trained on real patches of the training
sections), R@10 of the judge, Frechet distance and coverage in features of an encoder that trained nothing here, diversity within a prompt.
Intervals: over the prompts, and from one seed to the next.

    python -m benchmarks.gan_learning --data runs/her2st --train C2,C3 --held-out C4 --out runs/gan_learning
"""
from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
PRESETS = {   # of either: the same size, backbone and a blur that fades within the run; frozen prompts without dropout
    "reference": ["--preset", "reference", "--backbone", "efficientnet_lite0", "--cond-dropout", "0"],
    "best": ["--preset", "best"],
}


@dataclass(frozen=True)
class Plan:
    """Where data lie and what is run."""

    data: Path
    train: list[str]
    held_out: str
    out: Path
    kimg: float
    backbone_weights: str | None

    def files(self, names: list[str], what: str) -> str:
        return ",".join(str((self.data / name / what).resolve()) for name in names)

    def clip(self, name: str, seed: int, *differences: str) -> Path:
        """CLIP weights of the training sections."""
        folder = self.out / name
        if not (folder / "clip").is_dir():
            run("train_clip.py", "--config-name", "clip_small", f"data.train_gex={self.files(self.train, 'gex_filt.h5ad')}",
                f"data.train_image_dir={self.files(self.train, 'patches')}", f"run_dir={folder.resolve()}", f"seed={seed}",
                "trainer.progress_bar=false", *differences)
        return folder / "clip"

    def gan(self, preset: str, seed: int) -> Path:
        """Patches of every held-out spot, four seeds each, from one run; returns their folder."""
        folder, patches = self.out / f"{preset}-{seed}", self.out / f"{preset}-{seed}-patches"
        if (patches / "samples.csv").is_file():
            return patches
        backbone = ["--backbone-weights", self.backbone_weights] if self.backbone_weights else []
        run("train_gan.py", "--data", self.files(self.train, "patches"), "--gex", self.files(self.train, "gex_filt.h5ad"), "--network",
            self.out / "clip" / "clip", "--outdir", folder, "--img-resolution", "64", "--cfg", "small", "--batch", "8", "--kimg", self.kimg,
            "--blur-fade-kimg", self.kimg / 10, "--seed", seed, "--no-tensorboard", "--resume", "auto", *PRESETS[preset], *backbone)
        run("gen_images.py", "--network", next(folder.glob("0*")), "--gex", self.files([self.held_out], "gex_filt.h5ad"), "--images",
            self.files([self.held_out], "patches"), "--seeds", "0-3", "--outdir", patches)
        return patches


def run(script: str, *arguments: object) -> None:
    """One command of the project; its output goes to stderr only where it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{script} ended with {done.returncode}: {done.stderr[-2000:]}")
