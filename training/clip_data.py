"""Bring the samples of a configuration into the form CLIP trains on: read, paired, split, with features and centres computed once."""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from networks.clip import CLIP
from networks.histo_models import Encoder
from networks.sample_scaling import fit_sample_scaling, patches_for_mean, require_whole_samples
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.expression import recorded_scale
from training.augment import plain_views, turned_views
from training.clip_config import ClipConfig
from training.clip_features import cached_features, compute_features, view_table
from training.clip_pairs import Pairs
from training.data import ImageGeneDataset, spatial_block_split
from training.patch_images import random_subset
from training.sample_centres import SamplePatches
from training.sample_sheet import SampleFiles

HASHED_ROWS = 512         # patches in memory at once, of those that lie on a disk


@dataclass
class ClipData:
    train: Pairs
    val: Pairs | None
    gene_names: list[str]
    record: dict            # what the weights say about their training data
    split: dict | None      # barcodes of a spatial split, to be saved
    sha256: str             # over every row of both, in their order: a run goes on with the very same alone


def load_clip_data(config: ClipConfig, resolve: Callable[[str], Path]) -> ClipData:
    """Read, pair and split the samples that the config names. Image features are not computed here."""
    train_files, val_files = config.data.train_and_val(resolve)
    options = {"target_sum": config.data.target_sum, "already_normalised": config.data.already_normalised, "image_px": config.data.patch_px,
               "hint": "Give the raw counts, or say that it is meant with data.already_normalised=true"}
    dataset = ImageGeneDataset(train_files, **options)
    cache_dir = config.data.patch_cache(resolve)
    train, split, val = _pairs(dataset, config, cache_dir, max_size=config.data.max_size), None, None
    if val_files:
        val = _pairs(ImageGeneDataset(val_files, vocabulary=dataset.gene_names, **options), config, cache_dir, training=False)
        if not len(val):
            raise InputError(val_files[0].gex, "rows", "at least 2 validation spots", "0")
    elif config.data.val_fraction > 0:
        buffer_px = config.data.val_buffer_px
        buffer_px = _patch_side_px(train_files, dataset) if buffer_px is None else buffer_px
        rows, held = spatial_block_split(dataset.centre_xy_px, dataset.sample_ids, config.data.val_fraction, buffer_px, config.seed)
        split = {"buffer_px": buffer_px, "train": dataset.barcodes[rows].tolist(), "val": dataset.barcodes[held].tolist()}
        train, val = _subset(train, rows), _subset(train, held, training=False)
    _require_enough(train, val, config)
    names = sorted({str(name) for name in dataset.sample_ids})
    if len(names) == 1 and (config.trainer.contrast == "within_sample" or config.trainer.batch_mmd):
        raise OptionError("trainer.contrast, trainer.batch_mmd", "several training samples, or contrast=all and batch_mmd=0", names[0])
    record = {"samples": names, "n_spots": len(train), "n_val_spots": len(val) if val else 0,
              "patch_px": config.data.patch_px}
    return ClipData(train, val, dataset.gene_names, record, split, _sha256(train, val))


def use_features(data: ClipData, tower: Encoder, config: ClipConfig, resolve: Callable[[str], Path], device: torch.device | str) -> None:
    """Replace the patches of `data` by cached features: K views each for training, the test views for validation."""
    image = config.image
    options = {"tower_key": f"{tower.source}@{tower.input_px}px", "device": device,
               "cache_dir": resolve(image.cache_dir) if image.cache_dir else None, "progress": config.trainer.progress_bar}
    views = view_table(len(data.train), image.cache_features, image.augment, config.seed)
    data.train.features = cached_features(data.train.images, views, tower, **options)
    data.train.images = None
    if data.val is not None:
        views = (turned_views() if config.model.image_views == 8 else plain_views(1)).expand(len(data.val), -1, -1)
        data.val.features = cached_features(data.val.images, views, tower, **options)
        data.val.images = None


def centre_features(data: ClipData, tower: Encoder, config: ClipConfig, device: torch.device | str) -> None:
    """With `model.feature_sample_scaling`, note the mean features of each whole sample."""
    if config.model.feature_sample_scaling == "none":
        return
    data.train.feature_centres = _mean_features(data.train, tower, config.model.image_views, device)
    if data.val is not None:
        data.val.feature_centres = data.train.feature_centres if data.split else \
            _mean_features(data.val, tower, config.model.image_views, device)


def _mean_features(pairs: Pairs, tower: Encoder, n_views: int, device: torch.device | str) -> Tensor:
    """(S, F); from the cached features, where these hold every spot in just the views that an embedding averages."""
    if not (pairs.is_whole and pairs.features is not None and _holds_plain_views(pairs, n_views)):
        return pairs.sample_patches.mean_features(tower, n_views=n_views, device=device)
    rows = [patches_for_mean(pairs.sample_numbers, number) for number in range(len(pairs.sample_patches.openers))]
    return torch.stack([pairs.features[own, :n_views].mean((0, 1)) for own in rows])


