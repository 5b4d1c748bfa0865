"""What a GAN run reads: patches as uint8, in memory or mapped, and prompt embeddings, computed once by the frozen gene encoder."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.clip import CLIP, clip_weights_sha256
from networks.layers import images_to_float
from preprocessing.errors import InputError
from preprocessing.outputs import strings_sha256
from training.data import ImageGeneDataset, SampleFiles
from training.gan_losses import pair_deviations
from training.gan_step import TrainingData


@dataclass(frozen=True)
class GanData:
    """Training patches with their prompts, validation ones for the pictures, and where they came from."""

    name: str                         # of the run folder and of messages
    training: TrainingData
    barcodes: np.ndarray              # (N,) str
    clusters: np.ndarray | None       # (N,) str, where every spot has one
    validation: TrainingData | None
    validation_barcodes: np.ndarray | None
    gene_encoder: dict | None         # {"path", "sha256", "target_sum"}
    record: dict                      # samples, numbers of spots, hashes: plain JSON, kept in snapshots
    sources: tuple[dict, ...] = ()    # sample_id, images, gex, split of every sample: plain JSON, for the run's config.json alone

    @property
    def sha256(self) -> str:
        return self.record["sha256"]


def load_gan_data(samples: Sequence[SampleFiles], validation: Sequence[SampleFiles], network: Path, img_resolution: int, *,
                  max_size: int | None = None, seed: int = 0, keep_expression: bool = False, progress: bool = True,
                  cache_dir: Path | str | None = None) -> GanData:
    """Read samples, embed their expression with the CLIP weights `network`, and bring the patches to `img_resolution`.

    `keep_expression`: the training spots' expression stays in memory, to be embedded anew at every step. `cache_dir`: of packed
    patches, as `ImageGeneDataset.open_patches` takes it.
    """
    clip = CLIP.from_pretrained(network, image_encoder=False)

    def read(files: Sequence[SampleFiles], size: int | None) -> tuple[ImageGeneDataset, TrainingData]:
        spots = ImageGeneDataset(files, target_sum=clip.target_sum, vocabulary=clip.gene_names, max_size=size, seed=seed)
        images = spots.load_images(img_resolution, progress=progress, cache_dir=cache_dir)
        return spots, TrainingData(images, clip.embed_expression(spots.expression, sample_ids=spots.sample_ids))

    spots, training = read(samples, max_size)
    training = replace(training, expression=spots.expression if keep_expression else None)
    held_out, validation_data = read(validation, None) if validation else (None, None)
    labels = spots.obs["cluster"] if "cluster" in spots.obs else None
    clusters = None if labels is None or labels.isna().any() else labels.astype(str).to_numpy()
    gene_encoder = {"path": str(network), "sha256": clip_weights_sha256(network), "target_sum": clip.target_sum}
    return gan_data("-".join(dict.fromkeys(spots.sample_ids)), training, spots.barcodes, clusters=clusters, validation=validation_data,
                    validation_barcodes=None if held_out is None else held_out.barcodes, gene_encoder=gene_encoder,
                    sources=[{**asdict(files), "images": str(files.images), "gex": str(files.gex), "split": split}
                             for split, part in (("train", samples), ("val", validation)) for files in part])


def gan_data(name: str, training: TrainingData, barcodes: np.ndarray, *, clusters: np.ndarray | None = None,
             validation: TrainingData | None = None, validation_barcodes: np.ndarray | None = None,
             gene_encoder: dict | None = None, sources: Sequence[dict] = ()) -> GanData:
    """Check prompts and put a run's data together."""
    bad = int((~torch.isfinite(training.prompts)).any(dim=1).sum())
    if bad:
        raise InputError(name, "prompt embeddings", "finite numbers", f"NaN or infinite ones in {bad:,} of {len(training.prompts):,} rows")
    hashes = {"barcode_sha256": strings_sha256(map(str, barcodes)), "images_sha256": _bytes_sha256(training.images),
              "prompts_sha256": _bytes_sha256(training.prompts)}
    record = {"name": name, "sample_ids": [source["sample_id"] for source in sources], "n_spots": len(training.images), **hashes,
              "sha256": strings_sha256(hashes.values())}
    training = replace(training, pair_deviations=neighbour_deviations(training.images, training.prompts))
    return GanData(name, training, np.asarray(barcodes), clusters, validation, validation_barcodes, gene_encoder, record, tuple(sources))


def _bytes_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's numbers in row order, without a copy."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def mean_colour(images: Tensor, rows_at_once: int = 4096) -> Tensor:
    """float32 (3,) in [-1, 1]: the mean of uint8 (N, 3, H, W), summed as whole numbers, a block at a time."""
    total = sum(block.sum(dim=(0, 2, 3)) for block in images.split(rows_at_once))
    return (total.double() / (images.numel() / 3) / 127.5 - 1).float()


def neighbour_deviations(images: Tensor, prompts: Tensor, n_pairs: int = 512) -> Tensor:
    """How much real patches with the most alike prompts differ: (4,) of `pair_deviations`, over at most `n_pairs` spots."""
    unit = F.normalize(prompts, dim=1)
    rows = torch.linspace(0, len(unit) - 1, min(n_pairs, len(unit))).long()
    likeness = unit[rows] @ unit.T
    likeness[torch.arange(len(rows)), rows] = -torch.inf
    return pair_deviations(images_to_float(images[rows]), images_to_float(images[likeness.argmax(dim=1)]))
