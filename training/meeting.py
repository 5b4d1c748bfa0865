"""Meet the other processes of a run, where a signal still ends this one, and say so when they are long in coming.

torch waits for them in C++, where no handler of Python's runs: a process would sit out its timeout, whatever was sent to it.
"""
from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from threading import Event, Thread

import torch

NOTICE_S = 5.0       # processes that were started together have met by then


def meet(join: Callable[[], None], n_all: int, timeout: timedelta, speaks: bool) -> None:
    """Call `join`, which returns or raises within the timeout, in a thread of its own, while this one sleeps as Python does. What a
    handler of signals raises here ends the wait; the thread goes with the process."""
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    failed: list[BaseException] = []
    done = Event()

    def run() -> None:
        try:
            if device is not None:               # every thread has its own
                torch.cuda.set_device(device)
            join()
        except BaseException as error:
            failed.append(error)
        finally:
            done.set()

    Thread(target=run, name="meeting", daemon=True).start()
    if not done.wait(NOTICE_S):
        if speaks:
            others = "the other process" if n_all == 2 else f"the other {n_all - 1} processes"
            minutes = timeout.total_seconds() / 60
            print(f"waiting for {others} of this run, at most {minutes:g} minutes: each has to be started; Ctrl-C ends this one",
                  file=sys.stderr, flush=True)
        done.wait()
    if failed:
        raise failed[0]
