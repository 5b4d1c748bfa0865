"""Write a patch folder: `patch_<padded row>.png`, `metadata.jsonl` and `stain.json`, complete or not there at all.

Patches are uint8 (H, W, 3) RGB. They go in any blocks into a working folder, which gets its final name once all are there;
who keeps the working folder goes on where a killed run was. Reading and pairing such a folder: `patches.py`.
"""
from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count as count_from
from pathlib import Path

import imagecodecs
import numpy as np

from preprocessing.done_manifests import file_sha256
from preprocessing.errors import first_few
from preprocessing.output_places import FolderKind, require_replaceable
from preprocessing.outputs import finished_folder, flush_to_disk, raise_named, replace_folder
from preprocessing.patch_file import blocks
from preprocessing.patches import METADATA, STAIN

KIND = FolderKind("a patch folder", rf"patch_\d+\.png|{re.escape(METADATA)}|{re.escape(STAIN)}")
PNG_SHARE = 0.4                                                 # bytes of a PNG per byte of its pixels; 0.45 to 0.7 on H&E
FLUSHERS = 8                                                    # files on their way to the disk at a time: waiting, not work
RUN_LENGTHS, PAETH_FILTER = 3, 0x80                             # of zlib and libpng


def encode_png(patch: np.ndarray) -> bytes:
    """A PNG file of uint8 (H, W, 3), with nothing in it but the pixels. Lossless; releases the GIL.

    Paeth's filter and run lengths alone: on H&E as small as zlib's search for repeats makes it, in an eighth of the time.
    """
    return imagecodecs.png_encode(np.ascontiguousarray(patch), level=1, strategy=RUN_LENGTHS, filter=PAETH_FILTER)


# ---- the working folder ---------------------------------------------------------------------------------------------

def name_digits(count: int) -> int:
    """Digits of the row in the names of `count` patches, so that the order of names is the order of rows."""
    return len(str(max(count - 1, 0)))


def png_name(row: int, digits: int) -> str:
    """`patch_0042.png`"""
    return f"patch_{row:0{digits}d}.png"


def write_pngs(folder: Path, first_row: int, patches: Iterable[np.ndarray], digits: int, workers: int) -> None:
    """Write consecutive patches from `first_row` on, over what a killed run left there. They are on the disk when this returns."""
    def write(row: int, patch: np.ndarray) -> Path:
        path = folder / png_name(row, digits)
        try:
            path.write_bytes(encode_png(patch))
        except OSError as error:
            raise_named(error, path)
        return path

    with ThreadPoolExecutor(workers) as pool:
        paths = list(pool.map(write, count_from(first_row), patches))
    with ThreadPoolExecutor(FLUSHERS) as pool:
        list(pool.map(flush_to_disk, [*paths, folder]))


def whole_pngs(working: Path, digits: int) -> int:
    """How many PNG files from row 0 on stand in the working folder without a gap."""
    if not working.is_dir():
        return 0
    present = {entry.name for entry in os.scandir(working)}
    return next(row for row in count_from() if png_name(row, digits) not in present)


def finish_patch_folder(working: Path, folder: Path | str, *, count: int, digits: int, barcodes: Sequence[str] | None, sample_id: str,
                        xy: np.ndarray, stain: dict, record: Callable[[Path], object] | None = None) -> None:
    """Describe the `count` patches in `working` and give it the name `folder`; an older patch folder there is replaced.

    `xy` (count, 2) are centres in level-0 px. What a killed run left in `working` beside the patches is removed. `record(working)`
    sees the complete folder before it has its name: what it writes about the content stands no later than the folder does.
    """
    refuse_foreign_content(folder)
    try:
        _complete(working, [png_name(row, digits) for row in range(count)], barcodes, sample_id, xy, stain)
    except OSError as error:
        raise_named(error, working)
    if record is not None:
        record(working)
    replace_folder(working, folder, KIND)


def _complete(working: Path, names: Sequence[str], barcodes: Sequence[str] | None, sample_id: str, xy: np.ndarray, stain: dict) -> None:
    if len(xy) != len(names) or (barcodes is not None and len(barcodes) != len(names)):
        n_barcodes = "no" if barcodes is None else len(barcodes)
        raise ValueError(f"{len(names)} patches need as many centres and barcodes; got {len(xy)} and {n_barcodes}")
    present = {entry.name for entry in os.scandir(working)}
    missing = [name for name in names if name not in present]
    if missing:
        raise OSError(f"{working}: {first_few(missing)} of {len(names):,} patches are not there; run the command again")
    for name in present.difference(names):
        (working / name).unlink()
    with open(working / METADATA, "w", encoding="utf-8") as stream:
        for row, name in enumerate(names):
            line = {"file_name": name}
            if barcodes is not None:
                line["barcode"] = str(barcodes[row])
            line |= {"sample_id": sample_id, "x": float(xy[row][0]), "y": float(xy[row][1])}
            if barcodes is not None:
                line["gex_emb"] = row
            stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    (working / STAIN).write_text(json.dumps(stain, indent=2) + "\n")
    for path in (working / METADATA, working / STAIN, working):
        flush_to_disk(path)


# ---- the finished folder --------------------------------------------------------------------------------------------

def write_patch_folder(folder: Path | str, patches: Iterable[np.ndarray], *, barcodes: Sequence[str] | None, sample_id: str,
                       xy: np.ndarray, stain: dict, workers: int = 2) -> None:
    """Write a patch folder in one go; `xy` (N, 2) centres fix the number of patches.

    The folder appears when it is complete; an older patch folder is replaced, any other folder is left alone.
    """
    refuse_foreign_content(folder)
    count, digits, written = len(xy), name_digits(len(xy)), 0
    with finished_folder(folder, sync=False, kind=KIND) as working:      # a torn PNG is noticed when it is read
        for block in blocks(patches):
            write_pngs(working, written, block, digits, workers)
            written += len(block)
        if written != count:
            raise ValueError(f"{folder}: {count} patches were announced, {written} came")
        _complete(working, [png_name(row, digits) for row in range(count)], barcodes, sample_id, xy, stain)


def refuse_foreign_content(folder: Path | str) -> None:
    """Writing replaces the whole folder, so nothing in it may be anybody else's."""
    require_replaceable(folder, KIND)


def patch_folder_sha256(folder: Path | str) -> str:
    """SHA-256 over `metadata.jsonl`, `stain.json` and the name and size of every `patch_*.png`: tells a damaged folder."""
    folder = Path(folder)
    texts = [f"{name} {file_sha256(folder / name)}" for name in (METADATA, STAIN) if (folder / name).is_file()]
    images = [f"{path.name} {path.stat().st_size}" for path in sorted(folder.glob("patch_*.png"))]
    return hashlib.sha256("\n".join(texts + images).encode()).hexdigest()
