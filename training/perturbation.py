"""Change genes and look: what perturb.py does. Patches before and after have the same noise, so that only the genes differ.

Reads a GAN snapshot (a diffusion pipeline: `diffusion_utils.perturbation`) and the expression of a sample; writes the patches, a table
of their nuclei and stain, the effects and a page.
"""
from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from evaluation.contact_sheet import save_png
from evaluation.effects import Effect, difference_map, effects_of
from evaluation.nuclei import STATISTICS, fit_nuclei, measure_nuclei
from evaluation.perturbation_page import pairs_sheet, write_perturbation_page
from networks.sample_scaling import fit_sample_scaling, require_whole_samples
from preprocessing.done_manifests import fingerprint, program_versions
from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.expression import recorded_scale
from preprocessing.output_places import FolderKind, require_outputs, require_own_folder
from preprocessing.outputs import finished_file, finished_within, locked, nan_to_none, write_json
from preprocessing.progress import ProgressBar
from training.data import ExpressionTable, expression_only
from training.gene_changes import GeneChanges, read_gene_changes
from training.prompts import parse_seeds, read_labels
from training.sampling import Batch, newest_snapshot, open_snapshot, sample_batches
from training.sampling_options import SamplingOptions
from training.sampling_ranks import Ranks

WRITTEN = ("perturbation.csv", "perturbation.json", "index.html")     # beside the patches
LEAST_CONTROLS = 19
PATCH_UM = 55.0            # side of a patch where the expression file does not say
PICTURE = re.compile(r"spot\d{5,}_seed\d{4,}_(before|after|difference)\.png")
KIND = FolderKind("an older perturbation", rf"perturbation\.(csv|json)|{PICTURE.pattern}")
Make = Callable[[Tensor, Sequence[tuple[int, int]], str], Iterator[np.ndarray]]   # prompts (m, D), keys, what for -> patches, in order


@dataclass(frozen=True, kw_only=True)
class PerturbConfig(SamplingOptions):
    """One call of `perturb`."""

    gex: Path                              # .h5ad of raw counts
    genes: str                             # changes, see `read_gene_changes`
    gene_sets: Path | None = None          # GMT: sets that `genes` may name
    spots: str | None = None               # barcodes or row numbers, by commas
    cluster: str | None = None             # or: spots of this cluster
    cluster_labs: str = "cluster"          # labels: .npy, CSV, or an obs column
    n_spots: int = 8                       # at most, drawn with the first seed; not of --spots
    controls: int = 20                     # random gene sets
    patch_um: float | None = None          # side of a patch; None: as the .h5ad says

    def __post_init__(self):
        super().__post_init__()
        if self.spots is not None and self.cluster:
            raise OptionError("--spots", "these, or --cluster, not both", f"{self.spots} and {self.cluster}")
        if self.spots is not None and not self.spots.strip(", "):
            raise OptionError("--spots", "barcodes or row numbers, separated by commas", f"none ({self.spots!r})")
        if self.n_spots < 1:
            raise OptionError("--n-spots", "at least 1", str(self.n_spots))
        if self.controls and self.controls < LEAST_CONTROLS:
            raise OptionError("--controls", f"0, or at least {LEAST_CONTROLS}: of fewer none can be one in twenty", str(self.controls))
        if self.patch_um is not None and not self.patch_um > 0:
            raise OptionError("--patch-um", "more than 0", str(self.patch_um))
        require_own_folder("--outdir", self.outdir, KIND)
        require_outputs({"--outdir": [self.outdir / name for name in WRITTEN]}, {
            "--gex": self.gex, "--genes": self.genes, "--gene-sets": self.gene_sets, "--cluster-labs": self.cluster_labs})


@dataclass(frozen=True)
class Perturbed:
    """Patches uint8 (n, k, px, px, 3) of n spots and k seeds, their statistics (n, k, 5), and the effects."""

    before: np.ndarray
    after: np.ndarray
    before_statistics: np.ndarray
    after_statistics: np.ndarray
    effects: list[Effect]
    haematoxylin_threshold: float


@dataclass(frozen=True)
class Source:
    """What patches are drawn from: a gene encoder, and how its prompts become patches."""

    gene_encoder: object                   # networks.clip.CLIP without image tower, or ConditionMlp
    make: Make
    px: int                                # side of a patch
    facts: dict[str, object]               # of the page: weights, how they were sampled


