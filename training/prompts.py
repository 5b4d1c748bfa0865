"""Read what a generator is asked for: rows of expression or of embeddings, and which of them to sample.

An .h5ad goes through the snapshot's gene encoder; an .npy of expression too; an .npy of embeddings (`encoded`) goes straight in.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from networks.snapshot import Snapshot
from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.npy_file import load_array, require_as_recorded
from training.data import expression_only
from training.spot_csv import last_column

if TYPE_CHECKING:
    pass

log = logging.getLogger(__name__)
NO_CLUSTER = ""                 # label of a spot that an obs column of clusters leaves out
MAX_SEED = 2 ** 62              # what the random numbers take, with room for --n-samples to count on
MAX_SEEDS = 1_000_000
MOST_DIGITS = 1000               # of a number that is looked at
FEW_SPOTS = 30                  # whose median library size may be far from their sample's


@dataclass(frozen=True)
class Prompts:
    """Rows a generator can be asked for."""

    path: Path | None                 # None: unconditional
    embeddings: Tensor                # (N, c_dim) float32
    barcodes: np.ndarray              # (N,) str "sample_id__barcode"; empty strings for an .npy
    clusters: np.ndarray | None       # (N,) str; NO_CLUSTER where there is none
    sample_id: str = ""               # of an .h5ad
    centre_xy_px: np.ndarray | None = None   # (N, 2) float64, level-0 px, of an .h5ad that has them

    def __len__(self) -> int:
        return len(self.embeddings)

    @property
    def are_rows(self) -> bool:
        """True for an .npy without clusters, and for the empty prompt: every row counts, `--n-samples` times."""
        return self.clusters is None and (self.path is None or self.path.suffix == ".npy")

    def spot_barcode(self, row: int) -> str:
        """The barcode of a row as its .h5ad has it, without the sample; empty for an .npy."""
        return str(self.barcodes[row]).removeprefix(f"{self.sample_id}__")


def read_prompts(path: Path | str | None, snapshot: Snapshot, *, encoded: bool = False, clusters: str | None = None) -> Prompts:
    """Read and embed the prompts in `path` (.h5ad or .npy). `clusters`: an obs column, or an .npy or CSV of labels.

    An unconditional snapshot takes no path and gives the one empty prompt.
    """
    if snapshot.is_unconditional or path is None:
        return _no_prompt(path, snapshot, encoded, clusters)
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file", "an .h5ad or .npy file of prompts", "nothing there")
    if path.suffix not in (".h5ad", ".npy"):
        raise InputError(path, "suffix", ".h5ad or .npy", path.suffix or "none")
    if encoded and path.suffix != ".npy":
        raise OptionError("--encoded", "an .npy of embeddings as prompts", str(path))
    if not encoded and snapshot.gene_encoder is None:
        raise InputError(path, "--encoded", "a snapshot that names its gene encoder, or prompts that are embeddings",
                         "a snapshot without gene encoder and expression")
    barcodes, obs, sample_id, xy = None, None, "", None
    if path.suffix == ".h5ad":
        encoder = snapshot.gene_encoder
        table = expression_only(path, target_sum=encoder.target_sum, vocabulary=encoder.gene_names)
        if encoder.scales_by_sample:
            log.warning("%s: its %d spots are scaled by the sample's own genes: give whole samples, choose with --clusters or --n-samples",
                        path, len(table.barcodes))
        elif encoder.target_sum == "median" and len(table.barcodes) < FEW_SPOTS:
            log.warning("%s: its %d spots are brought to their own median library size, as whole samples were in training: give whole "
                        "samples, choose with --clusters or --n-samples", path, len(table.barcodes))
        embeddings, barcodes, obs = encoder.embed_expression(table.expression, sample_ids=table.sample_ids), table.barcodes, table.obs
        sample_id, xy = str(table.sample_ids[0]) if len(table.sample_ids) else "", table.centre_xy_px
        xy = xy if np.isfinite(xy).all() else None
    else:
        if not encoded and snapshot.gene_encoder.scales_by_sample:
            raise InputError(path, "prompts", "an .h5ad of a whole sample: the gene encoder scales every sample by its own genes",
                             "rows of expression in an .npy", "Or give embeddings with --encoded")
        rows = read_rows(path, snapshot.generator.config.c_dim if encoded else len(snapshot.gene_encoder.gene_names), encoded)
        embeddings = torch.from_numpy(rows) if encoded else snapshot.gene_encoder.embed_expression(sp.csr_matrix(rows))
    width = snapshot.generator.config.c_dim
    if embeddings.shape[1] != width:
        raise InputError(path, "width of an embedding", f"{width}, as the snapshot was trained with", str(embeddings.shape[1]))
    labels = None if clusters is None else read_labels(clusters, obs, path, len(embeddings))
    barcodes = np.full(len(embeddings), "") if barcodes is None else barcodes
    return Prompts(path, embeddings, barcodes, labels, sample_id, xy)


def _no_prompt(path: Path | str | None, snapshot: Snapshot, encoded: bool, clusters: str | None) -> Prompts:
    """The empty prompt of an unconditional snapshot, where nothing else was asked for."""
    if not snapshot.is_unconditional:
        raise OptionError("--gex", "prompts: this snapshot draws what it is asked for", "none")
    for option, said in (("--gex", path), ("--encoded", encoded), ("--clusters", clusters)):
        if said:
            raise OptionError(option, "no prompts: this snapshot was trained without expression and takes --seeds alone", str(said))
    return Prompts(None, torch.zeros(1, 0), np.array([""]), None)


def read_rows(path: Path, width: int | None, encoded: bool) -> np.ndarray:
    """(N, width) float32 of an .npy, of any width if that is None; one prompt may be a plain row."""
    if encoded:
        require_as_recorded(path)
    rows = load_array(path, "an array of numbers")
    rows = rows[None] if rows.ndim == 1 else rows
    what = "prompt embeddings" if encoded else "normalised expression"
    if rows.ndim != 2 or rows.shape[1] != (width or rows.shape[1]) or not rows.size or rows.dtype.kind not in "fiu":
        raise InputError(path, what, f"numbers, (prompts, {width or 'width'})", f"{rows.dtype} {rows.shape}")
    with np.errstate(over="ignore"):
        rows = rows.astype(np.float32)                         # beyond its range: infinite, refused
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise InputError(path, what, "finite numbers", f"NaN or infinite ones in rows {first_few(bad.tolist())}")
    if not encoded:
        _require_normalised(path, rows)
    return rows


def _require_normalised(path: Path, rows: np.ndarray) -> None:
    """Refuse rows that cannot be normalised expression: negative ones, and whole numbers as raw counts are."""
    how = "Scale each row to the median library size of its sample and take log1p, or give raw counts as an .h5ad"
    negative = np.flatnonzero((rows < 0).any(axis=1))
    if len(negative):
        raise InputError(path, "normalised expression", "no negative values", f"some in rows {first_few(negative.tolist())}", how)
    if rows.max() > 1 and (rows == np.floor(rows)).all():
        raise InputError(path, "normalised expression", "log1p of scaled counts", f"whole numbers up to {rows.max():g}: raw counts", how)


def read_labels(clusters: str, obs, gex: Path, n_rows: int, *, option: str = "--clusters", rows_are: str = "prompts") -> np.ndarray:
    """(N,) str, one label a row: from a file of that name, else from an obs column. A CSV's last column counts, its first line is a
    header; where another column has the spots' barcodes, labels are joined by these, else line by line. `NO_CLUSTER` where an obs column
    has none; a file must have all."""
    import pandas as pd

    path = Path(clusters)
    if path.suffix == ".npy" and path.is_file():
        labels = load_array(path, "an array of labels")
    elif path.is_file():
        try:
            table = pd.read_csv(path)
        except ValueError as error:
            raise InputError(path, "cluster labels", "a CSV with a header line and one label a line", str(error)) from error
        labels = last_column(table, obs, path, gex)
    elif obs is not None and clusters in obs:
        labels = obs[clusters].to_numpy()
    else:
        columns = "none" if obs is None else ", ".join(map(str, obs.columns)) or "none"
        raise InputError(gex, option, "an .npy or CSV file of labels, or an obs column", f"{clusters}; columns: {columns}")
    if labels.shape != (n_rows,):
        raise InputError(path if path.is_file() else gex, "cluster labels", f"one for each of the {n_rows:,} {rows_are}", str(labels.shape))
    if labels.dtype.kind not in "biufUSOMm" or (labels.dtype.kind == "S" and not all(label.isascii() for label in labels)):
        raise InputError(path if path.is_file() else gex, "cluster labels", "numbers or words", f"{labels.dtype}")
    missing = pd.isna(labels) | np.array([not str(label).strip() for label in labels])
    if missing.all() or (missing.any() and path.is_file()):
        raise InputError(path if path.is_file() else gex, "cluster labels", "no gaps", f"{int(missing.sum()):,} missing")
    if missing.any():      # clustering leaves out spots without reads: they are nobody's prompt
        log.warning("%s: %d of %d spots have no %s and are left out", gex, missing.sum(), n_rows, clusters)
    return np.where(missing, NO_CLUSTER, labels.astype(str))


@dataclass(frozen=True)
class Request:
    """One patch to make."""

    prompt: int                # row of the prompts
    seed: int
    cluster: str | None = None

    @property
    def file_name(self) -> str:
        folder = "" if self.cluster is None else f"cluster_{_safe(self.cluster)}/"
        return f"{folder}prompt{self.prompt:05d}_seed{self.seed:04d}.png"


def _safe(label: str) -> str:
    """A label as a folder name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in label).strip(".") or "_"


