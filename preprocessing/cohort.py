"""What a cohort is told: its settings, its sample sheet, and the command of every step of every sample.

`workflow/Snakefile` decides what runs when; this module says what is run and where results lie:
`OUT_DIR/SAMPLE/` with the results, `steps/STEP.txt` once a step ended and `logs/STEP.log` with what it said.
"""
from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from preprocessing.done_manifests import file_sha256, read_done
from preprocessing.errors import InputError, OptionError
from preprocessing.extraction import ExtractConfig
from preprocessing.inputs import beside_or_here, read_text, require_unique
from preprocessing.outputs import done_path

SOURCES = ("space_ranger_dir", "gex_file")                  # one of them a sample
NUMBERS = ("mpp", "spot_um")
COLUMNS = ("sample_id", "wsi_file", *SOURCES, *NUMBERS, "stain_file")
CHOICES = {"missing_genes": ("error", "zero"), "on_stain_failure": ("error", "skip"), "edge": ("drop", "pad")}
FINISHED = "finished"                                       # what steps/STEP.txt says; else `failed EXIT_CODE`


@dataclass(frozen=True)
class CohortConfig:
    """`workflow/config.yaml`, where each field is explained. Relative paths: from the working folder."""

    samples: Path                        # the sample sheet
    out_dir: Path
    vocab_file: Path | None = None       # None: made over the cohort
    vocab_min_counts: int = 10           # of a vocabulary made here: least counts of a gene over the cohort
    missing_genes: str = "error"
    patch_um: float = 55.0
    patch_px: int = 128
    stride: int = 5                      # bins
    edge: str = "drop"
    min_tissue: float = 0.0
    use_wsi_res: bool = False
    keep_hdf5: bool = True               # patches in imgs.h5 too, not only in the patch folder
    normalize: bool = True
    stain_file: Path | None = None       # for every sample whose row of the sheet names none
    on_stain_failure: str = "error"
    threads: int = 1                     # of one extraction
    memory_gb: float = 8.0               # a sample may use

    def __post_init__(self):
        ExtractConfig(patch_um=self.patch_um, patch_px=self.patch_px, stride_bins=self.stride, min_tissue=self.min_tissue)
        for name in CHOICES:
            if getattr(self, name) not in CHOICES[name]:
                raise OptionError(name, f"one of {', '.join(CHOICES[name])}", repr(getattr(self, name)))
        for name, least in (("threads", 1), ("memory_gb", 1), ("vocab_min_counts", 0)):
            if not getattr(self, name) >= least:
                raise OptionError(name, f"at least {least}", f"{getattr(self, name)}")
        if "," in str(self.out_dir):
            raise OptionError("out_dir", "a path without a comma", str(self.out_dir))
        if not self.normalize and self.stain_file:
            raise OptionError("stain_file", "nothing, as normalize is false", str(self.stain_file))

    @property
    def counts_gb(self) -> float:
        """For counts in flight in an extraction; the rest of `memory_gb` is for patches and tables."""
        return self.memory_gb / 4

    @property
    def vocabulary(self) -> Path:
        """The vocabulary in use, given or to be made."""
        return self.vocab_file or self.out_dir / "vocab.txt"


def read_cohort_config(values: Mapping[str, object]) -> CohortConfig:
    """Settings as YAML or `--config` hand them over; unknown names, absent ones and words for numbers are refused."""
    known = {field.name: field for field in fields(CohortConfig)}
    unknown = [name for name in values if name not in known]
    if unknown:
        raise OptionError(f"config: {unknown[0]}", f"one of {', '.join(known)}", "an unknown setting")
    settings = {}
    for name, value in values.items():
        default = known[name].default
        if value is None or value == "":
            if name in ("samples", "out_dir"):
                raise OptionError(f"config: {name}", "a path (snakemake ... --config samples=sheet.csv out_dir=cohort)", "nothing")
            continue
        if "Path" in known[name].type:
            settings[name] = Path(str(value))
        elif isinstance(default, bool) and str(value).lower() in ("true", "false"):     # --config hands YAML's words over as text
            settings[name] = str(value).lower() == "true"
        elif isinstance(default, float) and isinstance(value, (int, float)) and not isinstance(value, bool):
            settings[name] = float(value)
        elif type(value) is type(default):
            settings[name] = value
        else:
            kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[type(default)]
            raise OptionError(f"config: {name}", kind, repr(value))
    for name in ("samples", "out_dir"):
        if name not in settings:
            raise OptionError(f"config: {name}", "a path (snakemake ... --config samples=sheet.csv out_dir=cohort)", "nothing")
    return CohortConfig(**settings)