def perturb(config: PerturbConfig, open_source: Callable[..., Source] | None = None,
            progress: bool = True) -> tuple[list[Effect], list[Path]]:
    """Make and write everything; returns the effects, and the files that are not one a patch.

    `open_source(config, device, workers, progress)` opens what `config.network` is, by default a GAN snapshot.
    """
    seeds, ranks = parse_seeds(config.seeds), Ranks()
    workers = ranks.workers(config.workers)
    source = (open_source or snapshot_source)(config, ranks.device(config.device), workers, progress)
    encoder = source.gene_encoder
    table = expression_only(config.gex, target_sum=encoder.target_sum, vocabulary=encoder.gene_names)
    changes = read_gene_changes(config.genes, encoder.gene_names, config.gene_sets)
    if changes.strangers:
        ProgressBar.write(f"{config.gene_sets}: genes that the model does not know stay as they are: {first_few(changes.strangers)}")
    rows = choose_spots(config, table, seeds[0])
    patch_um = config.patch_um or recorded_scale(config.gex).get("patch_um", PATCH_UM)
    found = compare(Embedder(encoder, table), changes, rows, seeds, source.make, um_per_px=patch_um / source.px, controls=config.controls,
                    workers=workers)
    barcodes = [table.barcodes[row].split("__", 1)[-1] for row in rows]
    settings = {"network": str(config.network), **source.facts, "expression": str(config.gex),
                "expression file (SHA-256)": fingerprint(config.gex)["sha256"], "genes": config.genes,
                "gene sets": str(config.gene_sets or "none"),
                "genes of the sets unknown to the model": first_few(changes.strangers) if changes.strangers else "none",
                "spots": ", ".join(barcodes), "seeds": config.seeds,
                "random sets": config.controls, "patch side, µm": patch_um, "patch side, px": source.px,
                "haematoxylin threshold": found.haematoxylin_threshold, **program_versions()}
    return found.effects, _write(config, found, changes.describe(encoder.gene_names), rows, barcodes, seeds, settings)


def require_expression_file(config: PerturbConfig) -> None:
    if config.gex.suffix != ".h5ad":
        raise InputError(config.gex, "suffix", ".h5ad of raw counts", config.gex.suffix or "none")


def snapshot_source(config: PerturbConfig, device: str, workers: int, progress: bool) -> Source:
    """A GAN snapshot, with the gene encoder it names or holds."""
    require_expression_file(config)
    snapshot = open_snapshot(newest_snapshot(config.network), config, device)
    if snapshot.gene_encoder is None:
        raise InputError(config.network, "gene encoder", "a snapshot that draws from expression", "one without gene encoder")

    def make(prompts: Tensor, keys: Sequence[tuple[int, int]], what: str) -> Iterator[np.ndarray]:
        batches = (Batch(start, prompts[start:start + config.batch_sz], keys[start:start + config.batch_sz])
                   for start in range(0, len(keys), config.batch_sz))
        with ProgressBar(total=len(keys), desc=f"patches {what}", unit="patch", disable=not progress) as bar:
            for pictures in sample_batches(snapshot.generator, batches, config, lambda _, made: made, workers):
                bar.update(len(pictures))
                yield from pictures

    return Source(snapshot.gene_encoder, make, snapshot.generator.config.img_resolution,
                  {"weights (SHA-256)": snapshot.weights_sha256, "truncation": config.truncation, "noise": config.noise_mode})


def choose_spots(config: PerturbConfig, table: ExpressionTable, seed: int) -> np.ndarray:
    """Ascending rows, or those of --spots in their order."""
    if config.spots is not None:
        place = {barcode.split("__", 1)[-1]: row for row, barcode in enumerate(table.barcodes)}
        asked = [part.strip() for part in config.spots.split(",") if part.strip()]
        rows = [place.get(name, int(name) if name.isascii() and name.isdigit() else -1) for name in asked]
        unknown = [name for name, row in zip(asked, rows, strict=True) if not 0 <= row < len(table.barcodes)]
        if unknown or not rows or len(set(rows)) < len(rows):
            raise InputError(config.gex, "--spots", f"barcodes, or rows 0 to {len(table.barcodes) - 1}, each once",
                             first_few(unknown) if unknown else config.spots)
        return np.array(rows)
    rows = np.arange(len(table.barcodes))
    if config.cluster:
        labels = read_labels(config.cluster_labs, table.obs, config.gex, len(rows), option="--cluster-labs", rows_are="spots")
        rows = np.flatnonzero(labels == config.cluster)
        if not len(rows):
            raise InputError(config.gex, "--cluster", f"one of {', '.join(map(str, np.unique(labels[labels != ''])))}", config.cluster)
    return np.sort(np.random.default_rng(seed).choice(rows, min(config.n_spots, len(rows)), replace=False))


