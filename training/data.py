"""Pair patches with expression, one or many samples: the only door through which training sees data.

Reads a patch folder or `imgs.h5` beside a `gex_filt.h5ad` per sample (`SampleFiles`), verifies the pairing by barcode and
normalises expression once, per sample. Images stay uint8 (3, H, W); `networks.layers` turns them into floats.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils.data import Dataset

from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.expression import (
    RAW_COUNTS,
    normalise_expression,
    read_expression,
    recorded_barcode_sha256,
    recorded_sample_id,
    spot_positions,
)
from preprocessing.patch_file import read_patch_file
from preprocessing.patches import PatchFolder, match_barcodes, pair, read_patch_folder
from training.patch_images import PatchImages, random_subset
from training.sample_sheet import SampleFiles, recorded_name, require_unique_samples

TargetSum = float | Literal["median"]


# ---- expression of one or many samples ------------------------------------------------------------------------------

@dataclass(frozen=True)
class ExpressionTable:
    """Normalised expression of one or many samples, row i of everything one spot."""

    gene_names: list[str]          # G symbols, in order
    barcodes: np.ndarray           # (N,) "sample_id__barcode"
    sample_ids: np.ndarray         # (N,) str
    expression: sp.csr_matrix      # (N, G) float32
    centre_xy_px: np.ndarray       # (N, 2) float64, level-0 px; NaN where a sample has none
    obs: pd.DataFrame              # rows keyed by `barcodes`; column `cluster` where known

    def rows(self, index: np.ndarray) -> ExpressionTable:
        """The rows of `index`, in its order."""
        return ExpressionTable(self.gene_names, self.barcodes[index], self.sample_ids[index], self.expression[index],
                               self.centre_xy_px[index], self.obs.iloc[index])


def expression_only(samples: Sequence[SampleFiles] | Path | str, *, target_sum: TargetSum = "median",
                    vocabulary: Sequence[str] | None = None, already_normalised: bool = False,
                    hint: str = RAW_COUNTS) -> ExpressionTable:
    """Expression without images: prompts. `samples` may be the path of one h5ad; `hint`: see `read_expression`."""
    if isinstance(samples, (str, Path)):
        path = Path(samples)
        samples = [SampleFiles(recorded_name(path) or path.absolute().parent.name, path.parent, path)]
    tables = [table for table, _ in _tables(samples, target_sum, vocabulary, already_normalised, hint)]
    return _stack(tables)


def _tables(samples: Sequence[SampleFiles], target_sum: TargetSum, vocabulary: Sequence[str] | None, already_normalised: bool, hint: str):
    """One (table, AnnData) a sample, after its genes were compared with the vocabulary, or with the first sample's."""
    if not samples:
        raise OptionError("samples", "at least one", "none")
    reference = "the vocabulary of the weights"
    for sample in samples:
        adata = read_expression(sample.gex, already_normalised=already_normalised, hint=hint)
        genes = adata.var_names.tolist()
        if vocabulary is None:
            vocabulary, reference = genes, str(sample.gex)
        _require_same_genes(sample.gex, genes, list(vocabulary), reference)
        values = adata.X.astype(np.float32) if already_normalised else normalise_expression(adata.X, target_sum)
        keys = np.array([f"{sample.sample_id}__{barcode}" for barcode in adata.obs_names])
        known_xy = spot_positions(adata, sample.gex)
        xy = np.full((adata.n_obs, 2), np.nan) if known_xy is None else known_xy
        obs = adata.obs.copy()
        obs.index = keys
        yield ExpressionTable(genes, keys, np.full(adata.n_obs, sample.sample_id), values, xy, obs), adata


def _require_same_genes(path: Path, genes: list[str], vocabulary: list[str], reference: str) -> None:
    if genes == vocabulary:
        return
    place, expected, found = next((i, a, b) for i, (a, b) in enumerate(zip_longest(vocabulary, genes)) if a != b)
    raise InputError(path, "var_names", f"the {len(vocabulary):,} genes of {reference} in their order",
                     f"{len(genes):,}; first difference at gene {place + 1}: {expected or 'no gene'} expected, {found or 'no gene'} found",
                     "Run `python -m preprocessing.gex_preprocessing` with one vocabulary for all")


def _stack(tables: list[ExpressionTable]) -> ExpressionTable:
    def joined(name):
        return np.concatenate([getattr(table, name) for table in tables])

    expression = sp.vstack([table.expression for table in tables], format="csr")
    obs = pd.concat([table.obs for table in tables])
    if "cluster" in obs:                       # samples may hold different labels: one set of categories for all
        obs["cluster"] = obs["cluster"].astype(object).astype("category")
    return ExpressionTable(tables[0].gene_names, joined("barcodes"), joined("sample_ids"), expression, joined("centre_xy_px"), obs)


# ---- the data set ---------------------------------------------------------------------------------------------------

