"""The doctor finds what is wrong, says what to do, and fails only for what has to be mended."""
from importlib import metadata

import pytest
from click.testing import CliRunner

from training import doctor
from training.doctor import GIB, check_packages, check_python, check_room, check_weights


def levels(findings) -> list[str]:
    return [finding.level for finding in findings]


@pytest.mark.parametrize(("version", "level"), [((3, 9), "FIX"), ((3, 10), "ok"), ((3, 12), "ok"), ((3, 13), "note")])
def test_python_is_held_against_what_we_test(version, level):
    assert levels(check_python(version)) == [level]


def test_a_package_outside_its_range_or_missing_has_to_be_mended(tmp_path):
    listed = tmp_path / "requirements.txt"
    listed.write_text("# a comment\nclick>=8\nnumpy<1   # old\nno-such-package-of-ours>=2\nclick<1; python_version < '3'\n")
    first, second, third = check_packages(listed)
    assert str(first) == f"FIX   numpy {metadata.version('numpy')}: outside <1. Install it: make setup, or pip install -r requirements.txt"
    assert second.level == "FIX" and "no-such-package-of-ours: not installed; needed >=2" in second.text
    assert str(third) == "ok    1 packages inside the ranges of requirements.txt"


def test_little_memory_and_little_disk_are_said_with_what_to_do(tmp_path):
    memory, disk = check_room(tmp_path, memory_bytes=GIB, disk_bytes=GIB)
    assert (memory.level, disk.level) == ("note", "note")
    assert "smaller batches" in memory.next_step and "--folder" in disk.next_step
    assert levels(check_room(tmp_path, memory_bytes=99 * GIB, disk_bytes=99 * GIB)) == ["ok", "ok"]


@pytest.mark.parametrize("state", ["ok", "FIX", "note"])
def test_weights_of_uni_are_found_missed_or_explained(state, tmp_path, monkeypatch):
    path = tmp_path / "uni.safetensors"
    monkeypatch.setenv("UNI_STATE_DICT_PATH", str(path) if state != "note" else "")
    if state == "ok":
        path.write_bytes(b"weights")
    assert levels(check_weights()) == ["ok", state]


def test_the_exit_code_tells_whether_something_has_to_be_mended(tmp_path, monkeypatch):
    listed = tmp_path / "requirements.txt"
    monkeypatch.setattr(doctor.check_packages, "__defaults__", (listed,))
    monkeypatch.delenv("UNI_STATE_DICT_PATH", raising=False)
    for text, code, last in (("click>=8\n", 0, "nothing to mend"), ("click<1\n", 1, "1 to mend")):
        listed.write_text(text)
        result = CliRunner().invoke(doctor.main, ["--folder", str(tmp_path)])
        assert result.exit_code == code and result.output.splitlines()[-1] == last
