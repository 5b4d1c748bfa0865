"""Open a slide and read regions of level 0: OpenSlide for pyramids, Pillow and tifffile for flat images.

A region is uint8 (height, width, 3) RGB, whatever the file holds; transparent pixels are white. A file that cannot be
read ends as an `InputError` when it is opened, a region that cannot be decoded as a `SlideReadError` that names it.
Pixels are taken as stored: an orientation tag is not applied, as positions were measured on the stored pixels.
"""
from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import openslide
import tifffile
from PIL import Image, UnidentifiedImageError

from preprocessing.errors import InputError
from preprocessing.mpp import plausible_mpp

MAX_FLAT_PX = 1_500_000_000        # a flat image is decoded whole: 4.5 GB; larger ones must come as pyramids
MAPPED_BYTES = 1 << 30             # a flat TIFF above this is decoded into a temporary memory-mapped file
BAND_BYTES = 64 << 20              # pixels in memory at a time while a thumbnail is made
MAGIC = {"JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG",), "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")}
FLAT_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".btf": "TIFF"}
PHOTOMETRIC, COMPRESSION = tifffile.PHOTOMETRIC, tifffile.COMPRESSION
JPEGS = (COMPRESSION.JPEG, COMPRESSION.OJPEG)
_pillow_lock = threading.Lock()


class SlideReadError(InputError):
    """One region of a slide cannot be decoded. The slide stays usable for other regions."""


def open_slide(path: Path | str) -> Slide:
    """Open a slide, checking at once what can be checked without decoding a pyramid."""
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "slide", "a file", "a folder" if path.is_dir() else "nothing at this path")
    with open(path, "rb") as stream:
        head = stream.read(4)
    if not head:
        raise InputError(path, "slide", "an image", "a file of zero bytes")
    found = next((name for name, magics in MAGIC.items() if head.startswith(magics)), None)
    expected = FLAT_SUFFIXES.get(path.suffix.lower())
    if expected and found != expected:
        raise InputError(path, "slide", f"{expected}, as the extension {path.suffix} says", found or "none of JPEG, PNG, TIFF")
    if found == "TIFF":
        _check_tiff_is_whole(path)
    if openslide.OpenSlide.detect_format(str(path)) is None and expected:
        return FlatSlide(path, found)
    return PyramidSlide(path)


