"""Gather what a cohort's samples came to: how far each got and why it stopped, spots, UMIs, genes, mpp, stain; and what looks odd.

Reads the folder of each sample that `workflow/Snakefile` fills. UMIs and genes a spot are read from `gex.h5ad` in slices, once:
their quantiles are kept beside it (`cohort_numbers.json`).
"""
from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preprocessing.cohort import FINISHED, CohortSample, read_mark
from preprocessing.done_manifests import is_done, read_done, write_done
from preprocessing.errors import InputError
from preprocessing.inputs import read_json
from preprocessing.outputs import done_path, finished_file, locked, write_json

QUANTILES = np.linspace(0, 1, 101)
ENTRIES_AT_ONCE = 1 << 24                # counts read together: 64-128 MB
STEPS = {"extract": "patches and expression", "genes": "gene selection"}
KILLED = {"137", "-9", "265"}            # exit codes of a process that was killed
INTERRUPTED = "130"                      # by Ctrl-C
MIN_COMPARED = 3                         # samples needed to call one of them odd
UMI_FACTOR, MPP_FACTOR, STAIN_DEGREES = 4.0, 1.5, 15.0     # further than this from the cohort's median: a warning


@dataclass(frozen=True)
class SampleNumbers:
    """What is known of one sample; None where it did not get so far."""

    sample_id: str
    status: str                          # finished, failed, unfinished, not started
    reason: str = ""                     # of a failure, in the words of the step that failed
    platform: str | None = None
    mpp: float | None = None
    kept: int | None = None
    dropped: Mapping[str, int] = field(default_factory=dict)     # reason -> spots
    umis: np.ndarray | None = None       # (101,) quantiles of UMIs a spot
    genes: np.ndarray | None = None      # (101,) quantiles of genes a spot
    stain: np.ndarray | None = None      # (3, 2) RGB optical density of haematoxylin, of eosin
    stain_note: str = ""                 # where there are no vectors

    @property
    def median_umis(self) -> float | None:
        return None if self.umis is None else float(self.umis[50])

    @property
    def median_genes(self) -> float | None:
        return None if self.genes is None else float(self.genes[50])


def gather(out_dir: Path, samples: Sequence[CohortSample]) -> list[SampleNumbers]:
    """One a line of the sheet, in its order."""
    return [_gather_sample(out_dir, sample.sample_id) for sample in samples]


def _gather_sample(out_dir: Path, sample_id: str) -> SampleNumbers:
    folder = out_dir / sample_id
    status, reason = _status(out_dir, folder)
    extracted = read_mark(folder, "extract") == FINISHED           # else what lies there is of an older slide
    numbers = _read_numbers(folder) if extracted and (folder / "gex.h5ad").is_file() else {}
    stain, note = _read_stain(folder / "patches" / "stain.json") if extracted else (None, "")
    return SampleNumbers(sample_id, status, reason, stain=stain, stain_note=note, **numbers)


# ---- how far a sample got -------------------------------------------------------------------------------------------

def _status(out_dir: Path, folder: Path) -> tuple[str, str]:
    """(status, reason): the first step that failed decides. One that was interrupted did not fail: the next run goes on with it."""
    stopped = []
    for step, words in STEPS.items():
        mark, log = read_mark(folder, step), folder / "logs" / f"{step}.log"
        if mark == FINISHED:
            continue
        code = mark.removeprefix("failed").strip()
        interrupted = was_interrupted(log, code)
        if not interrupted and (mark or (log.is_file() and last_error(log))):
            return "failed", f"{words}: {failure_reason(log, code)}"
        how_far = "interrupted" if interrupted else "begun, not ended" if log.is_file() else "not begun"
        if step == "extract":
            return ("unfinished", f"{words}: {how_far}") if interrupted or log.is_file() else ("not started", "")
        waits_for = out_dir / "logs" / "vocabulary.log"
        if waits_for.is_file() and last_error(waits_for) and not was_interrupted(waits_for):
            return "failed", f"gene vocabulary: {last_error(waits_for)}"
        stopped.append(f"{words}: {how_far}")
    return ("unfinished", "; ".join(stopped)) if stopped else ("finished", "")


def was_interrupted(log: Path, exit_code: str = "") -> bool:
    """Whether Ctrl-C ended a step, by its exit code or by what it said last."""
    said = last_error(log) if log.is_file() else ""
    return exit_code == INTERRUPTED or said.startswith("interrupted") or said.endswith("KeyboardInterrupt")


