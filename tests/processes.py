"""Wait for a process that a test started."""
import subprocess

import pytest


def finish(process: subprocess.Popen, timeout_s: float) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); a process that hangs is killed and fails the test."""
    try:
        told, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail("the run hangs")
    return process.returncode, told, errors
