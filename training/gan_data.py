"""What a GAN run reads: patches as uint8, in memory or mapped, and prompt embeddings, computed once or handed over."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.clip import CLIP, clip_weights_sha256
from networks.condition_mlp import ConditionMlp
from networks.layers import images_to_float
from networks.weights import pinned
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError
from preprocessing.inputs import require_file
from training.data import ImageGeneDataset
from training.gan_losses import pair_deviations
from training.gan_parts import TrainingData
from training.gan_sources import GanSources
from training.patch_images import read_patch_images
from training.prompts import read_rows
from training.sample_centres import SamplePatches
from training.sample_sheet import SampleFiles
from training.spot_choice import SpotChoice

ALL_SPOTS = SpotChoice()
LONGEST_NAME = 80


@dataclass(frozen=True)
class GanData:
    """Training patches with their prompts, validation ones for the pictures, and where they came from."""

    name: str                         # of the run folder and of messages
    training: TrainingData
    barcodes: np.ndarray              # (N,) str
    clusters: np.ndarray | None       # (N,) str, where every spot has one
    validation: TrainingData | None
    validation_barcodes: np.ndarray | None
    gene_encoder: dict | None         # "path" or "repo_id", "sha256", "target_sum" of the CLIP weights that embedded the prompts
    record: dict                      # samples, numbers of spots, hashes: plain JSON, kept in snapshots
    sources: tuple[dict, ...] = ()    # sample_id, images, gex, split of every sample: plain JSON, for the run's config.json alone
    mlp: ConditionMlp | None = None   # untrained: what a run's own gene encoder starts as

    @property
    def sha256(self) -> str:
        return self.record["sha256"]


def load_gan_data(sources: GanSources, img_resolution: int, *, choice: SpotChoice = ALL_SPOTS, seed: int = 0,
                  keep_expression: bool = False, progress: bool = True, cache_dir: Path | str | None = None) -> GanData:
    """Read what `sources` names and `choice` leaves, bring the patches to `img_resolution`, and embed the prompts.

    `keep_expression`: the spots' expression stays in memory, to be embedded anew at every step. `cache_dir`: of packed
    patches, as `ImageGeneDataset.open_patches` takes it. With encoder `mlp` prompts are those of the untrained encoder, drawn
    with `seed`: a random projection of the expression, which tells like spots from unlike ones; the run embeds anew.
    """
    how = {"img_resolution": img_resolution, "progress": progress, "cache_dir": cache_dir}
    if sources.encoder == "none":
        return _load_patches_alone(sources, choice, seed, **how)
    clip = CLIP.from_pretrained(sources.network, image_encoder=False) if sources.encoder == "clip" else None
    spots = _spots(sources.train, clip)
    mlp = _new_mlp(spots.gene_names, seed) if sources.encoder == "mlp" else None
    name = _data_name(spots.sample_ids)
    keep_expression = keep_expression or mlp is not None
    training = _load(spots, sources.train, choice.training_rows(len(spots), spots.obs, name, seed), clip or mlp, keep_expression, **how)
    held_out, validation = None, None
    if sources.validation:
        held_out = _spots(sources.validation, clip, None if mlp is None else mlp.gene_names)
        rows = choice.validation_rows(len(held_out), held_out.obs, _data_name(held_out.sample_ids))
        validation = _load(held_out, sources.validation, rows, clip or mlp, keep_expression, **how)
    labels = spots.obs["cluster"] if "cluster" in spots.obs else None
    clusters = None if labels is None or labels.isna().any() else labels.astype(str).to_numpy()
    gene_encoder = None
    if clip is not None:
        where = {"path": str(sources.network)} if Path(sources.network).exists() else {"repo_id": pinned(sources.network)}
        gene_encoder = {**where, "sha256": clip_weights_sha256(sources.network), "target_sum": clip.target_sum}
    return gan_data(name, training, spots.barcodes, clusters=clusters, validation=validation,
                    validation_barcodes=None if held_out is None else held_out.barcodes, gene_encoder=gene_encoder, mlp=mlp,
                    sources=sources.listed, chosen=choice.record)


def _spots(files: Sequence[SampleFiles], clip: CLIP | None, vocabulary: list[str] | None = None) -> ImageGeneDataset:
    if clip is None:
        return ImageGeneDataset(files, vocabulary=vocabulary)
    return ImageGeneDataset(files, target_sum=clip.target_sum, vocabulary=clip.gene_names)


def _new_mlp(gene_names: list[str], seed: int) -> ConditionMlp:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ConditionMlp(gene_names)


def _load(spots: ImageGeneDataset, files: Sequence[SampleFiles], rows: np.ndarray, encoder: CLIP | ConditionMlp | None,
          keep_expression: bool, *, img_resolution: int, progress: bool, cache_dir: Path | str | None) -> TrainingData:
    """Patches and prompts of the chosen rows; `spots` keeps these alone. No encoder: the prompts are ready-made."""
    numbers = np.unique(spots.sample_ids, return_inverse=True)[1]
    sample_patches = SamplePatches.of(spots, numbers, image_px=img_resolution, cache_dir=cache_dir)
    prompts = None
    if encoder is None:
        prompts = ready_embeddings(files, spots.sample_ids)[torch.from_numpy(rows)]
    elif encoder.scales_by_sample:      # by all spots of a sample, whichever are chosen
        prompts = encoder.embed_expression(spots.expression, sample_ids=spots.sample_ids)[torch.from_numpy(rows)]
    spots.keep(rows)
    if prompts is None:
        prompts = encoder.embed_expression(spots.expression, sample_ids=spots.sample_ids)
    images = spots.load_images(img_resolution, progress=progress, cache_dir=cache_dir)
    return TrainingData(images, prompts, expression=spots.expression if keep_expression else None, samples=torch.from_numpy(numbers[rows]),
                        sample_patches=sample_patches)


def ready_embeddings(files: Sequence[SampleFiles], sample_ids: np.ndarray) -> Tensor:
    """float32 (N, width): the embeddings of all samples, row i of spot i; `sample_ids` (N,) say how many spots each has."""
    parts: list[np.ndarray] = []
    for sample in files:
        rows = read_rows(require_file(sample.embeddings, "an .npy of embeddings"), None, encoded=True)
        n_spots, width = int((sample_ids == sample.sample_id).sum()), rows.shape[1]
        if len(rows) != n_spots:
            raise InputError(sample.embeddings, "rows", f"{n_spots:,}, one a spot of {sample.gex} in its order", f"{len(rows):,}")
        if parts and width != parts[0].shape[1]:
            raise InputError(sample.embeddings, "width of an embedding", f"{parts[0].shape[1]}, as of {files[0].embeddings}", str(width))
        parts.append(rows)
    return torch.from_numpy(np.concatenate(parts))


def _load_patches_alone(sources: GanSources, choice: SpotChoice, seed: int, *, img_resolution: int, progress: bool,
                        cache_dir: Path | str | None) -> GanData:
    """Unconditional: patches with prompts of width 0. Spots are counted in the patches' own order."""
    def read(paths, rows_of):
        patches, names, source_names = read_patch_images(paths)
        rows = rows_of(len(patches), None, _data_name(source_names))
        patches.keep(rows)
        images = patches.load_images(img_resolution, progress=progress, cache_dir=cache_dir)
        return TrainingData(images, torch.zeros(len(images), 0)), names[rows], _data_name(source_names)

    training, barcodes, name = read(sources.patches, partial(choice.training_rows, seed=seed))
    validation, validation_barcodes, _ = read(sources.val_patches, choice.validation_rows) if sources.val_patches else (None, None, "")
    return gan_data(name, training, barcodes, validation=validation, validation_barcodes=validation_barcodes, sources=sources.listed,
                    chosen=choice.record)


