"""Write and read a Parquet table block by block, one row group each, as pandas would write it whole."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


class ParquetBlocks:
    """A table being written; every block has the columns of the first."""

    def __init__(self, path: Path):
        self._path, self._writer = path, None

    def __enter__(self) -> ParquetBlocks:
        return self

    def write(self, table: pd.DataFrame) -> None:
        block = pa.Table.from_pandas(table, schema=self._writer and self._writer.schema, preserve_index=False)
        self._writer = self._writer or pq.ParquetWriter(self._path, block.schema)
        self._writer.write_table(block)

    def __exit__(self, *error) -> None:
        if self._writer:
            self._writer.close()


def read_blocks(path: Path) -> Iterator[pd.DataFrame]:
    """The blocks as they were written."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number).to_pandas()
