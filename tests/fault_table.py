"""Count the faults that tests try and print them by kind: tried, survived, data lost, crashes, hangs.

A test says its kind with the marker `fault`, and how many it tries with the fixture `tried`; without that it is one. A fault is
survived if the test goes on after it; the one at which a test fails counts as data lost (an assertion), a hang (a time ran out), or
a crash (any other error). `tests/conftest.py` loads this for every run; where FAULT_ROUNDS says full the table is printed, and what
was skipped and why.
"""
import re
from collections import defaultdict

import pytest
from fault_rounds import FULL

COLUMNS = ("tried", "survived", "data lost", "crashes", "hangs")
CRASH = re.compile(r"Traceback|Segmentation|\(?-(?:4|6|7|8|11)\b|\b13[49]\b")        # of a command: its words, or its exit code
HANG_WORDS = ("hangs", "timeout", "timed out", "deadline")


@pytest.fixture
def tried(request):
    """`tried()` or `tried(n)`: faults that this test is about to try, of the kind its marker `fault` names."""
    def count(n: int = 1) -> None:
        request.node.user_properties.append(("tried", n))
    return count


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    outcome = yield
    report, marker = outcome.get_result(), item.get_closest_marker("fault")
    if marker is None or report.when != "call" and not report.failed and not report.skipped:
        return
    if report.skipped:
        report.user_properties = [*report.user_properties, ("fault not tried", f"{item.name}: {_reason(report)}")]
        return
    n = sum(count for name, count in item.user_properties if name == "tried") or 1
    row = dict.fromkeys(COLUMNS, 0) | {"tried": n, "survived": n}
    if report.failed:
        said = str(call.excinfo.value)
        lost = "hangs" if any(word in said.lower() for word in HANG_WORDS) else \
            "data lost" if isinstance(call.excinfo.value, AssertionError) and not CRASH.search(said) else "crashes"
        row |= {"survived": n - 1, lost: 1}
    report.user_properties = [*report.user_properties, ("fault", (marker.args[0], row))]


def _reason(report) -> str:
    """Why a test was skipped."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else str(report.longrepr)


def table_of(reports) -> dict[str, dict[str, int]]:
    """Kind -> numbers by column, of the reports of all tests, whichever process ran them."""
    table: dict[str, dict[str, int]] = defaultdict(lambda: dict.fromkeys(COLUMNS, 0))
    for report in reports:
        for name, value in getattr(report, "user_properties", []):
            if name == "fault":
                kind, row = value
                for column in COLUMNS:
                    table[kind][column] += row[column]
    return table


def lines_of(table) -> list[str]:
    """A table in Markdown, a row a kind and one for all."""
    rows = {**dict(sorted(table.items())), "all": {column: sum(row[column] for row in table.values()) for column in COLUMNS}}
    width = max(map(len, rows))
    return [f"| {'fault':<{width}} | " + " | ".join(COLUMNS) + " |",
            f"|{'-' * (width + 2)}|" + "".join(f"{'-' * (len(column) + 1)}:|" for column in COLUMNS),
            *(f"| {kind:<{width}} | " + " | ".join(f"{row[column]:>{len(column)},}" for column in COLUMNS) + " |"
              for kind, row in rows.items())]


def pytest_terminal_summary(terminalreporter):
    all_reports = [report for reports in terminalreporter.stats.values() for report in reports]
    table = table_of(all_reports)
    if FULL and table:
        terminalreporter.section("faults")
        for line in lines_of(table):
            terminalreporter.write_line(line)
        not_tried = sorted({value for report in all_reports for name, value in getattr(report, "user_properties", ())
                            if name == "fault not tried"})
        for line in not_tried:
            terminalreporter.write_line(f"not tried: {line}")
