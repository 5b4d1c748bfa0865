"""Read the patch folder `patches/`, and say which patch - of a folder or an `imgs.h5` - belongs to which row.

Patches are uint8 (H, W, 3) RGB; `x, y` is a patch's centre in level-0 pixels. The join is by barcode, never by row number;
positions, where both sides have them, prove it. Writing such a folder: `png_folder.py`.
"""
from __future__ import annotations

import json
import os
import re
import struct
import sys
import warnings
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps

from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.inputs import read_json, read_text, require_unique
from preprocessing.output_places import require_place

METADATA, STAIN = "metadata.jsonl", "stain.json"
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# what Pillow and its decoders make of a damaged image
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, ArithmeticError, NotImplementedError, struct.error,
                 zlib.error, Image.DecompressionBombError)
SAME_PLACE_PX = 2.0               # centres may differ by this: `coords` are whole pixels, some programs round side and corner
MAX_SIDE_PX = 4096                # of a patch; larger ones are refused before they are decoded
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


# ---- the patch folder: patches/ -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PatchFolder:
    """What a patch folder lists, in its own row order: from `metadata.jsonl`, or the names of a foreign folder alone."""

    folder: Path
    paths: list[Path]
    is_foreign: bool
    barcodes: list[str] | None = None
    sample_ids: list[str] | None = None
    rows: list[int] | None = None              # `gex_emb`: row of gex.h5ad when the folder was written
    centre_xy_px: np.ndarray | None = None     # (N, 2) float64
    barcode_sha256: str | None = None          # over the barcodes of the extraction in its order, as `stain.json` keeps it


def require_no_patch_folder(option: str, folder: Path) -> None:
    """Refuse a folder of real patches for generated ones or their list: who reads it later would take these for those."""
    require_place(folder, folder=True)
    if (folder / METADATA).exists():
        raise OptionError(option, f"a folder of its own, without the {METADATA} of a patch folder", str(folder))


