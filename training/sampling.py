"""Sample from a snapshot in bulk: threads draw the random numbers, the device makes patches, threads encode and write them.

No step waits for another but through a short queue, and only so many batches are in memory.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from networks.generator import Generator
from networks.layers import images_to_uint8
from networks.snapshot import Snapshot, load_snapshot, move_fourier_input
from training.gan_draws import seeded_draws
from training.gan_grids import as_pictures
from training.loading import in_order
from training.sampling_options import SamplingOptions

Saved = TypeVar("Saved")
DRAWERS = 2        # threads that draw random numbers, at most: NumPy's are faster than any generator


@dataclass(frozen=True)
class Batch:
    """Patches to make at a time."""

    number: int
    prompts: Tensor                      # (n, c_dim)
    keys: Sequence[tuple[int, int]]      # n of (seed, number), as `seeded_draws` takes them


def newest_snapshot(folder: Path) -> Path:
    """`folder` itself, or the newest snapshot of a run folder."""
    found = [path for path in folder.glob("snapshot-*") if path.name[9:].isdigit()] if folder.is_dir() else []
    return max(found, key=lambda path: int(path.name[9:])) if found else folder


def open_snapshot(folder: Path, options: SamplingOptions, device: str) -> Snapshot:
    """The snapshot in `folder`, on the device, its Fourier input moved as the options say."""
    snapshot = load_snapshot(folder, gene_encoder=not options.encoded, gene_encoder_path=options.clip)
    move_fourier_input(snapshot.generator, options.translate, options.rotate)
    for module in (snapshot.generator, snapshot.gene_encoder):
        if module is not None:
            module.to(device)
    return snapshot


def sample_batches(generator: Generator, batches: Iterable[Batch], options: SamplingOptions,
                   save: Callable[[int, list[np.ndarray]], Saved], workers: int) -> Iterator[Saved]:
    """`save(number, pictures)` of every batch, in order; pictures are uint8 (r, r, 3). `save` runs in `workers` threads.

    A patch depends on its prompt and its key alone, up to what another batch size does to the last bit of a sum.
    """
    device = next(generator.parameters()).device
    noise_size = generator.noise_size if options.noise_mode == "random" else 0      # z comes first in a stream: it stays the same

    def draw(batch: Batch) -> tuple[Batch, tuple[Tensor, Tensor]]:
        return batch, seeded_draws(batch.keys, generator.config.z_dim, noise_size)

    def make() -> Iterator[tuple[int, Tensor]]:
        for batch, (z, noise) in in_order(batches, draw, min(workers, DRAWERS)):
            with torch.no_grad():
                images = generator(z.to(device), batch.prompts.to(device), options.truncation, options.noise_mode, noise.to(device))
            yield batch.number, images_to_uint8(images)      # a GPU may still be at work on them: the writer waits, not the next batch

    def write(made: tuple[int, Tensor]) -> Saved:
        number, images = made
        return save(number, as_pictures(images.cpu()))

    return in_order(make(), write, workers)
