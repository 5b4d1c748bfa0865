"""Embed a sample with trained CLIP weights and write the unit rows in h5ad order."""
from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.retrieval import retrieval_by_sample
from networks.clip import CLIP, clip_weights_sha256
from networks.layers import images_to_float
from networks.sample_scaling import patches_for_mean, require_whole_samples
from preprocessing.done_manifests import file_sha256, program_versions, strings_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.npy_file import RECORD
from preprocessing.older_outputs import json_file
from preprocessing.output_places import require_outputs, require_shared_folder
from preprocessing.outputs import finished_file, finished_together, locked, write_json
from preprocessing.patch_file import read_patch_file
from preprocessing.patches import read_patch, read_patch_folder, require_no_patch_folder
from preprocessing.progress import ProgressBar
from training.data import ImageGeneDataset, expression_only
from training.sample_sheet import sample_files

RETRIEVAL = "retrieval.json"
RETRIEVAL_SPOTS = 20_000   # every spot is compared with every other


@dataclass(frozen=True)
class EmbedConfig:
    network: Path                          # CLIP weights
    gex: Path | None = None
    images: Path | None = None
    out_dir: Path = Path(".")
    batch_size: int = 64
    device: str = "auto"                   # auto | cpu | cuda | cuda:N
    encoder_weights: Path | None = None    # of the image tower, if the file moved since training
    already_normalised: bool = False
    add_to_h5ad: bool = False              # obsm of `gex`
    null: bool = False                     # the embedding of all-zero expression; of the average spot, if samples are scaled

    def __post_init__(self):
        if not (self.gex or self.images or self.null):
            raise OptionError("--gex / --images / --null", "at least one of them", "none")
        if self.add_to_h5ad and not self.gex:
            raise OptionError("--add-to-h5ad", "--gex, the file to add to", "no --gex")
        if self.device != "auto" and not (self.device == "cpu" or self.device.startswith("cuda")):
            raise OptionError("--device", "auto, cpu, cuda or cuda:N", self.device)
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise OptionError("--device", "cpu (no GPU is visible here)", self.device)
        require_no_patch_folder("--out-dir", Path(self.out_dir))
        require_shared_folder("--out-dir", self.out_dir, own=RECORD)
        files = {name: json_file("that of older embeddings", "model_sha256") for name in (RECORD, RETRIEVAL)}
        require_outputs({"--out-dir": {Path(self.out_dir) / name: kind for name, kind in files.items()}}, {})


