"""Decode a JPEG, PNG or flat TIFF whole and hand out regions of it as RGB.

The pixels are kept as they are stored (grey, palette, with alpha) and become RGB region by region: 1 Gpx of RGB takes 3 GB as a TIFF
(on disk, in the folder for temporary files, above MAPPED_BYTES) and 4 GB as a JPEG or PNG, with no second copy at any time.
"""
from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image

from preprocessing.errors import InputError
from preprocessing.tiff_checks import open_tiff

MAX_FLAT_PX = 1_500_000_000        # a flat image is decoded whole; larger ones must come as pyramids
MAPPED_BYTES = 1 << 30             # a flat TIFF above this is decoded into a temporary memory-mapped file
BUFFER_BYTES = 32 << 20            # compressed bytes of a TIFF read at a time
PHOTOMETRIC, COMPRESSION = tifffile.PHOTOMETRIC, tifffile.COMPRESSION
JPEGS = (COMPRESSION.JPEG, COMPRESSION.OJPEG)
_pillow_lock = threading.Lock()


@dataclass(frozen=True)
class TiffPixels:
    """The pixels of a flat TIFF as stored: uint8 (H, W) or (H, W, 3 or 4), in memory or mapped."""

    stored: np.ndarray
    palette: np.ndarray | None = None        # uint8 (256, 3): `stored` are its rows
    white_is_zero: bool = False

    @property
    def size(self) -> tuple[int, int]:
        return self.stored.shape[1], self.stored.shape[0]

    def region(self, x: int, y: int, width: int, height: int) -> Image.Image:
        """RGB of a rectangle inside the image."""
        pixels = np.ascontiguousarray(self.stored[y:y + height, x:x + width])
        if self.palette is not None:
            pixels = self.palette[pixels]
        return Image.fromarray(on_white(255 - pixels if self.white_is_zero else pixels))


@dataclass(frozen=True)
class PillowPixels:
    """The pixels of a JPEG or PNG in Pillow's mode of the file."""

    stored: Image.Image

    @property
    def size(self) -> tuple[int, int]:
        return self.stored.size

    def region(self, x: int, y: int, width: int, height: int) -> Image.Image:
        """RGB of a rectangle inside the image."""
        part = self.stored.crop((x, y, x + width, y + height))
        return as_rgb(part.convert("RGBA")) if part.has_transparency_data else part.convert("RGB")


def decode_flat(path: Path, image_format: str) -> tuple[TiffPixels | PillowPixels, float | None]:
    """The pixels of a flat image and the mpp that its file declares."""
    return _decode_tiff(path) if image_format == "TIFF" else (_decode_with_pillow(path), None)


def on_white(pixels: np.ndarray) -> np.ndarray:
    """uint8 (h, w), (h, w, 3) or (h, w, 4) -> RGB (h, w, 3); alpha is composited on white."""
    if pixels.ndim == 2:
        return np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 3:
        return pixels
    alpha = pixels[..., 3:].astype(np.uint16)
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(pixels[..., :3])
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def as_rgb(rgba: Image.Image) -> Image.Image:
    """`on_white` of a Pillow image; four times as fast where nothing is transparent."""
    if rgba.getchannel("A").getextrema() == (255, 255):
        return rgba.convert("RGB")
    return Image.fromarray(on_white(np.asarray(rgba)))


def _decode_tiff(path: Path) -> tuple[TiffPixels, float | None]:
    try:
        with open_tiff(path) as tiff:
            page = tiff.pages[0]
            _require_flat_size(path, page.imagewidth, page.imagelength)
            _require_known_colours(path, page)
            stored = page.asarray(out="memmap" if page.nbytes > MAPPED_BYTES else None, buffersize=BUFFER_BYTES)
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and stored.ndim == 3:
                stored = np.moveaxis(stored, 0, 2)
            if stored.shape[:2] != (page.imagelength, page.imagewidth) or stored.shape[2:] not in ((), (3,), (4,)):
                raise InputError(path, "slide", f"pixels of {page.imagelength:,} rows and {page.imagewidth:,} columns",
                                 f"an array {stored.shape}: the directory is damaged")
            palette = (page.colormap.T >> 8).astype(np.uint8) if page.photometric == PHOTOMETRIC.PALETTE else None    # 16 bits a channel
            resolution, unit = page.get_resolution(), page.resolutionunit
    except InputError:
        raise
    except Exception as error:           # a damaged file ends in whatever the parser stumbles over first
        raise InputError(path, "slide", "a TIFF that can be decoded", f"{type(error).__name__}: {error}") from error
    um_per_unit = {2: 25_400.0, 3: 10_000.0}.get(int(unit))
    mpp = um_per_unit / resolution[0] if um_per_unit and resolution[0] > 0 else None
    return TiffPixels(stored, palette, page.photometric == PHOTOMETRIC.MINISWHITE), mpp


def _require_known_colours(path: Path, page: tifffile.TiffPage) -> None:
    """Refuse pixels that are not 8-bit grey, RGB or of a palette; YCbCr is decoded to RGB with its JPEG, and only there."""
    channels = {PHOTOMETRIC.MINISWHITE: (1,), PHOTOMETRIC.MINISBLACK: (1,), PHOTOMETRIC.PALETTE: (1,), PHOTOMETRIC.RGB: (3, 4),
                PHOTOMETRIC.YCBCR: (3,) if page.compression in JPEGS else ()}.get(page.photometric, ())
    eight_bits = page.dtype == np.uint8 and (page.bitspersample == 8 or page.photometric == PHOTOMETRIC.PALETTE)
    if not eight_bits or page.samplesperpixel not in channels:
        raise InputError(path, "slide", "8-bit grey, RGB or RGBA, a palette, or YCbCr in JPEG",
                         f"{page.samplesperpixel} channels of {page.dtype}, {page.bitspersample} bits, "
                         f"{getattr(page.photometric, 'name', page.photometric)}, {getattr(page.compression, 'name', page.compression)}",
                         "Convert it to RGB")


def _decode_with_pillow(path: Path) -> PillowPixels:
    try:
        with _pillow_unlimited(), open(path, "rb") as stream:
            image = Image.open(stream)
            _require_flat_size(path, *image.size)
            if image.mode.startswith(("I", "F")):
                raise InputError(path, "slide", "8 bits a channel", f"mode {image.mode}")
            image.load()
    except InputError:
        raise
    except Exception as error:           # as above
        raise InputError(path, "slide", "an image that can be decoded", f"{type(error).__name__}: {error}") from error
    return PillowPixels(image)


def _require_flat_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_FLAT_PX:
        raise InputError(path, "slide", f"at most {MAX_FLAT_PX:,} pixels in a flat image", f"{width:,} x {height:,}",
                         "Convert it to a tiled pyramidal TIFF, which is read piece by piece")


@contextmanager
def _pillow_unlimited() -> Iterator[None]:
    """Lift Pillow's guard against decompression bombs for one slide that the user named, whose size is checked before it is
    decoded; everybody else keeps the guard."""
    with _pillow_lock:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = before
