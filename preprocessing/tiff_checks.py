"""Refuse a TIFF that is truncated or damaged, from its directories alone, before a decoder in C sees it.

Those decoders end the whole process where a directory asks for a tile of 60 GB, and follow directories in a circle for ever.
"""
from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tifffile

from preprocessing.errors import InputError

MAX_TILE_PX = 1 << 26              # pixels of a tile: it is decoded whole, as 4 bytes a pixel
MAX_DIRECTORIES = 1000             # levels, label and overview; a whole-slide image has about ten


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that ends before its directories or its pixels do, or whose tiles are impossible, without decoding any."""
    size = path.stat().st_size
    try:
        with open_tiff(path) as tiff:
            end = max((_checked_end(path, page) for page in _directories(path, tiff)), default=0)
    except InputError:
        raise
    except Exception as error:           # a damaged file ends in whatever the parser stumbles over first
        raise InputError(path, "slide", "a whole TIFF", f"a damaged or truncated one ({type(error).__name__}: {error})") from error
    if not end:
        raise InputError(path, "slide", "a whole TIFF", "one without an image in it (truncated?)")
    if end > size:
        raise InputError(path, "slide", f"a whole TIFF of at least {end:,} bytes", f"{size:,} bytes: it is truncated")


@contextmanager
def open_tiff(path: Path) -> Iterator[tifffile.TiffFile]:
    """tifffile, without its log of everything odd in a damaged file: our one line says what is wrong."""
    log = logging.getLogger("tifffile")
    before, log.disabled = log.disabled, True
    try:
        with tifffile.TiffFile(path) as tiff:
            yield tiff
    finally:
        log.disabled = before


def _directories(path: Path, tiff: tifffile.TiffFile) -> Iterator[tifffile.TiffPage]:
    seen: set[int] = set()
    for page in tiff.pages:
        if page.offset in seen or len(seen) == MAX_DIRECTORIES:
            raise InputError(path, "slide", f"at most {MAX_DIRECTORIES:,} directories of images, one after the other",
                             f"a damaged chain of them (directory {len(seen) + 1:,} at byte {page.offset:,})")
        seen.add(page.offset)
        yield page


def _checked_end(path: Path, page: tifffile.TiffPage) -> int:
    """The first byte behind the pixels of an image whose size and tiles agree; 0 if it has none."""
    if page.is_tiled and page.dataoffsets:
        if not 0 < page.tilewidth * page.tilelength <= MAX_TILE_PX:
            raise InputError(path, "slide", f"tiles of at most {MAX_TILE_PX:,} pixels", f"{page.tilewidth:,} x {page.tilelength:,}")
        n_tiles = int(np.prod(page.chunked, dtype=object))
        if not len(page.dataoffsets) == len(page.databytecounts) == n_tiles:
            raise InputError(path, "slide", f"{n_tiles:,} tiles of {page.tilewidth:,} x {page.tilelength:,} pixels for an image of "
                             f"{page.imagewidth:,} x {page.imagelength:,}", f"{len(page.dataoffsets):,} offsets and "
                             f"{len(page.databytecounts):,} sizes of tiles: the directory is damaged")
    return max((offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)), default=0)