# ---- the sample sheet -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class CohortSample:
    """One line of the sheet."""

    sample_id: str
    wsi_file: Path
    space_ranger_dir: Path | None = None
    gex_file: Path | None = None
    mpp: float | None = None
    spot_um: float | None = None
    stain_file: Path | None = None
    line: int = 0                        # of the sheet, for messages

    def files(self) -> dict[str, Path]:
        """Column -> path, of every path the line names."""
        named = {name: getattr(self, name) for name in ("wsi_file", *SOURCES, "stain_file")}
        return {name: path for name, path in named.items() if path is not None}


def read_cohort_sheet(path: Path | str) -> list[CohortSample]:
    """A CSV, one line a sample: sample_id, wsi_file, space_ranger_dir or gex_file, and where wanted mpp, spot_um, stain_file.

    Relative paths: beside the sheet, else in the working folder. That the files are there is asked by `missing_files`.
    """
    path = Path(path)
    reader = csv.DictReader(io.StringIO(read_text(path, "a sample sheet (CSV)"), newline=""), restkey="", restval="")
    try:
        columns = [column.strip() for column in reader.fieldnames or []]
        reader.fieldnames = columns
        _check_columns(path, columns)
        rows = ((reader.line_num, {name: _cell(value) for name, value in row.items()}) for row in reader)
        samples = [_read_line(path, line, row) for line, row in rows if any(row.values())]     # a spreadsheet leaves lines of commas
    except csv.Error as error:
        raise InputError(path, f"line {reader.line_num}", "comma-separated text", str(error)) from error
    if not samples:
        raise InputError(path, "rows", "one a sample", "none")
    folders = [sample.sample_id.lower() for sample in samples]             # on some disks S1 and s1 are one folder
    first_line = {folder: sample.line for folder, sample in reversed(list(zip(folders, samples, strict=True)))}
    require_unique(path, "sample_id", folders, [f"{sample.sample_id} on lines {first_line[folder]} and {sample.line}"
                                                for folder, sample in zip(folders, samples, strict=True)])
    return samples


def _cell(value: str | list[str]) -> str:
    return value.strip() if isinstance(value, str) else ",".join(value)


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    require_unique(path, "columns", columns)
    unknown = [column for column in columns if column not in COLUMNS]
    missing = [column for column in ("sample_id", "wsi_file") if column not in columns]
    if not any(column in columns for column in SOURCES):
        missing.append(" or ".join(SOURCES))
    if unknown or missing:
        found = f"unknown {', '.join(map(repr, unknown))}" if unknown else f"no {', '.join(missing)}"
        raise InputError(path, "columns", ", ".join(COLUMNS), found)


def _read_line(path: Path, line: int, row: dict[str, str]) -> CohortSample:
    def refuse(expected: str, found: str):
        raise InputError(path, f"line {line}", expected, found)

    if row.get(""):
        refuse("one cell a column", f"more: {row['']!r}")
    empty = [column for column in ("sample_id", "wsi_file") if not row[column]]
    if empty:
        refuse(f"{' and '.join(empty)} filled", "an empty cell")
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", row["sample_id"]) or row["sample_id"].lower() == "logs":
        refuse("a sample_id of letters, digits, '.', '_' and '-' (it names a folder; not 'logs')", repr(row["sample_id"]))
    sources = [column for column in SOURCES if row.get(column)]
    if len(sources) != 1:
        refuse("either space_ranger_dir or gex_file filled", "both" if sources else "neither")
    if row.get("spot_um") and not row.get("gex_file"):
        refuse("spot_um only beside gex_file", f"spot_um {row['spot_um']}")
    values: dict[str, object] = {}
    for column in (column for column in NUMBERS if row.get(column)):
        try:
            values[column] = float(row[column])
        except ValueError:
            values[column] = float("nan")
        if not 0 < values[column] < float("inf"):
            refuse(f"{column}: a positive number", repr(row[column]))
    for column in (column for column in ("wsi_file", *SOURCES, "stain_file") if row.get(column)):
        values[column] = beside_or_here(path, row[column])
    return CohortSample(sample_id=row["sample_id"], line=line, **values)


