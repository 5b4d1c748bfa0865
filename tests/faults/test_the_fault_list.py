"""The list of faults in README.md names, for every row, tests that exist."""
import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROWS = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in (TESTS / "faults" / "README.md").read_text().splitlines()
        if re.match(r"\| \d+ \|", line)]


def test_functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


test_functions.__test__ = False


def test_every_row_of_the_list_names_tests_that_exist():
    missing, without = [], []
    for row in ROWS:
        named = re.findall(r"([\w/]+\.py)::(\w+)", row[4])
        if not named and not row[4].startswith("none: "):
            without.append(row[0])
        missing += [f"row {row[0]}: {file}::{name}" for file, name in named
                    if not (TESTS / file).is_file() or name not in test_functions(TESTS / file)]
    assert missing == [] and without == []


def test_the_rows_are_counted_without_a_gap():
    assert [int(row[0]) for row in ROWS] == list(range(1, len(ROWS) + 1)) and len(ROWS) >= 51
    assert all(len(row) == 5 and all(row) for row in ROWS)
