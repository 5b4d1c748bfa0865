"""Compile a loop with numba: the one decorator of every kernel. The machine code is kept on disk where a place can be written."""
from __future__ import annotations

from collections.abc import Callable

from numba import njit


def kernel(function: Callable | None = None, **options) -> Callable:
    """`njit` that leaves the interpreter free for other threads and is compiled once per installation.

    Where no folder can be written (a read-only installation without a home) it is compiled once per process instead."""
    if function is None:
        return lambda decorated: kernel(decorated, **options)
    try:
        return njit(nogil=True, cache=True, **options)(function)
    except RuntimeError:                                 # numba: "cannot cache function: no locator available"
        return njit(nogil=True, **options)(function)
