"""The doctor finds what is wrong, says what to do, and fails only for what has to be mended."""
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import metadata

import pytest
import torch
from click.testing import CliRunner
from processes import finish
from safetensors.torch import save_file

from evaluation import inception
from networks.encoder_specs import ENCODERS
from networks.histo_models import build_body
from preprocessing.done_manifests import file_sha256
from training import doctor
from training.doctor import (
    GIB,
    Finding,
    check_metric_weights,
    check_packages,
    check_python,
    check_room,
    check_weights,
    without_imports_that_fail,
)
from training.self_test import STAGES, Outcome, self_test


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


def a_small_uni(monkeypatch) -> dict:
    """Tensors of a UNI of one narrow layer, which the encoder of that name then is."""
    spec = ENCODERS["uni"]
    small = replace(spec, timm_args={**spec.timm_args, "depth": 1, "embed_dim": 16, "num_heads": 1})
    monkeypatch.setitem(ENCODERS, "uni", small)
    return build_body("uni", small).state_dict()


@pytest.mark.parametrize(("state", "suffix"), [("ok", "safetensors"), ("ok", "pth"), ("old", "pth"), ("note", "pth")])
def test_weights_of_uni_are_found_or_explained(state, suffix, tmp_path, monkeypatch):
    path, tensors = tmp_path / f"uni.{suffix}", a_small_uni(monkeypatch)
    monkeypatch.setenv("UNI_STATE_DICT_PATH", str(path) if state != "note" else "")
    if suffix == "safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=state != "old")
    assert levels(check_weights()) == ["ok", "note" if state == "note" else "ok"]


def pickled(path, tensors) -> None:
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "canary"),)

    torch.save({**tensors, "x": Payload()}, path)


def cut(path, save) -> None:
    save(path)
    path.write_bytes(path.read_bytes()[:-100])


