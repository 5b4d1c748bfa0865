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

AGAIN_AFTER_S = 0.02
INTERRUPTED = "error: interrupted; what was finished is kept, run the same command again"


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


def raise_again_soon() -> threading.Timer:
    """The Ctrl-C that came where it could not be answered comes once more in a moment."""
    again = threading.Timer(AGAIN_AFTER_S, os.kill, (os.getpid(), signal.SIGINT))
    again.daemon = True
    again.start()
    return again


@contextmanager
def first_ctrl_c_ends_in_order() -> Iterator[None]:
    """Within this `ctrl_c.pressed` tells whatever error a Ctrl-C became. Where another handler stands it stays, as outside of the main
    thread, where none can be set."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    hook, started = sys.unraisablehook, []

    def dropped(what) -> None:
        if not (ctrl_c.pressed and issubclass(what.exc_type, KeyboardInterrupt)):
            return hook(what)
        ctrl_c.pressed = False
        signal.signal(signal.SIGINT, ctrl_c)
        started.append(raise_again_soon())

    signal.signal(signal.SIGINT, ctrl_c)
    sys.unraisablehook = dropped
    try:
        yield
    finally:
        for again in started:
            again.cancel()
        sys.unraisablehook = hook
        if not ctrl_c.pressed:               # else the process is about to end, and nothing should come between
            signal.signal(signal.SIGINT, signal.default_int_handler)


def _one_line_for_ctrl_c(kind, error, traceback) -> None:
    """A Ctrl-C outside of a command's own rules, most often while it still imports, shows no traceback."""
    if issubclass(kind, KeyboardInterrupt) and "--debug" not in sys.argv:
        print(INTERRUPTED, file=sys.stderr)
    else:
        _usual_hook(kind, error, traceback)


_usual_hook, sys.excepthook = sys.excepthook, _one_line_for_ctrl_c
