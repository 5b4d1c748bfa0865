"""Write and read patches - the file `imgs.h5`, the folder `patches/` - and say which patch belongs to which row.

Patches are uint8 (H, W, 3) RGB. `coords` are the (x, y) of a patch's top-left corner, `x, y` of the folder the centre, in
level-0 pixels. The join is by barcode, never by position; both formats keep the row order of the `gex.h5ad` beside them.
"""
from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
from PIL import Image, ImageOps

from preprocessing.errors import InputError, first_few
from preprocessing.hdf5_output import hdf5_output
from preprocessing.outputs import finished_file, finished_folder, require_free_space, strings_sha256

BLOCK = 64                                                      # patches held in memory while streaming
METADATA, STAIN = "metadata.jsonl", "stain.json"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


# ---- the patch file: imgs.h5, in HEST's schema ----------------------------------------------------------------------

def write_patch_file(path: Path | str, patches: Iterable[np.ndarray], *, count: int, patch_px: int, coords: np.ndarray,
                     barcodes: Sequence[str] | None, patch_size_src: float, pixel_size: float, name: str) -> None:
    """Stream exactly `count` patches (patch_px, patch_px, 3) into `path`, a block at a time.

    coords int64 (count, 2) top-left at level 0; `barcodes` is None for random patches. `patch_size_src` is the side cut from
    level 0 in px, `pixel_size` the µm per level-0 px, `name` the sample id.
    """
    coords = np.asarray(coords)
    if coords.shape != (count, 2) or (barcodes is not None and len(barcodes) != count):
        raise ValueError(f"{count} patches need as many coords and barcodes; got {coords.shape} and {len(barcodes or ())}")
    attributes = {"patch_size_src": patch_size_src, "patch_size_target": patch_px, "downsample": patch_size_src / patch_px,
                  "pixel_size": pixel_size, "name": name}
    require_free_space(Path(path).parent, count * patch_px * patch_px * 3)
    with finished_file(path, validate=lambda temporary: _require_complete(temporary, path, count)) as temporary:
        with hdf5_output(temporary) as file:
            shape = (patch_px, patch_px, 3)
            images = file.create_dataset("img", (count, *shape), np.uint8, chunks=(1, *shape) if count else None,
                                         compression="lzf" if count else None)
            positions = file.create_dataset("coords", data=coords.astype(np.int64))
            if barcodes is not None:
                text = np.array([str(barcode) for barcode in barcodes], dtype=object).reshape(-1, 1)
                file.create_dataset("barcode", data=text, dtype=h5py.string_dtype("utf-8"))
            for dataset in (images, positions):
                dataset.attrs.update(attributes)
            written = 0
            for block in _blocks(patches):
                if written + len(block) <= count:
                    images[written:written + len(block)] = np.stack(block)
                written += len(block)
            if written != count:
                raise ValueError(f"{path}: {count} patches were announced, {written} came")


def _blocks(items: Iterable, length: int = BLOCK) -> Iterator[list]:
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

    def __len__(self) -> int:
        return self._images.shape[0]

    @property
    def patch_px(self) -> int:
        return self._images.shape[1]

    @property
    def centre_xy_px(self) -> np.ndarray:
        """(N, 2) float64: centres in level-0 px."""
        return self.coords + float(self.attrs.get("patch_size_src", self.patch_px)) / 2

    def images(self, rows: slice | int) -> np.ndarray:
        """uint8 (n, H, W, 3) of a slice; (H, W, 3) of one row."""
        try:
            return self._images[rows]
        except (OSError, RuntimeError) as error:
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
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file", "an HDF5 file of patches", "nothing there" if not path.exists() else "a folder")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise InputError(path, "file", "an HDF5 file of patches", f"{path.stat().st_size:,} bytes that HDF5 cannot read") from error
    try:
        _check_schema(path, file)
        return PatchFile(path, file)
    except BaseException:
        file.close()
        raise


def _check_schema(path: Path, file: h5py.File) -> None:
    missing = {"img", "coords"} - set(file)
    if missing:
        raise InputError(path, "datasets", "`img` and `coords`", f"no {' and no '.join(sorted(missing))}")
    images, count = file["img"], len(file["coords"])
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise InputError(path, "img", "uint8 (N, H, W, 3)", f"{images.dtype} {images.shape}")
    if len(images) != count:
        raise InputError(path, "coords", f"{len(images)} rows, one a patch", f"{count}")
    barcodes = _barcodes(file)
    if barcodes is not None:
        if len(barcodes) != count:
            raise InputError(path, "barcode", f"{count} rows, one a patch", f"{len(barcodes)}")
        _refuse_duplicates(path, "barcode", barcodes)