def parse_seeds(text: str) -> list[int]:
    """'0,1,4-6' -> [0, 1, 4, 5, 6]."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)) or (dash and int(last) < int(first)):
            raise OptionError("--seeds", "numbers and ranges, as 0,1,4-6", text)
        if int(last or first) > MAX_SEED or int(last or first) - int(first) >= MAX_SEEDS:
            raise OptionError("--seeds", f"numbers up to {MAX_SEED}, at most {MAX_SEEDS:,} of them", text)
        seeds += range(int(first), int(last or first) + 1)
    return list(dict.fromkeys(seeds))


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def plan_requests(prompts: Prompts, seeds: Sequence[int], n_samples: int | None) -> list[Request]:
    """Which patches to make: every chosen prompt once per seed.

    From an .h5ad, or where there are clusters: `n_samples` prompts per cluster, or over all (None: every row), drawn with the
    first seed. From an .npy, or without prompts: every row, `n_samples` patches each (seeds are counted on, or cut, to that many).
    """
    if n_samples is not None and n_samples < 1:
        raise OptionError("--n-samples", "at least 1", str(n_samples))
    seeds = list(seeds)
    if prompts.are_rows:
        if n_samples is not None:
            seeds = (seeds + list(range(max(seeds) + 1, max(seeds) + 1 + n_samples)))[:n_samples]
        rows = list(range(len(prompts)))
    else:
        rows = _chosen_rows(prompts, n_samples, seeds[0])
    clusters = prompts.clusters
    return [Request(row, seed, None if clusters is None else str(clusters[row])) for row in rows for seed in seeds]


def _chosen_rows(prompts: Prompts, n_samples: int | None, seed: int) -> list[int]:
    groups = [np.arange(len(prompts))] if prompts.clusters is None else [
        np.flatnonzero(prompts.clusters == label) for label in np.unique(prompts.clusters) if label != NO_CLUSTER]
    order = np.random.default_rng(seed)
    chosen: list[int] = []
    for rows in groups:
        chosen += sorted(order.choice(rows, min(n_samples or len(rows), len(rows)), replace=False).tolist())
    return chosen
