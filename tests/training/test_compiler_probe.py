"""--compile without what it needs is refused before a run makes its folder."""
import os
from contextlib import ExitStack

import pytest

from preprocessing.errors import OptionError
from training.compiler_probe import require_compiler


def compiler(folder, name, script):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def use(monkeypatch):
    """Hand Inductor and Triton this compiler."""
    import torch._inductor.config as inductor

    with ExitStack() as held:
        def set_compiler(path):
            held.enter_context(inductor.patch({"cpp.cxx": (path,)}))
            monkeypatch.setenv("CC", path)
        yield set_compiler


DEVICES = pytest.mark.parametrize(("device", "kind"), [("cpu", r"C\+\+"), ("cuda:1", "C")])


@DEVICES
def test_a_compiler_that_is_not_there_is_refused(tmp_path, use, device, kind, monkeypatch):
    monkeypatch.setattr("training.compiler_probe.find_spec", lambda name: True)
    use(str(tmp_path / "none"))
    with pytest.raises(OptionError, match=rf"--compile: expected a working {kind} compiler.*--compile off"):
        require_compiler("blocks", device)
    require_compiler("off", device)


@DEVICES
def test_what_a_compiler_misses_is_said(tmp_path, use, device, kind, monkeypatch):
    monkeypatch.setattr("training.compiler_probe.find_spec", lambda name: True)
    use(compiler(tmp_path, "bad", '[ "$1" = "--version" ] && exit 0\necho "1:10: fatal error: Python.h: No such file" >&2; exit 1'))
    with pytest.raises(OptionError, match=rf"working {kind} compiler.*fatal error: Python.h: No such file"):
        require_compiler("max", device)


@DEVICES
def test_a_compiler_that_works_is_given_the_language_and_pythons_headers(tmp_path, use, device, kind, monkeypatch):
    monkeypatch.setattr("training.compiler_probe.find_spec", lambda name: True)
    use(compiler(tmp_path, "good", f'echo "$@" >> {tmp_path}/called'))
    require_compiler("blocks", device)
    called = (tmp_path / "called").read_text().splitlines()[-1]
    assert ("-x c++" in called) == (device == "cpu") and "-I" in called and os.sep + "probe.txt" in called


def test_a_gpu_needs_triton(monkeypatch):
    monkeypatch.setattr("training.compiler_probe.find_spec", lambda name: None)
    with pytest.raises(OptionError, match="--compile: expected the package triton on a GPU"):
        require_compiler("blocks", "cuda")
