"""Read patches by row, one or many sources: uint8 from a folder of images or an `imgs.h5`, one by one, all at once, or packed.

Knows nothing of expression: `training/data.py` pairs it, and a run without prompts uses the patches alone.
"""
from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor

from preprocessing.errors import InputError, OptionError
from preprocessing.outputs import MIB
from preprocessing.patch_file import PatchFile, read_patch_file
from preprocessing.patches import read_patch, read_patch_folder
from preprocessing.progress import ProgressBar
from training.patch_cache import AUTO_CACHE, BLOCK_ROWS, FOLDER, WORTH_KEEPING_MIB, PatchRows, cache_key, packed_patches


class PatchImages:
    """Patches in the order of `paths`. Safe with workers: an HDF5 file is opened by the process that reads it."""

    def __init__(self, paths: Sequence[Path], rows: np.ndarray, folder: Path, image_px: int | None = None):
        self._every_image, self._kept = (paths, rows), None     # (path, row) of all spots; row numbers of those kept, None: all
        self.image_paths: list[Path] = list(paths)      # of an imgs.h5: the file, once a row
        self.image_rows: np.ndarray = rows              # (N,) row inside an imgs.h5; -1 for a PNG
        self.images_folder, self.image_px = folder, image_px
        self._open_files: dict[Path, PatchFile] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        return len(self.image_paths)

    def keep(self, rows: np.ndarray) -> None:
        """Leave out all but these ascending row numbers."""
        if len(rows) == len(self):
            return
        self._kept = rows if self._kept is None else self._kept[rows]
        self.image_paths, self.image_rows = [self.image_paths[i] for i in rows], self.image_rows[rows]

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
        with ProgressBar(total=len(self), desc="patches", unit="patch", disable=not progress) as bar:
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


def read_patch_images(sources: Sequence[Path | str]) -> tuple[PatchImages, np.ndarray, list[str]]:
    """The patches of folders or `imgs.h5` files, one after the other, without expression.

    Also a name of each, (N,) str: its barcode, else its file's name or row, after the name of its source; and the sources' names.
    """
    paths: list[Path] = []
    rows, names, source_names = [], [], []
    for source in map(Path, sources):
        if source.is_dir():
            folder = read_patch_folder(source)
            own = folder.barcodes or [path.name for path in folder.paths]
            paths += folder.paths
            rows.append(np.full(len(own), -1))
        else:
            with read_patch_file(source) as file:
                own = file.barcodes or [str(row) for row in range(len(file))]
            paths += [source] * len(own)
            rows.append(np.arange(len(own)))
        name = source.absolute().parent.name
        source_names.append(name if name not in source_names else f"{name}_{len(source_names) + 1}")
        names += [f"{source_names[-1]}__{barcode}" for barcode in own]
    return PatchImages(paths, np.concatenate(rows), Path(sources[0]).absolute().parent), np.array(names), source_names


def random_subset(n_rows: int, max_size: int, seed: int, option: str = "max_size") -> np.ndarray:
    """At most `max_size` of `n_rows` row numbers, ascending."""
    if max_size < 1:
        raise OptionError(option, "at least 1", str(max_size))
    if max_size >= n_rows:
        return np.arange(n_rows)
    return np.sort(np.random.default_rng(seed).choice(n_rows, max_size, replace=False))
