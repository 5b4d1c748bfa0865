"""Cut patches and sum their expression a block of spots at a time, so that memory stays small and a killed run goes on.

A block is some 1,000 consecutive spots. What it gives - compressed patches, packed counts, what the quality page shows - is kept by
`Parts` until all blocks are there. Patches on tiles that cannot be decoded are left out, with their expression.
"""
from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse as sp

from preprocessing.compressed_chunks import pack, unpack
from preprocessing.errors import InputError, first_few
from preprocessing.expression_file import TAILS, CountsPacker
from preprocessing.outputs import require_free_space
from preprocessing.parts import Parts
from preprocessing.patch_file import compress_patch
from preprocessing.png_folder import PNG_SHARE, whole_pngs, write_pngs
from preprocessing.progress import ProgressBar
from preprocessing.spot_sums import sum_blocks
from preprocessing.stain import StainVectors, normalise_stain
from preprocessing.windows import CutBlock, cut_blocks

if TYPE_CHECKING:
    from preprocessing.extraction import Resources
    from preprocessing.sample import Sample, Spots
    from preprocessing.slide import Slide

BLOCK_BYTES, MOST_SPOTS = 1 << 26, 2048      # pixels and spots of a block
GROUP = 64                                   # patches that a thread compresses or normalises at a time
COUNT_BYTES = 1.7                            # of one non-zero count in a file, its column with it
NEARLY_BLACK, MOSTLY = 8, 0.5                # a patch with this share of pixels this dark was cut where nothing was scanned


@dataclass(frozen=True)
class PatchFolderTarget:
    """PNG files made beside the cutting, in a working folder until all are there."""

    folder: Path                             # where they will lie
    working: Path
    digits: int                              # of a row number in a file's name
    stain: StainVectors | None               # None: colours as they are
    record: dict                             # content of stain.json


@dataclass(frozen=True)
class PatchJob:
    """Patches to cut, and what is to be kept of each."""

    slide: Slide
    centre_xy_px: np.ndarray                 # (P, 2) level-0 px
    patch_um: float
    mpp: float
    patch_px: int
    edge: str
    shown_rows: np.ndarray                   # rows whose patch the quality page shows
    keeps_images: bool = True                # compressed pixels, for imgs.h5
    folder: PatchFolderTarget | None = None  # PNG files
    sample: Sample | None = None             # expression is summed where there is a sample ...
    spots: Spots | None = None               # ... over these, one a patch
    max_bad: float = 0.01                    # largest share of patches on tiles that cannot be decoded

    def blocks(self) -> list[slice]:
        """Consecutive rows; the same for every run of the same job, whatever its resources."""
        length, count = block_length(self.patch_px), len(self.centre_xy_px)
        return [slice(start, min(start + length, count)) for start in range(0, count, length)]

    def expected_bytes(self) -> tuple[int, int]:
        """About how much the blocks and then the files will take, and the PNG files."""
        count, pixels = len(self.centre_xy_px), 3 * self.patch_px ** 2 * len(self.centre_xy_px)
        counts = 0
        if self.spots is not None:
            entries, (rows, genes) = self.sample.counts.nnz, self.sample.counts.shape
            counts = int(COUNT_BYTES * count * min(genes, self.spots.n_members * entries / max(rows, 1)))
        return 2 * (counts + pixels * self.keeps_images), int(PNG_SHARE * pixels) * (self.folder is not None)


