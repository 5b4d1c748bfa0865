"""Measure how far a folder of generated patches lies from real ones, and how far real lies from real at the same n.

Reads image folders, appends rows to a CSV. One row a feature set: FID and KID of all images (torch-fidelity's
definitions), each with a 95 % interval, and both distances at equal n beside their real-vs-real floor.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.cluster_quality import ClusterRows, cluster_columns
from evaluation.coverage import NEIGHBOURS, coverage_metrics
from evaluation.distances import (
    INFINITE_SHARES,
    LEAST_INFINITE,
    RELIABLE_N,
    distances_to_halves,
    frechet_at_infinity,
    frechet_distance,
    full_kernel_distance,
    half_sample_interval,
    half_size,
    kernel_distance,
    mean_and_interval,
)
from evaluation.diversity import prompt_distances
from evaluation.features import (
    FeatureSpec,
    build_features,
    cached_features,
    display_name,
    list_images,
    pick_device,
    read_samples_csv,
)
from preprocessing.errors import InputError, OptionError
from preprocessing.outputs import finished_file, locked
from preprocessing.patches import read_patch

KID_SUBSET, KID_SUBSETS = 1000, 100      # torch-fidelity's
INFINITE_SPLITS = 10                     # random halves behind the interval at infinite n, of five distances each
SHARES = ("precision", "recall", "density", "coverage")   # at equal n; empty for fewer than 6 images a side
DIVERSITY = ("within_prompt", "between_prompts")          # distances of features; empty without several seeds in samples.csv
SIZES_LOOKED_AT = 50
CSV_NAME = "image_quality_metrics.csv"
COLUMNS = (
    "experiment", "FID", "KID_mean", "KID_std", "seed",                                # the original's five
    "features", "n_reference", "n_generated", "FID_low", "FID_high", "KID_low", "KID_high",
    "n_floor", "FID_at_floor_n", "FID_at_floor_n_low", "FID_at_floor_n_high", "FID_floor", "FID_floor_low", "FID_floor_high",
    "KID_at_floor_n", "KID_at_floor_n_low", "KID_at_floor_n_high", "KID_floor", "KID_floor_low", "KID_floor_high",
    "kid_subset", "match_px", "n_ignored", "flags", "reference", "generated", "weights_sha256",
    *SHARES, "FID_infinite", "FID_infinite_low", "FID_infinite_high",
    *DIVERSITY,
)


@dataclass(frozen=True)
class QualityConfig:
    """What is compared, and how."""

    experiment: str                         # names the row
    reference: tuple[Path, ...]             # folders of real patches, taken together
    generated: tuple[Path, ...]             # folders of generated patches, taken together
    features: tuple[FeatureSpec, ...]       # one row each
    num: int | None = None                  # images a side, a random choice; None = all
    seed: int = 0                           # of that choice, the KID subsets and the splits
    batch_size: int = 64
    device: str = "auto"                    # auto | cpu | cuda
    cache_dir: Path | None = None           # keeps the reference's features
    n_splits: int = 20                      # random halves for floors and intervals
    match_px: int | None = None             # bring both sides to this side by area first; None = as they are

    def __post_init__(self):
        for option, value, least in (("--num", self.num, 4), ("--batch-size", self.batch_size, 1), ("--splits", self.n_splits, 2),
                                     ("--match-px", self.match_px, 8)):
            if value is not None and value < least:
                raise OptionError(option, f"at least {least}", str(value))
        if not 0 <= self.seed < 2**32:
            raise OptionError("--seed", "0 to 4294967295", str(self.seed))


@dataclass(frozen=True)
class ImageSet:
    """The images of one side."""

    folders: tuple[Path, ...]
    paths: list[Path]
    n_ignored: int

    @property
    def name(self) -> str:
        return ",".join(display_name(folder) for folder in self.folders)


def collect(folders: Sequence[Path], num: int | None, rng: np.random.Generator) -> ImageSet:
    """All images of the folders, or `num` of them drawn without replacement. At least 4: two halves of two."""
    found = [list_images(folder) for folder in folders]
    paths = [path for folder in found for path in folder.paths]
    if num is not None and num < len(paths):
        paths = [paths[i] for i in np.sort(rng.choice(len(paths), num, replace=False))]
    if len(paths) < 4:
        raise InputError(folders[0], "images", "at least 4", str(len(paths)))
    return ImageSet(tuple(folders), paths, sum(folder.n_ignored for folder in found))


def collect_both(config: QualityConfig) -> tuple[ImageSet, ImageSet]:
    """Reference and generated images."""
    rng = np.random.default_rng(config.seed)
    return collect(config.reference, config.num, rng), collect(config.generated, config.num, rng)


def measure(config: QualityConfig, reference: ImageSet, generated: ImageSet, progress: bool = True,
            clusters: Sequence[ClusterRows] = ()) -> Iterator[dict[str, object]]:
    """One row of `COLUMNS` for each feature set; with `clusters` also `by_cluster`, a list of what `cluster_columns` finds."""
    device, sizes = pick_device(config.device), unequal_sizes(config, reference, generated)
    prompts = prompts_of(generated)
    for spec in config.features:
        encoder = build_features(spec)
        real, _ = cached_features(reference.paths, encoder, config.cache_dir, config.batch_size, device, progress, config.match_px)
        fake, _ = cached_features(generated.paths, encoder, None, config.batch_size, device, progress, config.match_px)
        for side, values in ((reference, real), (generated, fake)):
            if not np.isfinite(values).all():
                raise InputError(side.name, f"{spec.label} features", "finite numbers", "NaN or infinity", "Are the weights damaged?")
        columns = distance_columns(real, fake, config)
        columns |= dict.fromkeys(DIVERSITY, "") if prompts is None else prompt_distances(fake, prompts, config.seed)
        by_cluster = {"by_cluster": cluster_columns(real, fake, clusters, config.seed, config.n_splits)} if clusters else {}
        yield {"experiment": config.experiment, "seed": config.seed, "features": spec.label, **columns,
               "flags": "; ".join([*columns["flags"], *sizes]), "n_ignored": reference.n_ignored + generated.n_ignored,
               "match_px": config.match_px or "",
               "reference": reference.name, "generated": generated.name, "weights_sha256": encoder.source,
               **by_cluster}


def prompts_of(generated: ImageSet) -> np.ndarray | None:
    """(N,) name of the prompt of every image; None where samples.csv does not name them, or no prompt has two images."""
    named: dict[Path, str] = {}
    for folder in generated.folders:
        rows = read_samples_csv(folder) if (folder / "samples.csv").is_file() else []
        named |= {folder / row["file"]: f"{folder}: {row['prompt']}" for row in rows if row.get("prompt")}
    prompts = [named.get(path, "") for path in generated.paths]
    return np.array(prompts) if "" not in prompts and len(set(prompts)) < len(prompts) else None


def distance_columns(real: np.ndarray, fake: np.ndarray, config: QualityConfig) -> dict[str, object]:
    """Everything of a row that follows from the features (N, D) and (M, D)."""
    fid = frechet_distance(real, fake)
    kid_mean, kid_std = kernel_distance(real, fake, KID_SUBSET, KID_SUBSETS, config.seed)
    columns: dict[str, object] = {"FID": fid, "KID_mean": kid_mean, "KID_std": kid_std, "n_reference": len(real), "n_generated": len(fake),
                                  "n_floor": half_size(len(real), [len(fake)]), "kid_subset": min(KID_SUBSET, len(real), len(fake))}
    for name, distance, value in (("FID", frechet_distance, fid), ("KID", full_kernel_distance, kid_mean)):
        rng = np.random.default_rng([config.seed, 1])                      # both distances see the same splits
        low, high = half_sample_interval(real, fake, distance, value, rng=rng, n_splits=config.n_splits)
        columns[f"{name}_low"], columns[f"{name}_high"] = low, high
        splits = distances_to_halves(real, {"generated": fake}, distance, rng=rng, n_splits=config.n_splits)
        for column, key in ((f"{name}_at_floor_n", "generated"), (f"{name}_floor", "real_vs_real")):
            summary = mean_and_interval(splits[key])
            columns[column], (columns[f"{column}_low"], columns[f"{column}_high"]) = summary["mean"], summary["ci95"]
    columns |= infinite_columns(real, fake, config)
    columns["flags"] = flags_of(len(real), len(fake), real.shape[1])
    return columns | share_columns(real, fake, np.random.default_rng([config.seed, 2]))


def share_columns(real: np.ndarray, fake: np.ndarray, rng: np.random.Generator) -> dict[str, object]:
    """`coverage_metrics` of as many images a side as the smaller has: all four numbers depend on n."""
    n = min(len(real), len(fake))
    if n <= NEIGHBOURS:
        return dict.fromkeys(SHARES, "")
    return coverage_metrics(*(side[np.sort(rng.choice(len(side), n, replace=False))] for side in (real, fake)))


def infinite_columns(real: np.ndarray, fake: np.ndarray, config: QualityConfig) -> dict[str, float]:
    """The Frechet distance at infinite n and its interval; NaN, an empty cell, where there are too few images for it."""
    names = [f"FID_infinite{end}" for end in ("", "_low", "_high")]
    if min(len(real), len(fake)) < 2 * LEAST_INFINITE:                     # half of them stand behind the interval
        return dict.fromkeys(names, float("nan"))
    rng = np.random.default_rng([config.seed, 3])
    follow = partial(frechet_at_infinity, rng=rng)
    value = follow(real, fake)
    interval = half_sample_interval(real, fake, follow, value, rng=rng, n_splits=min(config.n_splits, INFINITE_SPLITS))
    return dict(zip(names, (value, *interval), strict=True))


def flags_of(n_reference: int, n_generated: int, width: int) -> list[str]:
    """What a reader must know before quoting the row; `width` numbers a feature."""
    flags = []
    if min(n_reference, n_generated) < RELIABLE_N:
        flags.append(f"n < {RELIABLE_N}")
    if min(n_reference, n_generated) < KID_SUBSET:
        flags.append(f"KID subset {min(n_reference, n_generated)}")
    if n_reference != n_generated:
        flags.append("unequal n")
    if RELIABLE_N <= min(n_reference, n_generated) < max(INFINITE_SHARES) * width:
        flags.append(f"infinite n from n < {max(INFINITE_SHARES) * width}")
    return flags


def notices(config: QualityConfig, reference: ImageSet, generated: ImageSet) -> list[str]:
    """What was understood, one line each, said before the work starts."""
    lines = [f"reference {reference.name}: {len(reference.paths):,} images, {reference.n_ignored:,} other files ignored",
             f"generated {generated.name}: {len(generated.paths):,} images, {generated.n_ignored:,} other files ignored"]
    smaller = min(len(reference.paths), len(generated.paths))
    if config.num is not None and config.num > smaller:
        lines.append(f"notice: --num {config.num:,} is more than there are; all of the smaller side are used")
    if smaller < KID_SUBSET:
        lines.append(f"notice: KID subsets hold {smaller:,} images instead of {KID_SUBSET:,}: there are no more")
    if smaller < RELIABLE_N:
        lines.append(f"notice: below {RELIABLE_N:,} images a Frechet distance is mostly bias: read it beside its floor at equal n")
    lines += [f"notice: {flag}: the distance includes that difference in sharpness; --match-px takes it away"
              for flag in unequal_sizes(config, reference, generated)]
    return lines


def unequal_sizes(config: QualityConfig, reference: ImageSet, generated: ImageSet) -> list[str]:
    """A flag if patches are compared at different sizes, between the sides or within one; else nothing."""
    if config.match_px is not None:
        return []
    real, made = (_sides(images) for images in (reference, generated))
    return [f"unequal sizes: {_span(real)} and {_span(made)} px"] if len({*real, *made}) > 1 else []


def _sides(images: ImageSet) -> tuple[int, int]:
    """Smallest and largest height, of at most about `SIZES_LOOKED_AT` images from all over the list."""
    found = [read_patch(path).shape[0] for path in images.paths[::max(1, len(images.paths) // SIZES_LOOKED_AT)]]
    return min(found), max(found)


def _span(sides: tuple[int, int]) -> str:
    return str(sides[0]) if sides[0] == sides[1] else f"{sides[0]} to {sides[1]}"


def append_rows(csv_path: Path, rows: Sequence[dict[str, object]]) -> None:
    """Append rows to the CSV, whole or not at all; older rows, also those of fewer columns, stay as they are. The last rows are not
    written a second time: who repeats a command that was killed after this moment has them already."""
    with locked(csv_path):
        new = pd.DataFrame([{name: cell(row[name]) for name in COLUMNS} for row in rows], columns=list(COLUMNS))
        old = read_rows(csv_path)
        if old is not None:
            if set(COLUMNS) <= set(old.columns) and old[list(COLUMNS)].tail(len(new)).to_numpy().tolist() == new.to_numpy().tolist():
                return
            new = pd.concat([old, new], ignore_index=True)
            new = new[[*COLUMNS, *(name for name in old.columns if name not in COLUMNS)]].fillna("")
        with finished_file(csv_path) as temporary:
            new.to_csv(temporary, index=False)


def read_rows(csv_path: Path) -> pd.DataFrame | None:
    """The rows that are there, all text; None where there is no file."""
    if not csv_path.exists():
        return None
    try:
        old = pd.read_csv(csv_path, dtype=str, keep_default_na=False)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise InputError(csv_path, "contents", "rows of earlier calls (CSV)", " ".join(str(error).split())[:80],
                         "Delete it, or name another --out-dir") from error
    if "experiment" not in old.columns:
        raise InputError(csv_path, "columns", ", ".join(COLUMNS[:5]), ", ".join(map(str, old.columns[:5])), "Name another --out-dir")
    return old


def cell(value: object) -> str:
    """Six significant digits for floats, empty for NaN."""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return str(value)
