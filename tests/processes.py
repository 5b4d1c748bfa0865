"""Wait for a process that a test started, and press Ctrl-C twice in one that trains."""
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

LONG_S = 600


def finish(process: subprocess.Popen, timeout_s: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a process that hangs is killed and fails the test."""
    try:
        told, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the run hangs")
    return process.returncode, told, errors


def slow_places(step, where: str, after: int):
    """For a child: `step`, whose call after so many takes long; or ("save") it waits for a Ctrl-C and the next save takes long."""
    calls, save = [], torch.save

    def slow_step(*arguments, **options):
        calls.append(None)
        if len(calls) == after + 1:
            print("in a step", flush=True)
            time.sleep(LONG_S if where == "step" else 4)
        return step(*arguments, **options)

    def slow_save(*arguments, **options):
        save(*arguments, **options)
        if len(calls) > after:
            print("in a save", flush=True)
            time.sleep(LONG_S)

    torch.save = slow_save
    return slow_step


def press_twice(process: subprocess.Popen, where: str) -> tuple[int, str]:
    """(exit code, stderr) of a child with `slow_places`: Ctrl-C in the step, and again in it or in the save."""
    _read_until(process, "in a step")
    process.send_signal(signal.SIGINT)
    if where == "save":
        _read_until(process, "in a save")
    else:
        _wait_until_answered(process)
    process.send_signal(signal.SIGINT)
    code, _, errors = finish(process, 60)
    return code, errors


def _wait_until_answered(process: subprocess.Popen) -> None:
    """Until the first Ctrl-C, once answered, has left the second to the system, which keeps no count of signals that wait."""
    deadline = time.monotonic() + 60
    while process.poll() is None and _catches(process.pid, signal.SIGINT) and time.monotonic() < deadline:
        time.sleep(0.02)


def _catches(process_id: int, number: int) -> bool:
    """Whether the process has a handler of its own for a signal."""
    caught = re.search(r"^SigCgt:\s*(\w+)", Path(f"/proc/{process_id}/status").read_text(), re.MULTILINE)
    return bool(int(caught[1], 16) >> number - 1 & 1)


def _read_until(process: subprocess.Popen, said: str) -> None:
    while said not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
