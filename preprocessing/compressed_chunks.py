"""Compress HDF5 chunks outside HDF5, in as many threads as wanted, and put them into a dataset as they are.

HDF5 compresses one chunk at a time under one lock. Its gzip filter is a zlib stream, after a byte shuffle where the dataset asks for
one, so chunks made here are read by every HDF5 reader. Touches no files but the dataset it is given.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor

import h5py
import imagecodecs
import numpy as np

GZIP_LEVEL = 1
GZIP = {"compression": "gzip", "compression_opts": GZIP_LEVEL}     # how a dataset must be created to take these chunks
PROBE_BYTES, WORTHWHILE = 4096, 0.8                                # H&E shrinks to 0.9, at the price of cutting it; glass to nothing
NOT_COMPRESSED = 1                                                 # filter mask: a reader skips the first filter, gzip


def compress(values: np.ndarray) -> bytes:
    """One chunk: a zlib stream over the bytes of `values`, shuffled where a value has several."""
    width = values.dtype.itemsize
    raw = np.ascontiguousarray(values).view(np.uint8)
    if width > 1:                                                  # HDF5's shuffle: all first bytes, then all second ones, ...
        raw = np.ascontiguousarray(raw.reshape(-1, width).T)
    return imagecodecs.zlibng_encode(raw, GZIP_LEVEL)


def compress_if_worthwhile(values: np.ndarray) -> bytes | memoryview:
    """One chunk of uint8: compressed if a piece out of its middle says that it pays, else a view of it as it is."""
    raw = np.ascontiguousarray(values).reshape(-1)
    middle = max(0, (len(raw) - PROBE_BYTES) // 2)
    probe = raw[middle:middle + PROBE_BYTES]
    if len(_deflate(probe)) > WORTHWHILE * len(probe):
        return raw.data
    stream = _deflate(raw)
    return stream if len(stream) < len(raw) else raw.data


def _deflate(raw: np.ndarray) -> bytes:
    return imagecodecs.deflate_encode(raw, level=GZIP_LEVEL, raw=False)


def write_chunk(dataset: h5py.Dataset, place: tuple[int, ...], stream: bytes | memoryview) -> None:
    """Put what `compress_if_worthwhile` made of a chunk into a `dataset` created with `GZIP`."""
    is_raw = len(stream) == math.prod(dataset.chunks) * dataset.dtype.itemsize
    dataset.id.write_direct_chunk(place, stream, NOT_COMPRESSED if is_raw else 0)


def pack(streams: Sequence[bytes | memoryview]) -> tuple[np.ndarray, np.ndarray]:
    """Streams end to end, uint8 (n,), and the length of each, int64."""
    return np.frombuffer(b"".join(streams), np.uint8), np.array([len(stream) for stream in streams], dtype=np.int64)


def unpack(joined: np.ndarray, lengths: np.ndarray) -> Iterable[memoryview]:
    """The streams that `pack` joined, as views."""
    ends = np.cumsum(lengths)
    for start, end in zip((ends - lengths).tolist(), ends.tolist(), strict=True):
        yield joined[start:end].data


class ChunkedColumn:
    """Cut a growing 1-D array into chunks of `length` values. Full chunks leave compressed, the rest waits in `tail`."""

    def __init__(self, tail: np.ndarray, length: int):
        self.tail, self.length = tail, length

    def add(self, values: np.ndarray, pool: Executor) -> list:
        """Futures of the chunks that `values` fill up."""
        values = np.concatenate([self.tail, values])
        full = len(values) // self.length * self.length
        self.tail = values[full:].copy()
        return [pool.submit(compress, values[start:start + self.length]) for start in range(0, full, self.length)]


def write_column(dataset: h5py.Dataset, streams: Iterable[bytes | memoryview], tail: np.ndarray) -> None:
    """Fill a 1-D `dataset`, created with `GZIP` and shuffle, with its chunks and what is left after them."""
    length, first = dataset.chunks[0], 0
    for stream in streams:
        dataset.id.write_direct_chunk((first,), stream)
        first += length
    if len(tail):
        padded = np.zeros(length, dataset.dtype)                   # HDF5 stores a last chunk whole
        padded[:len(tail)] = tail
        dataset.id.write_direct_chunk((first,), compress(padded))
    if first + len(tail) != len(dataset):
        raise ValueError(f"{dataset.name}: {len(dataset)} values were announced, {first + len(tail)} came")
