"""Open a slide and read regions of level 0: OpenSlide for pyramids, Pillow and tifffile for flat images.

A region is RGB, whatever the file holds: uint8 (height, width, 3), or a Pillow image; transparent pixels are white. A file that
cannot be read ends as an `InputError` when it is opened, a region that cannot be decoded as a `SlideReadError` that names it.
Threads may read from one slide at a time, damaged tiles included.
Pixels are taken as stored: an orientation tag is not applied, as positions were measured on the stored pixels.
"""
from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import openslide
from PIL import Image

from preprocessing.errors import InputError
from preprocessing.flat_image import as_rgb, decode_flat
from preprocessing.mpp import plausible_mpp
from preprocessing.tiff_checks import check_tiff

DAMAGE_PX = 64                     # damage is looked for down to squares of this side
BAND_BYTES = 64 << 20              # pixels in memory at a time while a thumbnail is made
MAGIC = {"JPEG": (b"\xff\xd8\xff",), "PNG": (b"\x89PNG",), "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")}
FLAT_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".tiff": "TIFF", ".btf": "TIFF"}


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
        check_tiff(path)
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
        return np.array(self.read_image(x, y, width, height))

    def read_image(self, x: int, y: int, width: int, height: int) -> Image.Image:
        """`read_region` as a Pillow image in RGB, without a copy."""
        if width < 1 or height < 1 or x < 0 or y < 0 or x + width > self.width_px or y + height > self.height_px:
            raise ValueError(f"{self.path}: region x={x} y={y} {width} x {height} is not inside {self.width_px} x {self.height_px}")
        return self._read(int(x), int(y), int(width), int(height))

    def thumbnail(self, max_px: int, may_be_blank: bool = False) -> np.ndarray:
        """The whole slide with its longer side at `max_px` (never enlarged), uint8 (h, w, 3), each pixel an area mean.

        Read in bands, so memory stays small for a one-level slide too. What cannot be decoded is white; nothing at all is a
        `SlideReadError`, unless the picture `may_be_blank`."""
        shrink = max(1.0, max(self.width_px, self.height_px) / max_px)
        width, height = max(1, round(self.width_px / shrink)), max(1, round(self.height_px / shrink))
        level, level_width, level_height = self._level_for(shrink)
        rows = max(1, int(BAND_BYTES / (4 * level_width) * height / level_height))      # output rows a band
        bands, unreadable = [], []
        for first in range(0, height, rows):
            last = min(first + rows, height)
            top, bottom = first * level_height / height, last * level_height / height
            above = int(top)
            band_rows = min(int(np.ceil(bottom)), level_height) - above
            try:
                band = self._read_level(level, above, band_rows)
            except SlideReadError as error:
                unreadable.append(error)
                band = Image.new("RGB", (level_width, band_rows), "white")
            box = (0, top - above, level_width, min(bottom - above, band.height))
            bands.append(np.asarray(band.resize((width, last - first), Image.Resampling.BOX, box=box)))
        if len(unreadable) == len(bands) and not may_be_blank:
            raise unreadable[0]
        return np.concatenate(bands)

    @abstractmethod
    def close(self) -> None:
        """Free the handle; reading afterwards is an error."""

    def __enter__(self) -> Slide:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    @abstractmethod
    def _read(self, x: int, y: int, width: int, height: int) -> Image.Image:
        """Level-0 pixels of a rectangle known to be inside, RGB."""

    def _level_for(self, shrink: float) -> tuple[int, int, int]:
        return 0, self.width_px, self.height_px

    def _read_level(self, level: int, top: int, height: int) -> Image.Image:
        """Full-width rows of a level, RGB."""
        return self._read(0, top, self.width_px, height)


class PyramidSlide(Slide):
    """A slide that OpenSlide opens; decodes only what is read."""

    def __init__(self, path: Path):
        self._handle, self._swap = _open_handle(path), threading.Lock()
        width, height = self._handle.dimensions
        super().__init__(path, width, height, _declared_mpp(self._handle.properties))

    def close(self) -> None:
        self._handle.close()

    def _read(self, x, y, width, height) -> Image.Image:
        return self._decode(x, y, 0, width, height)

    def _decode(self, x: int, y: int, level: int, width: int, height: int) -> Image.Image:
        handle = self._handle
        try:
            return as_rgb(handle.read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError:
            self._replace(handle)
        # OpenSlide answers nothing more on a handle that has failed, so the damage may lie in another thread's region: this
        # thread asks again on a handle of its own
        try:
            return as_rgb(_open_handle(self.path).read_region((x, y), level, (width, height)))
        except openslide.OpenSlideError as error:
            raise SlideReadError(self.path, f"region x={x} y={y} {width} x {height} of level {level}", "pixels",
                                 f"a tile that cannot be decoded ({error})") from error

    def _replace(self, broken: openslide.OpenSlide) -> None:
        """A new handle for all threads, once. The broken one is freed when no thread reads from it any more."""
        with self._swap:
            if self._handle is broken:
                self._handle = _open_handle(self.path)

    def _level_for(self, shrink):
        level = self._handle.get_best_level_for_downsample(shrink * 1.01)    # levels are rarely exact powers of two
        return (level, *self._handle.level_dimensions[level])

    def _read_level(self, level, top, height):
        return self._read_around_damage(level, 0, top, self._handle.level_dimensions[level][0], height)

    def _read_around_damage(self, level: int, left: int, top: int, width: int, height: int) -> Image.Image:
        """A rectangle in the level's own pixels, white where it cannot be decoded, as a picture of the whole must not fail for a tile."""
        downsample = self._handle.level_downsamples[level]
        try:
            return self._decode(round(left * downsample), round(top * downsample), level, width, height)
        except SlideReadError as error:
            if max(width, height) <= DAMAGE_PX:
                raise
            of_the_whole = error
        picture, n_read = Image.new("RGB", (width, height), "white"), 0
        across, down = (width // 2, height) if width >= height else (width, height // 2)
        x, y = (across, 0) if width >= height else (0, down)
        for place, size in (((0, 0), (across, down)), ((x, y), (width - x, height - y))):
            try:
                picture.paste(self._read_around_damage(level, left + place[0], top + place[1], *size), place)
            except SlideReadError:
                continue                                   # this half stays white
            n_read += 1
        if not n_read:
            raise of_the_whole
        return picture


class FlatSlide(Slide):
    """A JPEG, PNG or flat TIFF, decoded whole when opened."""

    def __init__(self, path: Path, image_format: str):
        self._pixels, declared_mpp = decode_flat(path, image_format)
        super().__init__(path, *self._pixels.size, declared_mpp)

    def close(self) -> None:
        self._pixels = None

    def _read(self, x, y, width, height) -> Image.Image:
        return self._pixels.region(x, y, width, height)


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