class Slide(ABC):
    """A slide of `width_px` x `height_px` level-0 pixels; a context manager. `mpp` is None unless stated and plausible."""

    def __init__(self, path: Path, width_px: int, height_px: int, declared_mpp: float | None):
        self.path, self.width_px, self.height_px = path, int(width_px), int(height_px)
        self.declared_mpp = declared_mpp                                     # as the file says, plausible or not
        self.mpp = declared_mpp if plausible_mpp(declared_mpp) else None

    def read_region(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Level-0 pixels of a rectangle that lies inside the slide, uint8 (height, width, 3) RGB."""
        self._require_inside(x, y, width, height)
        return self._read(int(x), int(y), int(width), int(height))

    def thumbnail(self, max_px: int) -> np.ndarray:
        """The whole slide with its longer side at `max_px` (never enlarged), uint8 (h, w, 3), each pixel an area mean.

        Read in bands, so memory stays small for a one-level slide too."""
        shrink = max(1.0, max(self.width_px, self.height_px) / max_px)
        width, height = max(1, round(self.width_px / shrink)), max(1, round(self.height_px / shrink))
        level, level_width, level_height = self._level_for(shrink)
        rows = max(1, int(BAND_BYTES / (4 * level_width) * height / level_height))      # output rows a band
        bands = []
        for first in range(0, height, rows):
            last = min(first + rows, height)
            top, bottom = first * level_height / height, last * level_height / height
            above = int(top)
            band = self._read_level(level, above, min(int(np.ceil(bottom)), level_height) - above)
            box = (0, top - above, level_width, min(bottom - above, len(band)))
            bands.append(np.asarray(Image.fromarray(band).resize((width, last - first), Image.Resampling.BOX, box=box)))
        return np.concatenate(bands)

    @abstractmethod
    def close(self) -> None:
        """Free the handle; reading afterwards is an error."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _require_inside(self, x, y, width, height) -> None:
        if width < 1 or height < 1 or x < 0 or y < 0 or x + width > self.width_px or y + height > self.height_px:
            raise ValueError(f"{self.path}: region x={x} y={y} {width} x {height} is not inside {self.width_px} x {self.height_px}")

    @abstractmethod
    def _read(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """Level-0 pixels of a rectangle known to be inside."""

    def _level_for(self, shrink: float) -> tuple[int, int, int]:
        return 0, self.width_px, self.height_px

    def _read_level(self, level: int, top: int, height: int) -> np.ndarray:
        """Full-width rows of a level, uint8 (height, level width, 3)."""
        return self._read(0, top, self.width_px, height)


class PyramidSlide(Slide):
    """A slide that OpenSlide opens; decodes only what is read."""

    def __init__(self, path: Path):
        self._handle = _open_handle(path)
        width, height = self._handle.dimensions
        super().__init__(path, width, height, _declared_mpp(self._handle.properties))

    def close(self) -> None:
        self._handle.close()

    def _read(self, x, y, width, height) -> np.ndarray:
        return self._decode(x, y, 0, width, height)

    def _decode(self, x: int, y: int, level: int, width: int, height: int) -> np.ndarray:
        try:
            image = self._handle.read_region((x, y), level, (width, height))
        except openslide.OpenSlideError as error:
            broken, self._handle = self._handle, _open_handle(self.path)   # OpenSlide answers nothing more on one that has failed
            broken.close()
            raise SlideReadError(self.path, f"region x={x} y={y} {width} x {height} of level {level}", "pixels",
                                 f"a tile that cannot be decoded ({error})") from error
        return on_white(np.asarray(image))

    def _level_for(self, shrink):
        level = self._handle.get_best_level_for_downsample(shrink * 1.01)    # levels are rarely exact powers of two
        return (level, *self._handle.level_dimensions[level])

    def _read_level(self, level, top, height):
        downsample = self._handle.level_downsamples[level]
        return self._decode(0, round(top * downsample), level, self._handle.level_dimensions[level][0], height)


class FlatSlide(Slide):
    """A JPEG, PNG or flat TIFF, decoded whole when opened."""

    def __init__(self, path: Path, image_format: str):
        self._pixels, declared_mpp = _decode_tiff(path) if image_format == "TIFF" else (_decode_with_pillow(path), None)
        super().__init__(path, self._pixels.shape[1], self._pixels.shape[0], declared_mpp)

    def close(self) -> None:
        self._pixels = np.empty((0, 0, 3), np.uint8)

    def _read(self, x, y, width, height) -> np.ndarray:
        return np.array(self._pixels[y:y + height, x:x + width])


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


def _open_handle(path: Path) -> openslide.OpenSlide:
    try:
        return openslide.OpenSlide(str(path))
    except openslide.OpenSlideError as error:              # OpenSlideUnsupportedFormatError is one of these
        raise InputError(path, "slide", "a slide that OpenSlide can open, or a JPEG, PNG or TIFF", str(error)) from error


def _declared_mpp(properties) -> float | None:
    """Mean of mpp-x and mpp-y; None where absent, no number, or pixels that are not square within 2 %."""
    try:
        across, down = (float(properties[name]) for name in ("openslide.mpp-x", "openslide.mpp-y"))
    except (KeyError, ValueError):
        return None
    return (across + down) / 2 if abs(across - down) <= 0.02 * across else None


def _check_tiff_is_whole(path: Path) -> None:
    """Refuse a TIFF that ends before its directories or its pixels do, without decoding any."""
    size = path.stat().st_size
    try:
        with tifffile.TiffFile(path) as tiff:
            ends = [offset + count for page in tiff.pages for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    except (tifffile.TiffFileError, ValueError, IndexError, KeyError, TypeError, OSError) as error:
        raise InputError(path, "slide", "a whole TIFF", f"a damaged or truncated one ({error})") from error
    if not ends:
        raise InputError(path, "slide", "a whole TIFF", "one without an image in it (truncated?)")
    if max(ends) > size:
        raise InputError(path, "slide", f"a whole TIFF of at least {max(ends):,} bytes", f"{size:,} bytes: it is truncated")


def _decode_tiff(path: Path) -> tuple[np.ndarray, float | None]:
    """Pixels of the first image, uint8 RGB, and the mpp of its resolution tags."""
    try:
        with tifffile.TiffFile(path) as tiff:
            page = tiff.pages[0]
            _require_flat_size(path, page.imagewidth, page.imagelength)
            _require_known_colours(path, page)
            pixels = page.asarray(out="memmap" if page.nbytes > MAPPED_BYTES else None)
            if page.planarconfig == tifffile.PLANARCONFIG.SEPARATE and pixels.ndim == 3:
                pixels = np.moveaxis(pixels, 0, 2)
            if page.photometric == PHOTOMETRIC.PALETTE:
                pixels = (page.colormap.T >> 8).astype(np.uint8)[pixels]                # a colour map has 16 bits a channel
            elif page.photometric == PHOTOMETRIC.MINISWHITE:
                np.subtract(255, pixels, out=pixels)
            resolution, unit = page.get_resolution(), page.resolutionunit
    except (tifffile.TiffFileError, ValueError, IndexError, RuntimeError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(path, "slide", "a TIFF that can be decoded", str(error)) from error
    um_per_unit = {2: 25_400.0, 3: 10_000.0}.get(int(unit))
    return on_white(pixels), um_per_unit / resolution[0] if um_per_unit and resolution[0] > 0 else None


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


def _decode_with_pillow(path: Path) -> np.ndarray:
    try:
        with _pillow_unlimited(), Image.open(path) as image:
            _require_flat_size(path, *image.size)
            if image.mode.startswith(("I", "F")):
                raise InputError(path, "slide", "8 bits a channel", f"mode {image.mode}")
            return on_white(np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB")))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(path, "slide", "an image that can be decoded", str(error)) from error


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