def read_patch_folder(folder: Path | str) -> PatchFolder:
    """List a patch folder: what `metadata.jsonl` names, or every image of a foreign folder. Opens no image."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "folder", "a folder of patches", "a file" if folder.exists() else "nothing there")
    return _read_metadata(folder) if (folder / METADATA).is_file() else foreign_folder(folder)


def foreign_folder(folder: Path) -> PatchFolder:
    """Every image of a folder, whatever describes them."""
    images = [entry for entry in folder.iterdir()
              if not entry.name.startswith(".") and entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
    if not images:
        raise InputError(folder, "content", f"{METADATA} or images", "neither")
    return PatchFolder(folder, sorted(images), is_foreign=True)


def _read_metadata(folder: Path) -> PatchFolder:
    source = folder / METADATA
    lines = []
    for number, text in enumerate(read_text(source, "JSON lines, one a patch").splitlines(), start=1):
        if text.strip():
            lines.append(_metadata_line(source, number, text))
    if not lines:
        raise InputError(source, "lines", "one a patch", "none")
    names = [line["file_name"] for line in lines]
    require_unique(source, "file_name", names)
    with_barcode = [line for line in lines if "barcode" in line]
    if with_barcode and len(with_barcode) < len(lines):
        nameless = [line["file_name"] for line in lines if "barcode" not in line]
        raise InputError(source, "barcode", "one in every line", f"none for {first_few(nameless)}")
    if with_barcode:
        require_unique(source, "barcode", [f"{line.get('sample_id', '')}__{line['barcode']}" for line in lines],
                           shown=[line["barcode"] for line in lines])
    present = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()}
    gone = [f"{line['file_name']} of barcode {line.get('barcode', 'unknown')}" for line in lines if line["file_name"] not in present]
    if gone:
        raise InputError(source, "file_name", f"the {len(lines):,} files that {METADATA} lists", f"missing {first_few(gone)}")

    def column(key):
        return [line[key] for line in lines] if all(key in line for line in lines) else None

    xs, ys = column("x"), column("y")
    xy = np.array([xs, ys], dtype=np.float64).T if xs and ys else None
    return PatchFolder(folder, [folder / name for name in names], False, column("barcode"), column("sample_id"), column("gex_emb"), xy,
                       _recorded_in_stain(folder))


def _recorded_in_stain(folder: Path) -> str | None:
    try:
        content = read_json(folder / STAIN, "a stain.json")
    except InputError:
        return None                   # it proves more where it can be read; patches pair without it
    recorded = content.get("barcode_sha256") if isinstance(content, dict) else None
    return recorded if isinstance(recorded, str) else None


def _metadata_line(source: Path, number: int, text: str) -> dict:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(source, f"line {number}", "JSON", text[:60]) from error
    name = line.get("file_name") if isinstance(line, dict) else None
    if not isinstance(name, str):
        raise InputError(source, f"line {number}", "an object with `file_name`", text[:60])
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(source, f"line {number}", "a file inside the folder", name)
    line = {key: value for key, value in line.items() if value is not None}
    for key, kinds, expected in (("barcode", str, "text"), ("sample_id", str, "text"), ("gex_emb", int, "a row number"),
                                 ("x", (int, float), "a finite number"), ("y", (int, float), "a finite number")):
        value = line.get(key)
        if value is not None and (not isinstance(value, kinds) or isinstance(value, bool)
                                  or (key in "xy" and not abs(value) <= sys.float_info.max)):
            raise InputError(source, f"line {number}: {key}", expected, repr(value)[:60])
    return line | {"file_name": Path(name).as_posix()}


# ---- the pairing ----------------------------------------------------------------------------------------------------

def pair(folder: PatchFolder, barcodes: Sequence[str], gex_path: Path | str, recorded_sha256: str | None = None,
         centre_xy_px: np.ndarray | None = None) -> list[Path]:
    """The patch of every row of `gex_path`, whose `barcodes` are given in row order. Refuses anything but a full match.

    `recorded_sha256` is `uns['morphology']['barcode_sha256']` of the h5ad, `centre_xy_px` (N, 2) its `obsm['spatial']`, where it has them.
    """
    if folder.barcodes is None:
        if not folder.is_foreign:
            raise InputError(folder.folder / METADATA, "barcode", "one in every line", "none: patches at random places have no expression")
        return _pair_by_name(folder, barcodes, gex_path, recorded_sha256)
    in_row_order = folder.barcodes
    if folder.rows is not None:
        in_row_order = [folder.barcodes[i] for i in np.argsort(folder.rows, kind="stable")]
    patch_hashes = {strings_sha256(in_row_order), folder.barcode_sha256}
    order = match_barcodes(folder.barcodes, folder.folder / METADATA, barcodes, gex_path, recorded_sha256, patch_hashes=patch_hashes,
                           patch_xy_px=folder.centre_xy_px, centre_xy_px=centre_xy_px)
    return [folder.paths[i] for i in order]


def match_barcodes(patch_barcodes: Sequence[str], patches_path: Path | str, barcodes: Sequence[str], gex_path: Path | str,
                   recorded_sha256: str | None = None, *, patch_hashes: Collection[str | None] = (),
                   patch_xy_px: np.ndarray | None = None, centre_xy_px: np.ndarray | None = None) -> np.ndarray:
    """int (N,): which patch belongs to each row of the h5ad. The two sets of barcodes must be equal.

    Proof that both come from one extraction: every spot at its patch's centre where both sides know positions ((N, 2), each in its
    own row order); else hashes over ordered barcodes, those of the patches now and `patch_hashes` against those of the h5ad.
    """
    require_unique(gex_path, "obs_names", barcodes)
    require_unique(patches_path, "barcode", patch_barcodes)
    place = {barcode: i for i, barcode in enumerate(patch_barcodes)}
    missing = [barcode for barcode in barcodes if barcode not in place]
    extra = sorted(set(patch_barcodes) - set(barcodes))
    if missing or extra:
        found = " and ".join(part for part in (f"no patch for {first_few(missing)}" if missing else "",
                                               f"patches of {first_few(extra)} that it does not have" if extra else "") if part)
        raise InputError(patches_path, "barcodes", f"the {len(barcodes):,} of {gex_path}", found)
    order = np.array([place[barcode] for barcode in barcodes], dtype=np.int64)
    if patch_xy_px is not None and centre_xy_px is not None and np.isfinite(centre_xy_px).all():
        _require_same_places(patches_path, patch_xy_px[order], barcodes, gex_path, centre_xy_px)
    elif recorded_sha256:
        of_patches = {strings_sha256(patch_barcodes), *patch_hashes}
        if not of_patches & {recorded_sha256, strings_sha256(barcodes)}:
            raise InputError(patches_path, "barcode_sha256", f"{recorded_sha256[:12]}, as {gex_path} records",
                             strings_sha256(patch_barcodes)[:12],
                             "The patches and the expression are not of one extraction: write both again")
    return order


def _require_same_places(patches_path: Path | str, patch_xy_px: np.ndarray, barcodes: Sequence[str], gex_path: Path | str,
                         centre_xy_px: np.ndarray) -> None:
    """Both (N, 2) in the row order of `barcodes`."""
    apart = np.abs(patch_xy_px - centre_xy_px).max(axis=1)
    moved = np.flatnonzero(apart > SAME_PLACE_PX)
    if len(moved):
        raise InputError(patches_path, "positions", f"every patch within {SAME_PLACE_PX:g} px of its spot in {gex_path}",
                         f"up to {apart.max():,.0f} px apart: {first_few([barcodes[i] for i in moved])}",
                         "The patches and the expression are not of one extraction: write both again")


def _pair_by_name(folder: PatchFolder, barcodes: Sequence[str], gex_path: Path | str, recorded_sha256: str | None) -> list[Path]:
    """A foreign folder: its names are the barcodes, or carry the row numbers 0..N-1 behind one common prefix."""
    stems = [path.stem for path in folder.paths]
    if set(stems) & set(barcodes):
        order = match_barcodes(stems, folder.folder, barcodes, gex_path)
        _warn_foreign(folder, "the barcodes in its file names")
        return [folder.paths[i] for i in order]
    parts = [re.fullmatch(r"(.*?)(\d+)(\D*)", stem) for stem in stems]
    numbers = [int(part[2]) if part else -1 for part in parts]
    frames = {(part[1], part[3]) if part else None for part in parts}
    if sorted(numbers) != list(range(len(barcodes))) or len(frames) > 1:
        gaps = sorted(set(range(len(barcodes))) - set(numbers))
        detail = f"no patch for row {first_few(gaps)}" if gaps else f"{len(stems):,} images, e.g. {', '.join(sorted(stems)[-3:])}"
        raise InputError(folder.folder, "file names", f"numbers 0..{len(barcodes) - 1} or the {len(barcodes):,} barcodes of {gex_path}",
                         detail, f"Give the folder a {METADATA} with barcodes")
    if recorded_sha256 and recorded_sha256 != strings_sha256(barcodes):
        raise InputError(gex_path, "obs_names", "its original row order, as numbers in file names mean rows", "re-sorted rows",
                         f"Give {folder.folder} a {METADATA} with barcodes")
    _warn_foreign(folder, "the numbers in its file names, in natural order")
    return [folder.paths[i] for i in np.argsort(numbers)]


def _warn_foreign(folder: PatchFolder, by_what: str) -> None:
    warnings.warn(f"{folder.folder}: no {METADATA}; {len(folder.paths):,} patches paired by {by_what}", stacklevel=4)


# ---- one patch ------------------------------------------------------------------------------------------------------

def read_patch(path: Path | str, max_side: int = MAX_SIDE_PX) -> np.ndarray:
    """uint8 (H, W, 3) of an 8-bit image file: turned by its EXIF, transparency on white. The size is checked before decoding."""
    with open(path, "rb") as stream:
        try:
            with Image.open(stream) as image:
                _require_patch(path, image, max_side)
                if image.format == "PNG":
                    _require_whole_pixels(path, stream)
                image = ImageOps.exif_transpose(image)
                if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return np.array(image.convert("RGB"))
        except Image.DecompressionBombError as error:
            raise InputError(path, "size", f"at most {max_side} x {max_side} px", str(error)) from error
        except InputError:
            raise
        except DECODE_ERRORS as error:
            raise InputError(path, "image", "an image file that can be decoded", f"{error}") from error


def _require_whole_pixels(path: Path | str, stream: BinaryIO) -> None:
    """Compare the pixels' chunks of a PNG with their checksums, which Pillow passes over: one changed bit may decode to other pixels."""
    place = stream.tell()
    stream.seek(len(PNG_SIGNATURE))
    kind = b""
    while len(header := stream.read(8)) == 8:
        length, following = struct.unpack(">I4s", header)
        if kind == b"IDAT" != following:
            break
        kind = following
        if kind != b"IDAT":
            stream.seek(length + 4, os.SEEK_CUR)
            continue
        pixels, found = stream.read(length), stream.read(4)
        if len(pixels) < length or found != struct.pack(">I", zlib.crc32(pixels, zlib.crc32(kind))):
            raise InputError(path, "image", "an image file that can be decoded", "pixels that are not those of their checksum (damaged)")
    stream.seek(place)


def _require_patch(path: Path | str, image: Image.Image, max_side: int) -> None:
    if max(image.size) > max_side:
        raise InputError(path, "size", f"at most {max_side} x {max_side} px", f"{image.width} x {image.height}")
    raw_modes = {str(tile[3]) for tile in image.tile}
    if image.mode not in EIGHT_BIT_MODES or any("16" in mode for mode in raw_modes):
        deep = image.mode if image.mode not in EIGHT_BIT_MODES else "16-bit channels"
        raise InputError(path, "pixels", "8 bits a channel", deep, "Convert it to 8-bit RGB")