class Embedder:
    """Embeds changed rows of a sample. An encoder that scales samples scales them as the unchanged sample: else a change of all spots
    would be scaled away."""

    def __init__(self, encoder, table: ExpressionTable):
        self.encoder, self.table = encoder, table
        self.scaling = None
        if encoder.scales_by_sample:
            self.samples = np.unique(table.sample_ids, return_inverse=True)[1]
            require_whole_samples(self.samples, table.sample_ids)
            self.scaling = fit_sample_scaling(table.expression, self.samples, encoder.config.gene_sample_scaling)

    @property
    def mean_expression(self) -> np.ndarray:
        """(G,) over the sample."""
        return np.asarray(self.table.expression.mean(axis=0)).ravel()

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """float32 (n, G) normalised expression."""
        return self.table.expression[rows].toarray().astype(np.float32)

    @torch.no_grad()
    def embed(self, rows: np.ndarray, changed: np.ndarray) -> Tensor:
        """(n, D) of the expression (n, G) that the spots `rows` now have."""
        if self.scaling is None:
            return self.encoder.embed_expression(sp.csr_matrix(changed))
        scaled = self.scaling(torch.from_numpy(changed), torch.from_numpy(self.samples[rows]))
        return self.encoder.encode_genes(scaled.to(next(self.encoder.parameters()).device)).cpu()


def compare(embedder: Embedder, changes: GeneChanges, rows: np.ndarray, seeds: Sequence[int], make: Make, *, um_per_px: float,
            controls: int, workers: int = 1) -> Perturbed:
    """Patches and statistics before and after the changes, and after the same changes of `controls` random gene sets.

    A patch of a spot and a seed takes the random numbers that `gen_images.py` would give it.
    """
    expression, n, k = embedder.rows(rows), len(rows), len(seeds)
    keys = [(seed, int(row)) for row in rows for seed in seeds]

    def patches(rows_now: np.ndarray, what: str) -> Iterator[np.ndarray]:
        return make(embedder.embed(rows, rows_now).repeat_interleave(k, dim=0), keys, what)

    def measured(pictures, settings) -> np.ndarray:
        return measure_nuclei(pictures, settings, workers=workers, progress=False).reshape(n, k, len(STATISTICS))

    before, after = (np.stack(list(patches(part, what))) for part, what in ((expression, "before"), (changes.apply(expression), "after")))
    settings = fit_nuclei(before, um_per_px)
    rng = np.random.default_rng(seeds[0])
    random_sets = [changes.random_like(embedder.mean_expression, rng) for _ in range(controls)]
    by_control = [measured(patches(control.apply(expression), f"random set {number + 1}"), settings)
                  for number, control in enumerate(random_sets)]
    statistics = measured(before, settings), measured(after, settings)
    shape = (n, k, *before.shape[1:])
    return Perturbed(before.reshape(shape), after.reshape(shape), *statistics,
                     effects_of(*statistics, np.array(by_control).reshape(-1, n, k, len(STATISTICS))), settings.threshold)


def shortened(genes: str, most: int = 80) -> str:
    """What was asked for, as a title: whole changes only, "..." for those that do not fit."""
    parts = [part.strip() for part in genes.split(",") if part.strip()]
    kept = [part for number, part in enumerate(parts) if number == 0 or len(", ".join(parts[:number + 1])) <= most]
    return ", ".join(kept) + (", ..." if len(kept) < len(parts) else "")


def _write(config: PerturbConfig, found: Perturbed, changes: str, rows: np.ndarray, barcodes: list[str], seeds: list[int],
           settings: dict) -> list[Path]:
    paths = [config.outdir / name for name in WRITTEN]
    with locked(paths[0], covers=paths[1:]):
        older = [path.name for path in config.outdir.glob("spot*.png") if PICTURE.fullmatch(path.name)]      # other genes made them
        with finished_within(config.outdir, WRITTEN, older) as folder:
            _write_into(folder, config, found, changes, rows, barcodes, seeds, settings)
    return paths


def _write_into(folder: Path, config: PerturbConfig, found: Perturbed, changes: str, rows: np.ndarray, barcodes: list[str],
                seeds: list[int], settings: dict) -> None:
    table, record, page = (folder / name for name in WRITTEN)
    for i, row in enumerate(rows):
        for j, seed in enumerate(seeds):
            pair = found.before[i, j], found.after[i, j]
            for name, picture in zip(("before", "after", "difference"), (*pair, difference_map(*pair)), strict=True):
                save_png(folder / f"spot{row:05d}_seed{seed:04d}_{name}.png", picture)
    with finished_file(table) as temporary, open(temporary, "w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["spot", "barcode", "seed", *(f"{name}_{when}" for when in ("before", "after") for name in STATISTICS)])
        for i, row in enumerate(rows):
            for j, seed in enumerate(seeds):
                numbers = [*found.before_statistics[i, j], *found.after_statistics[i, j]]
                writer.writerow([row, barcodes[i], seed, *(f"{value:.6g}" if np.isfinite(value) else "" for value in numbers)])
    write_json(record, {"changes": changes, "effects": {effect.name: nan_to_none(effect.to_json()) for effect in found.effects},
                        "settings": settings})
    write_perturbation_page(page, f"Perturbation: {shortened(config.genes)}", changes, found.effects,
                            pairs_sheet(found.before, found.after, barcodes, seeds), settings)
