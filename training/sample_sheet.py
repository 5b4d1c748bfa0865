"""Which samples a command works on: two lists of files, or a sheet of one line a sample."""
from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.expression import open_h5ad, recorded_sample_id
from preprocessing.inputs import beside_or_here, path_list, read_text, require_file

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SampleFiles:
    """Where one sample lies."""

    sample_id: str
    images: Path               # a patch folder or an imgs.h5
    gex: Path                  # gex_filt.h5ad
    split: str = "train"       # one of SPLITS
    embeddings: Path | None = None   # ready-made prompt embeddings (.npy), rows in h5ad order; used by the image models alone


def sample_files(images: str | Path | Sequence[Path], gex: str | Path | Sequence[Path]) -> list[SampleFiles]:
    """Two lists of equal length -> samples, named as `obs['sample_id']` says, else by the folder of the h5ad."""
    image_paths, gex_paths = path_list(images), path_list(gex)
    if len(image_paths) != len(gex_paths) or not gex_paths:
        raise OptionError("images and expression", "two comma-separated lists of equal length", f"{len(image_paths)} and {len(gex_paths)}")
    if len(set(gex_paths)) < len(gex_paths):
        raise OptionError("expression", "every file once", ", ".join(map(str, gex_paths)))
    names: list[str] = []
    for path in gex_paths:
        name = recorded_name(path) or path.absolute().parent.name
        names.append(name if name not in names else f"{name}_{len(names) + 1}")
    return [SampleFiles(*files) for files in zip(names, image_paths, gex_paths, strict=True)]


def recorded_name(gex: Path) -> str | None:
    require_file(gex, "an .h5ad file")
    try:
        adata = open_h5ad(gex, backed=True)
    except InputError:
        return None                            # read_expression says later what is wrong with it
    try:
        return recorded_sample_id(adata)
    finally:
        adata.file.close()


def read_sample_sheet(path: Path | str) -> list[SampleFiles]:
    """A CSV with the columns sample_id, images, gex and (optional) split, embeddings. Relative paths: beside the sheet, else in the
    working folder."""
    path = Path(path)
    reader = csv.DictReader(io.StringIO(read_text(path, "a sample sheet (CSV)"), newline=""))
    try:
        rows = [(reader.line_num, row) for row in reader if "".join(map(str, filter(None, row.values()))).strip()]   # no lines of commas
        columns = reader.fieldnames or []
    except csv.Error as error:
        raise InputError(path, f"line {reader.line_num}", "comma-separated text", str(error)) from error
    missing = [column for column in ("sample_id", "images", "gex") if column not in columns]
    if missing or not rows:
        raise InputError(path, "columns" if missing else "rows", "sample_id, images, gex, split" if missing else "one a sample",
                         f"no {', '.join(missing)}" if missing else "none")

    samples = []
    for number, row in rows:
        empty = [column for column in ("sample_id", "images", "gex") if not (row[column] or "").strip()]
        split = (row.get("split") or "train").strip()
        if empty or split not in SPLITS:
            raise InputError(path, f"line {number}", f"every column filled and split one of {', '.join(SPLITS)}",
                             f"no {', '.join(empty)}" if empty else f"split {split}")
        embeddings = (row.get("embeddings") or "").strip()
        images, gex = (beside_or_here(path, row[column].strip()) for column in ("images", "gex"))
        samples.append(SampleFiles(row["sample_id"].strip(), images, gex, split, beside_or_here(path, embeddings) if embeddings else None))
    require_unique_samples(samples, path)
    return samples


def require_unique_samples(samples: Sequence[SampleFiles], path: Path | str) -> None:
    names = [sample.sample_id for sample in samples]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(path, "sample_id", "every sample once", f"repeated {first_few(repeated)}")
