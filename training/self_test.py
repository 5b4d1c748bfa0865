"""Walk from nothing to a drawn patch in about a minute, by the very commands a user gives: what the doctor calls its self-test.

A tiny section is simulated, cut into patches, CLIP and a generator take a few steps on it, and a patch is drawn. All of it lies in one
temporary folder, which goes at the end, also where SIGTERM or Ctrl-C is the end. Each command is a process of its own: one that crashes
is only a stage that failed. It leads a group, which ends with it: of what it started nothing is left to write into the folder.
"""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preprocessing.interrupts import Stopped, stops_answered

ROOT = Path(__file__).resolve().parent.parent
LONGEST_S = 600                     # of one stage; seconds on a machine that is fit for the work
SAMPLE, PX = "SELF_TEST", 16

# what is tried -> the command, in a folder where those above have left their files
STAGES: dict[str, Sequence[str]] = {
    "a simulated section": (
        "preprocessing/simulate_sample.py", "--out-dir", "section", "--platform", "visium-hd", "--sample-id", SAMPLE, "--seed", "1",
        "--width-um", "420", "--height-um", "380", "--genes", "60", "--region-um", "150"),
    "patches and expression": (
        "preprocessing/extract_patches.py", "--space-ranger-dir", "section", "--wsi-file", "section/slide.tif", "--sample-id", SAMPLE,
        "--out-dir", "data", "--dump-dir", "patches", "--no-h5", "--stride", "13", "--patch-sz-px", "32"),
    "a few steps of CLIP": (
        "train_clip.py", "--config-name", "clip_demo", "data.train_gex=data/gex.h5ad", "data.train_image_dir=patches", "run_dir=clip",
        "image.cache_features=1", "trainer.max_epochs=2", "trainer.batch_size=16", "logger=none", "trainer.progress_bar=false"),
    "a few steps of the generator": (
        "train_gan.py", "--outdir", "gan", "--data", "patches", "--gex", "data/gex.h5ad", "--network", "clip/clip", "--img-resolution",
        str(PX), "--batch", "8", "--cfg", "custom", "--cbase", "256", "--cmax", "16", "--res-blocks", "1", "--kimg", "0.032",
        "--no-tensorboard"),
    "a patch drawn": (
        "gen_images.py", "--network", f"gan/00000-{SAMPLE}@{PX}-custom-gpus1-b8", "--gex", "data/gex.h5ad", "--n-samples", "1",
        "--seeds", "0", "--outdir", "drawn"),
}


@dataclass(frozen=True)
class Outcome:
    """How a stage went; `error` is empty if it went well."""

    stage: str
    seconds: float
    error: str = ""


def self_test(folder: Path | str, stages: Mapping[str, Sequence[str]] = STAGES) -> Iterator[Outcome]:
    """Walk through the stages in a temporary folder below `folder`; the first that fails is the last, as the others need what it makes."""
    with stops_answered(_stop), tempfile.TemporaryDirectory(dir=folder, prefix=".self-test-") as inside:
        for stage, command in stages.items():
            began = time.monotonic()
            error = _run(command, Path(inside))
            if not error and stage == list(stages)[-1]:
                error = _not_a_patch(Path(inside) / "drawn")
            yield Outcome(stage, time.monotonic() - began, error)
            if error:
                return


def _run(command: Sequence[str], inside: Path) -> str:
    """Run one command; "" if it went well, else why not, in one line."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
                   "HF_HUB_OFFLINE": "1"}                              # nothing is fetched for a test
    with subprocess.Popen([sys.executable, str(ROOT / command[0]), *command[1:]], cwd=inside, env=environment, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True) as started:
        try:
            _, errors = started.communicate(timeout=LONGEST_S)
        except subprocess.TimeoutExpired:
            return f"{command[0]} did not end within {LONGEST_S} s"
        finally:
            _end_group(started)
    if started.returncode == 0:
        return ""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "it said nothing")
    ended = f"signal {signal.Signals(-started.returncode).name}" if started.returncode < 0 else f"exit code {started.returncode}"
    return f"{command[0]}: {ended}: {said.removeprefix('error: ')[:300]}"


def _end_group(started: subprocess.Popen) -> None:
    """What a command started ends with it; nothing of theirs is kept, so nobody is asked."""
    try:
        os.killpg(started.pid, signal.SIGKILL)
    except ProcessLookupError:         # it has ended, and left nobody
        pass


def _stop(number: int) -> None:
    raise Stopped(number, "in the self-test; its folder is removed")


def _not_a_patch(folder: Path) -> str:
    """"" if exactly one patch of the right form was drawn, else what was found instead."""
    from PIL import Image

    drawn = sorted(folder.glob("prompt*.png"))
    if len(drawn) != 1:
        return f"expected one patch; found {len(drawn)}"
    with Image.open(drawn[0]) as patch:
        form = f"{patch.mode}, {patch.width} x {patch.height} px"
    return "" if form == f"RGB, {PX} x {PX} px" else f"expected RGB, {PX} x {PX} px; found {form}"
