"""Write `dropped_spots.tsv`: the spots of a sample that got no patch, and why."""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from preprocessing.outputs import finished_file


def write_dropped(path: Path, dropped: Mapping[str, np.ndarray]) -> None:
    """One line a spot; `dropped` is reason -> barcodes."""
    lines = [f"{barcode}\t{reason}\n" for reason, barcodes in dropped.items() for barcode in barcodes]
    with finished_file(path) as temporary:
        temporary.write_text("barcode\treason\n" + "".join(lines))
