"""Checkpoints of a CLIP run: whole, with their SHA-256 beside them, and one more when a signal stops the run.

`last.ckpt` lies beside `last.ckpt.sha256` (as `sha256sum -c` reads it). A file that is not what was written is never resumed.
"""
from __future__ import annotations

import signal
from pathlib import Path
from typing import NoReturn

import pytorch_lightning as pl
from lightning_fabric.plugins.io import TorchCheckpointIO
from pytorch_lightning.callbacks import ModelCheckpoint

from networks.weights import read_plain_file, write_plain_file
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, WeightsError, first_few
from preprocessing.interrupts import Stopped, StopSignals
from preprocessing.outputs import finished_file
from training.clip_continuation import ResumePoint

WHOLE = {"weights_only": False}   # of saving: Lightning's word for "with the optimiser"; nothing is ever read that way
PARTS = ("clip", "state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")   # of a checkpoint to resume from


class SummedCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoint files, written by the rule of `preprocessing.outputs`, with their sums; read without running code."""

    def save_checkpoint(self, checkpoint: dict, path: Path | str, storage_options=None) -> None:
        path = Path(path)
        sums, before = sums_path(path), _recorded(path)
        with finished_file(path) as temporary:
            write_plain_file(checkpoint, temporary)
            found = file_sha256(temporary)
            _write_sums(sums, path.name, [found, *before])   # killed between the two: the old file and the new are both known
        _write_sums(sums, path.name, [found])

    def load_checkpoint(self, path: Path | str, map_location=None, weights_only: bool | None = None) -> dict:
        return read_plain_file(path)

    def remove_checkpoint(self, path: Path | str) -> None:
        super().remove_checkpoint(path)
        sums_path(Path(path)).unlink(missing_ok=True)


class GoodCheckpoints(ModelCheckpoint):
    """Lightning's, but none is written while steps are skipped: what there is, is from before the first of them. One that was due
    then is made up for, as `last.ckpt`, after the next step that moves the weights."""

    is_due = False

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, ModelCheckpoint.__qualname__)   # as in checkpoints older than this class

    def load_state_dict(self, state: dict) -> None:
        """Go on with the checkpoints that lie in this run's folder, wherever it lay when they were written. (Lightning forgets all but the
        path of the best, which may be gone, or another's.)"""
        def here(path: str) -> str:
            found = Path(self.dirpath) / Path(path).name
            return str(found) if path and found.is_file() else ""

        kept = {here(path): score for path, score in state["best_k_models"].items() if here(path)}
        best = min(kept, key=kept.get, default=here(state["best_model_path"]))           # of losses, as `mode` is; without one, the newest
        super().load_state_dict({
            **state, "dirpath": self.dirpath, "best_k_models": kept, "best_model_path": best, "best_model_score": kept.get(best),
            "kth_best_model_path": max(kept, key=kept.get, default=""), "kth_value": max(kept.values(), default=state["kth_value"]),
            "last_model_path": str(Path(self.dirpath) / "last.ckpt")})

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        trainer.ckpt_path = None       # Lightning would keep the one it went on from for ever, also where better ones take its place

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *step: object) -> None:
        super().on_train_batch_end(trainer, pl_module, *step)
        if self.is_due and not pl_module.skipped_in_a_row:
            self._make_up(trainer)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.skipped_in_a_row:
            self.is_due = True
        else:
            super().on_validation_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if pl_module.skipped_in_a_row:
            self.is_due = self.is_due or self.monitor is None      # with one, it is written after a validation
        else:
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not pl_module.skipped_in_a_row:
            super().on_train_end(trainer, pl_module)
        elif not pl_module.ends_badly:           # a single one at the end: there will be no next step
            self._make_up(trainer)

    def _make_up(self, trainer: pl.Trainer) -> None:
        self.is_due = False
        trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt", **WHOLE)


