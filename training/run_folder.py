"""Run folders, the statistics of a run, and checkpoints: everything needed to go on, whole or not there.

Run folder `00003-<name>`: config.json, stats.jsonl, log.txt, TensorBoard events, checkpoints, snapshots, samples.
Checkpoint folder `checkpoint-<step>/`: tensors as safetensors, optimisers as files that load with `weights_only=True`,
state.json, SHA256SUMS and COMMIT, which is written last. `latest` is computed, never stored.
"""
from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks.weights import write_plain_file
from preprocessing.done_manifests import file_sha256, strings_sha256
from preprocessing.errors import InputError, OptionError, WeightsError, first_few
from preprocessing.inputs import read_json
from preprocessing.output_places import FolderKind
from preprocessing.outputs import LEFTOVER, finished_file, finished_folder, writes_to
from preprocessing.progress import ProgressBar

log = logging.getLogger(__name__)
COMMIT, SUMS_FILE, STATE_FILE = "COMMIT", "SHA256SUMS", "state.json"
KEEP_CHECKPOINTS = 2
KIND = FolderKind("a checkpoint", r".+\.(safetensors|pt)|state\.json|SHA256SUMS|COMMIT")


def next_run_folder(outdir: Path | str, name: str) -> Path:
    """Make and return `outdir/00003-name`: one more than the highest number there."""
    outdir = Path(outdir)
    outdir.mkdir(parents=True, exist_ok=True)
    numbers = [int(match[1]) for path in outdir.iterdir() if (match := re.match(r"(\d{5})-", path.name))]
    number = max(numbers, default=-1) + 1
    while True:
        folder = outdir / f"{number:05d}-{name}"
        try:
            folder.mkdir()
        except FileExistsError:      # another run took the number
            number += 1
            continue
        return folder


def require_own_config(option: str, folder: Path, keys: Collection[str], what: str) -> None:
    """Refuse to start a run where the config.json of something else lies, which has not the `keys` of `what`."""
    try:
        found = read_json(folder / "config.json", "that of a run")
    except InputError:               # none, or a damaged one
        return
    if not (isinstance(found, dict) and set(keys) <= set(found)):
        raise OptionError(option, f"a new folder, or that of {what}", f"{folder}, whose config.json is another's")


class StatsLog:
    """Write the numbers of one tick to stats.jsonl, and a status line to the screen and log.txt; as asked, also to TensorBoard and to
    a project of Weights & Biases. `step` is where the run stands: what is there of later steps goes, it will be shown again."""

    def __init__(self, folder: Path | str, step: int = 0, *, tensorboard: bool = True, wandb_project: str | None = None):
        self.folder = Path(folder)
        self._forget_after(step)
        self.wandb_run = _wandb_run(self.folder, wandb_project) if wandb_project else None
        self.writer = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter
            self.writer = SummaryWriter(log_dir=str(self.folder), purge_step=step + 1)

    def _forget_after(self, step: int) -> None:
        """Drop the lines of later steps, and, with a notice, those that a kill or a full disk tore."""
        path = self.folder / "stats.jsonl"
        if not path.exists():
            return
        lines = path.read_text(errors="replace").splitlines()
        steps = [_step_of(line) for line in lines]
        if torn := steps.count(None):
            log.warning("%s: dropping %d unreadable line%s", path, torn, "" if torn == 1 else "s")
        kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
        with finished_file(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))

    def write(self, step: int, values: Mapping[str, float], line: str) -> None:
        with writes_to(self.folder / "stats.jsonl"), open(self.folder / "stats.jsonl", "a") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        self.note(line)
        if self.writer is not None:
            with writes_to(self.folder / "events.out.tfevents"):
                for name, value in values.items():
                    self.writer.add_scalar(name, value, step)
                self.writer.flush()
        if self.wandb_run is not None:
            self.wandb_run.log(dict(values), step=step)

    def note(self, line: str) -> None:
        """Say a line, and append it to log.txt."""
        ProgressBar.write(line)
        with writes_to(self.folder / "log.txt"), open(self.folder / "log.txt", "a") as stream:
            stream.write(line + "\n")

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def _wandb_run(folder: Path, project: str):
    """The run on Weights & Biases that mirrors this folder; None, with a notice, where the service takes none (no login, no network)."""
    import wandb
    try:
        about = read_json(folder / "config.json", "that of a run")
        return wandb.init(project=project, name=folder.name, id=wandb_id(folder), resume="allow", dir=str(folder), config=about["config"],
                          allow_val_change=True)          # a run may go on for longer, at other rates
    except Exception as error:      # a mirror is not worth a run, whatever the service says, or a damaged config.json
        log.warning("--wandb %s: going on without it: %s", project, " ".join(str(error).split())[:200])
        return None


