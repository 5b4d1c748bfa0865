"""A server of commands that sees a small disk of its own, which the tests fill, make larger, and make read-only."""
from __future__ import annotations

import os
from pathlib import Path

from fault_runs import CommandServer

KIB, MIB = 1 << 10, 1 << 20


class SmallDisk(CommandServer):
    """The server; what it sees under `mount` is the disk, here at `path(mount)`. It ends with the server."""

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

    def make_read_only(self) -> None:
        assert self._remount("ro") == 0

    def make_empty(self) -> None:
        """Writable, of full size, nothing on it."""
        assert self._remount(f"rw,size={self._size}") == 0
        assert self.call("find", self.mount, "-mindepth", "1", "-delete") == 0

    def _remount(self, options: str) -> int:
        return self.call("mount", "-o", f"remount,{options}", self.mount)


def small_disk(mount: Path, **how) -> SmallDisk | None:
    """One, by whichever way this machine allows; None: it allows none."""
    for unshare in (("unshare", "--mount"), ("unshare", "--user", "--map-root-user", "--mount")):
        try:
            return SmallDisk(mount, *unshare, **how)
        except (OSError, ValueError):
            continue
    return None