def block_length(patch_px: int) -> int:
    """Patches of a block."""
    return int(np.clip(BLOCK_BYTES // (3 * patch_px ** 2), 1, MOST_SPOTS))


def make_blocks(job: PatchJob, parts: Parts, resources: Resources) -> None:
    """Make the blocks of `job` that `parts` lacks, under a progress bar."""
    blocks, done, tally = job.blocks(), *_finished(job, parts)
    tally.check()
    if not done:
        for_blocks, for_pngs = job.expected_bytes()
        require_free_space(parts.folder, for_blocks)
        require_free_space(job.folder.working if job.folder else parts.folder, for_pngs)
    packer = CountsPacker(parts.read(done - 1, *TAILS) if done and job.spots is not None else None)
    cut = cut_blocks(job.slide, job.centre_xy_px, job.patch_um, job.mpp, job.patch_px, blocks[done:], edge=job.edge,
                     workers=resources.workers)
    sums = repeat(None) if job.spots is None else sum_blocks(
        job.sample, job.spots, blocks[done:], workers=resources.workers, memory_gb=resources.memory_gb, folder=parts.folder)
    keeper = BlockKeeper(job, parts, packer, tally, resources.workers)
    with keeper, _progress(job, blocks, done) as bar:
        for number, block, patches, counts in zip(range(done, len(blocks)), blocks[done:], cut, sums, strict=False):
            bar.update(keeper.take(number, block, patches, counts))
        bar.update(keeper.finish())


def _finished(job: PatchJob, parts: Parts) -> tuple[int, Tally]:
    """How many blocks stand, PNG files and all where there are any, and the count of their patches. Blocks beyond are thrown away."""
    facts = list(parts.blocks("readable", "reasons"))
    done, kept = len(facts), np.cumsum([0, *(block["readable"].sum() for block in facts)])
    if job.folder is not None:
        job.folder.working.mkdir(parents=True, exist_ok=True)
        done = int(np.searchsorted(kept, whole_pngs(job.folder.working, job.folder.digits), side="right")) - 1
        parts.drop_from(done)
    return done, Tally(job, int(kept[done]), [reason for block in facts[:done] for reason in _texts(block["reasons"])])


def _progress(job: PatchJob, blocks: list[slice], done: int) -> ProgressBar:
    return ProgressBar(desc="extracting" if job.spots is not None else "cutting", unit="patch", total=len(job.centre_xy_px),
                initial=blocks[done - 1].stop if done else 0)


@dataclass
class Tally:
    """Patches kept, and why others were not, so far."""

    job: PatchJob
    kept: int
    reasons: list[str]

    def add(self, patches: CutBlock) -> None:
        """Count a block; too many lost patches end the run."""
        self.kept += int(patches.readable.sum())
        self.reasons += patches.reasons
        self.check()

    def check(self) -> None:
        """Refuse more patches on damaged tiles than `max_bad` allows."""
        if len(self.reasons) > self.job.max_bad * len(self.job.centre_xy_px):
            raise InputError(self.job.slide.path, "tiles", f"at most {self.job.max_bad:.2%} of {len(self.job.centre_xy_px):,} patches on "
                             "tiles that cannot be decoded (--max-bad)", f"so far {first_few(self.reasons, 3)}")


class BlockKeeper:
    """Compresses and writes one block while the next is cut and summed."""

    def __init__(self, job: PatchJob, parts: Parts, packer: CountsPacker, tally: Tally, workers: int):
        self._job, self._parts, self._packer, self._tally, self._workers = job, parts, packer, tally, workers
        self._compressors, self._writer = ThreadPoolExecutor(workers), ThreadPoolExecutor(1)      # blocks are packed in their order
        self._under_way: Future | None = None

    def __enter__(self) -> BlockKeeper:
        return self

    def __exit__(self, *_) -> None:
        self._writer.shutdown()
        self._compressors.shutdown()

    def take(self, number: int, block: slice, patches: CutBlock, counts: sp.csr_matrix | None) -> int:
        """Start on a block once the one before is kept; returns how many patches that one had."""
        kept = self.finish()
        self._under_way = self._writer.submit(self._keep, number, block, patches, counts)
        return kept

    def finish(self) -> int:
        """Wait for the block under way; returns how many patches it had."""
        under_way, self._under_way = self._under_way, None
        return under_way.result() if under_way is not None else 0

    def _keep(self, number: int, block: slice, patches: CutBlock, counts: sp.csr_matrix | None) -> int:
        job, good, images = self._job, np.flatnonzero(patches.readable), patches.patches
        shown = [row - block.start for row in job.shown_rows if block.start <= row < block.stop and patches.readable[row - block.start]]
        dark = (images[good, ::8, ::8].max(axis=3) < NEARLY_BLACK).mean(axis=(1, 2)) > MOSTLY
        kept = {"readable": patches.readable, "reasons": _as_bytes(patches.reasons), "n_black": np.array(dark.sum()),
                "shown": images[shown]}
        if job.keeps_images:
            groups = [good[start:start + GROUP] for start in range(0, len(good), GROUP)]
            streams = self._compressors.map(lambda rows: [compress_patch(images[row], job.patch_px) for row in rows], groups)
            kept["image_streams"], kept["image_lengths"] = pack(list(chain.from_iterable(streams)))
        if job.folder is not None:
            patches_shown = _normalised(images[good], job.folder.stain, self._compressors)
            write_pngs(job.folder.working, self._tally.kept, patches_shown, job.folder.digits, self._workers)
        if counts is not None:
            counts = counts if len(good) == counts.shape[0] else counts[good]
            kept |= self._packer.pack(counts, self._compressors)
            kept["library_sizes"] = np.add.reduceat(np.append(counts.data, 0), counts.indptr[:-1], dtype=np.int64)
            kept["library_sizes"][np.diff(counts.indptr) == 0] = 0          # of an empty row reduceat gives the next entry
        self._parts.write(number, **kept)
        self._tally.add(patches)
        return len(patches.readable)


def _as_bytes(texts: Sequence[str]) -> np.ndarray:
    return np.frombuffer(json.dumps(list(texts)).encode(), np.uint8)


def _texts(stored: np.ndarray) -> list[str]:
    return json.loads(stored.tobytes())


def _normalised(images: np.ndarray, stain: StainVectors | None, pool: Executor) -> Iterable[np.ndarray]:
    """The patches as the PNG files show them, in order."""
    if stain is None:
        return images
    groups = pool.map(lambda start: normalise_stain(images[start:start + GROUP], stain), range(0, len(images), GROUP))
    return chain.from_iterable(groups)


class MadeBlocks:
    """All blocks of a job, and what they say together. Rows are those of the patches that could be read."""

    def __init__(self, parts: Parts):
        self._parts = parts
        facts = list(parts.blocks("readable", "reasons", "n_black", "shown"))
        self.readable = np.concatenate([block["readable"] for block in facts])                 # bool, a candidate each
        self.reasons: list[str] = [reason for block in facts for reason in _texts(block["reasons"])]
        self.bad_share = len(self.reasons) / len(self.readable)
        self.n_black = sum(int(block["n_black"]) for block in facts)
        self.shown = np.concatenate([block["shown"] for block in facts])

    def images(self) -> Iterator[memoryview]:
        """Compressed patches, in row order."""
        for block in self._parts.blocks("image_streams", "image_lengths"):
            yield from unpack(block["image_streams"], block["image_lengths"])

    def counts(self, *names: str) -> Iterator[dict[str, np.ndarray]]:
        """Packed counts, for `write_expression_blocks`."""
        return self._parts.blocks(*names)

    def column(self, name: str) -> np.ndarray:
        """`library_sizes` or `row_lengths` of every row."""
        return np.concatenate([block[name] for block in self._parts.blocks(name)])