# ---- the patch folder: patches/ -------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PatchFolder:
    """What a patch folder lists, in its own row order. Everything but `paths` is None in a folder without `metadata.jsonl`."""

    folder: Path
    paths: list[Path]
    barcodes: list[str] | None = None
    sample_ids: list[str] | None = None
    rows: list[int] | None = None              # `gex_emb`: row of gex.h5ad when the folder was written
    centre_xy_px: np.ndarray | None = None     # (N, 2) float64


def write_patch_folder(folder: Path | str, patches: Iterable[np.ndarray], *, barcodes: Sequence[str] | None, sample_id: str,
                       xy: np.ndarray, stain: dict, workers: int = 2) -> None:
    """Write `patch_<padded row>.png`, `metadata.jsonl` and `stain.json`; `xy` (N, 2) centres fix the number of patches.

    The folder appears when it is complete; an older patch folder is replaced, any other folder is left alone.
    """
    folder, count = Path(folder), len(xy)
    _refuse_foreign_content(folder)
    digits = len(str(max(count - 1, 0)))
    with finished_folder(folder) as temporary:
        names = [f"patch_{row:0{digits}d}.png" for row in range(count)]
        written = 0
        with ThreadPoolExecutor(workers) as pool:
            for block in _blocks(patches):
                block_names = names[written:written + len(block)]
                written += len(block)
                if written > count:
                    break
                list(pool.map(lambda name, patch: Image.fromarray(patch).save(temporary / name, compress_level=3), block_names, block))
        if written != count:
            raise ValueError(f"{folder}: {count} patches were announced, {written} or more came")
        with open(temporary / METADATA, "w", encoding="utf-8") as stream:
            for row, name in enumerate(names):
                line = {"file_name": name}
                if barcodes is not None:
                    line["barcode"] = str(barcodes[row])
                line |= {"sample_id": sample_id, "x": float(xy[row][0]), "y": float(xy[row][1])}
                if barcodes is not None:
                    line["gex_emb"] = row
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        (temporary / STAIN).write_text(json.dumps(stain, indent=2) + "\n")


def _refuse_foreign_content(folder: Path) -> None:
    """Writing replaces the whole folder, so nothing in it may be anybody else's."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(folder, "folder", "a folder for the patches", "a file")
    ours = re.compile(rf"patch_\d+\.png|{re.escape(METADATA)}|{re.escape(STAIN)}|\..*")
    foreign = sorted(entry.name for entry in folder.iterdir() if not ours.fullmatch(entry.name))
    if foreign:
        raise InputError(folder, "content", "a new folder, or a patch folder to replace", f"{first_few(foreign)} other entries",
                         "Name another folder")


def read_patch_folder(folder: Path | str) -> PatchFolder:
    """List a patch folder: what `metadata.jsonl` names, or every image of a foreign folder. Opens no image."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "folder", "a folder of patches", "a file" if folder.exists() else "nothing there")
    if not (folder / METADATA).is_file():
        images = [entry for entry in folder.iterdir()
                  if not entry.name.startswith(".") and entry.suffix.lower() in IMAGE_SUFFIXES and entry.is_file()]
        if not images:
            raise InputError(folder, "content", f"{METADATA} or images", "neither")
        return PatchFolder(folder, sorted(images))
    return _read_metadata(folder)


def _read_metadata(folder: Path) -> PatchFolder:
    source = folder / METADATA
    lines = []
    for number, text in enumerate(source.read_text(encoding="utf-8").splitlines(), start=1):
        if text.strip():
            lines.append(_metadata_line(source, number, text))
    if not lines:
        raise InputError(source, "lines", "one a patch", "none")
    names = [line["file_name"] for line in lines]
    _refuse_duplicates(source, "file_name", names)
    with_barcode = [line for line in lines if "barcode" in line]
    if with_barcode and len(with_barcode) < len(lines):
        nameless = [line["file_name"] for line in lines if "barcode" not in line]
        raise InputError(source, "barcode", "one in every line", f"none for {first_few(nameless)}")
    if with_barcode:
        _refuse_duplicates(source, "barcode", [f"{line.get('sample_id', '')}__{line['barcode']}" for line in lines],
                           shown=[line["barcode"] for line in lines])
    present = {entry.relative_to(folder).as_posix() for entry in folder.rglob("*") if entry.is_file()}
    gone = [f"{line['file_name']} of barcode {line.get('barcode', 'unknown')}" for line in lines if line["file_name"] not in present]
    if gone:
        raise InputError(folder, "patches", f"the {len(lines):,} files that {METADATA} lists", f"missing {first_few(gone)}")

    def column(key):
        return [line[key] for line in lines] if all(key in line for line in lines) else None

    xs, ys = column("x"), column("y")
    xy = np.array([xs, ys], dtype=np.float64).T if xs and ys else None
    return PatchFolder(folder, [folder / name for name in names], column("barcode"), column("sample_id"), column("gex_emb"), xy)


