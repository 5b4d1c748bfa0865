"""Pack a data set's patches into one memory-mapped array, so that training reads them without decoding a PNG again.

A cache is `<data set>-<content>.npy`, uint8 (N, 3, px, px), and a small JSON with its checksum. The first half of the name says
which patches, at which size and how resized, the second what they looked like (names, sizes, times of change, order): a changed
patch or another order is another cache, and the old one of the same patches is removed when the new one is built.
"""
from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from preprocessing.done_manifests import fingerprint, strings_sha256
from preprocessing.output_places import UNFINISHED
from preprocessing.outputs import MIB, finished_file, locked, require_free_space, write_json

FORMAT = 1                        # of the array and of the key
AUTO_CACHE = "auto"               # a folder FOLDER beside the first images, if they are many
FOLDER = ".patch_cache"
WORTH_KEEPING_MIB = 128           # smaller sets are read in a second or two: no cache unless a place is named
CHECKED_MIB = 2048                # of a larger cache so many blocks of 1 MiB, evenly spread, enter the checksum
BLOCK_ROWS = 512                  # patches in memory while a cache is built
WAIT_S = 24 * 3600                # for another process that is building the same cache
REPLACED = "a patch, the order of the spots or the version of Pillow has changed since"


def cache_place(said: str | None) -> str | None:
    """What a user says of a cache -> None (nothing said, or `none` or `null` in any case: in memory), `auto`, or a folder's path."""
    word = (said or "").strip().lower()
    return None if word in ("", "none", "null") else AUTO_CACHE if word == AUTO_CACHE else said


# ---- patches that every process can open ----------------------------------------------------------------------------

@dataclass
class PatchRows:
    """Some rows of an array of patches: `patches[rows]` -> uint8 (n, 3, px, px).

    The array is a tensor in memory, or a cache file that every process maps for itself: a worker is sent its path.
    """

    source: Tensor | Path
    rows: Tensor | None = None         # (n,) int64; None: all

    def __post_init__(self):
        self.array: Tensor = self.source if isinstance(self.source, Tensor) else map_patches(self.source)   # all rows; no copy

    def __len__(self) -> int:
        return len(self.array) if self.rows is None else len(self.rows)

    def __getitem__(self, index: int | Tensor) -> Tensor:
        index = index if self.rows is None else self.rows[index]
        return self.array.index_select(0, index) if isinstance(index, Tensor) and index.dim() == 1 else self.array[index]

    def subset(self, rows: np.ndarray) -> PatchRows:
        """The rows `rows` of these, by number: nothing is copied."""
        index = torch.from_numpy(rows)
        return replace(self, rows=index if self.rows is None else self.rows[index])

    def __reduce__(self):
        return PatchRows, (self.source, self.rows)


def map_patches(path: Path) -> Tensor:
    """uint8 (N, 3, px, px) that shares the file's pages. Writing to it would change this process's copy alone, never the file."""
    return torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))


# ---- which cache ----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CacheKey:
    """What a cache holds. Two keys with one `dataset` are the same patches, changed, in another order or made by another program."""

    dataset: str                       # hash over which patches, at which size and how resized
    content: str                       # hash over everything the array depends on
    shape: tuple[int, int, int, int]   # (N, 3, px, px)

    @property
    def name(self) -> str:
        return f"{self.dataset}-{self.content}"

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))


def cache_key(paths: Sequence[Path], rows: Sequence[int], px: int, how: Mapping[str, object], beside: Path, *, program: str) -> CacheKey:
    """The key of patches in the order of `paths`; `rows` are those inside an HDF5 file, -1 for a PNG.

    `how`: the way they are resized; `program`: what resizes them, with its version. Paths count as seen from the folder `beside`,
    so that a moved sample keeps its cache.
    """
    folders = {folder: os.path.relpath(folder, beside) for folder in {path.parent for path in paths}}
    marks: dict[Path, str] = {}
    for path, row in zip(paths, rows, strict=True):
        if path not in marks:
            marks[path] = _png_mark(path) if row < 0 else json.dumps(fingerprint(path))
    names = [f"{folders[path.parent]}/{path.name}:{row}" for path, row in zip(paths, rows, strict=True)]
    frame = json.dumps([FORMAT, px, how], sort_keys=True)
    content = [frame, program, *(f"{name} {marks[path]}" for name, path in zip(names, paths, strict=True))]
    return CacheKey(strings_sha256([frame, *sorted(names)])[:16], strings_sha256(content)[:32], (len(paths), 3, px, px))