WRONG_WEIGHTS = {
    "nothing": ("uni.pth", lambda path, tensors: None, "found nothing there"),
    "a folder": ("uni.pth", lambda path, tensors: path.mkdir(), "found nothing there"),
    "empty": ("uni.pth", lambda path, tensors: path.touch(), "damaged, cut short or of another kind"),
    "empty safetensors": ("uni.safetensors", lambda path, tensors: path.touch(), "damaged, cut short or of another kind"),
    "a text": ("passwd", lambda path, tensors: path.write_text("root:x:0:0\n"), "found none"),
    "cut short": ("uni.pth", lambda path, tensors: cut(path, lambda to: torch.save(tensors, to)), "damaged, cut short or of another kind"),
    "cut safetensors": ("uni.safetensors", lambda path, tensors: cut(path, lambda to: save_file(tensors, to)), "damaged, cut short"),
    "a pickle": ("uni.pth", pickled, "more than tensors and plain values"),
    "another model": ("uni.safetensors", lambda path, tensors: save_file({"weight": torch.zeros(2)}, path), "unexpected: 1 (weight)"),
    "another width": ("uni.pth", lambda path, tensors: torch.save({**tensors, "cls_token": torch.zeros(1, 1, 8)}, path),
                      "misshapen: 1 (cls_token (1, 1, 8) for (1, 1, 16))"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_weights_that_a_run_could_not_read_have_to_be_mended(wrong, tmp_path, monkeypatch):
    name, write, said = WRONG_WEIGHTS[wrong]
    write(tmp_path / name, a_small_uni(monkeypatch))
    monkeypatch.setenv("UNI_STATE_DICT_PATH", str(tmp_path / name))
    _, uni = check_weights()
    assert uni.level == "FIX" and f"uni: {tmp_path / name}: " in uni.text and said in uni.text, uni
    assert uni.next_step == "Correct or unset UNI_STATE_DICT_PATH" and not (tmp_path / "canary").exists()


def test_the_small_encoder_is_opened_too(tmp_path, monkeypatch):
    damaged = tmp_path / "lite0.pth"
    damaged.write_bytes(b"no weights")
    monkeypatch.setattr("networks.histo_models.weights_path", lambda *_: damaged)
    monkeypatch.delenv("UNI_STATE_DICT_PATH", raising=False)
    lite, _ = check_weights()
    assert lite.level == "FIX" and str(damaged) in lite.text and "--force-reinstall" in lite.next_step


def test_the_exit_code_tells_whether_something_has_to_be_mended(tmp_path, monkeypatch):
    listed = tmp_path / "requirements.txt"
    monkeypatch.setattr(doctor.check_packages, "__defaults__", (listed,))
    monkeypatch.delenv("UNI_STATE_DICT_PATH", raising=False)
    for text, code, last in (("click>=8\n", 0, "nothing to mend"), ("click<1\n", 1, "1 to mend")):
        listed.write_text(text)
        result = CliRunner().invoke(doctor.main, ["--folder", str(tmp_path), "--no-self-test"])
        assert result.exit_code == code and result.output.splitlines()[-1] == last


@pytest.mark.parametrize(("content", "level", "said"), [(None, "note", "fetch https://"), (b"other bytes", "FIX", "expected 6726825d"),
                                                        (b"", "ok", "weights in")], ids=["none", "damaged", "there"])
def test_inceptions_weights_are_found_missed_or_explained_and_never_fetched(content, level, said, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("the doctor went to the network"))
    path = inception.hub_path()
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    if level == "ok":
        monkeypatch.setattr(inception, "FILE_NAME", f"weights-{file_sha256(path)[:8]}.pth")
        path.rename(inception.hub_path())
    (finding,) = check_metric_weights()
    assert finding.level == level and said in str(finding)


def test_a_package_that_cannot_be_imported_is_a_finding_and_no_traceback():
    def broken():
        yield Finding("ok", "first")
        raise ImportError("libGL.so.1: cannot open shared object file")

    first, second = without_imports_that_fail(broken())
    assert first.level == "ok" and second.level == "FIX" and "libGL.so.1" in second.text and "make setup" in second.next_step


# ---- the self-test --------------------------------------------------------------------------------------------------

def scripts(folder, **programs):
    """Stages that are small programs of their own."""
    for name, program in programs.items():
        (folder / f"{name}.py").write_text(program)
    return {name: (str(folder / f"{name}.py"),) for name in programs}


FAILURES = {
    "an error of ours": ("import sys; print('error: disk full', file=sys.stderr); print('bye', file=sys.stderr); sys.exit(4)",
                         "exit code 4: disk full"),
    "a traceback": ("raise ValueError('odd')", "exit code 1: ValueError: odd"),
    "a crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal SIGSEGV: it said nothing"),
    "no end": ("import time; time.sleep(60)", "did not end within 2 s"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_stage_that_fails_says_why_ends_the_self_test_and_leaves_nothing(failure, tmp_path, monkeypatch):
    monkeypatch.setattr("training.self_test.LONGEST_S", 60)
    program, said = FAILURES[failure]
    stages = scripts(tmp_path, first="open('made', 'w').close()", second=f"import os; assert os.path.exists('made')\n{program}", third="")
    (work := tmp_path / "work").mkdir()
    outcomes = self_test(work, stages)
    first = next(outcomes)
    if failure == "no end":
        monkeypatch.setattr("training.self_test.LONGEST_S", 2)
    (second,) = outcomes
    assert (first.stage, first.error, second.stage) == ("first", "", "second") and said in second.error
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(("width", "error"), [(16, ""), (8, "expected RGB, 16 x 16 px; found RGB, 8 x 16 px"), (None, "found 0")])
def test_the_self_test_looks_at_the_patch_that_was_drawn(width, error, tmp_path):
    draw = f"import os\nfrom PIL import Image\nos.mkdir('drawn')\nImage.new('RGB', ({width}, 16)).save('drawn/prompt0.png')"
    (outcome,) = self_test(tmp_path, scripts(tmp_path, draw="" if width is None else draw))
    assert error in outcome.error and bool(error) == bool(outcome.error)


def test_the_self_test_is_tried_only_where_nothing_has_to_be_mended(tmp_path, monkeypatch):
    (tmp_path / "list").write_text("click<1\n")
    monkeypatch.setattr(doctor.check_packages, "__defaults__", (tmp_path / "list",))
    monkeypatch.setattr(doctor, "self_test", lambda folder: pytest.fail("tried"))
    result = CliRunner().invoke(doctor.main, ["--folder", str(tmp_path)])
    assert result.exit_code == 1 and result.output.splitlines()[-2:] == ["the self-test waits until this is mended", "1 to mend"]
    (tmp_path / "list").write_text("click>=8\n")
    monkeypatch.setattr(doctor, "self_test", lambda folder: iter([Outcome("one", 1.25), Outcome("two", 2.0, "x.py: exit code 3: no")]))
    result = CliRunner().invoke(doctor.main, ["--folder", str(tmp_path)])
    assert result.exit_code == 1 and "ok    self-test, one: 1.2 s" in result.output
    assert "FIX   self-test, two: 2.0 s: x.py: exit code 3: no. If this" in result.output


STOPPED = """
import subprocess, sys, time
open("begun", "w").close()
subprocess.Popen([sys.executable, "-c", "import time\\nwhile True:\\n    open('filled', 'a').write('x')\\n    time.sleep(0.01)"])
time.sleep(600)
"""
DOCTOR = """
import sys
from training import doctor
from training.self_test import self_test
doctor.check_packages = doctor.check_weights = lambda: iter(())
doctor.self_test = lambda folder: self_test(folder, {{"first": ({stage!r},)}})
doctor.main(["--folder", {work!r}])
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_self_test_with_what_it_started_and_leaves_nothing(number, tmp_path):
    (work := tmp_path / "work").mkdir()
    (tmp_path / "stage.py").write_text(STOPPED)
    script = DOCTOR.format(stage=str(tmp_path / "stage.py"), work=str(work))
    doctors = subprocess.Popen([sys.executable, "-c", script], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not (found := list(work.glob(".self-test-*/filled"))) and doctors.poll() is None:
        time.sleep(0.05)
    doctors.send_signal(number)
    code, _, errors = finish(doctors, 60)
    name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
    assert found and code == 128 + number, errors
    assert errors == f"stopped by {name} in the self-test; its folder is removed\n" and list(work.iterdir()) == []
    stages = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path / "stage.py") not in stages


@pytest.mark.slow
def test_the_walk_of_the_self_test_ends_with_a_patch(tmp_path):
    outcomes = list(self_test(tmp_path))
    assert [outcome.error for outcome in outcomes] == [""] * len(STAGES) and list(tmp_path.iterdir()) == []
