"""Where outputs may go: said before the work, so that nothing is lost - not the inputs, nor what is not an older output of the command.

One rule: a name must be free, or hold an older output of the same command. By what these are told: `older_outputs.py`.
"""
from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from preprocessing.errors import InputError, OptionError, first_few

UNFINISHED = r"(?:\.(tmp|old)\.\d{1,7})+$"     # what a process adds to a name, with its number, once or again; 2024-05-01 is none
LITTER = r"\.DS_Store|\._.*|\.nfs.*|\.ipynb_checkpoints"       # what systems and notebooks leave in any folder
Paths = Path | str | Iterable[Path | str] | None          # what an option names, if it was given
OWNED = {"metadata.jsonl": "patches", "samples.csv": "generated patches", "perturbation.csv": "a perturbation", "SHA256SUMS": "weights",
         "embeddings.json": "embeddings", "model_index.json": "a pipeline", "config.json": "a run"}   # of folders that are one output


@dataclass(frozen=True)
class FolderKind:
    """By what an older output that may be replaced as a whole is told from anybody else's folder."""

    what: str          # "a pipeline folder"
    names: str         # regular expression of what lies in one, folders with a slash at the end; anything else is somebody else's
    mark: str = ""     # what lies in every one, also in a damaged one
    is_older: Callable[[Path], bool] | None = None     # looks closer, where names alone do not tell


@dataclass(frozen=True)
class FileKind:
    """By what an older output, which its command may replace, is told from any other file."""

    what: str                              # "an older page of image quality"
    is_older: Callable[[Path], bool]       # by its content, or its done-manifest
    suffixes: tuple[str, ...] = ()         # one of which its name must have; none: any


def require_replaceable(path: Path | str, kind: FolderKind | None = None) -> None:
    """Refuse to put a folder in the place of a file, or of a folder that is neither empty nor an older one of this `kind`."""
    path = Path(path)
    require_place(path, folder=True)
    if not path.exists():
        return
    what = "a new folder" if kind is None else f"a new folder, or {kind.what} to replace"
    present = {entry.name: f"{entry.name}/" if entry.is_dir() else entry.name for entry in sorted(path.iterdir())}
    own = [] if kind is None else [name for name, shown in present.items() if re.fullmatch(kind.names, shown)]
    if own and (not kind.mark or kind.mark in own):
        foreign = [name for name in present if name not in own and not re.fullmatch(LITTER, name)]
    else:
        foreign = list(present)                             # litter alone does not make a folder ours
    if foreign:
        raise InputError(path, "content", what, f"{first_few(foreign)} other entries", "Name another folder")


def require_own_folder(option: str, path: Path | str, kind: FolderKind) -> None:
    """Refuse to write into a folder that holds anything but is no older output of this `kind`, finished or not. Into one that is, its user
    may have put what he likes; hidden files do not count."""
    path = Path(path)
    require_place(path, folder=True)
    present = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")] if path.exists() else []
    shown = [re.sub(UNFINISHED, "", entry.name) + "/" * entry.is_dir() for entry in present]
    has_own = any(re.fullmatch(kind.names, name) for name in shown)
    if present and not (has_own and (kind.is_older is None or kind.is_older(path))):
        raise OptionError(option, f"a new or empty folder, or {kind.what}", f"{path} with {first_few([entry.name for entry in present])}")


def require_shared_folder(option: str, path: Path | str, own: str = "") -> None:
    """Refuse to write beside others into a folder that as a whole is the output of another command, whose readers take all that lies
    there. `own`: which of OWNED the command writes itself."""
    path = Path(path)
    require_place(path, folder=True)
    for name, what in OWNED.items():
        if name != own and (path / name).is_file():
            raise OptionError(option, f"a folder that does not hold {what} alone", f"{path}, in which {name} lies")


def require_place(path: Path | str, folder: bool = False) -> None:
    """Say before the work that no file, or no `folder`, can be written there: a folder has that name, or a file that of its folder."""
    path = Path(path)
    if not folder:
        require_no_folder(path)
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), None)
    for holder in filter(None, (path if folder and os.path.lexists(path) else None, above)):
        if not holder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{holder} is no folder", str(path))


def require_outputs(outputs: Mapping[str, Paths | Mapping[Path, FileKind]], inputs: Mapping[str, Paths]) -> None:
    """Say before the work what is wrong with the files that options name for writing: nothing can be written there, it is also the
    file of another option, or it is not of the `FileKind` that the command writes. Links are followed."""
    taken = {os.path.realpath(path): option for option, paths in inputs.items() for path in _each(paths) if os.path.exists(path)}
    for option, paths in outputs.items():
        for path in _each(paths):
            require_place(path)
            real = os.path.realpath(path)
            if real in taken:
                raise OptionError(option, f"another file than {taken[real]}", str(path))
            taken[real] = option
            if isinstance(paths, Mapping):
                _require_kind(option, path, paths[path])


def _require_kind(option: str, path: Path, kind: FileKind) -> None:
    if kind.suffixes and path.suffix.lower() not in kind.suffixes:
        raise OptionError(option, f"a name that ends in {' or '.join(kind.suffixes)}", str(path))
    if path.exists() and path.stat().st_size and not kind.is_older(path):       # an empty file holds nothing to lose
        raise OptionError(option, f"a new file, or {kind.what} to replace", f"{path}, another file")


def _each(paths: Paths) -> Iterable[Path | str]:
    return [] if paths is None else [paths] if isinstance(paths, Path | str) else paths


def require_own_places(paths: Iterable[Path | str]) -> None:
    """Refuse to write two files under one name."""
    seen: set[str] = set()
    for path in paths:
        if (real := os.path.realpath(path)) in seen:
            raise InputError(path, "outputs", "a name of its own for every file", "one name for two")
        seen.add(real)


def require_no_folder(path: Path) -> None:
    """A file cannot take the place of a folder. Said before the work, not after it."""
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
