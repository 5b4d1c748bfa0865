"""Say what one extraction leaves and when it is finished: files of one kind of patches, and the patch folder made with them.

Files get their names together, when all of them are written; done-manifests, which say from what and how they were made, come last.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.done_manifests import is_done, read_done, strings_sha256, write_done
from preprocessing.errors import InputError
from preprocessing.extraction import ExtractConfig, Request
from preprocessing.older_outputs import extracted
from preprocessing.output_places import require_outputs, require_shared_folder
from preprocessing.outputs import finished_together

if TYPE_CHECKING:
    from preprocessing.block_extraction import MadeBlocks, PatchFolderTarget
    from preprocessing.slide import Slide

IMAGES = "images"           # among files told apart by their suffix: the HDF5 of patches


@dataclass(frozen=True)
class PatchFacts:
    """What is known of the patches that were kept, P of them."""

    name: str                        # of the sample
    mpp: float
    centre_xy_px: np.ndarray         # (P, 2) level-0 px
    top_left: np.ndarray             # (P, 2) int64
    barcodes: np.ndarray | None      # (P,), none for random patches
    bad_share: float                 # of the candidates, on tiles that cannot be decoded
    dropped: Mapping[str, int] | None = None   # reason -> spots without a patch

    def of_manifest(self) -> dict[str, object]:
        """Rows and their order, as manifests record them."""
        return {"rows": len(self.centre_xy_px)} | ({} if self.barcodes is None else {"barcode_sha256": strings_sha256(self.barcodes)})


@dataclass(frozen=True)
class Products:
    """The files of the spots of a sample, or those of random patches, as a request asks for them."""

    config: ExtractConfig
    request: Request
    files: tuple[Path, ...]

    @classmethod
    def of_spots(cls, config: ExtractConfig, request: Request) -> Products | None:
        """None where no sample is given."""
        return cls(config, request, request.spot_files()) if request.spot_files() else None

    @classmethod
    def of_random_patches(cls, config: ExtractConfig, request: Request) -> Products | None:
        """None where none are asked for."""
        return cls(config, request, request.random_files()) if request.random_files() else None

    @property
    def are_of_spots(self) -> bool:
        return self.files == self.request.spot_files()

    @property
    def picture(self) -> Path:
        """The one file that is always written: locks and blocks are named by it."""
        return next(file for file in self.files if file.suffix == ".png")

    @property
    def written(self) -> str:
        """Every path, for a line of text."""
        return ", ".join(map(str, self.request.written(self.files)))

    def recorded(self) -> dict[str, Mapping]:
        """`config` and `inputs` of a done-manifest: what these files depend on."""
        inputs = self.request.seen["sample"]
        if self.are_of_spots:
            return {"config": self.config.settings(of_spots=True), "inputs": inputs}
        return {"config": {**self.config.settings(of_spots=False), "tissue": self.request.tissue_seg_file},
                "inputs": inputs | self.request.seen["tissue"]}

    def recorded_of_folder(self) -> dict[str, Mapping]:
        """The same of the patch folder."""
        recorded = self.recorded()
        return {"config": recorded["config"] | self.request.folder_settings(), "inputs": recorded["inputs"] | self.request.seen["folder"]}

    def are_done(self, max_bad: float) -> bool:
        """Whether everything stands, made from the same inputs with the same settings."""
        recorded = self.recorded()
        return (all(is_done(file, **recorded) for file in self.files) and read_done(self.files[0]).get("bad_share", 0) <= max_bad
                and (not self.request.dump_dir or self.folder_is_done()))

    def folder_is_done(self) -> bool:
        """The same of the patch folder alone, its pixels compared."""
        from preprocessing.png_folder import patch_folder_sha256

        folder = self.request.dump_dir
        return is_done(folder, **self.recorded_of_folder(), content_sha256=patch_folder_sha256(folder))

    def refuse_foreign_files(self) -> None:
        """What lies where the files go must be of an earlier extraction."""
        if self.request.out_dir is not None and not any(file.exists() for file in self.files):
            require_shared_folder("--out-dir", self.request.out_dir)
        kind = extracted(self.picture, self.are_of_spots)
        for file in self.files:
            require_outputs({"--out-file" if file == self.request.out_file else "--out-dir": {file: kind}}, {})

    def refuse_stale_hdf5(self) -> None:
        """With --no-h5 an older HDF5 of the same spots would stay beside the new expression and be taken for its patches."""
        older = self.request.hdf5_beside(self.files)
        if older is not None and older.exists() and not is_done(older, **self.recorded()):
            raise InputError(older, "--no-h5", "no HDF5 file, or one of these settings", "patches of other settings or inputs",
                             "Remove it, or name another folder")

    @contextmanager
    def finishing(self, facts: PatchFacts, folder: PatchFolderTarget | None) -> Iterator[dict[str, Path]]:
        """Yield where to write each file, by its suffix (`IMAGES`: the patches). Only when all are written do they and the patch
        folder get their names, so that a full disk leaves the old ones together."""
        with finished_together(self.files) as staged:
            yield {IMAGES if file == self.files[0] and self.request.writes_hdf5 else file.suffix: path for file, path in staged.items()}
            if folder is not None:
                self._finish_folder(facts, folder)
        known = facts.of_manifest() | {"bad_share": facts.bad_share} | ({} if facts.dropped is None else {"dropped": dict(facts.dropped)})
        with ThreadPoolExecutor(2) as pool:                      # hashes of gigabytes
            list(pool.map(lambda file: write_done(file, **self.recorded(), **known), self.files))

    def _finish_folder(self, facts: PatchFacts, folder: PatchFolderTarget) -> None:
        from preprocessing.png_folder import finish_patch_folder, patch_folder_sha256

        known = facts.of_manifest()
        record = folder.record | {key: value for key, value in known.items() if key == "barcode_sha256"}

        def described(working: Path) -> None:
            write_done(folder.folder, **self.recorded_of_folder(), **known, stain=record, content_sha256=patch_folder_sha256(working))

        finish_patch_folder(folder.working, folder.folder, count=len(facts.centre_xy_px), digits=folder.digits, barcodes=facts.barcodes,
                            sample_id=facts.name, xy=facts.centre_xy_px, stain=record, record=described)

    def write_images(self, staged: Mapping[str, Path], facts: PatchFacts, made: MadeBlocks) -> None:
        """The HDF5 file, where one is asked for."""
        from preprocessing.patch_file import write_compressed_patches

        if IMAGES in staged:
            write_compressed_patches(staged[IMAGES], made.images(), count=len(facts.top_left), patch_px=self.config.patch_px,
                                     coords=facts.top_left, barcodes=facts.barcodes, patch_size_src=self.config.patch_um / facts.mpp,
                                     pixel_size=facts.mpp, name=facts.name)

    def write_page(self, staged: Mapping[str, Path], facts: PatchFacts, made: MadeBlocks, slide: Slide, lines: tuple[str, ...],
                   **details) -> None:
        """The quality page and its picture; `details` are further fields of `PatchQuality`."""
        from preprocessing.quality_page import MAP_PX, PatchQuality, write_quality_page

        settings = {key: value for key, value in self.config.settings(of_spots=self.are_of_spots).items() if value is not None}
        write_quality_page(staged[".png"], staged[".html"], PatchQuality(
            title=facts.name, lines=lines, thumbnail=slide.thumbnail(MAP_PX, may_be_blank=True), slide_px=(slide.width_px, slide.height_px),
            side_px=self.config.patch_um / facts.mpp, centre_xy_px=facts.centre_xy_px, patches=made.shown,
            settings={"mpp": round(facts.mpp, 5), **settings}, files=self.files, **{"dropped_xy_px": {}, **details}))
