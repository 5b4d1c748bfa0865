"""Memory that does not suffice is said in one line with what to lower, by every command; other faults of ours stay faults."""
import click
import numpy as np
import pytest
from click.testing import CliRunner

from preprocessing.errors import Command, is_out_of_memory, one_line_errors


class OutOfMemoryError(RuntimeError):
    """Named as torch's own."""


GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB of which 1 is free.\nSee documentation"


def torch_asks_for_too_much():
    import torch
    torch.empty(2 ** 58, dtype=torch.uint8)


def numpy_asks_for_too_much():
    np.empty(2 ** 58, np.uint8)


def raising(error):
    def work():
        raise error
    return work


@pytest.mark.parametrize("work", [
    torch_asks_for_too_much, numpy_asks_for_too_much, raising(MemoryError()), raising(OutOfMemoryError(GPU)),
    raising(RuntimeError("CUDA error: out of memory")), raising(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")),
    raising(RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried to allocate 80000 bytes."))],
    ids=["torch", "numpy", "python", "gpu", "driver", "cublas", "windows"])
def test_no_memory_is_one_line_that_says_what_to_lower(work):
    command = Command("work", callback=work)
    result = CliRunner().invoke(command, [])
    assert result.exit_code == 4 and result.output.startswith("error: out of memory") and len(result.output.splitlines()) == 1
    assert "--batch-gpu" in result.output and "--cfg" in result.output and "batch size" in result.output
    debug = CliRunner().invoke(command, ["--debug"])
    assert debug.exit_code == 4 and debug.output.startswith("Traceback") and debug.output.endswith(f"\n{result.output}")


def test_how_much_was_asked_for_is_said(capsys):
    with pytest.raises(SystemExit), one_line_errors():
        raise OutOfMemoryError(GPU)
    assert "(tried to allocate 2.00 GiB)" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2 shapes cannot be multiplied"), ValueError("out of memory"),
                                   KeyError("out of memory")], ids=repr)
def test_other_faults_keep_their_traceback(error):
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)), one_line_errors():
        raise error


def test_usage_errors_of_click_are_unchanged():
    assert CliRunner().invoke(click.command(cls=Command)(lambda: None), ["--no-such"]).exit_code == 2
