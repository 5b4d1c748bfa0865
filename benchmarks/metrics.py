"""Time and peak memory of FID and KID against torch-fidelity: same folders, same weights, one run, a process each.

The Inception weights are random (time does not depend on them), so the distances printed are no FID of anything; they
only show that both programs compute the same. Example: python benchmarks/metrics.py --images 2000 --threads 2
"""
from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np


def ours(folders: tuple[Path, Path], weights: Path, subset: int, batch_size: int) -> dict[str, float]:
    from evaluation.distances import frechet_distance, kernel_distance
    from evaluation.features import image_features, list_images
    from evaluation.inception import build_inception
    encoder = build_inception(weights)
    a, b = (image_features(list_images(folder).paths, encoder, batch_size, progress=False) for folder in folders)
    started = time.perf_counter()
    fid, kid = frechet_distance(a, b), kernel_distance(a, b, subset, seed=2020)
    return {"fid": fid, "kid": kid[0], "distances_s": time.perf_counter() - started}


def theirs(folders: tuple[Path, Path], weights: Path, subset: int, batch_size: int) -> dict[str, float]:
    from torch_fidelity import calculate_metrics
    found = calculate_metrics(input1=str(folders[0]), input2=str(folders[1]), cuda=False, batch_size=batch_size, fid=True, kid=True,
                              kid_subset_size=subset, feature_extractor="inception-v3-compat", cache=False, verbose=False,
                              feature_extractor_weights_path=str(weights))
    return {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"]}


def measure(name: str, folders: tuple[Path, Path], weights: Path, subset: int, batch_size: int, threads: int) -> None:
    """One program in this process; prints JSON."""
    import torch
    torch.set_num_threads(threads)
    started = time.perf_counter()
    found = {"ours": ours, "torch-fidelity": theirs}[name](folders, weights, subset, batch_size)
    usage = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({**found, "wall_s": time.perf_counter() - started, "peak_mb": max(usage)}))


def write_patches(folder: Path, count: int, px: int, rng: np.random.Generator, softness: int) -> None:
    """Coloured noise of a given softness as PNG."""
    from PIL import Image
    folder.mkdir()
    for number in range(count):
        coarse = rng.integers(0, 256, size=(px // softness, px // softness, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC).save(folder / f"patch_{number:06d}.png")


@click.command()
@click.option("--images", default=32, show_default=True, help="Images a side; 32 take about a minute on 2 cores.")
@click.option("--px", default=64, show_default=True, help="Side of an image.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--only", hidden=True, help="(internal) measure one program in this process: its name and the folder.", nargs=2)
def main(images: int, px: int, batch_size: int, threads: int, only: tuple[str, str] | None):
    """FID and KID: wall time and peak memory, ours and torch-fidelity's."""
    subset = min(1000, images)
    if only:
        root = Path(only[1])
        return measure(only[0], (root / "a", root / "b"), root / "inception.pth", subset, batch_size, threads)
    with tempfile.TemporaryDirectory() as folder:
        root, rng = Path(folder), np.random.default_rng(0)
        from evaluation.inception import write_random_weights
        write_random_weights(root / "inception.pth")
        write_patches(root / "a", images, px, rng, 4)
        write_patches(root / "b", images, px, rng, 8)
        click.echo(f"n = {images} a side, {px} px, {threads} threads")
        click.echo(f"{'program':16}{'wall s':>9}{'peak MB':>9}{'Frechet':>14}{'kernel':>14}")
        for name in ("ours", "torch-fidelity"):
            answer = subprocess.run([sys.executable, __file__, "--images", str(images), "--batch-size", str(batch_size), "--threads",
                                     str(threads), "--only", name, folder], capture_output=True, text=True, check=True)
            found = json.loads(answer.stdout.strip().splitlines()[-1])
            click.echo(f"{name:16}{found['wall_s']:9.1f}{found['peak_mb']:9.0f}{found['fid']:14.6g}{found['kid']:14.6g}")


if __name__ == "__main__":
    main()
