"""Where outputs may go: said before the work, so that nothing is lost - not the inputs, nor a folder that is not an older output."""
from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from preprocessing.errors import InputError, OptionError, first_few

LITTER = r"\.DS_Store|\._.*|\.nfs.*|\.ipynb_checkpoints"       # what systems and notebooks leave in any folder
Paths = Path | str | Iterable[Path | str] | None          # what an option names, if it was given


@dataclass(frozen=True)
class FolderKind:
    """By what an older output that may be replaced as a whole is told from anybody else's folder."""

    what: str          # "a pipeline folder"
    names: str         # regular expression of what lies in one, folders with a slash at the end; anything else is somebody else's
    mark: str = ""     # what lies in every one, also in a damaged one


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


def require_place(path: Path | str, folder: bool = False) -> None:
    """Say before the work that no file, or no `folder`, can be written there: a folder has that name, or a file that of its folder."""
    path = Path(path)
    if not folder:
        require_no_folder(path)
    above = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), None)
    for holder in filter(None, (path if folder and os.path.lexists(path) else None, above)):
        if not holder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{holder} is no folder", str(path))


def require_outputs(outputs: Mapping[str, Paths], inputs: Mapping[str, Paths]) -> None:
    """Say before the work what is wrong with the files that options name for writing: nothing can be written there, or it is also the
    file of another option. Links are followed."""
    taken = {os.path.realpath(path): option for option, paths in inputs.items() for path in _each(paths) if os.path.exists(path)}
    for option, paths in outputs.items():
        for path in _each(paths):
            require_place(path)
            real = os.path.realpath(path)
            if real in taken:
                raise OptionError(option, f"another file than {taken[real]}", str(path))
            taken[real] = option


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