def missing_files(sheet: Path | str, samples: Sequence[CohortSample]) -> Iterator[str]:
    """A line for every path of the sheet that is not there; such a sample fails, the others do not."""
    for sample in samples:
        for column, path in sample.files().items():
            if not path.exists():
                yield f"{sheet}: line {sample.line}: {column}: expected a {'folder' if column == SOURCES[0] else 'file'}; found no {path}"


# ---- steps ----------------------------------------------------------------------------------------------------------

def input_files(config: CohortConfig, sample: CohortSample) -> list[str]:
    """The files there are of a sample, so that one that changes is looked at again."""
    from preprocessing.space_ranger_folder import find_folder

    found = [path for path in (sample.wsi_file, sample.gex_file, _stain_file(config, sample)) if path is not None]
    if sample.space_ranger_dir is not None:
        try:
            found += find_folder(sample.space_ranger_dir).files().values()
        except (InputError, OSError):                      # extraction itself says what is wrong with the folder
            pass
    return [str(path) for path in found if path.exists()]


def extract_arguments(config: CohortConfig, sample: CohortSample) -> list[str]:
    """`extract_patches` of one sample, patch folder and all, without --workers and --memory-gb, which change no result."""
    folder = config.out_dir / sample.sample_id
    arguments = ["preprocessing.extract_patches", "--sample-id", sample.sample_id, "--wsi-file", str(sample.wsi_file),
                 "--out-dir", str(folder), "--dump-dir", str(folder / "patches"), "--patch-sz-um", f"{config.patch_um:g}",
                 "--patch-sz-px", str(config.patch_px), "--stride", str(config.stride), "--edge", config.edge,
                 "--min-tissue", f"{config.min_tissue:g}", "--on-stain-failure", config.on_stain_failure]
    values = {**{name: getattr(sample, name) for name in (*SOURCES, *NUMBERS)}, "stain_file": _stain_file(config, sample)}
    for name, value in values.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
    flags = {"--use-wsi-res": config.use_wsi_res and sample.mpp is None, "--no-h5": not config.keep_hdf5,
             "--no-normalize": not config.normalize}
    return arguments + [flag for flag, is_set in flags.items() if is_set]


def _stain_file(config: CohortConfig, sample: CohortSample) -> Path | None:
    return (sample.stain_file or config.stain_file) if config.normalize else None


def genes_arguments(config: CohortConfig, sample: CohortSample) -> list[str]:
    """`gex_preprocessing` of one sample."""
    return ["preprocessing.gex_preprocessing", "--raw-file", str(config.out_dir / sample.sample_id / "gex.h5ad"),
            "--vocab-file", str(config.vocabulary), "--missing-genes", config.missing_genes]


def read_mark(folder: Path, step: str) -> str:
    """What `steps/STEP.txt` of a sample's folder says; empty where there is none. A damaged one says something else than FINISHED."""
    mark = folder / "steps" / f"{step}.txt"
    return mark.read_text(encoding="utf-8", errors="replace").strip() if mark.is_file() else ""


def forget_unfinished(config: CohortConfig, samples: Sequence[CohortSample]) -> None:
    """Remove the marks of steps that failed, so that they are tried again, and of steps whose files were deleted or damaged since."""
    products = {"extract": ("gex.h5ad", *(("imgs.h5",) if config.keep_hdf5 else ()), "patches"), "genes": ("gex_filt.h5ad",)}
    for sample in samples:
        folder = config.out_dir / sample.sample_id
        for step, names in products.items():
            mark = folder / "steps" / f"{step}.txt"
            if mark.is_file() and not (read_mark(folder, step) == FINISHED and all(is_as_finished(folder / name) for name in names)):
                mark.unlink()
                if step == "extract":
                    mark.with_name("extracted.txt").unlink(missing_ok=True)


def is_as_finished(product: Path) -> bool:
    """Whether a file or a patch folder is as its done-manifest says. A file is read only if it changed after its manifest; of a
    folder the list of its files, which a PNG that was deleted or truncated changes."""
    from preprocessing.png_folder import patch_folder_sha256

    done = read_done(product)
    if product.is_dir():
        return bool(done) and done.get("content_sha256") == patch_folder_sha256(product)
    if not (done and product.is_file()) or product.stat().st_size != done.get("bytes"):
        return False
    return product.stat().st_mtime_ns <= done_path(product).stat().st_mtime_ns or done.get("sha256") == file_sha256(product)
