"""By what the folders of commands that draw patches are told apart: the columns of samples.csv, and where a killed run left none, the
names of its patches and the mark that those of gen_images.py carry (`generated_pngs.py`)."""
from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from preprocessing.older_outputs import head
from preprocessing.output_places import FolderKind

SAMPLES, MARK = "samples.csv", b"genes-to-morphology"


def _lists(*columns: str, marked: bool | None = None) -> Callable[[Path], bool]:
    """Whether samples.csv has these columns, or is damaged, or absent beside patches that are `marked` so (None: of names of their own)."""
    def is_older(folder: Path) -> bool:
        samples = folder / SAMPLES
        text = head(samples).partition("\n")[0] if samples.is_file() else ""
        if text and "\ufffd" not in text and "\0" not in text:
            return set(columns) <= set(next(csv.reader([text]), ()))
        drawn = next(folder.rglob("prompt*_seed*.png"), None)
        return marked is None or drawn is None or _is_marked(drawn) == marked

    return is_older


def _is_marked(picture: Path) -> bool:
    with open(picture, "rb") as stream:
        return MARK in stream.read(256)


def with_file(kind: FolderKind, folder: Path, path: Path | None) -> FolderKind:
    """The kind of a folder in which that file may lie alone: what a killed run had finished."""
    if path is None or path.absolute().parent != folder.absolute():
        return kind
    return replace(kind, names=rf"{kind.names}|{re.escape(path.name)}(\.done\.json)?")


GENERATED = FolderKind("patches of an earlier gen_images.py", r"samples\.csv|prompt\d+_seed\d+\.png|cluster_.*/",
                       is_older=_lists("prompt", "truncation", marked=True))
DRAWN = FolderKind("pictures of an earlier generate_img.py", r"samples\.csv|latents\.npy|null/|prompt\d+_seed\d+\.png",
                   is_older=_lists("prompt", "guidance_scale", marked=False))
WALKED = FolderKind("patches of an earlier interpolate_prompts.py", r"samples\.csv|seed\d+_step\d+\.png", is_older=_lists("step", "share"))
