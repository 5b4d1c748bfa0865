"""Paired rows that CLIP trains on - patches or cached features - and batches of them drawn by step number.

A batch is a function of (seed, step) alone, so a resumed run sees exactly what an uninterrupted one would have seen.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from networks.sample_scaling import SampleScaling
from training.augment import N_DRAWS, AugmentConfig, apply_views, plain_views, views_from
from training.patch_cache import PatchRows
from training.sample_centres import SamplePatches


class Batch(NamedTuple):
    """What one step sees; row i of everything is one spot."""

    seen: Tensor         # images (n, 3, H, W) in [-1, 1] | cached features (n, F) | all cached views (n, K, F)
    expression: Tensor   # (n, G)
    samples: Tensor      # int64 (n,): number of the sample
    centre: Tensor | None = None   # (n, F) mean features of each row's sample, with model.feature_sample_scaling


@dataclass
class Pairs(Dataset):
    """Paired rows: `images` (in memory or mapped) or cached `features`, whichever training reads."""

    expression: sp.csr_matrix          # (N, G) float32, normalised
    barcodes: np.ndarray               # (N,) "sample__barcode"
    sample_ids: np.ndarray             # (N,) str
    images: Tensor | PatchRows | None  # uint8 (N, 3, H, W)
    sample_numbers: np.ndarray         # int64 (N,)
    scaling: SampleScaling | None = None   # of expression, by these numbers
    features: Tensor | None = None     # float32 (N, K, F)
    sample_patches: SamplePatches | None = None   # with feature_sample_scaling
    feature_centres: Tensor | None = None   # float32 (S, F) mean features of these, by these numbers
    augment: AugmentConfig | None = None   # None: the plain view, for validation
    seed: int = 0
    is_whole: bool = True              # no spot of its samples was left out

    def __len__(self) -> int:
        return len(self.barcodes)

    def __getitems__(self, keys: list[tuple[int, int]]) -> Batch:
        """A batch of (step, row) keys."""
        rows = torch.tensor([row for _, row in keys])
        samples = torch.from_numpy(self.sample_numbers[rows.numpy()])
        centre = None if self.feature_centres is None else self.feature_centres[samples]
        return Batch(self._seen(rows, keys), self.dense_expression(rows.numpy()), samples, centre)

    def dense_expression(self, rows: np.ndarray) -> Tensor:
        """float32 (n, G) of these rows, as the model takes it."""
        dense = torch.from_numpy(self.expression[rows].toarray())
        return dense if self.scaling is None else self.scaling(dense, torch.from_numpy(self.sample_numbers[rows]))

    def _seen(self, rows: Tensor, keys: list[tuple[int, int]]) -> Tensor:
        if self.features is not None:
            return self.features[rows] if self.augment is None else self.features[rows, self._views_of(keys)]
        if self.augment is None:
            return apply_views(self.images[rows], plain_views(len(rows)))
        uniform = torch.cat([torch.rand(1, N_DRAWS, generator=self._generator(key)) for key in keys])
        return apply_views(self.images[rows], views_from(uniform, self.augment))

    def _views_of(self, keys: list[tuple[int, int]]) -> Tensor:
        n_views = self.features.shape[1]
        return torch.stack([torch.randint(n_views, (), generator=self._generator(key)) for key in keys])

    def _generator(self, key: tuple[int, int]) -> torch.Generator:
        step, row = key
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * 1_000_003 + row)


class StepBatches(Sampler):
    """Batches of (step, row) keys of one epoch, from the step that training has reached; whole batches only.

    Each rank gets its share of the same global batch.
    """

    def __init__(self, n_rows: int, batch_size: int, seed: int, step: Callable[[], int], rank: int = 0, world_size: int = 1):
        self.n_rows, self.batch_size, self.seed, self.step = n_rows, batch_size, seed, step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.n_rows // self.batch_size

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        epoch, first = divmod(self.step(), len(self))
        order = np.random.default_rng((self.seed, epoch)).permutation(self.n_rows)
        for place in range(first, len(self)):
            rows = order[place * self.batch_size:(place + 1) * self.batch_size][self.rank::self.world_size]
            yield [(epoch * len(self) + place, int(row)) for row in rows]


def whole_batch(batch):
    """Collate nothing: `Pairs.__getitems__` returns finished batches."""
    return batch