def _holds_plain_views(pairs: Pairs, n_views: int) -> bool:
    augment = pairs.augment        # see view_table: view 0 is plain, the next seven are turned and, by chance, recoloured
    return augment is None or n_views == 1 or (pairs.features.shape[1] >= n_views and augment.flip and augment.rotate
                                               and not augment.recolours)


def fit_inputs(clip: CLIP, data: ClipData, tower: Encoder, device: torch.device | str) -> None:
    """Fit the model's input scaling to the training rows."""
    train = data.train
    expression = train.dense_expression(np.arange(len(train)))
    shares = None if train.scaling is None else torch.from_numpy((train.expression != 0).mean(axis=0).A1)
    rows = np.arange(len(train)) if train.features is not None else patches_for_mean(np.zeros(len(train), int), 0)
    features = compute_features(train.images[torch.from_numpy(rows)], plain_views(1).expand(len(rows), -1, -1), tower, device=device,
                                progress=False) if train.features is None else train.features[rows]
    centres = None if train.feature_centres is None else \
        train.feature_centres[train.sample_numbers[rows]].repeat_interleave(features.shape[1], dim=0)
    clip.fit_inputs(expression, features.flatten(0, 1), gene_shares=shares, centres=centres)


def _pairs(dataset: ImageGeneDataset, config: ClipConfig, cache_dir: Path | str | None, training: bool = True,
           max_size: int | None = None) -> Pairs:
    """At most `max_size` rows of the data set. What scales and centres a sample is of all its spots, as wherever it is embedded."""
    numbers = np.unique(dataset.sample_ids, return_inverse=True)[1]
    model, scaling, sample_patches = config.model, None, None
    if model.needs_whole_samples:
        require_whole_samples(numbers, dataset.sample_ids)
    if len(dataset):
        scaling = fit_sample_scaling(dataset.expression, numbers, model.gene_sample_scaling)
    if len(dataset) and model.feature_sample_scaling != "none":
        sample_patches = SamplePatches.of(dataset, numbers, cache_dir=cache_dir)
    n_spots = len(dataset)
    if max_size is not None:
        kept = random_subset(n_spots, max_size, config.seed)
        dataset.keep(kept)
        numbers = numbers[kept]
    images = dataset.open_patches(progress=config.trainer.progress_bar, cache_dir=cache_dir) if len(dataset) else None
    return Pairs(dataset.expression, dataset.barcodes, dataset.sample_ids, images, numbers, scaling, sample_patches=sample_patches,
                 augment=config.image.augment if training else None, seed=config.seed, is_whole=len(dataset) == n_spots)


def _subset(pairs: Pairs, rows: np.ndarray, training: bool = True) -> Pairs:
    """Some rows; expression stays scaled by the whole sample, as it will be wherever the sample is embedded."""
    return replace(pairs, expression=pairs.expression[rows], barcodes=pairs.barcodes[rows], sample_ids=pairs.sample_ids[rows],
                   images=pairs.images.subset(rows), sample_numbers=pairs.sample_numbers[rows], is_whole=False,
                   augment=pairs.augment if training else None)


def _sha256(*parts: Pairs | None) -> str:
    digest = hashlib.sha256()
    for pairs in parts:
        if pairs is None:
            continue
        digest.update(strings_sha256(map(str, pairs.barcodes)).encode())
        for values in (pairs.expression.indptr, pairs.expression.indices, pairs.expression.data):
            digest.update(np.ascontiguousarray(values))
        for rows in torch.arange(len(pairs)).split(HASHED_ROWS):
            digest.update(pairs.images[rows].contiguous().numpy())
    return digest.hexdigest()


def _require_enough(train: Pairs, val: Pairs | None, config: ClipConfig) -> None:
    if len(train) < config.trainer.batch_size:
        raise OptionError("trainer.batch_size", f"at most the {len(train)} training spots (a batch of one has nothing to contrast)",
                          str(config.trainer.batch_size))
    if val is not None and len(val) < 2:
        raise InputError("validation", "spots", "at least 2", str(len(val)),
                         "Give data.val_gex, or a larger data.val_fraction, or 0 for none")


def _patch_side_px(files: list[SampleFiles], dataset: ImageGeneDataset) -> float:
    """Level-0 px of one patch, as the expression file records it; where none does, 1.5 times the distance of two spots."""
    sides = []
    for file in files:
        recorded = recorded_scale(file.gex)
        if len(recorded) == 2:
            sides.append(recorded["patch_um"] / recorded["mpp"])
    if sides:
        return max(sides)
    distance, _ = cKDTree(dataset.centre_xy_px).query(dataset.centre_xy_px, k=2)
    return 1.5 * float(np.median(distance[:, 1]))
