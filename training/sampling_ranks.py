"""Sample in several processes ("ranks") that torchrun started: one a GPU, or several on CPUs.

Ranks agree on what to do and wait for each other through gloo, on CPUs and GPUs alike: patches go to the disk, not between them.
None waits longer than `--timeout-minutes` for another: whoever has long work lets the others hear from it in between.
A process that nobody joined is rank 0 of 1, and nothing here does anything.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from preprocessing.cores import usable_cores
from preprocessing.errors import EXIT_INTERRUPTED
from training.ranks import TIMEOUT_MINUTES, Place, from_first, join, named_place, waiting_time

GRACE_S, APART_S = 30.0, 3.0     # what ends all is said by rank 0, or else by the next, whose end ends the others meanwhile


@dataclass(frozen=True)
class Ranks(Place):
    """A place whose processes wait for each other and hear from rank 0."""

    timeout_minutes: float = TIMEOUT_MINUTES

    def workers(self, asked: int | None) -> int:
        """Threads of this rank: its share of the cores, unless said."""
        return asked or max(1, usable_cores() // self.local_size)

    def wait(self) -> None:
        """Until all ranks are here."""
        self.tell(None)

    def tell(self, value: Any) -> Any:
        """Rank 0's `value`, plain JSON, on every rank."""
        if self.size == 1:
            return value
        try:
            dist.barrier()
            return from_first(value)
        except RuntimeError as error:
            raise OSError(f"rank {self.rank}: another process of this run ended or did not answer within --timeout-minutes "
                          f"{self.timeout_minutes:g}") from error


@contextmanager
def all_ranks(timeout_minutes: float = TIMEOUT_MINUTES) -> Iterator[Ranks]:
    """Join the ranks that torchrun's environment names. What ends one of them inside ends all: torchrun sees to it."""
    ranks, timeout = Ranks(**asdict(named_place()), timeout_minutes=timeout_minutes), waiting_time(timeout_minutes)
    if ranks.size == 1:
        yield ranks
        return
    join("gloo", timeout)
    try:
        yield ranks
    except KeyboardInterrupt:
        if ranks.is_first:
            raise
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception:
        if not ranks.is_first:
            time.sleep(GRACE_S + APART_S * (ranks.rank - 1))
        raise
    finally:
        dist.destroy_process_group()
