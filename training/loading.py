"""Load batches ahead of the loop that uses them, in threads: nothing is pickled, and PyTorch's work on pixels lets other threads run."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Key, Batch = TypeVar("Key"), TypeVar("Batch")


def in_order(keys: Iterable[Key], load: Callable[[Key], Batch], workers: int) -> Iterator[Batch]:
    """`load(key)` of every key, in the order of `keys`, by so many threads; at most two batches a thread are ready and waiting.

    The same batches whatever `workers`; 0 loads each when it is asked for. An error of `load` is raised in its turn.
    """
    if workers < 1:
        yield from map(load, keys)
        return
    waiting: deque = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for key in keys:
                waiting.append(pool.submit(load, key))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class BatchesAhead:
    """An epoch of batches for Lightning: iterated anew each epoch, each time from the batch that `batches` begins with."""

    def __init__(self, batches: Iterable[Key], load: Callable[[Key], Batch], workers: int):
        self.batches, self.load, self.workers = batches, load, workers

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        return in_order(self.batches, self.load, self.workers)
