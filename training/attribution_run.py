"""Attribute distances in the CLIP space to genes, for the clusters of a sample: what interpretability.py does.

Reads CLIP weights, one h5ad and its cluster labels; writes a table (genes x pairs) and a record with the convergence delta of each pair.
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from evaluation.attribution import MAX_DELTA, Attributer, Attribution, higher_genes_only
from evaluation.features import IMAGE_SUFFIXES, image_features, list_images, pick_device, read_samples_csv
from evaluation.sections import ImageEncoder
from networks.clip import CLIP, clip_weights_sha256
from networks.sample_scaling import MIN_SPOTS, fit_sample_scaling, require_whole_samples
from preprocessing.done_manifests import program_versions
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from preprocessing.older_outputs import json_file, table
from preprocessing.output_places import require_outputs
from preprocessing.outputs import finished_together, locked, write_json
from preprocessing.patches import read_patch, read_patch_folder
from preprocessing.progress import ProgressBar
from training.data import ExpressionTable, expression_only
from training.prompts import NO_CLUSTER, read_labels, read_rows

SHOWN = 5      # genes named in the last lines


@dataclass(frozen=True)
class AttributionConfig:
    network: Path                          # CLIP weights
    gex: Path
    cluster_labs: str                      # .npy, CSV, or an obs column
    method: str = "ig"                     # ig | sg
    target: str = "clusters"               # clusters | image
    images: Path | None = None             # picture, folder or .npy of embeddings, of target image
    out_file: Path = Path("genes.csv")
    batch_size: int = 64
    device: str = "auto"
    encoder_weights: Path | None = None    # of the image tower, if the file moved since training
    already_normalised: bool = False
    seed: int = 0                          # of SmoothGrad

    def __post_init__(self):
        if (self.target == "image") != (self.images is not None):
            raise OptionError("--images", "pictures or embeddings, together with --target image", str(self.images or "nothing"))
        if self.out_file.suffix == ".json":
            raise OptionError("--out-file", "a .csv; the record goes into the .json of that name", str(self.out_file))
        require_outputs({"--out-file": {self.out_file: table("an older table of attributions", "gene(,.*)?"),
                                        self.out_file.with_suffix(".json"): json_file("an older record", "method", "target")}},
                        {"--gex": self.gex, "--cluster-labs": self.cluster_labs, "--images": self.images, "--network": self.network,
                         "--encoder-weights": self.encoder_weights})


@dataclass(frozen=True)
class Attributed:
    """What was written, and what it says in a few lines."""

    table: Path
    record: Path
    lines: list[str]


def write_attributions(config: AttributionConfig, progress: bool = True) -> Attributed:
    """Write the table and its record."""
    device = pick_device(config.device)
    needs_tower = config.target == "image" and config.images.suffix != ".npy"
    clip = CLIP.from_pretrained(config.network, image_encoder=needs_tower, image_encoder_weights=config.encoder_weights)
    clip.requires_grad_(False).to(device)
    table = expression_only(config.gex, target_sum=clip.target_sum, already_normalised=config.already_normalised,
                            hint="Give the raw counts, or say that it is meant with --already-normalised")
    clip.require_genes(table.gene_names, config.gex)
    labels = read_labels(config.cluster_labs, table.obs, config.gex, len(table.barcodes), option="--cluster-labs", rows_are="spots")
    names = [str(name) for name in np.unique(labels) if name != NO_CLUSTER]
    if config.target == "clusters" and len(names) < 2:
        raise InputError(config.gex, config.cluster_labs, "at least two clusters", f"one: {', '.join(names)}")
    means, middle = cluster_means(clip, table, labels, names)
    attributer = Attributer(clip.encode_genes, config.method, config.batch_size, config.seed)
    if config.target == "clusters":
        pairs, count = attributer.between_clusters(means.to(device), names), len(names) * (len(names) - 1)
    else:
        targets, target_names = read_targets(config, clip, table, labels, device)
        pairs, count = attributer.to_targets(means.to(device), names, middle.to(device), targets.to(device), target_names), \
            len(names) * len(targets)
    done = list(ProgressBar(pairs, total=count, desc="attributions", unit="pair", disable=not progress))
    return _write(config, done, dict(zip(names, means.numpy(), strict=True)), table.gene_names)


def cluster_means(clip: CLIP, table: ExpressionTable, labels: np.ndarray, names: list[str]) -> tuple[Tensor, Tensor]:
    """Mean expression of every cluster (K, G) and of all spots (G,), float32, as the gene encoder takes it: a CLIP that scales samples
    sees each spot scaled by its own sample first."""
    samples = np.unique(table.sample_ids, return_inverse=True)[1]
    if clip.scales_by_sample:
        require_whole_samples(samples, table.sample_ids)
    scaling = fit_sample_scaling(table.expression, samples, clip.config.gene_sample_scaling)

    def mean_of(rows: np.ndarray) -> Tensor:
        if scaling is None:
            return torch.from_numpy(np.asarray(table.expression[rows].mean(axis=0, dtype=np.float64)).ravel()).float()
        total = torch.zeros(table.expression.shape[1], dtype=torch.float64)
        for start in range(0, len(rows), 256):
            part = rows[start:start + 256]
            dense = torch.from_numpy(table.expression[part].toarray().astype(np.float32))
            total += scaling(dense, torch.from_numpy(samples[part])).double().sum(dim=0)
        return (total / len(rows)).float()

    return torch.stack([mean_of(np.flatnonzero(labels == name)) for name in names]), mean_of(np.arange(len(labels)))


# ---- pictures as targets --------------------------------------------------------------------------------------------

def read_targets(config: AttributionConfig, clip: CLIP, table: ExpressionTable, labels: np.ndarray,
                 device: str) -> tuple[Tensor, list[str]]:
    """Embeddings (T, D), unit rows, and their names: of a picture, of a folder's patches by cluster, or the rows of an .npy."""
    path = config.images
    if path.suffix == ".npy" and path.is_file():
        rows = torch.from_numpy(read_rows(path, clip.config.projection, encoded=True))
        return torch.nn.functional.normalize(rows, dim=1), [f"row {i}" for i in range(len(rows))] if len(rows) > 1 else [path.stem]
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise InputError(path, "suffix", "a picture, a folder of them, or an .npy of embeddings", path.suffix or "none")
        return torch.from_numpy(_embed([path], clip, config.batch_size, device)), [path.stem]
    paths, groups = _grouped_pictures(path, table, labels)
    embeddings = torch.from_numpy(_embed(paths, clip, config.batch_size, device))
    names = [str(name) for name in np.unique(groups) if name != NO_CLUSTER]
    if not names:
        raise InputError(path, "patches", "some of the spots that have a cluster", "none")
    means = torch.stack([embeddings[torch.from_numpy(groups == name)].mean(dim=0) for name in names])
    return torch.nn.functional.normalize(means, dim=1), names


