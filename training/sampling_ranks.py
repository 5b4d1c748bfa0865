"""Sample in several processes ("ranks") that torchrun started: one a GPU, or several on CPUs.

Ranks agree on what to do and wait for each other through gloo, on CPUs and GPUs alike: patches go to the disk, not between them.
A process that nobody joined is rank 0 of 1, and nothing here does anything.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from preprocessing.cores import usable_cores
from preprocessing.errors import EXIT_INTERRUPTED
from training.ranks import Place, from_first, join, named_place

GRACE_S = 30.0                   # what is wrong for all is said by rank 0, whose end ends the others meanwhile
LONGEST_WAIT = timedelta(days=7)  # one rank may look through files, or put them together, while the others wait


class Ranks(Place):
    """A place whose processes wait for each other and hear from rank 0."""

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
            raise OSError(f"rank {self.rank}: another process of this run ended or did not answer") from error


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """Join the ranks that torchrun's environment names. What ends one of them inside ends all: torchrun sees to it."""
    ranks = Ranks(**asdict(named_place()))
    if ranks.size == 1:
        yield ranks
        return
    join("gloo", LONGEST_WAIT)
    try:
        yield ranks
    except KeyboardInterrupt:
        if ranks.is_first:
            raise
        raise SystemExit(EXIT_INTERRUPTED) from None
    except Exception:
        if not ranks.is_first:
            time.sleep(GRACE_S)
        raise
    finally:
        dist.destroy_process_group()