def last_error(log: Path) -> str:
    """The one-line error a command ended with, without its `error: `; of an unexpected one its last line. Empty: no error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").replace("\r", "\n").splitlines() if line.strip()]
    if not lines:
        return ""
    errors = [line for line in lines if line.lower().startswith("error: ")]
    if errors:
        return errors[-1][len("error: "):]
    return f"stopped unexpectedly: {lines[-1]}" if any(line.startswith("Traceback") for line in lines) else ""


def failure_reason(log: Path, exit_code: str = "") -> str:
    """What to tell the user of a failed step."""
    if log.is_file() and (said := last_error(log)):
        return said
    if exit_code in KILLED:
        return "killed from outside, most often for want of memory: raise memory_gb"
    return f"stopped without a word{f' (exit code {exit_code})' if exit_code else ''}; see logs/{log.name}"


# ---- numbers --------------------------------------------------------------------------------------------------------

def _read_numbers(folder: Path) -> dict[str, object]:
    kept_numbers, gex, dropped = folder / "cohort_numbers.json", folder / "gex.h5ad", folder / "dropped_spots.tsv"
    inputs = {"gex": gex, **{path.stem: path for path in (dropped, done_path(gex)) if path.is_file()}}
    with locked(kept_numbers):
        if not is_done(kept_numbers, config={}, inputs=inputs):
            write_json(kept_numbers, {**_count_expression(gex), "dropped": read_done(gex).get("dropped", _count_dropped(dropped))})
            write_done(kept_numbers, config={}, inputs=inputs)
        numbers = json.loads(kept_numbers.read_text())
    return {**numbers, "umis": np.array(numbers["umis"]), "genes": np.array(numbers["genes"])}


def _count_expression(gex: Path) -> dict[str, object]:
    import h5py

    try:
        with h5py.File(gex, "r") as file:
            spatial = next(iter(file["uns/spatial"].values()), {}) if "uns/spatial" in file else {}
            platform = spatial["metadata/platform"][()].decode() if "metadata/platform" in spatial else None
            first_entry = file["X/indptr"][:].astype(np.int64)                                     # (P + 1,)
            library_sizes = np.concatenate([np.empty(0, np.int64), *_library_sizes(file["X/data"], first_entry)])
            return {"platform": platform, "mpp": float(file["uns/morphology/mpp"][()]), "kept": len(first_entry) - 1,
                    "umis": np.quantile(library_sizes, QUANTILES).tolist(),
                    "genes": np.quantile(np.diff(first_entry), QUANTILES).tolist()}
    except Exception as error:         # h5py and numpy raise a dozen types for a damaged file
        raise InputError(gex, "file", "the expression that extraction wrote", f"one that cannot be read ({str(error)[:120]})",
                         "Run the cohort again: it extracts a damaged sample anew") from error


def _library_sizes(counts, first_entry: np.ndarray) -> Iterator[np.ndarray]:
    """Sums of the rows whose entries begin at `first_entry`, a slice of rows at a time."""
    start = 0
    while start < len(first_entry) - 1:
        stop = max(start + 1, int(np.searchsorted(first_entry, first_entry[start] + ENTRIES_AT_ONCE, side="right")) - 1)
        block = counts[first_entry[start]:first_entry[stop]]
        before = np.concatenate([[0], np.cumsum(block, dtype=np.int64)])                       # sum of all entries before each
        yield np.diff(before[first_entry[start:stop + 1] - first_entry[start]])
        start = stop


def _count_dropped(path: Path) -> dict[str, int]:
    if not path.is_file():
        return {}
    with open(path, encoding="utf-8", errors="replace") as stream:
        next(stream, None)
        return dict(Counter(line.rstrip("\n").partition("\t")[2] for line in stream))


def _read_stain(path: Path) -> tuple[np.ndarray | None, str]:
    if not path.is_file():
        return None, ""
    content = read_json(path, "a stain.json")
    if isinstance(content, dict) and not content.get("normalised"):
        return None, str(content.get("reason") or "colours kept as they are")
    from preprocessing.stain import read_stain_file

    return np.array(read_stain_file(path).vectors), ""


def stain_rgb(vector: np.ndarray) -> tuple[int, int, int]:
    """The colour that one unit of a stain leaves of white light: Beer-Lambert."""
    red, green, blue = np.clip(240 * np.exp(-np.asarray(vector)), 0, 255).round().astype(int)
    return int(red), int(green), int(blue)


# ---- what looks odd -------------------------------------------------------------------------------------------------

def warnings(cohort: Sequence[SampleNumbers]) -> dict[str, list[str]]:
    """sample_id -> what is far from the other samples: valid, but worth a look. Empty for fewer than three samples."""
    found: dict[str, list[str]] = {sample.sample_id: [] for sample in cohort}
    for name, label, factor, unit in (("median_umis", "median UMIs", UMI_FACTOR, ",.0f"), ("mpp", "mpp", MPP_FACTOR, ".3g")):
        values = {sample.sample_id: getattr(sample, name) for sample in cohort if getattr(sample, name) is not None}
        for sample_id, value in values.items() if len(values) >= MIN_COMPARED else ():
            others = float(np.median([other for key, other in values.items() if key != sample_id]))
            if not others / factor <= value <= others * factor:
                found[sample_id].append(f"{label} {value:{unit}}, the others' median is {others:{unit}}")
    stains = {sample.sample_id: sample.stain / np.linalg.norm(sample.stain, axis=0) for sample in cohort if sample.stain is not None}
    for sample_id, vectors in stains.items() if len(stains) >= MIN_COMPARED else ():
        others = np.median([other for key, other in stains.items() if key != sample_id], axis=0)
        cosines = (vectors * others).sum(axis=0) / np.linalg.norm(others, axis=0)
        for stain, degrees in zip(("haematoxylin", "eosin"), np.degrees(np.arccos(np.clip(cosines, -1, 1))), strict=True):
            if degrees > STAIN_DEGREES:
                found[sample_id].append(f"{stain} {degrees:.0f}° from the others' median")
    return found


# ---- the table ------------------------------------------------------------------------------------------------------

def write_table(path: Path, cohort: Sequence[SampleNumbers]) -> None:
    """The page's numbers as CSV, one line a sample."""
    odd = warnings(cohort)
    columns = ("sample_id", "status", "reason", "platform", "mpp", "spots_kept", "spots_dropped", "dropped_because", "median_umis",
               "median_genes", *(f"{stain}_{channel}" for stain in ("haematoxylin", "eosin") for channel in "rgb"), "warnings")
    with finished_file(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        for sample in cohort:
            stain = [None] * 6 if sample.stain is None else sample.stain.T.ravel().round(4).tolist()
            dropped = None if sample.kept is None else sum(sample.dropped.values())
            writer.writerow([sample.sample_id, sample.status, sample.reason, sample.platform, sample.mpp, sample.kept, dropped,
                             "; ".join(f"{count} {why}" for why, count in sample.dropped.items()), sample.median_umis,
                             sample.median_genes, *stain, "; ".join(odd[sample.sample_id])])
