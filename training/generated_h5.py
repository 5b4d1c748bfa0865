"""Patches as one HDF5 file in the schema of `preprocessing/patch_file.py`, put together from blocks that a killed call leaves behind.

Row i is request i. With one seed, a patch of an .h5ad's spot has the spot's barcode and place: where every spot was asked for, the file
pairs with that .h5ad as the file of real patches does. With several seeds its key is `<barcode>_seed0003`; a patch of an .npy row is
`prompt00012_seed0003`. A patch shows as much tissue as those of the .h5ad did, if it says how much (`uns['morphology']`), else its
attribute `pixel_size` is NaN.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from preprocessing.compressed_chunks import pack, unpack
from preprocessing.done_manifests import is_done, write_done
from preprocessing.expression import recorded_scale
from preprocessing.parts import Parts
from preprocessing.patch_file import compress_patch, read_patch_file, write_compressed_patches
from training.generation_plan import GenerationPlan
from training.sampling_ranks import Ranks


class GeneratedH5:
    """The patches of a plan in one file."""

    columns = ("row", "key")

    def __init__(self, plan: GenerationPlan, path: Path, ranks: Ranks):
        self.plan, self.path, self.ranks = plan, path, ranks
        self.record = plan.record()
        self._parts: Parts | None = None           # None: the file is finished
        self._one_seed = len({request.seed for request in plan.requests}) == 1

    def begin(self) -> list[int]:
        """Batches that are neither in the file nor in a block, the same list on every rank. Rank 0 looks; it holds the lock of the file."""
        found = None
        if self.ranks.is_first and not is_done(self.path, config=self.record, inputs={}):
            self._parts = Parts(self.path, config=self.record, inputs={})
            found = self.record, [number for number in range(self.plan.n_batches) if number not in self._parts]
        found = self.ranks.tell(found)
        if found is None:
            return []
        record, missing = found
        if self._parts is None:                   # rank 0 has begun the blocks: others join them under its very words
            self._parts = Parts(self.path, config=record, inputs={})
        return missing

    def save(self, number: int, pictures: list[np.ndarray]) -> int:
        """Write the patches of a batch as a block; returns how many."""
        images, lengths = pack([compress_patch(picture, self.plan.patch_px) for picture in pictures])
        self._parts.write(number, images=images, lengths=lengths)
        return len(pictures)

    def settle(self) -> None:
        """Blocks have checksums: whoever puts them together sees a torn one."""

    def finish(self) -> list[Path]:
        """Put the blocks together (rank 0, after all ranks have settled); returns the file."""
        if self._parts is not None:
            patch_size_src, pixel_size = self._scale()
            streams = (stream for block in self._parts.blocks("images", "lengths") for stream in unpack(block["images"], block["lengths"]))
            write_compressed_patches(self.path, streams, count=len(self.plan), patch_px=self.plan.patch_px,
                                     coords=self._corners(patch_size_src), barcodes=[self._barcode(row) for row in range(len(self.plan))],
                                     patch_size_src=patch_size_src, pixel_size=pixel_size, name=self.plan.prompts.sample_id)
            write_done(self.path, config=self.record, inputs={}, rows=len(self.plan))
            self._parts.remove()
        return [self.path]

    def _barcode(self, row: int) -> str:
        request = self.plan.requests[row]
        barcode = self.plan.prompts.spot_barcode(request.prompt)
        if not barcode:
            return f"prompt{request.prompt:05d}_seed{request.seed:04d}"
        return barcode if self._one_seed else f"{barcode}_seed{request.seed:04d}"

    def _scale(self) -> tuple[float, float]:
        """Side of a patch on the slide in level-0 px, and µm of such a px."""
        if self.plan.prompts.sample_id:
            recorded = recorded_scale(self.plan.prompts.path)
            if len(recorded) == 2:
                return recorded["patch_um"] / recorded["mpp"], recorded["mpp"]
        return float(self.plan.patch_px), float("nan")

    def _corners(self, patch_size_src: float) -> np.ndarray:
        """int64 (N, 2): top-left at level 0; 0, 0 where a prompt has no place."""
        centres = self.plan.prompts.centre_xy_px
        if centres is None:
            return np.zeros((len(self.plan), 2), np.int64)
        return np.rint(centres[[request.prompt for request in self.plan.requests]] - patch_size_src / 2).astype(np.int64)

    def names(self, row: int) -> tuple[int, str]:
        return row, self._barcode(row)

    def picture(self, row: int) -> np.ndarray:
        with read_patch_file(self.path) as file:
            return file.images(row)
