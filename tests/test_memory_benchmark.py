"""README states a bound on the memory of each command; the benchmark holds the commands against those very bounds."""
import re
from pathlib import Path

import pytest
from click import ClickException

from benchmarks.memory import BOUNDS, MB, Bound, peak, walk

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_states_the_bounds_that_the_benchmark_checks():
    stated = dict(re.findall(r"^\| `(\w+)\.py` \| ([^|]+) \|$", (ROOT / "README.md").read_text(), re.M))
    assert stated == {name: str(bound) for name, bound in BOUNDS.items()} and list(walk(2000, 2)) == list(BOUNDS)


@pytest.mark.parametrize(("bound", "mb", "said"), [(Bound(500), 500, "500"), (Bound(500, 2), 520, "500 + 2 a thousand patches"),
                                                   (Bound(1000, 1.5, "bins"), 2500, "1,000 + 1.5 a thousand bins"),
                                                   (Bound(500, 1.5, "bins", 900), 900, "500 + 1.5 a thousand bins, at most 900")])
def test_a_bound_grows_with_what_a_command_handles(bound, mb, said):
    assert (bound.mb(patches=10_000, bins=1_000_000), str(bound)) == (mb, said)


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
