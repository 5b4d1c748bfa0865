"""Write HDF5 so that a full disk ends as an `OSError`.

When a write fails, the HDF5 library still wants to write its caches while it closes, fails again and takes the interpreter
down at exit. Here the first failure is kept, later writes are only pretended, the file closes, and then the failure is raised.
So is Ctrl-C, where it comes in the midst of a write.
"""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py

from preprocessing.interrupts import ctrl_c, raise_again_soon

# what h5py raises, reading a damaged file or one with other items than expected
HDF5_ERRORS = (OSError, LookupError, RuntimeError, ValueError, TypeError, AttributeError, ArithmeticError, MemoryError)


class _Stream:
    """A binary file for h5py's `fileobj` driver; `error` is the first failure to write."""

    def __init__(self, path: Path | str):
        self._file = open(path, "w+b", buffering=0)
        self.error: OSError | KeyboardInterrupt | None = None
        self.read, self.seek, self.tell, self.close = self._file.read, self._file.seek, self._file.tell, self._file.close

    def readinto(self, buffer) -> int:
        count = self._file.readinto(buffer)
        if self.error is not None:
            buffer[count:] = bytes(len(buffer) - count)
            return len(buffer)
        return count

    def _attempt(self, action, *arguments, otherwise: int) -> int:
        if self.error is None:
            try:
                return action(*arguments)
            except OSError as error:
                self.error = error
        return otherwise

    def write(self, data) -> int:
        view, done = memoryview(data), 0
        while done < len(view) and self.error is None:
            done += self._attempt(self._file.write, view[done:], otherwise=0)
        return len(view)

    def truncate(self, length: int | None = None) -> int:
        return self._attempt(self._file.truncate, length, otherwise=length or 0)

    def flush(self) -> None:
        self._attempt(self._file.flush, otherwise=0)


CALLED_BY_HDF5 = {method.__code__ for method in vars(_Stream).values() if hasattr(method, "__code__")}


@contextmanager
def _interrupts_outside_of(stream: _Stream) -> Iterator[None]:
    """Ctrl-C while HDF5 calls the stream is kept as its error: raised there, HDF5 would take it for a write that failed."""
    def interrupt(number, frame):
        while frame is not None and frame.f_code not in CALLED_BY_HDF5:
            frame = frame.f_back
        if frame is None:
            usual(number, frame)
        stream.error = stream.error or KeyboardInterrupt()
        again.append(raise_again_soon())     # between two writes, not after the last

    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or usual not in (signal.default_int_handler, ctrl_c):
        yield
        return
    again: list[threading.Timer] = []
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        for timer in again:
            timer.cancel()
        signal.signal(signal.SIGINT, usual)


@contextmanager
def hdf5_output(path: Path | str) -> Iterator[h5py.File]:
    """A new HDF5 file to write into; raises the first `OSError` of the disk after the file was closed."""
    stream = _Stream(path)
    try:
        with _interrupts_outside_of(stream), h5py.File(stream, "w") as file:
            yield file
            file.flush()
    finally:
        stream.close()
        if isinstance(stream.error, KeyboardInterrupt):
            raise stream.error
        if stream.error is not None:
            raise OSError(stream.error.errno, stream.error.strerror, str(path)) from stream.error
