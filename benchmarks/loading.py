"""Time loading of paired patches with training augmentation: image by image against the packed cache, in one run.

Image by image: decode a PNG, torchvision's flips, ColorJitter and ToTensor, one dense expression row, in a DataLoader.
Ours: whole batches from the mapped cache (`training.clip_pairs.Pairs`), drawn by this process, by threads ahead of it, or by
DataLoader workers. PyTorch has one thread a worker in every way. Example: python -m benchmarks.loading --count 6000
"""
from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np


def simulated_sample(folder: Path, count: int, px: int, genes: int, seed: int = 0) -> tuple[Path, Path]:
    """A patch folder of smooth coloured noise and sparse counts; returns (patches, gex)."""
    import anndata as ad
    import scipy.sparse as sp
    from PIL import Image

    from preprocessing.expression import write_expression
    from preprocessing.png_folder import write_patch_folder
    rng = np.random.default_rng(seed)
    barcodes, xy = [f"s_002um_{row:05d}_00000-1" for row in range(count)], rng.random((count, 2)) * 1e4
    counts = ad.AnnData(sp.random(count, genes, density=0.1, format="csr", dtype=np.float32, random_state=rng,
                                  data_rvs=lambda n: rng.integers(1, 9, n)))
    counts.obs_names, counts.var_names = barcodes, [f"gene{number}" for number in range(genes)]
    counts.obsm["spatial"] = xy
    write_expression(folder / "gex_filt.h5ad", counts)

    def patch() -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (px // 8, px // 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC), np.int16)
        return (smooth + rng.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8)

    write_patch_folder(folder / "patches", (patch() for _ in range(count)), barcodes=barcodes, sample_id="S", xy=xy,
                       stain={"normalised": False})
    return folder / "patches", folder / "gex_filt.h5ad"


class OneByOne:
    """The image-by-image way, row i: (float (3, H, W) in [0, 1], float32 (G,))."""

    def __init__(self, dataset):
        from torchvision import transforms
        self.dataset = dataset
        self.augment = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip(),
                                           transforms.ColorJitter(0.2, 0.2, 0.2, 0.2), transforms.ToTensor()])

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int):
        from PIL import Image
        with Image.open(self.dataset.image_paths[i]) as image:
            return self.augment(image.convert("RGB")), self.dataset.expression_row(i)


def rate(batches: Iterator, seconds: float) -> float:
    """Patches a second, after a first batch that starts the workers."""
    next(batches)
    started, seen = time.perf_counter(), 0
    for images, *_ in batches:
        seen += len(images)
        if time.perf_counter() - started > seconds:
            break
    return seen / (time.perf_counter() - started)


def one_by_one(dataset, batch: int, workers: int) -> Iterator:
    from torch.utils.data import DataLoader
    return iter(DataLoader(OneByOne(dataset), batch, shuffle=True, num_workers=workers))


def ours(pairs, batch: int, workers: int, how: str) -> Iterator:
    """`how`: processes (a DataLoader's; 0 workers: this process) or threads (`training.loading`)."""
    from torch.utils.data import DataLoader

    from training.clip_pairs import StepBatches, whole_batch
    from training.loading import in_order
    n_steps = len(pairs) // batch
    batches = [keys for epoch in range(20) for keys in StepBatches(len(pairs), batch, 0, lambda epoch=epoch: epoch * n_steps)]
    if how == "threads":
        return in_order(batches, pairs.__getitems__, workers)
    return iter(DataLoader(pairs, batch_sampler=batches, collate_fn=whole_batch, num_workers=workers))


def print_row(name: str, value: str, note: str = "") -> None:
    click.echo(f"{name:<58}{value:>12}   {note}")


def measure(images: Path, gex: Path, cache: Path, batch: int, seconds: float, rounds: int) -> None:
    import torch

    from training.augment import AugmentConfig
    from training.clip_pairs import Pairs
    from training.data import ImageGeneDataset
    from training.sample_sheet import SampleFiles
    torch.set_num_threads(1)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    dataset = ImageGeneDataset([SampleFiles("S", images, gex)])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    matrix = dataset.expression
    read_s = time.perf_counter() - started
    print_row(f"expression of {len(dataset):,} spots x {matrix.shape[1]:,} genes, read + normalised", f"{read_s:.2f} s",
              f"{matrix.nnz / 1e6:.1f} M values, CSR {matrix.dtype}, peak memory grew by {grown:.2f} GiB")
    started = time.perf_counter()
    patches = dataset.open_patches(progress=False, cache_dir=cache)
    built, started = time.perf_counter() - started, time.perf_counter()
    dataset.open_patches(progress=False, cache_dir=cache)
    print_row("cache: built", f"{built:.2f} s", f"{len(patches) / built:,.0f} patches/s, {patches.array.nbytes / 1e6:,.0f} MB, once")
    print_row("cache: found again and checked", f"{time.perf_counter() - started:.2f} s")
    pairs = Pairs(matrix, dataset.barcodes, dataset.sample_ids, patches, np.zeros(len(dataset), int), augment=AugmentConfig())
    ways = {"image by image, this process": lambda: one_by_one(dataset, batch, 0),
            "image by image, 2 worker processes": lambda: one_by_one(dataset, batch, 2),
            "packed cache, this process": lambda: ours(pairs, batch, 0, "processes")}
    ways |= {f"packed cache, {workers} worker {how}": lambda workers=workers, how=how: ours(pairs, batch, workers, how)
             for how in ("threads", "processes") for workers in (1, 2)}
    rates = {name: [] for name in ways}
    for _ in range(rounds):                     # in turn, so that what else runs on the machine disturbs all alike
        for name, start in ways.items():
            rates[name].append(rate(start(), seconds))
    slow = {number: np.median(rates[f"image by image, {where}"]) for number, where in ((1, "this process"), (2, "2 worker processes"))}
    for name, found in rates.items():
        spread = f"({min(found):,.0f} to {max(found):,.0f})   {np.median(found) / slow[1]:.1f} x and {np.median(found) / slow[2]:.1f} x"
        print_row(name, f"{np.median(found):,.0f} /s", spread + " image by image in this process and with 2 workers")


@click.command()
@click.option("--count", default=4000, show_default=True, help="Patches of the simulated sample.")
@click.option("--px", default=128, show_default=True, help="Their side.")
@click.option("--genes", default=2000, show_default=True, help="Its genes.")
@click.option("--images", type=click.Path(path_type=Path), help="A patch folder instead of a simulated one.")
@click.option("--gex", type=click.Path(path_type=Path), help="Its gex_filt.h5ad.")
@click.option("--batch", default=128, show_default=True, help="Patches a batch.")
@click.option("--seconds", default=2.0, show_default=True, help="Time given to each way in each round.")
@click.option("--rounds", default=3, show_default=True, help="The median of so many is printed.")
def main(count, px, genes, images, gex, batch, seconds, rounds):
    """Print patches a second of every way of loading."""
    with tempfile.TemporaryDirectory() as folder:
        if images is None:
            images, gex = simulated_sample(Path(folder), count, px, genes)
        measure(images, gex, Path(folder) / "cache", batch, seconds, rounds)


if __name__ == "__main__":
    main()
