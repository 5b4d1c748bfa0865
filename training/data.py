"""Pair patches with expression, one or many samples: the only door through which training sees data.

Reads a patch folder or `imgs.h5` beside a `gex_filt.h5ad` per sample (`SampleFiles`), verifies the pairing by barcode and
normalises expression once, per sample. Images stay uint8 (3, H, W); `networks.layers` turns them into floats.
"""
from __future__ import annotations

import csv
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
import PIL
import scipy.sparse as sp
import torch
from PIL import Image
from scipy.spatial import cKDTree
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from preprocessing.errors import InputError, OptionError, first_few, read_text, require_file
from preprocessing.expression import (
    RAW_COUNTS,
    normalise_expression,
    read_expression,
    recorded_barcode_sha256,
    recorded_sample_id,
    spot_positions,
)
from preprocessing.outputs import MIB
from preprocessing.patch_file import PatchFile, read_patch_file
from preprocessing.patches import PatchFolder, match_barcodes, pair, read_patch, read_patch_folder
from training.patch_cache import AUTO_CACHE, BLOCK_ROWS, FOLDER, WORTH_KEEPING_MIB, PatchRows, cache_key, packed_patches

SPLITS = ("train", "val", "test")
TargetSum = float | Literal["median"]


@dataclass(frozen=True)
class SampleFiles:
    """Where one sample lies."""

    sample_id: str
    images: Path               # a patch folder or an imgs.h5
    gex: Path                  # gex_filt.h5ad
    split: str = "train"       # one of SPLITS


def sample_files(images: str | Path, gex: str | Path) -> list[SampleFiles]:
    """Two comma-separated lists of equal length -> samples, named as `obs['sample_id']` says, else by the folder of the h5ad."""
    image_paths = [Path(part.strip()) for part in str(images).split(",") if part.strip()]
    gex_paths = [Path(part.strip()) for part in str(gex).split(",") if part.strip()]
    if len(image_paths) != len(gex_paths) or not gex_paths:
        raise OptionError("images and expression", "two comma-separated lists of equal length", f"{len(image_paths)} and {len(gex_paths)}")
    if len(set(gex_paths)) < len(gex_paths):
        raise OptionError("expression", "every file once", f"{gex}")
    names: list[str] = []
    for path in gex_paths:
        name = _recorded_name(path) or path.absolute().parent.name
        names.append(name if name not in names else f"{name}_{len(names) + 1}")
    return [SampleFiles(*files) for files in zip(names, image_paths, gex_paths, strict=True)]


def _recorded_name(gex: Path) -> str | None:
    require_file(gex, "an .h5ad file")
    try:
        adata = ad.read_h5ad(gex, backed="r")
    except (OSError, KeyError, ValueError, AttributeError, TypeError):
        return None                            # read_expression says later what is wrong with it
    try:
        return recorded_sample_id(adata)
    finally:
        adata.file.close()


