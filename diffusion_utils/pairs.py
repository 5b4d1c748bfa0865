"""Pair patches with ready-made prompt embeddings: by barcode where both sides know it, never by the order of a directory.

`embeddings.json` beside the .npy says which barcodes its rows are (a hash over them, and the expression file they came from);
`metadata.jsonl` says which barcode a patch is. A foreign folder pairs by the numbers in its file names.
"""
from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_utils.prompts import read_embeddings
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.expression import open_h5ad
from preprocessing.inputs import path_list, read_json
from preprocessing.npy_file import RECORD
from preprocessing.patch_file import read_patch_file
from preprocessing.patches import METADATA, match_barcodes, pair, read_patch_folder
from training.patch_images import PatchImages

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pairs:
    """Patches and their prompts, row by row."""

    patches: PatchImages
    embeddings: Tensor        # (N, D) float32

    def __len__(self) -> int:
        return len(self.embeddings)


def read_pairs(images: str, embeddings: str) -> Pairs:
    """`images`: a patch folder or imgs.h5, or several by commas; `embeddings`: an .npy for each, in the same order."""
    sources, files = path_list(images), path_list(embeddings)
    if not sources:
        raise OptionError("--train-data-dir", "at least one folder or imgs.h5", f"none ({images!r})")
    if len(sources) != len(files):
        raise OptionError("--dataset-embs", f"one .npy for each of the {len(sources)} of --train-data-dir", str(len(files)))
    paths: list[Path] = []
    rows, prompts, width = [], [], None
    for source, file in zip(sources, files, strict=True):
        part = read_embeddings(file, width)
        width = part.shape[1]
        own_paths, own_rows = _paired(source, file, len(part))
        paths += own_paths
        rows.append(own_rows)
        prompts.append(part)
    return Pairs(PatchImages(paths, np.concatenate(rows), sources[0].absolute().parent), torch.cat(prompts))


def _paired(source: Path, file: Path, n_rows: int) -> tuple[list[Path], np.ndarray]:
    """(path, row inside an imgs.h5 or -1) of the patch of every embedding."""
    record = _record(file)
    if source.is_file():
        with read_patch_file(source) as patches:
            barcodes = patches.barcodes
        if not barcodes:
            raise InputError(source, "barcode", "one a patch", "none: patches at random places have no prompt")
        order = _order(source, file, list(barcodes), None, record, n_rows)
        return [source] * len(order), order
    folder = read_patch_folder(source)
    listed = source / METADATA
    if folder.barcodes is None and folder.rows is not None:          # dump_metadata.py without --gex
        _require_count(file, n_rows, len(folder.paths), listed)
        if sorted(folder.rows) != list(range(n_rows)):
            raise InputError(listed, "gex_emb", f"every row 0..{n_rows - 1} once", "others")
        return [folder.paths[i] for i in np.argsort(folder.rows)], np.full(n_rows, -1)
    if folder.barcodes is None:
        names = _recorded_barcodes(file, record) or [str(row) for row in range(n_rows)]
        _require_count(file, n_rows, len(names), source)
        return pair(folder, names, file), np.full(n_rows, -1)
    order = _order(listed, file, folder.barcodes, folder.rows, record, n_rows)
    return [folder.paths[i] for i in order], np.full(n_rows, -1)


def _order(source: Path, file: Path, barcodes: list[str], rows: Sequence[int] | None, record: dict, n_rows: int) -> np.ndarray:
    """int64 (N,): the patch of every embedding."""
    _require_count(file, n_rows, len(barcodes), source)
    in_row_order = np.arange(n_rows) if rows is None else np.argsort(rows, kind="stable")
    recorded = record.get("barcode_sha256")
    if recorded is None:
        if rows is None or sorted(rows) != list(range(n_rows)):
            raise InputError(file, RECORD, "the record that says which barcodes the rows are, as clip_embeddings.py writes it", "none")
        log.warning("%s: no %s beside it; its rows are taken as those of the expression that %s was written with", file, RECORD, source)
        return in_row_order
    if strings_sha256([barcodes[i] for i in in_row_order]) == recorded:
        return in_row_order
    theirs = _recorded_barcodes(file, record)
    if theirs is None:
        raise InputError(file.with_name(RECORD), "barcode_sha256", f"the barcodes of {source} in their order", "others, or another order",
                         f"Keep {record.get('gex') or 'the expression file'} where {RECORD} says it is, or embed this sample again")
    return match_barcodes(barcodes, source, theirs, file)


def _require_count(file: Path, n_rows: int, n_patches: int, source: Path) -> None:
    if n_rows != n_patches:
        raise InputError(file, "rows", f"{n_patches:,}, one a patch of {source}", f"{n_rows:,}")


def prompt_barcodes(file: Path | str, n_rows: int) -> list[str] | None:
    """Barcodes of the rows of an embeddings file, where `embeddings.json` beside it tells them; else None."""
    file = Path(file)
    barcodes = _recorded_barcodes(file, _record(file))
    if barcodes is not None and len(barcodes) != n_rows:
        raise InputError(file, "rows", f"{len(barcodes):,}, as {RECORD} says", f"{n_rows:,}")
    return barcodes


def _record(file: Path) -> dict:
    """What `embeddings.json` says of this file; empty where it says nothing."""
    path = file.parent / RECORD
    content = read_json(path, "a record of embeddings") if path.is_file() else {}
    files = content.get("files") if isinstance(content, dict) else None
    return content if isinstance(files, list) and file.name in files else {}


def _recorded_barcodes(file: Path, record: dict) -> list[str] | None:
    """The barcodes of the rows, read from the expression file that was embedded, if it is still that one."""
    gex = record.get("gex")
    if not isinstance(gex, str) or not os.path.isfile(gex):
        return None
    adata = open_h5ad(gex, backed=True)
    try:
        barcodes = [str(name) for name in adata.obs_names]
    finally:
        adata.file.close()
    return barcodes if strings_sha256(barcodes) == record.get("barcode_sha256") else None
