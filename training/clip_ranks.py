"""Run CLIP training as several processes, one a device ("ranks"), that end together.

The process that the user started is rank 0. It reads and checks everything before it starts the others, so that what is wrong
is said once. Under torchrun, SLURM or on several nodes the processes are there already; nothing else differs.
"""
from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from subprocess import Popen
from threading import Lock, Thread

from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from lightning_fabric.utilities.exceptions import MisconfigurationException

from preprocessing.errors import EXIT_IO, OptionError
from training.clip_config import TrainerConfig
from training.meeting import meet
from training.ranks import LOST

GRACE_S = 3.0   # a rank that only suffers from another's end waits so long for that one's message and exit code


class MeetingStrategy(DDPStrategy):
    """Lightning's, whose ranks meet where a signal can end the wait."""

    def _setup_distributed(self) -> None:
        meet(super()._setup_distributed, self.num_processes * self.num_nodes, self._timeout, speaks=self.local_rank == 0)


def find_devices(options: TrainerConfig) -> Fabric:
    """The devices a run is asked to use: `.world_size`, `.global_rank`, `.device`; no process is started yet."""
    asked = {"accelerator": options.accelerator, "devices": options.devices, "num_nodes": options.num_nodes}
    try:
        ranks = Fabric(**asked)
        if ranks.world_size > 1:
            ranks = Fabric(**asked, strategy=MeetingStrategy(timeout=timedelta(minutes=options.timeout_minutes)))
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        raise OptionError("trainer.accelerator, devices, num_nodes", "devices of this machine",
                          f"{', '.join(map(str, asked.values()))}: {str(error).splitlines()[0]}") from error
    size = options.batch_size
    if size % ranks.world_size:
        below = size // ranks.world_size * ranks.world_size
        nearest = f"{below} or {below + ranks.world_size}" if below else str(ranks.world_size)
        raise OptionError("trainer.batch_size", f"a multiple of the {ranks.world_size} devices, such as {nearest}", str(size))
    return ranks


@contextmanager
def all_ranks(ranks: Fabric) -> Iterator[None]:
    """Start the other ranks and join them; whatever ends one of them inside ends all, with one message and its exit code."""
    if ranks.world_size == 1:
        yield
        return
    started: list[Popen] = ranks.strategy.launcher.procs      # empty until the launch
    joined = False
    ending = Lock()   # taken once, by what ends the run first; all that ends after it was ended by it and has nothing to say
    try:
        ranks.launch()
        joined = True
        for process in started:
            Thread(target=_end_with, args=(process, started, ending), daemon=True).start()
        yield
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and LOST.search(str(error))
        if lost or joined and not started:   # the rank that failed first speaks, and ends us where it started us
            time.sleep(GRACE_S)
        ending.acquire()
        killed, started[:] = [*started], []      # Lightning looks into this list every few seconds, and at the first that has ended would
        for process in killed:                   # kill this process too, before it leaves with its own exit code
            process.kill()
        if lost:
            reason = " ".join(str(error).split())[:160]
            raise OSError(f"rank {ranks.global_rank}: another process of this run ended or did not answer ({reason})") from error
        raise


def _end_with(process: Popen, started: list[Popen], ending: Lock) -> None:
    """Wait for one started rank; when it is the first to fail, end this process and the rest with its exit code."""
    code = process.wait()
    if code:
        ending.acquire()
        for other in started:
            other.kill()
        if code < 0:   # it could not say so itself
            print(f"error: process {process.pid} of this run: ended by signal {-code}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(code if code > 0 else EXIT_IO)
