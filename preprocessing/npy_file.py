"""Read an .npy file of anybody: one array of plain values, never a pickled object."""
from __future__ import annotations

import tokenize
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError
from preprocessing.inputs import read_json

RECORD = "embeddings.json"          # beside embeddings: which barcodes the rows are, of which weights, and their SHA-256
# what numpy makes of a damaged header, or of one that announces more than the file holds
NPY_ERRORS = (ValueError, EOFError, BadZipFile, LookupError, TypeError, SyntaxError, ArithmeticError, RecursionError, MemoryError,
              NotImplementedError, tokenize.TokenError)


def load_array(path: Path | str, expected: str) -> np.ndarray:
    """The one array of an .npy, never a pickled object."""
    try:
        array = np.load(path, allow_pickle=False)
    except NPY_ERRORS as error:              # what NumPy says of a pickle is how to run it: not repeated here
        raise InputError(path, "contents", f"{expected} as numpy.save writes it, no Python objects",
                         "Python objects, or no whole .npy file") from error
    if not isinstance(array, np.ndarray):
        raise InputError(path, "contents", f"{expected} as numpy.save writes it", "several arrays (.npz)")
    return array


def require_as_recorded(path: Path | str) -> None:
    """Refuse embeddings that are not those of which the record beside them gives the SHA-256; without one nothing is known."""
    path = Path(path)
    record = read_json(path.with_name(RECORD), "a record of embeddings") if path.with_name(RECORD).is_file() else {}
    sums = record.get("sha256") if isinstance(record, dict) else None
    expected = sums.get(path.name) if isinstance(sums, dict) else None
    if expected is not None and path.is_file() and file_sha256(path) != expected:
        raise InputError(path, "SHA-256", f"{expected}, as {RECORD} says", "another: the file is damaged or of another run",
                         "Run clip_embeddings.py again")
