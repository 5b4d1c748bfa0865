"""Refuse a TIFF that is truncated or damaged, from its directories alone, before a decoder in C sees it."""
from __future__ import annotations

from pathlib import Path

import tifffile

from preprocessing.errors import InputError


def check_tiff(path: Path) -> None:
    """Refuse a TIFF that ends before its directories or its pixels do, without decoding any."""
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            ends = [offset + count for page in tiff.pages for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    except Exception as error:           # a damaged file ends in whatever the parser stumbles over first
        raise InputError(path, "slide", "a whole TIFF", f"a damaged or truncated one ({type(error).__name__}: {error})") from error
    if not ends:
        raise InputError(path, "slide", "a whole TIFF", "one without an image in it (truncated?)")
    if max(ends) > size:
        raise InputError(path, "slide", f"a whole TIFF of at least {max(ends):,} bytes", f"{size:,} bytes: it is truncated")