def wandb_id(folder: Path) -> str:
    """The same for a run and its continuation."""
    return strings_sha256([str(folder.absolute())])[:16]


class NoStats:
    """The statistics of a rank that does not speak."""

    def write(self, step: int, values: Mapping[str, float], line: str) -> None:
        pass

    def close(self) -> None:
        pass


def _step_of(line: str) -> int | None:
    """The step of a line of stats.jsonl; None if the line is not whole."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, on the CPU."""

    folder: Path
    state: dict                              # step, counters, hashes: plain JSON
    tensors: dict[str, dict[str, Tensor]]    # part -> tensors by name
    optimisers: dict[str, dict]              # part -> optimiser state dict


def save_checkpoint(folder: Path | str, step: int, *, state: Mapping, tensors: Mapping[str, Mapping[str, Tensor]],
                    optimisers: Mapping[str, Mapping], keep: int = KEEP_CHECKPOINTS, on_signal: bool = False) -> Path:
    """Write `folder/checkpoint-<step>`; older ones beyond `keep`, and checkpoints and snapshots that killed runs left half-written, go
    once this one was read back. One written `on_signal`, out of turn, goes with the next: it never takes the place of a regular one.
    Returns its path."""
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
    older = [other for other in _checkpoint_folders(folder) if other.name <= path.name]     # a later one is damaged, and does not count
    in_turn = [other for other in older if other == path or not _was_on_signal(other)]
    for old in ({*older} - {*in_turn[:keep]}) | {*Path(folder).glob("checkpoint-*.tmp.*"), *Path(folder).glob("snapshot-*.tmp.*")}:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _was_on_signal(checkpoint: Path) -> bool:
    try:
        return json.loads((checkpoint / STATE_FILE).read_text())["on_signal"] is True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):      # damaged, or older than this record
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
    """The newest whole checkpoint under a run folder; damaged newer ones are skipped with a warning."""
    for path in _checkpoint_folders(folder):
        try:
            return read_checkpoint(path)
        except (WeightsError, InputError) as error:
            log.warning("skipping a damaged checkpoint: %s", error)
    return None


def latest_run(outdir: Path | str, name: str | None = None) -> Path | None:
    """The newest run folder under `outdir` that has a checkpoint; with `name`, only runs of that name, on any number of GPUs."""
    runs = sorted((path for path in Path(outdir).glob("[0-9]" * 5 + "-*") if path.is_dir()), reverse=True)
    named = [path for path in runs if name is None or _any_gpus(path.name[6:]) == _any_gpus(name)]
    return next((path for path in named if _checkpoint_folders(path)), None)


def begun_run(outdir: Path | str, name: str, record: Mapping) -> Path | None:
    """The newest run folder of this name, if a run of this very config.json was killed in it before its first checkpoint."""
    runs = sorted((path for path in Path(outdir).glob("[0-9]" * 5 + "-*") if path.is_dir() and path.name[6:] == name), reverse=True)
    if not runs or _checkpoint_folders(runs[0]):
        return None
    begun = runs[0] / "config.json"
    if not begun.is_file():                      # killed before it was written: there is nothing yet
        return runs[0] if all(path.name.startswith(".") or LEFTOVER.fullmatch(path.name) for path in runs[0].iterdir()) else None
    return runs[0] if read_json(begun, "that of a run") == json.loads(json.dumps(record, default=str)) else None


def _any_gpus(name: str) -> str:
    """A run's name without the number of its GPUs, which changes nothing in what it learns."""
    return re.sub(r"-gpus\d+-", "-", name)


def _checkpoint_folders(folder: Path | str) -> list[Path]:
    """Newest first."""
    found = [path for path in Path(folder).glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]), reverse=True)
