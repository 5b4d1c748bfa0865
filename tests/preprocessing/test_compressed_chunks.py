"""Chunks compressed outside HDF5 are what HDF5 reads back, whole or in parts, whatever their length."""
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pytest

from preprocessing.compressed_chunks import GZIP, ChunkedColumn, compress_if_worthwhile, pack, unpack, write_chunk, write_column


@pytest.mark.parametrize("lengths", [[5], [8], [3, 5], [20, 0, 7], [0], [8, 8]], ids=str)
def test_a_column_in_any_blocks_reads_back_as_one(tmp_path, lengths):
    blocks = [np.arange(sum(lengths[:i]), sum(lengths[:i + 1]), dtype=np.int32) * 70_000 for i in range(len(lengths))]
    column, streams = ChunkedColumn(np.empty(0, np.int32), 8), []
    with ThreadPoolExecutor(2) as pool:
        for block in blocks:
            joined, parts = pack([future.result() for future in column.add(block, pool)])
            streams += unpack(joined, parts)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_column(file.create_dataset("x", (sum(lengths),), np.int32, chunks=(8,), maxshape=(None,), shuffle=True, **GZIP), streams,
                     column.tail)
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["x"][:], np.concatenate(blocks)) and np.array_equal(file["x"][3:6], np.concatenate(blocks)[3:6])


def test_a_column_that_is_too_short_is_noticed(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        dataset = file.create_dataset("x", (9,), np.int32, chunks=(8,), maxshape=(None,), shuffle=True, **GZIP)
        with pytest.raises(ValueError, match="9 values were announced, 2 came"):
            write_column(dataset, [], np.zeros(2, np.int32))


@pytest.mark.parametrize(("values", "is_raw"), [
    (np.full((32, 32, 3), 240), False), (np.random.default_rng(0).integers(0, 256, (32, 32, 3)), True), (np.full((1, 1, 3), 7), True),
], ids=["glass", "noise", "one pixel"])
def test_only_what_shrinks_is_compressed_and_all_reads_back(tmp_path, values, is_raw):
    values = values.astype(np.uint8)
    stream = compress_if_worthwhile(values)
    assert (stream == values.tobytes()) == is_raw
    with h5py.File(tmp_path / "a.h5", "w") as file:
        write_chunk(file.create_dataset("img", (2, *values.shape), np.uint8, chunks=(1, *values.shape), **GZIP), (1, 0, 0, 0), stream)
    with h5py.File(tmp_path / "a.h5") as file:
        assert np.array_equal(file["img"][1], values)
