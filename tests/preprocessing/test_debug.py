"""`--debug` adds the traceback: the line and the exit code are those without it, whatever went wrong."""
import errno
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from preprocessing.errors import Command, DivergedError, InputError, OptionError, WeightsError, one_line_errors

ROOT = Path(__file__).resolve().parents[2]
ERRORS = [
    (DivergedError("run", "loss", "a number", "NaN"), 1), (OptionError("--stride", "at least 1", "0"), 2),
    (InputError("gex.h5ad", "X", "counts", "NaN"), 3), (OSError(errno.ENOSPC, "No space left on device", "imgs.h5"), 4), (MemoryError(), 4),
    (WeightsError("clip", "SHA-256", "one", "another"), 5), (KeyboardInterrupt(), 130)]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_the_line_and_the_exit_code_are_those_without_and_the_traceback_comes_before(error, code):
    def work():
        raise error

    plain, debug = (CliRunner().invoke(Command("work", callback=work), options) for options in ([], ["--debug"]))
    assert plain.exit_code == debug.exit_code == code
    assert plain.output.startswith("error: ") and len(plain.output.splitlines()) == 1
    assert debug.output.startswith("Traceback (most recent call last):\n") and "in work" in debug.output
    assert debug.output.endswith(f"\n{plain.output}") and debug.output.count("\nerror: ") == 1


def test_a_fault_of_ours_stays_a_traceback_without_a_line(capsys):
    with pytest.raises(KeyError), one_line_errors(debug=True):
        raise KeyError("ours")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("command", "code"), [
    (["preprocessing/gene_vocab.py", "--gex", "nowhere.h5ad", "--out", "nowhere.h5ad/vocab.txt"], 3),
    (["preprocessing/extract_patches.py", "--space-ranger-dir", "nowhere", "--wsi-file", "nowhere.tif", "--out-dir", "out"], 3),
    (["preprocessing/extract_patches.py", "--space-ranger-dir", "nowhere", "--wsi-file", "n", "--out-dir", "o", "--mpp", "nan"], 2)])
def test_a_command_of_the_shell_says_the_same_with_it(tmp_path, command, code):
    started = [sys.executable, str(ROOT / command[0]), *command[1:]]
    plain, debug = (subprocess.run([*started, *more], cwd=tmp_path, capture_output=True, text=True) for more in ([], ["--debug"]))
    assert plain.returncode == debug.returncode == code and list(tmp_path.iterdir()) == []
    assert debug.stderr.startswith("Traceback") and debug.stderr.endswith(f"\n{plain.stderr}"), debug.stderr