class ImageGeneDataset(PatchImages, Dataset):
    """Row i: (patch uint8 (3, H, W), expression float32 (G,)) of one spot, in h5ad order, sample after sample.

    `max_size` keeps a random subset drawn with `seed`.
    """

    def __init__(self, samples: Sequence[SampleFiles], *, target_sum: TargetSum = "median", vocabulary: Sequence[str] | None = None,
                 image_px: int | None = None, max_size: int | None = None, already_normalised: bool = False,
                 transform: Callable[[Tensor], Tensor] | None = None, seed: int = 0, hint: str = RAW_COUNTS):
        require_unique_samples(samples, "samples")
        tables, paths, rows = [], [], []
        for sample, (table, adata) in zip(samples, _tables(samples, target_sum, vocabulary, already_normalised, hint), strict=True):
            sample_paths, sample_rows, xy = _pair_sample(sample, adata)
            if xy is not None and np.isnan(table.centre_xy_px).all():
                table.centre_xy_px[:] = xy
            tables.append(table)
            paths += sample_paths
            rows.append(sample_rows)
        self._take(_stack(tables))
        self.transform = transform
        super().__init__(paths, np.concatenate(rows), samples[0].images.absolute().parent, image_px)
        if max_size is not None:
            self.keep(random_subset(len(self), max_size, seed))

    def _take(self, table: ExpressionTable) -> None:
        self._table = table
        self.gene_names, self.barcodes, self.sample_ids = table.gene_names, table.barcodes, table.sample_ids
        self.expression, self.centre_xy_px, self.obs = table.expression, table.centre_xy_px, table.obs

    def keep(self, rows: np.ndarray) -> None:
        """Leave out all but these ascending row numbers."""
        super().keep(rows)
        if len(rows) < len(self.barcodes):
            self._take(self._table.rows(rows))

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(self.read_image(i, self.image_px)).permute(2, 0, 1).contiguous()
        return (image if self.transform is None else self.transform(image)), self.expression_row(i)

    def expression_row(self, i: int) -> Tensor:
        """float32 (G,) of row i."""
        start, end = self.expression.indptr[i], self.expression.indptr[i + 1]
        dense = np.zeros(self.expression.shape[1], dtype=np.float32)
        dense[self.expression.indices[start:end]] = self.expression.data[start:end]
        return torch.from_numpy(dense)


def _pair_sample(sample: SampleFiles, adata: ad.AnnData) -> tuple[list[Path], np.ndarray, np.ndarray | None]:
    """Path and row (-1: the whole file) of the patch of every h5ad row, and centres where the patches know them."""
    barcodes, recorded, xy = adata.obs_names.tolist(), recorded_barcode_sha256(adata), spot_positions(adata, sample.gex)
    if not sample.images.exists():
        raise InputError(sample.images, "images", "a patch folder or an imgs.h5", "nothing there")
    if sample.images.is_dir():
        folder = read_patch_folder(sample.images)
        paths = pair(folder, barcodes, sample.gex, recorded, xy)
        _require_same_sample(sample, folder, adata)
        if folder.centre_xy_px is None:
            return paths, np.full(len(paths), -1), None
        place = {path: i for i, path in enumerate(folder.paths)}
        return paths, np.full(len(paths), -1), folder.centre_xy_px[[place[path] for path in paths]]
    with read_patch_file(sample.images) as file:
        if file.barcodes is None:
            raise InputError(sample.images, "barcode", "one a patch", "none: patches at random places have no expression")
        order = match_barcodes(file.barcodes, sample.images, barcodes, sample.gex, recorded,
                               patch_xy_px=file.recorded_xy_px, centre_xy_px=xy)
        name, of_expression = str(file.attrs.get("name", "")), recorded_sample_id(adata)
        if name and of_expression is not None and name != of_expression:
            raise InputError(sample.images, "sample_id", f"{of_expression}, as {sample.gex} says", name)
        return [sample.images] * len(order), order, file.centre_xy_px[order]


def _require_same_sample(sample: SampleFiles, folder: PatchFolder, adata: ad.AnnData) -> None:
    """Two sections can hold the very same barcodes; where both files name the sample of a spot, the names must agree."""
    if folder.sample_ids is None or "sample_id" not in adata.obs:
        return
    of_expression = recorded_sample_id(adata)
    expected = dict(zip(adata.obs_names, adata.obs["sample_id"].astype(str), strict=True)) if of_expression is None else {}
    keys = folder.barcodes or [path.name for path in folder.paths]
    foreign = [(found, key) for key, found in zip(keys, folder.sample_ids, strict=True)
               if found != (of_expression or expected.get(key, found))]
    if foreign:
        ids, patches = sorted({found for found, _ in foreign}), [key for _, key in foreign]
        raise InputError(sample.images, "sample_id", f"{of_expression or 'that of every spot'}, as {sample.gex} says",
                         f"{', '.join(ids[:5])} of {first_few(patches)}")


# ---- validation inside a sample -------------------------------------------------------------------------------------

def spatial_block_split(centre_xy_px: np.ndarray, sample_ids: np.ndarray, val_fraction: float, buffer_px: float,
                        seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers (train, val): of every sample one compact block of `val_fraction` of its spots is held out.

    Training spots nearer than `buffer_px` in x and y to a held-out spot belong to neither, so that with a buffer of one
    patch no pixel is seen on both sides.
    """
    if not 0 < val_fraction < 1:
        raise OptionError("val_fraction", "between 0 and 1", str(val_fraction))
    generator = np.random.default_rng(seed)
    train, val = [], []
    for sample_id in pd.unique(np.asarray(sample_ids)):
        rows = np.flatnonzero(np.asarray(sample_ids) == sample_id)
        xy = np.asarray(centre_xy_px, dtype=np.float64)[rows]
        if not np.isfinite(xy).all():
            raise InputError(sample_id, "obsm['spatial']", "the position of every spot", "none for some: a spatial split needs them")
        held = max(1, round(val_fraction * len(rows)))
        middle = xy[generator.integers(len(rows))]
        inside = np.zeros(len(rows), dtype=bool)
        inside[np.argsort(((xy - middle) ** 2).sum(axis=1), kind="stable")[:held]] = True
        distance, _ = cKDTree(xy[inside]).query(xy, p=np.inf)
        val.append(rows[inside])
        train.append(rows[~inside & (distance >= buffer_px)])
    train_rows, val_rows = np.concatenate(train), np.concatenate(val)
    if not len(train_rows):
        raise OptionError("val_fraction", "some spots left to train on", f"none outside the block and its buffer of {buffer_px:g} px")
    return train_rows, val_rows
