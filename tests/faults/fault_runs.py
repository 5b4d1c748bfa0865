"""What the fault tests share: a server of commands, run as a user would."""
from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60                                     # no run of a test takes longer
NOISE = ("Traceback", "Exception ignored", "Segmentation")


class Run:
    """A command under way."""

    def __init__(self, server: CommandServer, child: int, log: Path):
        self._server, self.child, self._log, self.code = server, child, log, None

    def is_over(self) -> bool:
        if self.code is None:
            self.code = self._server.ask(kind="wait", child=self.child, flags=os.WNOHANG)
        return self.code is not None

    def wait(self, seconds: float = SECONDS) -> int:
        """The exit code; below 0, the signal that ended it."""
        deadline = time.monotonic() + seconds
        while not self.is_over():
            assert time.monotonic() < deadline, f"it hangs; so far it said: {self.said}"
            time.sleep(0.005)
        return self.code

    def signal(self, number: int) -> None:
        if not self.is_over():
            os.kill(self.child, number)

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def errors(self) -> list[str]:
        """The lines that begin an error, and those that no user should see."""
        lines = self.said.replace("\r", "\n").splitlines()
        return [line for line in lines if line.startswith("error: ") or any(word in line for word in NOISE)]


class CommandServer:
    """Starts `extract`, `filter` and `dump`; with `unshare`, in mounts of its own, which end with it."""

    def __init__(self, *unshare: str, script: str = "command_server.py"):
        self.process = subprocess.Popen([*unshare, sys.executable, str(Path(__file__).with_name(script))], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                                        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
        self._logs = tempfile.TemporaryDirectory()
        self.logs = Path(self._logs.name)
        self.logs.chmod(0o777)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, command: str, *arguments, **how) -> Run:
        log = self.logs / f"{len(list(self.logs.iterdir()))}.log"
        log.touch()
        log.chmod(0o666)
        child = self.ask(kind="start", command=command, arguments=[str(argument) for argument in arguments], log=str(log), **how)
        return Run(self, child, log)

    def run(self, command: str, *arguments, **how) -> Run:
        """Run a command to its end."""
        run = self.start(command, *arguments, **how)
        run.wait()
        return run

    def succeeds(self, command: str, *arguments) -> str:
        run = self.run(command, *arguments)
        assert run.code == 0, (run.code, run.said)
        assert run.errors == []
        return run.said

    def fails(self, code: int, command: str, *arguments, **how) -> str:
        """Run a command that must end with this exit code and one line of error, which is returned."""
        run = self.run(command, *arguments, **how)
        assert (run.code, len(run.errors)) == (code, 1), (run.code, run.said)
        assert run.errors[0].startswith("error: ")
        return run.errors[0]

    def call(self, *command) -> int:
        """Run a program where the commands run; its exit code."""
        return self.ask(kind="call", command=[str(part) for part in command])

    def path(self, path: Path) -> Path:
        """A path as seen from here, of a file that the commands see under `path`."""
        return Path(f"/proc/{self.process.pid}/root{path}")

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=SECONDS)
        self._logs.cleanup()
