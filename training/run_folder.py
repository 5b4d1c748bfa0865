"""Run folders and the statistics of a run.

Run folder `00003-<name>`: config.json, stats.jsonl, log.txt, TensorBoard events, checkpoints, snapshots, samples.
"""
from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.inputs import read_json
from preprocessing.outputs import finished_file, is_leftover, writes_to
from preprocessing.progress import ProgressBar
from training.checkpoints import checkpoint_folders

log = logging.getLogger(__name__)


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
        say_without_wandb(f"--wandb {project}", error)
        return None


def say_without_wandb(option: str, error: Exception) -> None:
    """What keeps a run from being mirrored, in one line."""
    log.warning("%s: going on without it: %s", option, " ".join(str(error).split())[:200])


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


def latest_run(outdir: Path | str, name: str | None = None) -> Path | None:
    """The newest run folder under `outdir` that has a checkpoint; with `name`, only runs of that name, on any number of GPUs."""
    runs = sorted((path for path in Path(outdir).glob("[0-9]" * 5 + "-*") if path.is_dir()), reverse=True)
    named = [path for path in runs if name is None or _any_gpus(path.name[6:]) == _any_gpus(name)]
    return next((path for path in named if checkpoint_folders(path)), None)


def begun_run(outdir: Path | str, name: str, record: Mapping) -> Path | None:
    """The newest run folder of this name, if a run of this very config.json was killed in it before its first checkpoint."""
    runs = sorted((path for path in Path(outdir).glob("[0-9]" * 5 + "-*") if path.is_dir() and path.name[6:] == name), reverse=True)
    if not runs or checkpoint_folders(runs[0]):
        return None
    begun = runs[0] / "config.json"
    if not begun.is_file():                      # killed before it was written: there is nothing yet
        return runs[0] if all(path.name.startswith(".") or is_leftover(path) for path in runs[0].iterdir()) else None
    return runs[0] if read_json(begun, "that of a run") == json.loads(json.dumps(record, default=str)) else None


def _any_gpus(name: str) -> str:
    """A run's name without the number of its GPUs, which changes nothing in what it learns."""
    return re.sub(r"-gpus\d+-", "-", name)
