"""Walk from one prompt to another: what interpolate_prompts.py does.

Steps lie on the great circle between the two unit embeddings (spherical linear interpolation; Shoemake, SIGGRAPH 1985), both ends
included. Every step of a seed has the same z and the same per-pixel noise: what changes along a row, the genes change. They are those
of `gen_images.py --same-seed`.
"""
from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.contact_sheet import contact_sheet, save_png
from networks.snapshot import Snapshot
from preprocessing.errors import InputError, OptionError
from preprocessing.output_places import require_outputs, require_own_folder
from preprocessing.outputs import finished_file, finished_within, locked
from preprocessing.progress import ProgressBar
from training.prompts import Prompts, parse_seeds, read_prompts
from training.sample_folders import WALKED
from training.sampling import Batch, newest_snapshot, open_snapshot, sample_batches
from training.sampling_options import SamplingOptions
from training.sampling_ranks import Ranks

COLUMNS = ("file", "seed", "step", "share", "prompt1", "prompt2", "truncation", "weights_sha256")
LISTING = ("samples.csv", "strip.png")     # what says which patches lie there
NO_ANGLE = 1e-7           # radians between embeddings that are one, or opposite, up to float32


@dataclass(frozen=True, kw_only=True)
class InterpolateConfig(SamplingOptions):
    """One call of `interpolate_prompts`."""

    prompt1: str              # FILE.npy:ROW, FILE.h5ad:BARCODE or FILE.h5ad:ROW
    prompt2: str
    n_steps: int = 9          # both ends included

    def __post_init__(self):
        super().__post_init__()
        if self.n_steps < 2:
            raise OptionError("--n-steps", "at least 2, the two prompts", str(self.n_steps))
        require_own_folder("--outdir", self.outdir, WALKED)
        require_outputs({"--outdir": [self.outdir / name for name in LISTING]}, {})


@dataclass(frozen=True)
class Walk:
    """Every patch of a walk: all steps of the first seed, then of the next."""

    embeddings: Tensor        # (n_steps, c_dim)
    seeds: list[int]

    @property
    def shares(self) -> np.ndarray:
        """(n_steps,) float64: how far each step is on the way, 0 to 1."""
        return np.linspace(0, 1, len(self.embeddings))

    @property
    def asked(self) -> list[tuple[int, int]]:
        """(seed, step) of every patch."""
        return [(seed, step) for seed in self.seeds for step in range(len(self.embeddings))]

    @property
    def file_names(self) -> list[str]:
        digits = max(2, len(str(len(self.embeddings) - 1)))
        return [f"seed{seed:04d}_step{step:0{digits}d}.png" for seed, step in self.asked]

    def batches(self, length: int) -> Iterator[Batch]:
        """Numbered by their first patch."""
        asked = self.asked
        for start in range(0, len(asked), length):
            part = asked[start:start + length]
            yield Batch(start, self.embeddings[[step for _, step in part]], [(seed, 0) for seed, _ in part])


def interpolate_prompts(config: InterpolateConfig, progress: bool = True) -> list[Path]:
    """Make the patches of the walk, samples.csv and strip.png (a row a seed); returns the files, those two last."""
    seeds, ranks = parse_seeds(config.seeds), Ranks()
    device = ranks.device(config.device)
    snapshot = open_snapshot(newest_snapshot(config.network), config, device)
    walk = Walk(slerp(*read_prompt_pair(config, snapshot), config.n_steps), seeds)
    names = walk.file_names
    samples, strip = (config.outdir / name for name in LISTING)
    with locked(samples, covers=[strip]), finished_within(config.outdir, LISTING) as folder:
        def save(start: int, made: list[np.ndarray]) -> list[np.ndarray]:
            for name, picture in zip(names[start:start + len(made)], made, strict=True):
                save_png(folder / name, picture)
            return made

        pictures: list[np.ndarray] = []
        with ProgressBar(total=len(names), desc="patches", unit="patch", disable=not progress) as bar:
            for made in sample_batches(snapshot.generator, walk.batches(config.batch_sz), config, save, ranks.workers(config.workers)):
                pictures += made
                bar.update(len(made))
        rows = [pictures[start:start + config.n_steps] for start in range(0, len(pictures), config.n_steps)]
        save_png(folder / strip.name, contact_sheet(rows, row_labels=[f"seed {seed}" for seed in seeds],
                                                    column_labels=[f"{share:.2f}" for share in walk.shares]))
        _write_samples(folder / samples.name, walk, config, snapshot.weights_sha256)
    return [*(config.outdir / name for name in names), samples, strip]


