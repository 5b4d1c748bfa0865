"""The first Ctrl-C ends a command in order, the second ends the process at once.

Python raises KeyboardInterrupt wherever it stands: within a destructor, where it is dropped and the command goes on; within a library,
which may answer with an error of its own; and, pressed twice, within the cleaning up after the first, where libraries written in C crash.
"""
from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN_AFTER_S = 0.02          # a Ctrl-C that a destructor dropped is raised again so much later


class _CtrlC:
    """Whether Ctrl-C was pressed in this process, which then is to end."""

    pressed = False

    def __call__(self, _number: int, _frame: object) -> None:
        """The handler. A library that puts it back after the first Ctrl-C changes nothing."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if self.pressed:
            os.kill(os.getpid(), signal.SIGINT)
        self.pressed = True
        raise KeyboardInterrupt


ctrl_c = _CtrlC()


@contextmanager
def first_ctrl_c_ends_in_order() -> Iterator[None]:
    """Within this `ctrl_c.pressed` tells whatever error a Ctrl-C became. Where another handler stands it stays, as outside of the main
    thread, where none can be set."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook, again = sys.unraisablehook, threading.Timer(AGAIN_AFTER_S, os.kill, (os.getpid(), signal.SIGINT))

    def dropped(what) -> None:
        if not (ctrl_c.pressed and issubclass(what.exc_type, KeyboardInterrupt)) or again.ident is not None:
            return hook(what)
        ctrl_c.pressed = False
        signal.signal(signal.SIGINT, ctrl_c)
        again.start()

    signal.signal(signal.SIGINT, ctrl_c)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        again.cancel()
        sys.unraisablehook = hook
        if not ctrl_c.pressed:               # else the process is about to end, and nothing should come between
            signal.signal(signal.SIGINT, signal.default_int_handler)