def _png_mark(path: Path) -> str:
    """Size and time of change: a patch replaced by one of equal size is noticed without reading a million files."""
    about = os.stat(path)
    return f"{about.st_size} {about.st_mtime_ns}"


# ---- find or build --------------------------------------------------------------------------------------------------

def packed_patches(key: CacheKey, folder: Path, read: Callable[[int, int], np.ndarray], *, must: bool,
                   progress: bool = True) -> Path | None:
    """The cache file of `key` in `folder`, built now if need be; `read(start, stop)` -> uint8 (n, 3, px, px).

    Two processes may ask at once: one builds, the other waits and uses it. Where nothing can be written there is an `OSError`,
    or, unless `must`, a notice and None.
    """
    path = folder / f"{key.name}.npy"
    if is_whole(path, key):
        return path
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / key.dataset, WAIT_S))
            if is_whole(path, key):                  # built while we waited
                return path
            _remove_stale(key, folder, progress)
            require_free_space(folder, key.n_bytes)
        except OSError as error:
            if must or error.errno == errno.EAGAIN:
                raise
            _say(f"no packed patches in {folder} ({error.strerror or error}): read into memory; a cache folder of your own would keep them")
            return None
        _build(path, key, read, progress)
    if progress:
        _say(f"packed {key.shape[0]:,} patches in {path}")
    return path


def _build(path: Path, key: CacheKey, read: Callable[[int, int], np.ndarray], progress: bool) -> None:
    from preprocessing.progress import ProgressBar

    with finished_file(path) as temporary:
        # plain writes rather than a mapping: on a full disk they raise, where a mapping kills the process
        bar = ProgressBar(total=key.shape[0], desc="packing patches", unit="patch", disable=not progress)
        with open(temporary, "wb") as stream, bar:
            np.lib.format.write_array_header_1_0(stream, {"descr": "|u1", "fortran_order": False, "shape": key.shape})
            for start in range(0, key.shape[0], BLOCK_ROWS):
                block = read(start, min(start + BLOCK_ROWS, key.shape[0]))
                stream.write(block.data)
                bar.update(len(block))
    write_json(path.with_suffix(".json"), {"shape": key.shape, "bytes": path.stat().st_size, "sha256": spread_sha256(path)})


def is_whole(path: Path, key: CacheKey) -> bool:
    """True if the cache stands: finished, of its full size, and with the bytes it was finished with."""
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        expected = {"shape": list(key.shape), "bytes": path.stat().st_size}
        return isinstance(about, dict) and about | expected == about and about.get("sha256") == spread_sha256(path)
    except (OSError, ValueError):
        return False


def spread_sha256(path: Path) -> str:
    """SHA-256 of a file up to 2 GiB; of a larger one that of 2,048 blocks spread over it, both ends among them: two seconds at most."""
    digest, blocks = hashlib.sha256(), -(-path.stat().st_size // MIB)
    with open(path, "rb") as stream:
        for block in range(blocks) if blocks <= CHECKED_MIB else np.linspace(0, blocks - 1, CHECKED_MIB).astype(int):
            stream.seek(int(block) * MIB)
            digest.update(stream.read(MIB))
    return digest.hexdigest()


def _remove_stale(key: CacheKey, folder: Path, progress: bool) -> None:
    """Remove what was built of these patches at this size as they were, and what a killed build left. The caller holds the lock."""
    for old in sorted(folder.glob(f"{key.dataset}-*")):
        if not re.fullmatch(r"[0-9a-f]+-[0-9a-f]+\.(npy|json)", re.sub(UNFINISHED, "", old.name)):
            continue                                 # somebody's copy
        old.unlink(missing_ok=True)
        if progress and old.suffix == ".npy":
            _say(f"removed {old}: " + ("damaged" if old.stem == key.name else REPLACED))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