def _metadata_line(source: Path, number: int, text: str) -> dict:
    try:
        line = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(source, f"line {number}", "JSON", text[:60]) from error
    name = line.get("file_name") if isinstance(line, dict) else None
    if not isinstance(name, str):
        raise InputError(source, f"line {number}", "an object with `file_name`", text[:60])
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise InputError(source, f"line {number}", "a file inside the folder", name)
    if line.get("barcode") is None:
        line.pop("barcode", None)
    return line | {"file_name": Path(name).as_posix()}


# ---- the pairing ----------------------------------------------------------------------------------------------------

def pair(folder: PatchFolder, barcodes: Sequence[str], gex_path: Path | str, recorded_sha256: str | None = None) -> list[Path]:
    """The patch of every row of `gex_path`, whose `barcodes` are given in row order. Refuses anything but a full match.

    `recorded_sha256` is `uns['morphology']['barcode_sha256']` of the h5ad, where it has one.
    """
    if folder.barcodes is None:
        if (folder.folder / METADATA).is_file():
            raise InputError(folder.folder / METADATA, "barcode", "one in every line", "none: patches at random places have no expression")
        return _pair_by_name(folder, barcodes, gex_path, recorded_sha256)
    in_row_order = folder.barcodes
    if folder.rows is not None:
        in_row_order = [folder.barcodes[i] for i in np.argsort(folder.rows, kind="stable")]
    order = match_barcodes(folder.barcodes, folder.folder, barcodes, gex_path, recorded_sha256, in_row_order)
    return [folder.paths[i] for i in order]


def match_barcodes(patch_barcodes: Sequence[str], patches_path: Path | str, barcodes: Sequence[str], gex_path: Path | str,
                   recorded_sha256: str | None = None, in_row_order: Sequence[str] | None = None) -> np.ndarray:
    """int (N,): which patch belongs to each row of the h5ad. The two sets of barcodes must be equal.

    The recorded hash (if any) must be that of the patches as they were written, unless both orders are the same today.
    """
    _refuse_duplicates(gex_path, "obs_names", barcodes)
    _refuse_duplicates(patches_path, "barcode", patch_barcodes)
    place = {barcode: i for i, barcode in enumerate(patch_barcodes)}
    missing = [barcode for barcode in barcodes if barcode not in place]
    extra = sorted(set(patch_barcodes) - set(barcodes))
    if missing or extra:
        found = " and ".join(part for part in (f"no patch for {first_few(missing)}" if missing else "",
                                               f"patches of {first_few(extra)} that it does not have" if extra else "") if part)
        raise InputError(patches_path, "barcodes", f"the {len(barcodes):,} of {gex_path}", found)
    written = list(patch_barcodes if in_row_order is None else in_row_order)
    if recorded_sha256 and strings_sha256(written) != recorded_sha256 and written != list(barcodes):
        raise InputError(patches_path, "barcode_sha256", f"{recorded_sha256[:12]}, as {gex_path} records", strings_sha256(written)[:12],
                         "The patches and the expression are not of one extraction: write both again")
    return np.array([place[barcode] for barcode in barcodes], dtype=np.int64)


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


def _refuse_duplicates(path: Path | str, field: str, values: Sequence[str], shown: Sequence[str] | None = None) -> None:
    if len(set(values)) < len(values):
        seen: set[str] = set()
        repeated = [label for value, label in zip(values, shown or values, strict=True) if value in seen or seen.add(value)]
        raise InputError(path, field, "no value twice", f"repeated {first_few(repeated)}")


# ---- one patch ------------------------------------------------------------------------------------------------------

def read_patch(path: Path | str, max_side: int = 4096) -> np.ndarray:
    """uint8 (H, W, 3) of an 8-bit image file: turned by its EXIF, transparency on white. The size is checked before decoding."""
    with open(path, "rb") as stream:
        try:
            with Image.open(stream) as image:
                _require_patch(path, image, max_side)
                image = ImageOps.exif_transpose(image)
                if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return np.array(image.convert("RGB"))
        except Image.DecompressionBombError as error:
            raise InputError(path, "size", f"at most {max_side} x {max_side} px", str(error)) from error
        except InputError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError) as error:
            raise InputError(path, "image", "an image file that can be decoded", f"{error}") from error


def _require_patch(path: Path | str, image: Image.Image, max_side: int) -> None:
    if max(image.size) > max_side:
        raise InputError(path, "size", f"at most {max_side} x {max_side} px", f"{image.width} x {image.height}")
    raw_modes = {str(tile[3]) for tile in image.tile}
    if image.mode not in EIGHT_BIT_MODES or any("16" in mode for mode in raw_modes):
        deep = image.mode if image.mode not in EIGHT_BIT_MODES else "16-bit channels"
        raise InputError(path, "pixels", "8 bits a channel", deep, "Convert it to 8-bit RGB")