def write_embeddings(config: EmbedConfig) -> tuple[list[Path], str]:
    """Write gene_clip_emb.npy, image_clip_emb.npy, null_clip_emb.npy (as asked) and embeddings.json; with genes and images also
    retrieval.json. Returns the paths, and what retrieval found in one line ("" without it)."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    clip = CLIP.from_pretrained(config.network, image_encoder=config.images is not None, image_encoder_weights=config.encoder_weights)
    clip.to(device)
    arrays, barcodes, sample_ids = embed_sample(clip, config, device)
    names = [*(f"{name}_clip_emb.npy" for name in arrays), RECORD, *([RETRIEVAL] if config.gex and config.images else [])]
    files = [config.out_dir / name for name in names]
    with locked(config.out_dir / RECORD, covers=[path for path in files if path.name != RECORD]), finished_together(files) as staged:
        said = _write(config, arrays, barcodes, sample_ids, staged)
    if config.add_to_h5ad:
        with locked(config.gex):
            _add_to_h5ad(config.gex, {f"X_clip_{name}": array for name, array in arrays.items() if name != "null"})
        files.append(config.gex)
    return files, said


def _write(config: EmbedConfig, arrays: dict[str, np.ndarray], barcodes: list[str], sample_ids: np.ndarray,
           staged: Mapping[Path, Path]) -> str:
    """Write all files under their `staged` names; what retrieval found in one line."""
    written = [config.out_dir / f"{name}_clip_emb.npy" for name in arrays]
    for path, array in zip(written, arrays.values(), strict=True):
        with open(staged[path], "wb") as stream:
            np.save(stream, array.astype(np.float32), allow_pickle=False)
    record = {"model_sha256": clip_weights_sha256(config.network), "n_rows": len(barcodes), "barcode_sha256": strings_sha256(barcodes),
              "gex": str(config.gex) if config.gex else None, "images": str(config.images) if config.images else None,
              "files": [path.name for path in written], "sha256": {path.name: file_sha256(staged[path]) for path in written},
              "versions": program_versions()}
    write_json(staged[config.out_dir / RECORD], record)
    if not (config.gex and config.images):
        return ""
    found = _retrieval(arrays["gene"], arrays["image"], sample_ids)
    write_json(staged[config.out_dir / RETRIEVAL], {"model_sha256": record["model_sha256"], **found})
    return retrieval_line(found["joint"])


def _retrieval(genes: np.ndarray, images: np.ndarray, sample_ids: np.ndarray) -> dict[str, dict]:
    """`retrieval_by_sample` of all spots, or of so many drawn at random as take seconds."""
    rows = np.arange(len(genes))
    if len(rows) > RETRIEVAL_SPOTS:
        rows = np.sort(np.random.default_rng(0).choice(rows, RETRIEVAL_SPOTS, replace=False))
    return retrieval_by_sample(genes[rows], images[rows], sample_ids[rows])


def retrieval_line(found: dict) -> str:
    """`gene to image R@10 0.207 (0.150 to 0.266), median rank 38.5; image to gene ...; 184 spots, chance R@10 0.054`."""
    ways = [f"{way.replace('_', ' ')} R@10 {found[way]['r10']:.3f} ({found[way]['r10_ci95'][0]:.3f} to {found[way]['r10_ci95'][1]:.3f}), "
            f"median rank {found[way]['median_rank']:g}" for way in ("gene_to_image", "image_to_gene")]
    return "; ".join([*ways, f"{found['n_spots']:,} spots, chance R@10 {found['gene_to_image']['chance_r10']:.3f}"])


@torch.no_grad()
def embed_sample(clip: CLIP, config: EmbedConfig, device: str) -> tuple[dict[str, np.ndarray], list[str], np.ndarray]:
    """({"gene": (N, D), "image": (N, D), "null": (1, D)} as asked, ordered barcodes, sample of each spot where expression is given);
    float32 unit rows."""
    arrays: dict[str, np.ndarray] = {}
    barcodes: list[str] = []
    sample_ids, dataset = np.array([]), None
    if config.gex:
        options = {"target_sum": clip.target_sum, "already_normalised": config.already_normalised,
                   "hint": "Give the raw counts, or say that it is meant with --already-normalised"}
        if config.images:
            patch_px = clip.training_record.get("patch_px")
            dataset = ImageGeneDataset(sample_files(config.images, config.gex), image_px=patch_px, **options)
        table = dataset or expression_only(config.gex, **options)
        clip.require_genes(table.gene_names, config.gex)
        barcodes = [str(barcode).split("__", 1)[-1] for barcode in table.barcodes]
        sample_ids = table.sample_ids
        arrays["gene"] = clip.embed_expression(table.expression, config.batch_size, sample_ids=sample_ids).numpy()
    if config.images:
        if dataset is not None:
            read, samples = (lambda row: dataset.read_image(row, dataset.image_px)), sample_ids
        else:
            read, samples, barcodes = _patches_alone(config.images, clip.training_record.get("patch_px"))
        arrays["image"] = _embed_patches(clip, read, samples, config.batch_size, device)
    if config.null:
        arrays["null"] = clip.encode_genes(torch.zeros(1, len(clip.gene_names), device=device)).cpu().numpy()
    return arrays, barcodes, sample_ids


def _embed_patches(clip: CLIP, read: Callable[[int], np.ndarray], sample_ids: np.ndarray, batch_size: int, device: str) -> np.ndarray:
    """(N, D) of the patches that `read` gives by row; with `feature_sample_scaling` those of a sample are centred together (N,)."""
    def batches(rows: np.ndarray) -> Iterator[Tensor]:
        for start in range(0, len(rows), batch_size):
            part = rows[start:start + batch_size]
            images = torch.stack([torch.from_numpy(np.ascontiguousarray(read(row))).permute(2, 0, 1) for row in part])
            yield images_to_float(images).to(device)
            bar.update(len(part))

    names, numbers = np.unique(sample_ids, return_inverse=True)
    if clip.centres_features:
        require_whole_samples(numbers, sample_ids)
    groups = [(np.arange(len(numbers)), None)] if not clip.centres_features else \
        [(np.flatnonzero(numbers == number), patches_for_mean(numbers, number)) for number in range(len(names))]
    embeddings = np.empty((len(numbers), clip.config.projection), dtype=np.float32)
    twice = sum(len(chosen) for rows, chosen in groups if chosen is not None and len(chosen) < len(rows))
    with ProgressBar(total=len(numbers) + twice, desc="patches", unit="patch") as bar:
        for rows, chosen in groups:
            features = None if chosen is None else torch.cat([clip.view_features(images) for images in batches(chosen)])
            centre = None if chosen is None else features.mean((0, 1))
            if features is not None and len(chosen) == len(rows):   # a small sample is seen once
                blocks = [clip.project_views(features, centre)]
            else:
                blocks = [clip.encode_images(images, centre) for images in batches(rows)]
            embeddings[rows] = torch.cat(blocks).cpu().numpy()
    return embeddings


def _patches_alone(images: Path, patch_px: int | None) -> tuple[Callable[[int], np.ndarray], np.ndarray, list[str]]:
    """(what reads a patch by row, (N,) its sample, else the folder's name, barcodes where known) of patches without expression."""
    def resized(patch: np.ndarray) -> np.ndarray:
        if patch_px is None or patch.shape[:2] == (patch_px, patch_px):
            return patch
        how = Image.Resampling.BOX if patch_px < patch.shape[0] else Image.Resampling.BICUBIC
        return np.array(Image.fromarray(patch).resize((patch_px, patch_px), how))

    if images.is_dir():
        folder = read_patch_folder(images)
        samples = np.full(len(folder.paths), images.name) if folder.sample_ids is None else np.asarray(folder.sample_ids)
        return lambda row: resized(read_patch(folder.paths[row])), samples, list(folder.barcodes or [])
    file = read_patch_file(images)
    if not len(file):
        raise InputError(images, "img", "at least one patch", "none")
    return lambda row: resized(file.images(row)), np.full(len(file), images.name), list(file.barcodes or [])


def _add_to_h5ad(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays into obsm of a copy that then takes the file's place."""
    with finished_file(path, validate=lambda temporary: ad.read_h5ad(temporary, backed="r").file.close()) as temporary:
        shutil.copyfile(path, temporary)
        with h5py.File(temporary, "a") as file:
            for name, array in arrays.items():
                ad.io.write_elem(file["obsm"], name, array.astype(np.float32))
