"""Time and memory of evaluation: FID and KID against torch-fidelity, memory of a row at n and 10 n images, attributions a second.

Parts. `distances`: same folders, same weights, one run, a process each. The Inception weights are random (time does not depend on them),
so the distances printed are no FID of anything; they only show that both programs compute the same. `memory`: peak of a whole row of
calculate_image_quality_metrics.py (floors, intervals, coverage) at the numbers of --memory-images, with an encoder that costs next to
nothing. `attribution`: ordered pairs of clusters a second with an untrained CLIP of the published layout and --genes genes.

    python -m benchmarks.evaluation --images 2000 --memory-images 2000,20000 --genes 18248 --threads 2
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

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("distances", "memory", "attribution")


# ---- what is measured, each in a process of its own ---------------------------------------------------------------------

def ours(root: Path, subset: int, batch_size: int) -> dict[str, float]:
    from evaluation.distances import frechet_distance, kernel_distance
    from evaluation.features import image_features, list_images
    from evaluation.inception import build_inception
    encoder = build_inception(root / "inception.pth")
    a, b = (image_features(list_images(root / side).paths, encoder, batch_size, progress=False) for side in "ab")
    started = time.perf_counter()
    fid, kid = frechet_distance(a, b), kernel_distance(a, b, subset, seed=2020)
    return {"fid": fid, "kid": kid[0], "distances_s": time.perf_counter() - started}


def theirs(root: Path, subset: int, batch_size: int) -> dict[str, float]:
    from torch_fidelity import calculate_metrics
    found = calculate_metrics(input1=str(root / "a"), input2=str(root / "b"), cuda=False, batch_size=batch_size, fid=True, kid=True,
                              kid_subset_size=subset, feature_extractor="inception-v3-compat", cache=False, verbose=False,
                              feature_extractor_weights_path=str(root / "inception.pth"))
    return {"fid": found["frechet_inception_distance"], "kid": found["kernel_inception_distance_mean"]}


def whole_row(root: Path, _subset: int, batch_size: int) -> dict[str, float]:
    from evaluation import image_quality
    from evaluation.features import FeatureSpec
    config = image_quality.QualityConfig("memory", (root / "a",), (root / "b",), (FeatureSpec("random_tiny"),), batch_size=batch_size,
                                         device="cpu", n_splits=2)
    (row,) = image_quality.measure(config, *image_quality.collect_both(config), progress=False)
    return {"n": row["n_reference"]}


def attribution(genes: int, clusters: int, method: str) -> dict[str, float]:
    import torch

    from evaluation.attribution import Attributer
    from networks.clip import CLIP, ClipModelConfig
    torch.manual_seed(0)
    clip = CLIP(ClipModelConfig(), [f"g{i}" for i in range(genes)], feature_width=1024).eval().requires_grad_(False)
    means = torch.rand(clusters, genes, generator=torch.Generator().manual_seed(1)) * 3
    started = time.perf_counter()
    done = list(Attributer(clip.encode_genes, method).between_clusters(means, [str(i) for i in range(clusters)]))
    seconds = time.perf_counter() - started
    return {"pairs": len(done), "pairs_per_s": len(done) / seconds, "delta": max((one.delta or 0) for one in done)}


JOBS = {"ours": ours, "torch-fidelity": theirs, "row": whole_row, "attribution": attribution}


def in_this_process(job: str, arguments: list, threads: int) -> None:
    """One job; prints JSON with its wall time, CPU time (which other work on the machine hardly changes) and peak memory."""
    import torch
    torch.set_num_threads(threads)
    started = time.perf_counter()
    found = JOBS[job](*(Path(argument) if isinstance(argument, str) and "/" in argument else argument for argument in arguments))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({**found, "wall_s": time.perf_counter() - started, "cpu_s": sum(one.ru_utime + one.ru_stime for one in usage),
                      "peak_mb": max(one.ru_maxrss for one in usage) / 1024}))


def measured(job: str, *arguments: object, threads: int) -> dict[str, float]:
    """The answer of a process of its own."""
    words = json.dumps([str(argument) if isinstance(argument, Path) else argument for argument in arguments])
    answer = subprocess.run([sys.executable, "-m", "benchmarks.evaluation", "--threads", str(threads), "--only", job, words], cwd=ROOT,
                            capture_output=True, text=True)
    if answer.returncode:
        raise click.ClickException(f"{job} ended with {answer.returncode}: {answer.stderr[-1000:]}")
    return json.loads(answer.stdout.strip().splitlines()[-1])


# ---- the parts ----------------------------------------------------------------------------------------------------------

def write_patches(folder: Path, count: int, px: int, rng: np.random.Generator, softness: int) -> None:
    """Coloured noise of a given softness as PNG."""
    from PIL import Image
    folder.mkdir(parents=True)
    for number in range(count):
        coarse = rng.integers(0, 256, size=(px // softness, px // softness, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((px, px), Image.Resampling.BICUBIC).save(folder / f"patch_{number:06d}.png")


def both_sides(root: Path, count: int, px: int) -> Path:
    rng = np.random.default_rng(0)
    write_patches(root / "a", count, px, rng, 4)
    write_patches(root / "b", count, px, rng, 8)
    return root


def print_distances(root: Path, images: int, px: int, batch_size: int, threads: int) -> None:
    from evaluation.inception import write_random_weights
    both_sides(root, images, px)
    write_random_weights(root / "inception.pth")
    click.echo(f"distances, n = {images} a side, {px} px, {threads} threads")
    click.echo(f"{'program':16}{'wall s':>9}{'CPU s':>9}{'peak MB':>9}{'Frechet':>14}{'kernel':>14}")
    for name in ("ours", "torch-fidelity"):
        found = measured(name, root, min(1000, images), batch_size, threads=threads)
        click.echo(f"{name:16}{found['wall_s']:9.1f}{found['cpu_s']:9.1f}{found['peak_mb']:9.0f}{found['fid']:14.6g}{found['kid']:14.6g}")


def print_memory(root: Path, counts: list[int], px: int, batch_size: int, threads: int) -> None:
    click.echo(f"memory of a row\n{'images a side':16}{'wall s':>9}{'peak MB':>9}")
    for count in counts:
        found = measured("row", both_sides(root / str(count), count, px), 0, batch_size, threads=threads)
        click.echo(f"{count:<16,}{found['wall_s']:9.1f}{found['peak_mb']:9.0f}")


def print_attribution(genes: int, clusters: int, threads: int) -> None:
    click.echo(f"attribution, {genes:,} genes, {clusters} clusters\n{'method':16}{'pairs':>9}{'pairs/s':>9}{'delta':>9}{'peak MB':>9}")
    for method in ("ig", "sg"):
        found = measured("attribution", genes, clusters, method, threads=threads)
        click.echo(f"{method:16}{found['pairs']:9.0f}{found['pairs_per_s']:9.3f}{found['delta']:9.2%}{found['peak_mb']:9.0f}")


def _chosen(_context, _option, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or set(parts) - set(PARTS):
        raise click.BadParameter(f"expected some of {', '.join(PARTS)}; found {text}")
    return parts


def _counts(_context, _option, text: str) -> list[int]:
    try:
        counts = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"expected numbers, as 2000,20000; found {text}") from error
    if min(counts) < 16:
        raise click.BadParameter(f"expected at least 16 images; found {text}")
    return counts


@click.command(context_settings={"show_default": True})
@click.option("--parts", default=",".join(PARTS), callback=_chosen, help="What to measure.")
@click.option("--images", default=32, type=click.IntRange(min=4), help="distances: images a side; 32 take about a minute on 2 free cores.")
@click.option("--memory-images", default="200,2000", callback=_counts, help="memory: numbers of images a side to compare.")
@click.option("--genes", default=2000, type=click.IntRange(min=2), help="attribution: genes; 18248 are those published.")
@click.option("--clusters", default=3, type=click.IntRange(min=2), help="attribution: clusters.")
@click.option("--px", default=64, type=click.IntRange(min=8), help="Side of an image.")
@click.option("--batch-size", default=16, type=click.IntRange(min=1), help="Images encoded at once.")
@click.option("--threads", default=2, type=click.IntRange(min=1), help="Of PyTorch.")
@click.option("--only", hidden=True, nargs=2, help="(internal) one job in this process: its name and its arguments as JSON.")
def main(parts: list[str], images: int, memory_images: list[int], genes: int, clusters: int, px: int, batch_size: int, threads: int,
         only: tuple[str, str] | None):
    """Print wall time and peak memory of each part."""
    if only:
        return in_this_process(only[0], json.loads(only[1]), threads)
    with tempfile.TemporaryDirectory() as folder:
        if "distances" in parts:
            print_distances(Path(folder) / "distances", images, px, batch_size, threads)
        if "memory" in parts:
            print_memory(Path(folder) / "memory", memory_images, px, batch_size, threads)
        if "attribution" in parts:
            print_attribution(genes, clusters, threads)


if __name__ == "__main__":
    main()
