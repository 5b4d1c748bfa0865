"""README states a bound on the memory of each command; the benchmark holds the commands against those very bounds."""
import re
import shutil
from importlib import import_module
from pathlib import Path

import diffusion_world
import pytest
from click import ClickException
from click.testing import CliRunner
from sampling_world import make_world

from benchmarks import memory_inputs
from benchmarks.memory import BOUNDS, MB, Bound, beside, peak, walk
from preprocessing.dump_patches import main as dump_patches

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_states_the_bounds_that_the_benchmark_checks():
    stated = dict(re.findall(r"^\| `(\w+)\.py` \| ([^|]+) \|$", (ROOT / "README.md").read_text(), re.M))
    assert stated == {name: str(bound) for name, bound in BOUNDS.items()} and [*walk(2000, 2), *beside()] == list(BOUNDS)


def test_every_command_has_a_bound():
    commands = {path.stem for folder in (".", "preprocessing", "diffusion_utils") for path in (ROOT / folder).glob("*.py")
                if 'if __name__ == "__main__":' in path.read_text()}
    assert commands == set(BOUNDS)


def called(command: tuple) -> tuple:
    """The click command of a line of the benchmark, and what it is given."""
    module, given = (command[1], command[2:]) if command[0] == "-m" else (command[0].removesuffix(".py").replace("/", "."), command[1:])
    return import_module(module).main, list(map(str, given))


@pytest.mark.parametrize("name", [name for name in BOUNDS if name != "train_clip"])      # that one is told by a config
def test_every_command_knows_its_options(name):
    main, given = called((walk(2000, 2) | beside())[name])
    assert main.make_parser(main.make_context(name, given, resilient_parsing=True)).parse_args(list(given))[1] == []


@pytest.mark.parametrize(("bound", "mb", "said"), [(Bound(500), 500, "500"), (Bound(500, 2), 520, "500 + 2 a thousand patches"),
                                                   (Bound(1000, 1.5, "bins"), 2500, "1,000 + 1.5 a thousand bins"),
                                                   (Bound(1000, 5, "pixels"), 1450, "1,000 + 5 a million pixels"),
                                                   (Bound(500, 1.5, "bins", 900), 900, "500 + 1.5 a thousand bins, at most 900")])
def test_a_bound_grows_with_what_a_command_handles(bound, mb, said):
    assert (bound.mb(patches=10_000, bins=1_000_000, pixels=90_000_000), str(bound)) == (mb, said)


FILL = "import time; held = bytearray(150_000_000); time.sleep(0.3)"


@pytest.mark.parametrize("program", [FILL, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FILL!r}], check=True)"],
                         ids=["itself", "a process it starts"])
def test_the_peak_counts_a_command_and_what_it_starts(tmp_path, program):
    (tmp_path / "command.py").write_text(program)
    _, found = peak((str(tmp_path / "command.py"),), tmp_path)
    assert 150e6 / MB < found < 260e6 / MB


def test_a_command_that_fails_is_said_with_its_words(tmp_path):
    (tmp_path / "command.py").write_text("raise SystemExit('error: no such thing')")
    with pytest.raises(ClickException, match=r"failed \(1\):\n.*no such thing"):
        peak((str(tmp_path / "command.py"),), tmp_path)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """What a walk leaves, as far as the further inputs are made of it; with those, in small."""
    folder = tmp_path_factory.mktemp("walked")
    data = folder / "data"
    data.mkdir()
    make_world(data)
    shutil.copy(data / "gex.h5ad", data / "gex_filt.h5ad")
    assert CliRunner().invoke(dump_patches, ["--images", str(data / "imgs.h5"), "--out-dir", str(data / "patches"),
                                             "--no-normalize"]).exit_code == 0
    diffusion_world.run(diffusion_world.write_world(folder / "world"), folder / "diffusion")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_inputs, "ST_STEP_PX", 40)
        patch.setattr(memory_inputs, "ST_GENES", 20)
        memory_inputs.write_further_inputs(folder)
    return folder


@pytest.mark.parametrize("name", ["import_st", "cohort_report", "choose_ema", "dump_metadata"])       # those that need no network of a walk
def test_the_further_inputs_are_what_the_commands_read(walked, monkeypatch, name):
    main, given = called(beside()[name])
    monkeypatch.chdir(walked)
    result = CliRunner().invoke(main, given, catch_exceptions=False)
    assert result.exit_code == 0 and ("1 samples: 1 finished" in result.output) == (name == "cohort_report")


def test_every_further_input_that_a_command_is_given_is_written(walked):
    given = {str(word) for command in beside().values() for word in command if str(word).startswith(("beside/", "foreign"))}
    assert given and [name for name in given if not (walked / name).exists()] == []
