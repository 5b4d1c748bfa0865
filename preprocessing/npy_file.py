"""Read an .npy file of anybody: one array of plain values, never a pickled object."""
from __future__ import annotations

import tokenize
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from preprocessing.errors import InputError

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
