"""A server of commands that sees a small disk of its own, which the tests fill, make larger, and make read-only."""
from __future__ import annotations

import os
import shutil
from pathlib import Path

from fault_runs import CommandServer, Run

KIB, MIB = 1 << 10, 1 << 20


class SmallDisk(CommandServer):
    """The server; what it sees under `mount` is the disk, here at `path(mount)`. It ends with the server."""

    refused = ("No space left on device", " are free")      # what an error says of it

    def __init__(self, mount: Path, *unshare: str, script: str = "command_server.py", size: int = 64 * MIB):
        super().__init__(*unshare, script=script)
        self.mount, self._size = mount, size
        if self.call("mount", "-t", "tmpfs", "-o", f"size={size}", "none", mount) != 0:
            raise OSError("no mount")

    def used(self) -> int:
        about = os.statvfs(self.path(self.mount))
        return (about.f_blocks - about.f_bfree) * about.f_frsize

    def leave_free(self, n_bytes: int) -> None:
        assert self._remount(f"size={(self.used() + n_bytes) // KIB}k") == 0

    def leave_share(self, share: float, whole: Path) -> None:
        """Room for this share of what is in a folder."""
        self.leave_free(int(share * sum(path.stat().st_blocks * 512 for path in whole.rglob("*"))))

    def leave_room(self) -> None:
        """Enough for all that a test writes."""
        self.leave_free(self._size)

    def make_read_only(self) -> None:
        assert self._remount("ro") == 0

    def make_empty(self) -> None:
        """Writable, of full size, nothing on it."""
        assert self._remount(f"rw,size={self._size}") == 0
        assert self.call("find", self.mount, "-mindepth", "1", "-delete") == 0

    def _remount(self, options: str) -> int:
        return self.call("mount", "-o", f"remount,{options}", self.mount)


class ShortFiles:
    """A server whose commands may not write a file beyond a length: the system refuses it, whichever library writes, without a mount."""

    refused = ("File too large",)
    least = 8 * KIB                                        # the error itself has to fit into the log

    def __init__(self, server: CommandServer, mount: Path):
        self.server, self.mount, self._limit = server, mount, ""

    def leave_share(self, share: float, whole: Path) -> None:
        longest = max(path.stat().st_size for path in whole.rglob("*") if path.is_file())
        self._limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({max(self.least, int(share * longest))}, -1)); "

    def leave_room(self) -> None:
        self._limit = ""

    def make_empty(self) -> None:
        self.leave_room()
        shutil.rmtree(self.mount)
        self.mount.mkdir()

    def start(self, command: str, *arguments, before: str = "") -> Run:
        return self.server.start(command, *arguments, before=self._limit + before)

    def call(self, *command) -> int:
        return self.server.call(*command)

    def path(self, path: Path) -> Path:
        return path


def small_disk(mount: Path, **how) -> SmallDisk | None:
    """One, by whichever way this machine allows; None: it allows none."""
    for unshare in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            return SmallDisk(mount, *unshare, **how)
        except (OSError, ValueError):
            continue
    return None
