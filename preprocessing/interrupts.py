"""The first Ctrl-C ends a command in order, the second ends the process at once.

Python raises KeyboardInterrupt wherever it stands: within a destructor, where it is dropped and the command goes on; within a library,
which may answer with an error of its own; and, pressed twice, within the cleaning up after the first, where libraries written in C crash.
"""
from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

AGAIN_AFTER_S = 0.02
INTERRUPTED = "error: interrupted; what was finished is kept, run the same command again"
STOPS = (signal.SIGTERM, signal.SIGINT)


class AnsweredOnce:
    """A handler that answers the first signal of a kind; the second ends the process at once.

    The system sees to the second, also while Python waits for a library. A library that puts the handler back meanwhile changes nothing.
    """

    def __init__(self, answer: Callable[[int], None]):
        self._answer, self._answered = answer, set()

    def __call__(self, number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        if number in self._answered:
            os.kill(os.getpid(), number)
        self._answered.add(number)
        self._answer(number)


class _CtrlC(AnsweredOnce):
    """Whether Ctrl-C was pressed in this process, which then is to end."""

    def __init__(self):
        super().__init__(self._interrupt)

    @staticmethod
    def _interrupt(_number: int) -> None:
        raise KeyboardInterrupt

    @property
    def pressed(self) -> bool:
        return bool(self._answered)

    def forget(self) -> None:
        """The Ctrl-C was dropped: the next is the first."""
        self._answered.clear()


ctrl_c = _CtrlC()


class StopSignals:
    """SIGTERM and Ctrl-C as they come, for a training that finishes its step, saves and ends.

    A second Ctrl-C ends the process at once: checkpoints get their names when they are whole, so the one before stays. SIGTERM may come
    again: a batch system sends it to every process, and a launcher hands it on. Outside of the main thread signals are nobody's.
    """

    def __init__(self):
        self.received: list[int] = []
        self._interrupt = AnsweredOnce(self.received.append)

    def listen(self) -> None:
        """From here on signals are collected."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note)
            signal.signal(signal.SIGINT, self._interrupt)

    def _note(self, number: int, _frame: object) -> None:
        self.received.append(number)

    @contextmanager
    def same_handlers_after(self) -> Iterator[None]:
        """Put the handlers back at the end; not a command's own for a signal that came: it is ending, and the next ends it at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOPS}
        try:
            yield
        finally:
            for number, handler in before.items():
                ending = number in self.received and isinstance(handler, AnsweredOnce)
                signal.signal(number, signal.SIG_DFL if ending else handler)


class Stopped(SystemExit):
    """A signal ended a training; `.message` says what was kept. The exit code is the shell's: 143 for SIGTERM, 130 for Ctrl-C."""

    def __init__(self, number: int, message: str):
        super().__init__(128 + number)
        self.is_said = False
        self.message = f"stopped by {'Ctrl-C' if number == signal.SIGINT else signal.Signals(number).name} {message}"


@contextmanager
def stops_answered(answer: Callable[[int], None]) -> Iterator[None]:
    """Within this the first SIGTERM or Ctrl-C is handed to `answer`, the second of its kind ends the process at once. Outside of the main
    thread signals are nobody's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    once = AnsweredOnce(answer)
    before = {number: signal.signal(number, once) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is once:      # else one came, and the next ends the process at once
                signal.signal(number, handler)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """The signals that came meanwhile (`StopSignals`), instead of dying in the middle of a step."""
    stops = StopSignals()
    with stops.same_handlers_after():
        stops.listen()
        yield stops.received


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
        ctrl_c.forget()
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
    """A Ctrl-C outside of a command's own rules, most often while it still imports, is said as within them."""
    interrupted = issubclass(kind, KeyboardInterrupt)
    if not interrupted or "--debug" in sys.argv:
        _usual_hook(kind, error, traceback)
    if interrupted:
        print(INTERRUPTED, file=sys.stderr)


_usual_hook, sys.excepthook = sys.excepthook, _one_line_for_ctrl_c
