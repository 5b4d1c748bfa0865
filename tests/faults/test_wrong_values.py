"""A number without sense is one line and an exit code from 2 to 5, whichever option it is given to; nothing is written.

Every numeric option of every command of the walk, and every numeric key of the configuration of CLIP, is in turn below zero, zero, not a
number, infinite, and larger than what can be computed with. Where a value is legal the command ends well, and in time. `make test` tries
one of these for every third option, FAULT_ROUNDS=full all.
"""
import os
import shutil
import signal
import time
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path

import pytest
from click.types import FloatParamType, IntParamType
from fault_rounds import FULL
from test_wrong_inputs import OUTPUTS
from walk import COMMANDS, start

from training.clip_config import ClipConfig

pytestmark = [pytest.mark.slow, pytest.mark.fault("wrong value")]
VALUES = ("-1", "0", "nan", "inf", "1e300", "18446744073709551616")
LIMIT_S = 60                      # what no command of this size takes, also on a loaded machine
MAINS = {"simulate": "preprocessing.simulate_sample", "extract": "preprocessing.extract_patches", "vocabulary": "preprocessing.gene_vocab",
         "filter": "preprocessing.gex_preprocessing", "dump": "preprocessing.dump_patches", "embeddings": "clip_embeddings",
         "gan": "train_gan", "diffusion": "diffusion_utils.train_diffusion", "generate_img": "diffusion_utils.generate_img",
         "metrics": "calculate_image_quality_metrics", "interpolate": "interpolate_prompts", "import_st": "preprocessing.import_st",
         "cohort_report": "preprocessing.cohort_report", "choose_ema": "diffusion_utils.choose_ema",
         "dump_metadata": "diffusion_utils.dump_metadata"}       # of the others the command's own name


def keys_of(part: object, prefix: str = "") -> list[str]:
    """Keys of the configuration of CLIP that hold numbers, or none of them by default."""
    found = []
    for field in fields(part):
        value, kind = getattr(part, field.name), str(field.type)
        if is_dataclass(value):
            found += keys_of(value, f"{prefix}{field.name}.")
        elif "int" in kind or "float" in kind or field.name in ("target_sum", "devices"):
            found.append(prefix + field.name)
    return found


def numeric_options(name: str) -> list[str]:
    if name == "clip":
        return keys_of(ClipConfig())
    options = import_module(MAINS.get(name, name)).main.params
    return [option.opts[0] for option in options if isinstance(option.type, (IntParamType, FloatParamType))]


def with_value(name: str, option: str, value: str) -> list[str]:
    return [f"{option}={value}"] if name == "clip" else [option, value]


def ended(run) -> bool:
    """Whether the command ends in time; one that does not is killed with what it started."""
    deadline = time.monotonic() + LIMIT_S
    while not run.is_over() and time.monotonic() < deadline:
        time.sleep(0.02)
    if run.is_over():
        return True
    os.killpg(run.child, signal.SIGKILL)
    run.wait()
    return False


def breach(run, named: tuple[str, str]) -> str | None:
    """What is wrong with how a command took a value; None where nothing is."""
    if not ended(run):
        return f"hangs: {run.said[-300:]}"
    said = [line for line in run.said.splitlines() if line.lower().startswith("error: ") or "Traceback" in line]
    if run.code == 0:
        return "; ".join(said) or None
    if run.code not in (2, 3, 4, 5) or len(said) != 1:
        return f"exit {run.code}: {run.said[-600:]}"
    return None if any(word in said[0] for word in named) else f"names neither the option nor the value: {said[0]}"


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file but locks: hundreds of runs are compared, so contents are not read."""
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".lock"}


def copied(fresh: Path, folder: Path) -> None:
    """Files as links: whatever is replaced gets its name anew, and what is written on, logs, lies in the output, which is not there."""
    shutil.copytree(fresh, folder, copy_function=os.link)


@pytest.mark.parametrize("name", [name for name in COMMANDS if numeric_options(name)])
def test_a_number_without_sense_is_one_line_and_nothing_is_written(commands, undisturbed, name, tmp_path, tried):
    folder, breaches = tmp_path / "walk", []
    fresh = tmp_path / "fresh"
    shutil.copytree(undisturbed[0], fresh)
    out = fresh / OUTPUTS[name]
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    copied(fresh, folder)
    before = stamps(folder)
    for number, option in enumerate(numeric_options(name)):
        for value in VALUES if FULL else (VALUES[(number + len(name)) % len(VALUES)],) * (number % 3 == 0):
            run = start(commands, name, folder, *with_value(name, option, value))
            tried()
            wrong = breach(run, (option.strip("-"), value))
            if wrong is None and run.code and stamps(folder) != before:
                wrong = f"wrote {sorted(dict(stamps(folder).items() ^ before.items()))[:3]}"
            if wrong:
                breaches.append(f"{option} {value}: {wrong}")
            if wrong or not run.code:                      # what it wrote would be another start for the next one
                shutil.rmtree(folder)
                copied(fresh, folder)
                before = stamps(folder)
    assert not breaches, "\n".join(breaches)
