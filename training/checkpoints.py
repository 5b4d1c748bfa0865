"""Checkpoint folders: everything a run needs to go on, whole or not there.

`checkpoint-<step>/`: tensors as safetensors, optimisers as files that load with `weights_only=True`, state.json, SHA256SUMS and
COMMIT, which is written last. `latest` is computed, never stored.
"""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks.weights import write_plain_file
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from preprocessing.output_places import FolderKind
from preprocessing.outputs import finished_folder, is_leftover

log = logging.getLogger(__name__)
COMMIT, SUMS_FILE, STATE_FILE = "COMMIT", "SHA256SUMS", "state.json"
KEEP_CHECKPOINTS = 2
KIND = FolderKind("a checkpoint", r".+\.(safetensors|pt)|state\.json|SHA256SUMS|COMMIT")


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, on the CPU."""

    folder: Path
    state: dict                              # step, counters, hashes: plain JSON
    tensors: dict[str, dict[str, Tensor]]    # part -> tensors by name
    optimisers: dict[str, dict]              # part -> optimiser state dict


def save_checkpoint(folder: Path | str, step: int, *, state: Mapping, tensors: Mapping[str, Mapping[str, Tensor]],
                    optimisers: Mapping[str, Mapping], keep: int = KEEP_CHECKPOINTS, on_signal: bool = False) -> Path:
    """Write `folder/checkpoint-<step>` and return its path. Once it was read back, others go: of those written in turn all but the `keep`
    newest; those written `on_signal`, which are one more until the next; damaged ones; and what killed runs left half-written."""
    path = Path(folder) / f"checkpoint-{step:08d}"
    with finished_folder(path, validate=read_checkpoint, kind=KIND) as temporary:
        for part, values in tensors.items():
            plain = {name: value.detach().cpu().contiguous().clone() for name, value in values.items()}
            save_file(plain, temporary / f"{part}.safetensors")
        for part, values in optimisers.items():
            write_plain_file(values, temporary / f"{part}.pt")
        (temporary / STATE_FILE).write_text(json.dumps({**state, "step": step, "on_signal": on_signal}, indent=2) + "\n")
        files = sorted(path.name for path in temporary.iterdir())
        (temporary / SUMS_FILE).write_text("".join(f"{file_sha256(temporary / name)}  {name}\n" for name in files))
        _write_and_sync(temporary / COMMIT, f"{step}\n")
    older = [other for other in checkpoint_folders(folder) if other.name <= path.name]     # a later one is damaged, and does not count
    in_turn = [other for other in older if _was_in_turn(other)]
    half_written = {left for left in Path(folder).glob("*.tmp.*") if is_leftover(left, r"(checkpoint|snapshot)-\d+")}
    for old in ({*older} - {path, *in_turn[:keep]}) | half_written:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _was_in_turn(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text()).get("on_signal") is not True      # not there: older than this record
    except (OSError, ValueError, AttributeError, RecursionError):      # damaged: no run goes on from it
        return False


def _write_and_sync(path: Path, text: str) -> None:
    with open(path, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def read_checkpoint(folder: Path | str) -> Checkpoint:
    """A checkpoint after comparing every file with its SHA-256; `WeightsError` if it is not whole."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(folder, "checkpoint", "a checkpoint folder", "nothing there")
    if not (folder / COMMIT).is_file() or not (folder / SUMS_FILE).is_file():
        raise WeightsError(folder, "checkpoint", f"{SUMS_FILE} and {COMMIT}, which is written last", "an unfinished folder")
    text = (folder / SUMS_FILE).read_text(errors="replace")
    sums = dict(line.split("  ", 1)[::-1] for line in text.splitlines() if "  " in line)
    unlisted = sorted({path.name for path in folder.iterdir()} - {*sums, SUMS_FILE, COMMIT})
    if unlisted:                               # a damaged list would leave them out
        raise WeightsError(folder / SUMS_FILE, "checkpoint", "a line for every file", f"none for {first_few(unlisted)}")
    for name, expected in sums.items():
        if not (folder / name).is_file():
            raise WeightsError(folder / name, "checkpoint", "a file named in SHA256SUMS", "nothing there")
        if file_sha256(folder / name) != expected:
            raise WeightsError(folder / name, "SHA-256", expected, "another: the file is damaged")
    if STATE_FILE not in sums:
        raise WeightsError(folder, "checkpoint", STATE_FILE, "not listed in SHA256SUMS")
    try:
        tensors = {Path(name).stem: load_file(folder / name) for name in sums if name.endswith(".safetensors")}
        optimisers = {Path(name).stem: torch.load(folder / name, map_location="cpu", weights_only=True)
                      for name in sums if name.endswith(".pt")}
        state = json.loads((folder / STATE_FILE).read_text())
    except Exception as error:   # the loaders raise a dozen types for hostile contents; none of them may look like a bug of ours
        raise WeightsError(folder, "checkpoint", "tensors that load without running code", str(error)[:160]) from error
    return Checkpoint(folder, state, tensors, optimisers)


def latest_checkpoint(folder: Path | str) -> Checkpoint | None:
    """The newest whole checkpoint under a run folder, None if it has none; damaged newer ones are skipped with a warning. `WeightsError` if
    all are damaged: to begin anew is the user's to say."""
    found = checkpoint_folders(folder)
    for path in found:
        try:
            return read_checkpoint(path)
        except (WeightsError, InputError) as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    if found:
        raise WeightsError(folder, "checkpoints", "one that is whole", f"damaged ones alone, {first_few([path.name for path in found])}",
                           "Remove them to start anew")
    return None


def require_newest(checkpoint: Checkpoint, folder: Path | str, option: str) -> None:
    """Refuse to go on in `folder` from one checkpoint where later ones lie, which the next call would take for this run's."""
    later = [path.name for path in checkpoint_folders(folder) if int(path.name.split("-")[1]) > int(checkpoint.state["step"])]
    if later:
        raise OptionError(option, f"no checkpoints later than {checkpoint.folder.name}, which would be taken for this run's",
                          f"{folder} with {first_few(later[::-1])}")


def checkpoint_folders(folder: Path | str) -> list[Path]:
    """Newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