def _grouped_pictures(folder: Path, table: ExpressionTable, labels: np.ndarray) -> tuple[list[Path], np.ndarray]:
    """Pictures below a folder and the group (N,) of each: "images of CLUSTER", or the folder's name where nothing says whose they are."""
    known = dict(zip((barcode.split("__", 1)[-1] for barcode in table.barcodes), labels, strict=True))
    if not folder.is_dir():
        raise InputError(folder, "--images", "a picture, a folder of them, or an .npy of embeddings", "nothing there")
    paths = list_images(folder).paths
    if (folder / "samples.csv").is_file():
        rows = read_samples_csv(folder)
        said = [row.get("cluster") or known.get((row.get("barcode") or "").rpartition("__")[2], NO_CLUSTER) for row in rows]
    elif (folder / "metadata.jsonl").is_file():
        barcodes = read_patch_folder(folder).barcodes or []
        said = [known.get(barcode, NO_CLUSTER) for barcode in barcodes]
    else:
        said = []
    if not any(name != NO_CLUSTER for name in said):
        return paths, np.full(len(paths), folder.name)
    return paths, np.array([f"images of {name}" if name != NO_CLUSTER else NO_CLUSTER for name in said])


def _embed(paths: list[Path], clip: CLIP, batch_size: int, device: str) -> np.ndarray:
    """(N, D) unit rows. A CLIP that centres features centres a folder on its own mean, as a sample; few pictures on the training mean."""
    for path in paths[:1]:
        read_patch(path)                     # what is no picture is said before the tower runs
    px, centre = clip.training_record.get("patch_px"), None
    if clip.centres_features and len(paths) >= MIN_SPOTS:
        views = ImageEncoder(lambda images: clip.view_features(images).mean(1))
        centre = torch.from_numpy(image_features(paths, views, batch_size, device, match_px=px).mean(axis=0)).to(device)
    return image_features(paths, ImageEncoder(lambda images: clip.encode_images(images, centre)), batch_size, device, match_px=px)


# ---- results --------------------------------------------------------------------------------------------------------

def _write(config: AttributionConfig, done: list[Attribution], means: dict[str, np.ndarray], genes: list[str]) -> Attributed:
    if not all(np.isfinite(attribution.values).all() for attribution in done):
        raise WeightsError(config.network, "attributions", "finite numbers", "NaN or infinity", "Are the weights damaged?")
    columns = {attribution.column: higher_genes_only(attribution, means[attribution.query], means[attribution.other])
               if config.target == "clusters" else attribution.values for attribution in done}
    if len(columns) < len(done):
        raise InputError(config.images, "names of pictures", "others than", first_few([attribution.column for attribution in done]))
    pairs = {attribution.column: {"distance_change": attribution.change, "sum": float(attribution.values.sum()),
                                  "convergence_delta": attribution.delta} for attribution in done}
    record = config.out_file.with_suffix(".json")
    with locked(config.out_file, covers=[record]), finished_together([config.out_file, record]) as staged:
        pd.DataFrame(columns, index=pd.Index(genes, name="gene")).to_csv(staged[config.out_file], float_format="%.6g")
        write_json(staged[record], {"method": config.method, "target": config.target, "model_sha256": clip_weights_sha256(config.network),
                                    "gex": str(config.gex), "cluster_labs": config.cluster_labs,
                                    "images": str(config.images) if config.images else None,
                                    "seed": config.seed, "pairs": pairs, "versions": program_versions()})
    return Attributed(config.out_file, record, list(_said(columns, done, genes)))


def _said(columns: dict[str, np.ndarray], done: list[Attribution], genes: list[str]) -> Iterator[str]:
    """The strongest genes of every pair (the first dozen pairs), and how far the sums are from what they must be."""
    for column, values in list(columns.items())[:12]:
        strongest = np.argsort(-np.abs(values), kind="stable")[:SHOWN]
        yield f"{column}: {', '.join(genes[i] for i in strongest if values[i]) or 'no gene'}"
    if len(columns) > 12:
        yield f"... and {len(columns) - 12:,} pairs more"
    deltas = [attribution.delta for attribution in done if attribution.delta is not None]
    if deltas:
        yield f"convergence delta: largest {max(deltas):.2%} of the distance attributed"
    wide = [attribution.column for attribution in done if attribution.delta is not None and attribution.delta >= MAX_DELTA]
    if wide:
        yield f"warning: the attributions of {first_few(wide)} miss the distance by {MAX_DELTA:.0%} or more"
