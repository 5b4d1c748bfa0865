"""Patches as PNG files that say themselves what they were made of, so that a killed call goes on and never keeps a stranger.

The mark of a patch (`generation_plan.py`) stands in a text chunk, and every chunk has a checksum: a file is kept when it is whole and
carries the mark of the patch that is asked for.
"""
from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np

from preprocessing.outputs import finished_file, is_leftover
from preprocessing.patches import read_patch
from preprocessing.png_folder import encode_png
from training.generation_plan import GenerationPlan
from training.loading import in_order
from training.sample_folders import MARK
from training.sampling_ranks import Ranks

SIGNATURE = b"\x89PNG\r\n\x1a\n"
AFTER_HEADER = len(SIGNATURE) + 4 + 4 + 13 + 4      # the header chunk is 13 bytes long, and the first
KEYWORD = MARK
LOOK_FOR = 256                                      # batches that rank 0 looks for while the others wait to hear from it


def _chunk(kind: bytes, content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")


def encode_marked(picture: np.ndarray, mark: str) -> bytes:
    """A PNG file of uint8 (H, W, 3) that carries its mark."""
    plain = encode_png(picture)
    return plain[:AFTER_HEADER] + _chunk(b"tEXt", KEYWORD + b"\0" + mark.encode()) + plain[AFTER_HEADER:]


def carries_mark(path: Path, mark: str) -> bool:
    """True for a whole PNG file, every checksum right, that carries this mark. It is not decoded."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    if not content.startswith(SIGNATURE):
        return False
    place, found, kind = len(SIGNATURE), False, b""
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place:place + 4], "big")
        kind = content[place + 4:place + 8]
        if end > len(content) or zlib.crc32(content[place + 4:end - 4]) != int.from_bytes(content[end - 4:end], "big"):
            return False
        found |= kind == b"tEXt" and content[place + 8:end - 4] == KEYWORD + b"\0" + mark.encode()
        place = end
    return found and kind == b"IEND"


class GeneratedPngs:
    """The patches of a plan as files below a folder, named by `Request.file_name`."""

    columns = ("file",)

    def __init__(self, plan: GenerationPlan, folder: Path, ranks: Ranks, workers: int):
        self.plan, self.folder, self.ranks, self.workers = plan, folder, ranks, workers

    def _path(self, row: int) -> Path:
        return self.folder / self.plan.requests[row].file_name

    def begin(self) -> list[int]:
        """Batches that are not all there, the same list on every rank. Rank 0 looks; it holds the lock of the folder."""
        def is_there(number: int) -> bool:
            return all(carries_mark(self._path(row), self.plan.mark(row)) for row in self.plan.rows(number))

        if self.ranks.is_first:
            for left in self.folder.rglob("prompt*_seed*.png.tmp.*"):
                if is_leftover(left, r"prompt\d+_seed\d+\.png") and left.is_file():
                    left.unlink()
        missing: list[int] = []
        for start in range(0, self.plan.n_batches, LOOK_FOR):
            numbers, found = range(start, min(start + LOOK_FOR, self.plan.n_batches)), None
            if self.ranks.is_first:
                found = [number for number, there in zip(numbers, in_order(numbers, is_there, self.workers), strict=True) if not there]
            missing += self.ranks.tell(found)
        return missing

    def save(self, number: int, pictures: list[np.ndarray]) -> int:
        """Write the patches of a batch; returns how many."""
        for row, picture in zip(self.plan.rows(number), pictures, strict=True):
            with finished_file(self._path(row), sync=False) as temporary:
                temporary.write_bytes(encode_marked(picture, self.plan.mark(row)))
        return len(pictures)

    def settle(self) -> None:
        """What this rank wrote would survive a power cut when this returns; it was not waited for file by file."""
        os.sync()

    def finish(self) -> list[Path]:
        """The files that are not one a patch (rank 0, after all ranks have settled)."""
        return []

    def names(self, row: int) -> tuple[str]:
        return (self.plan.requests[row].file_name,)

    def picture(self, row: int) -> np.ndarray:
        return read_patch(self._path(row))