class StopOnSignal(pl.Callback):
    """Note SIGTERM and Ctrl-C while training; the step in hand is finished and saved as `last.ckpt`, then `Stopped` is raised.

    A signal to one of several ranks stops all of them after the same step. A second Ctrl-C ends the process at once.
    """

    def __init__(self, run_dir: Path, stops: StopSignals):
        self.run_dir, self.stops = run_dir, stops

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.stops.listen()   # over Lightning's own handlers, which would save nothing

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch, batch_idx: int) -> None:
        if self._is_asked_of_any(trainer):
            batches = trainer.fit_loop.epoch_loop.batch_progress
            batches.total.ready, batches.is_last_batch = batches.total.completed, False   # the batch in hand is not begun: counted, it
            # would shift every later validation by a step
            self._stop(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._is_asked_of_any(trainer):        # in the last step, or in the validation after it
            self._stop(trainer, pl_module)

    def _is_asked_of_any(self, trainer: pl.Trainer) -> bool:
        return trainer.strategy.reduce_boolean_decision(bool(self.stops.received), all=False)

    def _stop(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> NoReturn:
        number = self.stops.received[0] if self.stops.received else signal.SIGTERM   # another rank's
        if pl_module.skipped_in_a_row:
            raise Stopped(number, f"after step {trainer.global_step}, which was skipped: the checkpoint before stays; go on with "
                                  f"ckpt_path=auto run_dir={self.run_dir}")
        trainer.save_checkpoint(self.run_dir / "checkpoints" / "last.ckpt", **WHOLE)
        raise Stopped(number, f"after step {trainer.global_step}; go on with ckpt_path=last run_dir={self.run_dir}")


def require_checkpoint(path: Path) -> ResumePoint:
    """What a run can be resumed from; else an error that names the newest other checkpoint that is whole."""
    if not path.is_file():
        raise InputError(path, "checkpoint", "a file to resume from", "nothing there")
    sums = _recorded(path)
    try:
        if sums and (sum_found := file_sha256(path)) not in sums:
            raise WeightsError(path, "SHA-256", sums[0], f"{sum_found}: the file is damaged")
        content = read_plain_file(path)
        if missing := [name for name in PARTS if name not in content]:
            raise WeightsError(path, "contents", "a checkpoint of train_clip.py", f"no {', '.join(missing)}")
        found = ResumePoint.of(path, content)
    except WeightsError as error:
        good = _newest_whole(path)
        raise WeightsError(path, "checkpoint", "a whole one", str(error).removeprefix(f"{path}: "),
                           f"The newest whole one beside it: ckpt_path={good}" if good else "No other whole one lies beside it") from error
    if not sums:
        print(f"{path}: no {sums_path(path).name} beside it, so it was not compared with what was written", flush=True)
    return found


def newest_checkpoint(folder: Path) -> ResumePoint | None:
    """What `ckpt_path=auto` goes on from: `last.ckpt`, else, said aloud, the newest other that is whole; None where there is none at all.
    `WeightsError` if all are damaged: to begin anew is the user's to say."""
    newest_first = sorted(folder.glob("*.ckpt"), key=lambda path: (path.name == "last.ckpt", path.stat().st_mtime_ns), reverse=True)
    for path in newest_first:
        try:
            return require_checkpoint(path)
        except WeightsError as error:
            print(f"skipping a damaged checkpoint: {error}", flush=True)
    if newest_first:
        raise WeightsError(folder, "checkpoints", "one that is whole", f"damaged ones alone, {first_few([p.name for p in newest_first])}",
                           "Remove them to start anew")
    return None


def sums_path(path: Path) -> Path:
    """Where the SHA-256 of a checkpoint lies."""
    return path.with_name(f"{path.name}.sha256")


def _recorded(path: Path) -> list[str]:
    sums = sums_path(path)
    return [line.split()[0] for line in sums.read_text(errors="replace").splitlines() if line.strip()] if sums.is_file() else []


def _write_sums(sums: Path, name: str, digests: list[str]) -> None:
    with finished_file(sums) as temporary:
        temporary.write_text("".join(f"{digest}  {name}\n" for digest in digests))


def _newest_whole(damaged: Path) -> Path | None:
    others = [path for path in damaged.parent.glob("*.ckpt") if path != damaged and _recorded(path)]
    newest_first = sorted(others, key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return next((path for path in newest_first if file_sha256(path) in _recorded(path)), None)
