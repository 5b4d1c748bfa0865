"""What users name: paths, lists of paths, and small text files, with errors that say what is wrong with them."""
from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocessing.errors import MOST_OF_AN_ITEM, InputError, first_few


def require_file(path: Path | str, expected: str) -> Path:
    """The path, if there is a file; else an InputError that names what was expected there."""
    path = Path(path)
    if not path.is_file():
        raise InputError(path, "file", expected, "a folder" if path.is_dir() else "nothing there")
    return path


def beside_or_here(sheet: Path, name: str) -> Path:
    """A relative path that a sheet names: beside the sheet if something is there, else in the working folder."""
    beside = sheet.parent / name
    try:
        return beside if beside.exists() else Path(name)
    except OSError as error:                   # no name of a file: thousands of letters
        raise InputError(sheet, "paths", "names of files", f"{name[:MOST_OF_AN_ITEM]} ({error.strerror})") from error


def path_list(paths: str | Path | Sequence[Path]) -> list[Path]:
    """The paths of a list with commas between. What exists as it is said is one path, commas and all."""
    if not isinstance(paths, str):
        return [paths] if isinstance(paths, Path) else list(paths)
    if "," in paths and os.path.exists(paths.strip()):           # unlike Path.exists, without an error for a name that cannot be one
        return [Path(paths.strip())]
    return [Path(part.strip()) for part in paths.split(",") if part.strip()]


def read_text(path: Path | str, expected: str) -> str:
    """The text of a UTF-8 file (a byte order mark is dropped)."""
    try:
        return require_file(path, expected).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(path, "file", f"{expected}, in UTF-8", "other bytes") from error


def read_json(path: Path | str, expected: str) -> Any:
    """The content of a JSON file. Its form is the caller's to check."""
    text = read_text(path, expected)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:              # lists in lists without end
        raise InputError(path, "file", expected, f"text that is not JSON ({error})") from error


def require_unique(path: Path | str, field: str, values: Sequence[str], shown: Sequence[str] | None = None) -> None:
    """Refuse values that come twice; `shown` are their names in the message."""
    if len(set(values)) < len(values):
        seen: set[str] = set()
        repeated = [label for value, label in zip(values, shown or values, strict=True) if value in seen or seen.add(value)]
        raise InputError(path, field, "no value twice", f"repeated {first_few(repeated)}")