def read_sample_sheet(path: Path | str) -> list[SampleFiles]:
    """A CSV with the columns sample_id, images, gex and (optional) split. Relative paths: beside the sheet, else in the working folder."""
    path = Path(path)
    reader = csv.DictReader(io.StringIO(read_text(path, "a sample sheet (CSV)"), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if "".join(map(str, filter(None, row.values()))).strip()]   # no lines of commas
        columns = reader.fieldnames or []
    except csv.Error as error:
        raise InputError(path, f"line {reader.line_num}", "comma-separated text", str(error)) from error
    missing = [column for column in ("sample_id", "images", "gex") if column not in columns]
    if missing or not rows:
        raise InputError(path, "columns" if missing else "rows", "sample_id, images, gex, split" if missing else "one a sample",
                         f"no {', '.join(missing)}" if missing else "none")

    def resolve(name: str) -> Path:
        beside = path.parent / name
        return beside if beside.exists() else Path(name)

    samples = []
    for number, row in rows:
        empty = [column for column in ("sample_id", "images", "gex") if not (row[column] or "").strip()]
        split = (row.get("split") or "train").strip()
        if empty or split not in SPLITS:
            raise InputError(path, f"line {number}", f"every column filled and split one of {', '.join(SPLITS)}",
                             f"no {', '.join(empty)}" if empty else f"split {split}")
        samples.append(SampleFiles(row["sample_id"].strip(), resolve(row["images"].strip()), resolve(row["gex"].strip()), split))
    _require_unique_samples(samples, path)
    return samples


def _require_unique_samples(samples: Sequence[SampleFiles], path: Path | str) -> None:
    names = [sample.sample_id for sample in samples]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(path, "sample_id", "every sample once", f"repeated {first_few(repeated)}")


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
        samples = [SampleFiles(_recorded_name(path) or path.absolute().parent.name, path.parent, path)]
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

class ImageGeneDataset(Dataset):
    """Row i: (patch uint8 (3, H, W), expression float32 (G,)) of one spot, in h5ad order, sample after sample.

    `max_size` keeps a random subset drawn with `seed`. Safe with workers: an HDF5 file is opened by the process that reads it.
    """

    def __init__(self, samples: Sequence[SampleFiles], *, target_sum: TargetSum = "median", vocabulary: Sequence[str] | None = None,
                 image_px: int | None = None, max_size: int | None = None, already_normalised: bool = False,
                 transform: Callable[[Tensor], Tensor] | None = None, seed: int = 0, hint: str = RAW_COUNTS):
        _require_unique_samples(samples, "samples")
        tables, paths, rows = [], [], []
        for sample, (table, adata) in zip(samples, _tables(samples, target_sum, vocabulary, already_normalised, hint), strict=True):
            sample_paths, sample_rows, xy = _pair_sample(sample, adata)
            if xy is not None and np.isnan(table.centre_xy_px).all():
                table.centre_xy_px[:] = xy
            tables.append(table)
            paths += sample_paths
            rows.append(sample_rows)
        table, rows = _stack(tables), np.concatenate(rows)
        self._every_image, self._kept = (paths, rows), None     # (path, row) of all spots; row numbers of those kept, None: all
        if max_size is not None and max_size < len(rows):
            if max_size < 1:
                raise OptionError("max_size", "at least 1", str(max_size))
            self._kept = kept = np.sort(np.random.default_rng(seed).choice(len(rows), max_size, replace=False))
            table, rows, paths = table.rows(kept), rows[kept], [paths[i] for i in kept]
        self.gene_names, self.barcodes, self.sample_ids = table.gene_names, table.barcodes, table.sample_ids
        self.expression, self.centre_xy_px, self.obs = table.expression, table.centre_xy_px, table.obs
        self.image_paths: list[Path] = paths            # of an imgs.h5: the file, once a row
        self.image_rows: np.ndarray = rows              # (N,) row inside an imgs.h5; -1 for a PNG
        self.images_folder = samples[0].images.absolute().parent
        self.image_px, self.transform = image_px, transform
        self._open_files: dict[Path, PatchFile] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.image_paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        image = torch.from_numpy(self.read_image(i, self.image_px)).permute(2, 0, 1).contiguous()
        return (image if self.transform is None else self.transform(image)), self.expression_row(i)

    def expression_row(self, i: int) -> Tensor:
        """float32 (G,) of row i."""
        start, end = self.expression.indptr[i], self.expression.indptr[i + 1]
        dense = np.zeros(self.expression.shape[1], dtype=np.float32)
        dense[self.expression.indices[start:end]] = self.expression.data[start:end]
        return torch.from_numpy(dense)

    def read_image(self, i: int, image_px: int | None = None) -> np.ndarray:
        """uint8 (H, W, 3) of row i, resized to `image_px` if given: by area when smaller, bicubic when larger."""
        return self._read(self.image_paths[i], int(self.image_rows[i]), image_px)

    def _read(self, path: Path, row: int, image_px: int | None) -> np.ndarray:
        patch = read_patch(path) if row < 0 else self._file(path).images(row)
        if patch.shape[0] != patch.shape[1]:
            raise InputError(path, "size", "a square patch", f"{patch.shape[1]} x {patch.shape[0]} px")
        if image_px is None or image_px == patch.shape[0]:
            return patch
        how = Image.Resampling.BOX if image_px < patch.shape[0] else Image.Resampling.BICUBIC
        return np.array(Image.fromarray(patch).resize((image_px, image_px), how))

    def load_images(self, image_px: int | None = None, progress: bool = True, cache_dir: Path | str | None = None) -> Tensor:
        """All patches: uint8 (N, 3, px, px), mapped from the file of a cache (`open_patches`), or in memory: without one, or a subset."""
        patches = self.open_patches(image_px, progress, cache_dir)
        return patches.array if patches.rows is None else patches[torch.arange(len(patches))]

    def open_patches(self, image_px: int | None = None, progress: bool = True, cache_dir: Path | str | None = None) -> PatchRows:
        """All patches at `image_px`, which defaults to the data set's, then to the patches' own size.

        `cache_dir`: None reads them into memory; a folder keeps them packed there and maps them; "auto" does so in a hidden folder
        beside the first sample's images, if they are many and it can be written to. Kept are those of every spot, of which a
        subset takes its rows: all seeds and sizes of a subset share one file.
        """
        px = image_px or self.image_px or self.read_image(0).shape[0]
        resized = image_px is not None or self.image_px is not None
        n_bytes = len(self) * 3 * px * px
        if cache_dir is not None and (cache_dir != AUTO_CACHE or n_bytes >= WORTH_KEEPING_MIB * MIB):
            folder = Path(cache_dir) if cache_dir != AUTO_CACHE else self.images_folder / FOLDER
            how = {"resized": resized, "smaller": "box", "larger": "bicubic"}
            paths, rows = self._every_image
            key = cache_key(paths, rows.tolist(), px, how, folder.absolute(), program=f"pillow {PIL.__version__}")

            def read(start: int, stop: int) -> np.ndarray:
                return self._read_block(paths[start:stop], rows[start:stop], px, resized)

            path = packed_patches(key, folder.absolute(), read, must=cache_dir != AUTO_CACHE, progress=progress)
            if path is not None:
                return PatchRows(path, None if self._kept is None else torch.from_numpy(self._kept))
        images = np.empty((len(self), 3, px, px), np.uint8)
        with tqdm(total=len(self), desc="patches", unit="patch", disable=not progress) as bar:
            for start in range(0, len(self), BLOCK_ROWS):
                part = slice(start, start + BLOCK_ROWS)
                images[part] = self._read_block(self.image_paths[part], self.image_rows[part], px, resized)
                bar.update(len(images[part]))
        return PatchRows(torch.from_numpy(images))

    def _read_block(self, paths: Sequence[Path], rows: np.ndarray, px: int, resized: bool) -> np.ndarray:
        """uint8 (n, 3, px, px), decoded by several threads."""
        block = np.empty((len(paths), 3, px, px), np.uint8)

        def read(i: int) -> None:
            patch = self._read(paths[i], int(rows[i]), px if resized else None)
            if patch.shape[0] != px:
                raise InputError(paths[i], "size", f"{px} x {px} px as the first patch", f"{patch.shape[1]} x {patch.shape[0]}",
                                 "Choose one size with image_px")
            block[i] = patch.transpose(2, 0, 1)

        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            for _ in pool.map(read, range(len(paths))):
                pass
        return block

    def _file(self, path: Path) -> PatchFile:
        if self._pid != os.getpid():                   # forked: the parent's handle shares its state with us
            for file in self._open_files.values():
                file.close()
            self._open_files, self._pid = {}, os.getpid()
        if path not in self._open_files:
            self._open_files[path] = read_patch_file(path)
        return self._open_files[path]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open_files": {}}


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