def _data_name(sample_ids: Sequence[str]) -> str:
    """`C2-C3`: what a run's folder is called after; of a cohort the first sample and a hash of all."""
    names = list(dict.fromkeys(map(str, sample_ids)))
    joined = "-".join(names)
    return joined if len(joined) <= LONGEST_NAME else f"{names[0][:LONGEST_NAME]}-and-{len(names) - 1}-more-{strings_sha256(names)[:8]}"


def gan_data(name: str, training: TrainingData, barcodes: np.ndarray, *, clusters: np.ndarray | None = None,
             validation: TrainingData | None = None, validation_barcodes: np.ndarray | None = None,
             gene_encoder: dict | None = None, sources: Sequence[dict] = (), mlp: ConditionMlp | None = None,
             chosen: dict | None = None) -> GanData:
    """Check prompts and put a run's data together."""
    bad = int((~torch.isfinite(training.prompts)).any(dim=1).sum())
    if bad:
        raise InputError(name, "prompt embeddings", "finite numbers", f"NaN or infinite ones in {bad:,} of {len(training.prompts):,} rows")
    hashes = {"barcode_sha256": strings_sha256(map(str, barcodes)), "images_sha256": _bytes_sha256(training.images),
              "prompts_sha256": _bytes_sha256(training.prompts)}
    if validation is not None and validation.prompts.shape[1] != training.prompts.shape[1]:
        raise InputError(name, "width of the validation's embeddings", str(training.prompts.shape[1]), str(validation.prompts.shape[1]))
    record = {"name": name, "sample_ids": [source["sample_id"] for source in sources if "sample_id" in source],
              "n_spots": len(training.images), **hashes, "sha256": strings_sha256(hashes.values())}
    if chosen:
        record["chosen"] = chosen
    training = replace(training, pair_deviations=neighbour_deviations(training.images, training.prompts))
    return GanData(name, training, np.asarray(barcodes), clusters, validation, validation_barcodes, gene_encoder, record, tuple(sources),
                   mlp)


def _bytes_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's numbers in row order, without a copy."""
    return hashlib.sha256(tensor.contiguous().numpy()).hexdigest()


def mean_colour(images: Tensor, rows_at_once: int = 4096) -> Tensor:
    """float32 (3,) in [-1, 1]: the mean of uint8 (N, 3, H, W), summed as whole numbers, a block at a time."""
    total = sum(block.sum(dim=(0, 2, 3)) for block in images.split(rows_at_once))
    return (total.double() / (images.numel() / 3) / 127.5 - 1).float()


def neighbour_deviations(images: Tensor, prompts: Tensor, n_pairs: int = 512) -> Tensor:
    """How much real patches with the most alike prompts (without prompts: any two) differ: (4,) of `pair_deviations`, over at
    most `n_pairs` spots."""
    unit = F.normalize(prompts, dim=1)
    rows = torch.linspace(0, len(unit) - 1, min(n_pairs, len(unit))).long()
    if not prompts.shape[1]:
        return pair_deviations(images_to_float(images[rows]), images_to_float(images[rows.roll(1)]))
    likeness = unit[rows] @ unit.T
    likeness[torch.arange(len(rows)), rows] = -torch.inf
    return pair_deviations(images_to_float(images[rows]), images_to_float(images[likeness.argmax(dim=1)]))