def _write_samples(path: Path, walk: Walk, config: InterpolateConfig, weights_sha256: str) -> None:
    with finished_file(path) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(COLUMNS)
        for name, (seed, step) in zip(walk.file_names, walk.asked, strict=True):
            writer.writerow([name, seed, step, f"{walk.shares[step]:.6g}", config.prompt1, config.prompt2, config.truncation,
                             weights_sha256])


def read_prompt_pair(config: InterpolateConfig, snapshot: Snapshot) -> tuple[Tensor, Tensor]:
    """The embeddings (c_dim,) of both prompts. A file that holds both is read once."""
    if snapshot.is_unconditional:
        raise OptionError("--network", "a generator that is asked with prompts", f"{config.network}, trained without expression")
    files: dict[Path, Prompts] = {}
    found = []
    for option, text in (("--prompt1", config.prompt1), ("--prompt2", config.prompt2)):
        name, _, which = text.rpartition(":")
        if not name or not which:
            raise OptionError(option, "FILE.npy:ROW, FILE.h5ad:BARCODE or FILE.h5ad:ROW", text)
        path = Path(name)
        if path not in files:
            files[path] = read_prompts(path, snapshot, encoded=config.encoded)
        prompts = files[path]
        embedding = prompts.embeddings[_row(prompts, which)]
        if not embedding.norm() > 0:
            raise InputError(path, f"embedding of {which}", "a direction", "zeros alone")
        found.append(embedding)
    return found[0], found[1]


def _row(prompts: Prompts, which: str) -> int:
    """The row of a barcode, with or without its sample, else of a row number."""
    has_barcodes = prompts.path.suffix == ".h5ad"
    if has_barcodes:
        for barcode in (which, f"{prompts.sample_id}__{which}"):
            rows = np.flatnonzero(prompts.barcodes == barcode)
            if len(rows):
                return int(rows[0])
    if not (which.isascii() and which.isdigit() and int(which) < len(prompts)):
        expected = f"{'a barcode of it, or ' if has_barcodes else ''}0 to {len(prompts) - 1}"
        raise InputError(prompts.path, "row of a prompt", expected, which)
    return int(which)


def slerp(first: Tensor, second: Tensor, n_steps: int) -> Tensor:
    """float32 (n_steps, D): from `first` (D,) to `second` (D,), equal angles apart; the first and last row are the two themselves.

    Lengths, where they are not 1, change in equal steps. Equal directions stay one direction. Between opposite ones every great
    circle is as short: the one through the axis along which `first` is smallest is taken, always the same.
    """
    a, b = first.double(), second.double()
    length_a, length_b = a.norm(), b.norm()
    a, b = a / length_a, b / length_b
    across = b - (a @ b) * a
    angle = torch.atan2(across.norm(), a @ b)
    if torch.pi - angle < NO_ANGLE:
        across = torch.zeros_like(a)
        across[a.abs().argmin()] = 1
        across = across - (a @ across) * a
    across = across / across.norm().clamp(min=torch.finfo(across.dtype).tiny)
    shares = torch.linspace(0, 1, n_steps, dtype=torch.float64)[:, None]
    steps = torch.cos(shares * angle) * a + torch.sin(shares * angle) * across
    steps = (steps * torch.lerp(length_a, length_b, shares)).float()
    steps[0], steps[-1] = first, second
    return steps

