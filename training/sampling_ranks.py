"""Sample in several processes ("ranks") that torchrun started: one a GPU, or several on CPUs.

Ranks agree on what to do and wait for each other through gloo, on CPUs and GPUs alike: patches go to the disk, not between them.
A process that nobody joined is rank 0 of 1, and nothing here does anything.
"""
from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from evaluation.features import pick_device
from preprocessing.cores import usable_cores
from preprocessing.errors import EXIT_INTERRUPTED, OptionError
from training.ranks import from_first

GRACE_S = 30.0                   # what is wrong for all is said by rank 0, whose end ends the others meanwhile
LONGEST_WAIT = timedelta(days=7)  # one rank may look through files, or put them together, while the others wait


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run, and among those of its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def device(self, asked: str | None) -> str:
        """The device of this rank: of several GPUs its own."""
        name = pick_device(asked or "auto")
        if self.size == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise OptionError("--device", "cpu or cuda, as torchrun gives every process its own GPU", name)
        if self.local_size > torch.cuda.device_count():
            raise OptionError("--nproc-per-node", f"at most the {torch.cuda.device_count()} GPUs of this machine", str(self.local_size))
        return f"cuda:{self.local_rank}"

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
    try:
        ranks = Ranks(*(int(os.environ.get(name, missing)) for name, missing in
                        (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))))
        if ranks.size > 1:
            dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    except (ValueError, RuntimeError) as error:
        raise OptionError("RANK, WORLD_SIZE, MASTER_ADDR, ...", "as torchrun sets them", str(error).splitlines()[0]) from error
    if ranks.size == 1:
        yield Ranks()
        return
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
