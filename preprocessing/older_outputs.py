"""By what an older output of a command is told from other files: its first lines, what an HDF5 file holds, or its done-manifest.

What was written before there was such a rule is known too. A damaged output is, where a done-manifest lies beside it.
"""
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

from preprocessing.done_manifests import read_done
from preprocessing.output_places import FileKind
from preprocessing.outputs import is_leftover
from preprocessing.parts import parts_folder

HEAD_BYTES = 1 << 16
SYMBOL = r"[^\s,{}\[\]<>\"=\x00\ufffd]+"       # of a gene, in a vocabulary
SAMPLE_FILES = ("imgs.h5", "gex.h5ad", "dropped_spots.tsv", "qc.png", "qc.html")
Test = Callable[[Path], bool]


def head(path: Path) -> str:
    """How a file begins, as text; what is none becomes U+FFFD."""
    with open(path, "rb") as stream:
        return stream.read(HEAD_BYTES).decode("utf-8-sig", errors="replace")


def page(what: str, title: str = "") -> FileKind:
    """An HTML page of ours, whose title begins so."""
    begin = re.compile(rf"<!doctype html>\s*<html lang=\"en\">\s*<head>\s*<meta charset=\"utf-8\">(<meta[^>]*>)?\s*<title>{title}")
    return FileKind(what, lambda path: begin.match(head(path)) is not None, (".html", ".htm"))


def json_file(what: str, *keys: str) -> FileKind:
    """A JSON object that has these keys near its begin."""
    def is_older(path: Path) -> bool:
        text = head(path)
        return text.lstrip().startswith("{") and all(f'"{key}":' in text for key in keys)

    return FileKind(what, is_older, (".json",))


def table(what: str, columns: str, suffix: str = ".csv") -> FileKind:
    """A table whose line of columns fits this regular expression."""
    return FileKind(what, lambda path: re.fullmatch(columns, head(path).partition("\n")[0].rstrip("\r")) is not None, (suffix,))


def config_of(path: Path) -> dict:
    """What the done-manifest says that the file was made with; empty without one."""
    config = read_done(path).get("config")
    return config if isinstance(config, dict) else {}


# ---- preprocessing --------------------------------------------------------------------------------------------------

def _is_vocabulary(path: Path) -> bool:
    text = head(path)
    lines = text.splitlines()[:-1 if len(text) >= HEAD_BYTES // 4 else None]      # the last one may be cut off
    symbols = [line.strip() for line in lines if line.strip()]
    return bool(symbols) and all(re.fullmatch(SYMBOL, symbol) and not re.search(r":[+-]", symbol) for symbol in symbols)


def _uns(path: Path, name: str) -> object:
    """A value of an .h5ad's `uns`; None without one."""
    import h5py

    try:
        with h5py.File(path) as file:
            found = file[f"uns/{name}"][()]
            return found.decode() if isinstance(found, bytes) else found
    except (OSError, KeyError, RuntimeError, TypeError, ValueError):     # no HDF5 file, a damaged one, or one without it
        return None


def _is_filtered(path: Path) -> bool:
    return "missing_genes" in config_of(path) or _uns(path, "vocab_sha256") is not None


def _settings_of_sample(path: Path) -> dict:
    """What a file of a sample was made with: by its done-manifest, else by the expression beside it, which a killed run may have left."""
    if (config := config_of(path)) or path.name not in SAMPLE_FILES:
        return config
    try:
        settings = json.loads(str(_uns(path.with_name("gex.h5ad"), "morphology/settings")))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _was_killed(path: Path, *others: str) -> bool:
    """Whether a killed run left something behind before it could say what it made."""
    return not config_of(path) and any(is_leftover(left, re.escape(name)) for name in others for left in path.parent.glob(f"{name}.tmp.*"))


def extracted(picture: Path, of_spots: bool = True) -> FileKind:
    """A file of extract_patches.py, of the spots of a sample or of random patches, whose blocks lie beside `picture`."""
    def is_older(path: Path) -> bool:
        made_with = _settings_of_sample(path) if of_spots else config_of(path)
        own = "edge" in made_with if of_spots else "n_patches" in made_with           # as `ExtractConfig.settings` says of each
        return own or not config_of(path) and parts_folder(picture).exists()

    return FileKind("that of an earlier extraction", is_older)


def _is_imported(path: Path) -> bool:
    settings = _settings_of_sample(path)
    return "patch_um" in settings and "edge" not in settings or _was_killed(path, "gex.h5ad", "dropped_spots.tsv")


def _is_generated_hdf5(path: Path) -> bool:
    return "made_of" in config_of(path) or parts_folder(path).exists()


VOCABULARY = FileKind("a list of one gene a line", _is_vocabulary)
FILTERED = FileKind("expression in the genes of a vocabulary", _is_filtered, (".h5ad",))
IMPORTED = FileKind("that of an earlier import", _is_imported)
GENERATED_HDF5 = FileKind("an older file of generated patches", _is_generated_hdf5, (".h5", ".hdf5"))
