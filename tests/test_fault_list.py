"""The list of faults (faults/README.md) names for every row tests that exist, and the table of `make faults` counts right."""
import ast
import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LINES = (TESTS / "faults" / "README.md").read_text().splitlines()
ROWS = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in LINES if re.match(r"\| \d+ \|", line)]
HOOKS = "from fault_table import pytest_runtest_makereport, pytest_terminal_summary, tried  # noqa: F401\n"


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_of_the_list_names_tests_that_exist():
    missing, without = [], []
    for row in ROWS:
        named = re.findall(r"([\w/]+\.py)::(\w+)", row[4])
        if not named and not row[4].startswith("none: "):
            without.append(row[0])
        missing += [f"row {row[0]}: {file}::{name}" for file, name in named
                    if not (TESTS / file).is_file() or name not in functions_of(TESTS / file)]
    assert missing == [] and without == []


def test_the_rows_are_counted_without_a_gap():
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) >= 51
    assert all(len(row) == 5 and all(row) for row in ROWS)


# ---- the table that `make faults` prints ----------------------------------------------------------------------------

SUITE = """
import pytest

@pytest.mark.fault("killed")
def test_survives(tried):
    tried(3)
    tried()

@pytest.mark.fault("killed")
def test_loses(tried):
    tried(2)
    assert 1 == 2

@pytest.mark.fault("damaged")
def test_hangs(tried):
    pytest.fail("it hangs")

@pytest.mark.fault("damaged")
def test_crashes(tried):
    tried(5)
    raise ValueError("a traceback")

@pytest.mark.fault("damaged")
def test_skips():
    pytest.skip("no mount")

@pytest.mark.fault("damaged")
@pytest.mark.skipif(True, reason="no root")
def test_is_skipped():
    pass

def test_other():
    assert False
"""


def test_faults_are_counted_by_kind_and_by_what_became_of_them(tmp_path):
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_suite.py").write_text(SUITE)
    said = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(TESTS), "FAULT_ROUNDS": "full"}).stdout
    rows = {line.split("|")[1].strip(): [int(cell) for cell in line.split("|")[2:7]] for line in said.splitlines()
            if line.startswith("| ") and "tried" not in line}
    assert rows == {"damaged": [6, 4, 0, 1, 1], "killed": [6, 5, 1, 0, 0], "all": [12, 9, 1, 1, 1]}, said
    assert [line for line in said.splitlines() if line.startswith("not tried: ")] == [
        "not tried: test_is_skipped: no root", "not tried: test_skips: no mount"], said
