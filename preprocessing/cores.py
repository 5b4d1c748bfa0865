"""Count the cores this process may use: the default of every `--workers`."""
from __future__ import annotations

import os


def usable_cores() -> int:
    """At least 1. Respects the affinity that schedulers and `taskset` set, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
