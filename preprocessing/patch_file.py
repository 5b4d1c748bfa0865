"""Write and read `imgs.h5`: patches in HEST's schema, streamed, with the barcode and the top-left corner of each.

Patches are uint8 (H, W, 3) RGB. `coords` are the (x, y) of a patch's top-left corner in level-0 pixels.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import h5py
import numpy as np

from preprocessing.compressed_chunks import GZIP, compress_if_worthwhile, write_chunk
from preprocessing.errors import InputError
from preprocessing.hdf5_output import HDF5_ERRORS, hdf5_output
from preprocessing.inputs import require_file, require_unique
from preprocessing.outputs import finished_file, require_free_space

BLOCK = 64                                                      # patches held in memory while streaming


def write_patch_file(path: Path | str, patches: Iterable[np.ndarray], *, count: int, patch_px: int, coords: np.ndarray,
                     barcodes: Sequence[str] | None, patch_size_src: float, pixel_size: float, name: str) -> None:
    """Stream exactly `count` patches uint8 (patch_px, patch_px, 3) into `path`.

    coords int64 (count, 2) top-left at level 0; `barcodes` is None for random patches. `patch_size_src` is the side cut from
    level 0 in px, `pixel_size` the µm per level-0 px, `name` the sample id.
    """
    write_compressed_patches(path, (compress_patch(patch, patch_px) for patch in patches), count=count, patch_px=patch_px, coords=coords,
                             barcodes=barcodes, patch_size_src=patch_size_src, pixel_size=pixel_size, name=name)


def compress_patch(patch: np.ndarray, patch_px: int) -> bytes | memoryview:
    """One patch as the chunk it becomes in the file."""
    if patch.shape != (patch_px, patch_px, 3) or patch.dtype != np.uint8:
        raise ValueError(f"a patch of uint8 ({patch_px}, {patch_px}, 3) was announced, {patch.dtype} {patch.shape} came")
    return compress_if_worthwhile(patch)


def write_compressed_patches(path: Path | str, streams: Iterable[bytes | memoryview], *, count: int, patch_px: int, coords: np.ndarray,
                             barcodes: Sequence[str] | None, patch_size_src: float, pixel_size: float, name: str) -> None:
    """As `write_patch_file`, for patches that went through `compress_patch`, in worker threads maybe."""
    coords = np.asarray(coords)
    if coords.shape != (count, 2) or (barcodes is not None and len(barcodes) != count):
        n_barcodes = "no" if barcodes is None else len(barcodes)
        raise ValueError(f"{count} patches need as many coords and barcodes; got {coords.shape} and {n_barcodes}")
    attributes = {"patch_size_src": patch_size_src, "patch_size_target": patch_px, "downsample": patch_size_src / patch_px,
                  "pixel_size": pixel_size, "name": name}
    require_free_space(Path(path).parent, count * patch_px * patch_px * 3)
    with finished_file(path, validate=lambda temporary: _require_complete(temporary, path, count)) as temporary:
        with hdf5_output(temporary) as file:
            shape = (patch_px, patch_px, 3)
            images = file.create_dataset("img", (count, *shape), np.uint8, **({"chunks": (1, *shape), **GZIP} if count else {}))
            positions = file.create_dataset("coords", data=coords.astype(np.int64))
            if barcodes is not None:
                text = np.array([str(barcode) for barcode in barcodes], dtype=object).reshape(-1, 1)
                file.create_dataset("barcode", data=text, dtype=h5py.string_dtype("utf-8"))
            for dataset in (images, positions):
                dataset.attrs.update(attributes)
            written = 0
            for stream in streams:
                if written < count:
                    write_chunk(images, (written, 0, 0, 0), stream)
                written += 1
            if written != count:
                raise ValueError(f"{path}: {count} patches were announced, {written} came")


def blocks(items: Iterable, length: int = BLOCK) -> Iterator[list]:
    """Lists of `length` items, the last one shorter."""
    iterator = iter(items)
    while block := list(islice(iterator, length)):
        yield block


def _require_complete(temporary: Path, path: Path | str, count: int) -> None:
    with read_patch_file(temporary) as file:
        if len(file) != count or (count and file.images(slice(count - 1, count)).shape[0] != 1):
            raise OSError(f"{path}: only {len(file)} of {count} patches reached the disk")


class PatchFile:
    """An open `imgs.h5`. `barcodes` is None for random patches; `attrs` holds HEST's attributes of `img`."""

    def __init__(self, path: Path, file: h5py.File):
        self.path, self._file, self._images = path, file, file["img"]
        self.coords: np.ndarray = file["coords"][:].astype(np.int64)             # (N, 2) top-left, level 0
        self.barcodes: list[str] | None = _barcodes(file)
        self.attrs: dict = {**dict(file["coords"].attrs), **dict(self._images.attrs)}
        self._side_px = float(self.attrs.get("patch_size_src", self.patch_px))

    def __len__(self) -> int:
        return self._images.shape[0]

    @property
    def patch_px(self) -> int:
        return self._images.shape[1]

    @property
    def centre_xy_px(self) -> np.ndarray:
        """(N, 2) float64: centres in level-0 px."""
        return self.coords + self._side_px / 2

    @property
    def recorded_xy_px(self) -> np.ndarray | None:
        """`centre_xy_px` where the file says how large its patches are on the slide, else None."""
        return self.centre_xy_px if "patch_size_src" in self.attrs else None

    def images(self, rows: slice | int) -> np.ndarray:
        """uint8 (n, H, W, 3) of a slice; (H, W, 3) of one row."""
        try:
            return self._images[rows]
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(self.path, "img", f"readable patches at {rows}", str(error)) from error

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> PatchFile:
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _barcodes(file: h5py.File) -> list[str] | None:
    for key in ("barcode", "barcodes"):                          # HEST has shipped both names
        if key in file:
            return [value.decode() if isinstance(value, bytes) else str(value) for value in file[key][:].ravel()]
    return None


def read_patch_file(path: Path | str) -> PatchFile:
    """Open and check an `imgs.h5`; use it as a context manager."""
    path = require_file(path, "an HDF5 file of patches")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(path, "file", "an HDF5 file of patches", f"{path.stat().st_size:,} bytes that HDF5 cannot read") from error
    try:
        _check_schema(path, file)
        return PatchFile(path, file)
    except InputError:
        file.close()
        raise
    except HDF5_ERRORS as error:
        file.close()
        raise InputError(path, "file", "an HDF5 file of patches", f"one that cannot be read ({error})") from error


def _check_schema(path: Path, file: h5py.File) -> None:
    missing = {"img", "coords"} - set(file)
    if missing:
        raise InputError(path, "datasets", "`img` and `coords`", f"no {' and no '.join(sorted(missing))}")
    images, coords = file["img"], file["coords"]
    count = len(coords)
    if coords.ndim != 2 or coords.shape[1] != 2 or coords.dtype.kind not in "iuf":
        raise InputError(path, "coords", "numbers (N, 2): x, y", f"{coords.dtype} {coords.shape}")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(path, "img", "uint8 (N, H, W, 3)", f"{images.dtype} {images.shape}")
    if len(images) != count:
        raise InputError(path, "coords", f"{len(images)} rows, one a patch", f"{count}")
    barcodes = _barcodes(file)
    if barcodes is not None:
        if len(barcodes) != count:
            raise InputError(path, "barcode", f"{count} rows, one a patch", f"{len(barcodes)}")
        require_unique(path, "barcode", barcodes)
