"""Import a section of legacy Spatial Transcriptomics: the files of `st_sample.py` and the image their pixels refer to.

Writes `imgs.h5` (one patch a spot), `gex.h5ad` (raw counts, same rows) and `dropped_spots.tsv`.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from preprocessing.done_manifests import fingerprint, is_done, strings_sha256, write_done
from preprocessing.dropped_spots import write_dropped
from preprocessing.errors import Command, InputError, OptionError
from preprocessing.mpp import require_mpp
from preprocessing.older_outputs import IMPORTED
from preprocessing.output_places import require_outputs, require_shared_folder
from preprocessing.outputs import finished_together, locked

if TYPE_CHECKING:
    from preprocessing.sample import Sample, Spots
    from preprocessing.slide import Slide

BLOCK_SPOTS = 1024        # cut at a time


@dataclass(frozen=True)
class ImportConfig:
    sample_id: str
    mpp: float | None = None       # µm per pixel; None: from the fit of the positions
    patch_um: float = 100.0        # side of the square of tissue, µm
    patch_px: int = 128            # side of the saved patch, px

    def __post_init__(self):
        from preprocessing.patches import MAX_SIDE_PX

        if not self.sample_id or "/" in self.sample_id:
            raise OptionError("--sample-id", "a name without a slash", repr(self.sample_id))
        if self.mpp is not None:
            require_mpp(self.mpp)
        if not 0 < self.patch_um < float("inf"):
            raise OptionError("--patch-sz-um", "a positive number of µm", f"{self.patch_um:g}")
        if self.patch_px < 1:
            raise OptionError("--patch-sz-px", "at least 1 px", str(self.patch_px))
        if self.patch_px > MAX_SIDE_PX:
            raise OptionError("--patch-sz-px", f"at most {MAX_SIDE_PX}, the largest that is read", str(self.patch_px))


def import_section(config: ImportConfig, counts: Path, spots: Path, image: Path, out_dir: Path, clusters: Path | None = None) -> list[str]:
    """Write imgs.h5, gex.h5ad and dropped_spots.tsv into `out_dir`; returns what to say. Does nothing where all is done."""
    inputs = {"counts": counts, "spots": spots, "image": image, **({"clusters": clusters} if clusters else {})}
    for file in inputs.values():
        if not file.is_file():
            raise InputError(file, "file", "a file", "a folder" if file.is_dir() else "nothing at this path")
    outputs = [out_dir / name for name in ("imgs.h5", "gex.h5ad", "dropped_spots.tsv")]
    require_shared_folder("--out-dir", out_dir)
    require_outputs({"--out-dir": dict.fromkeys(outputs, IMPORTED)}, {f"--{name}": path for name, path in inputs.items()})
    with locked(outputs[0], covers=outputs[1:]):
        if all(is_done(file, config=asdict(config), inputs=inputs) for file in outputs):
            return [f"{config.sample_id}: already imported from these files with these settings; nothing to do", *map(str, outputs)]
        with finished_together(outputs) as staged:
            said, rows = _write_outputs(config, inputs, *staged.values())
        for file in outputs:
            write_done(file, config=asdict(config), inputs=inputs, rows=len(rows), barcode_sha256=strings_sha256(rows.barcodes))
    return [*said, *map(str, outputs)]


def _write_outputs(config: ImportConfig, inputs: Mapping[str, Path], patch_file: Path, gex_file: Path,
                   dropped_file: Path) -> tuple[list[str], Spots]:
    from preprocessing.expression import write_expression
    from preprocessing.patch_file import write_patch_file
    from preprocessing.pseudo_spots import as_spots, take_spots
    from preprocessing.slide import open_slide
    from preprocessing.spot_expression import spot_expression
    from preprocessing.st_sample import read_st_sample
    from preprocessing.windows import windows_inside

    with open_slide(inputs["image"]) as slide:
        sample = read_st_sample(inputs["counts"], inputs["spots"], slide, sample_id=config.sample_id,
                                clusters_file=inputs.get("clusters"), mpp=config.mpp)
        candidates = as_spots(sample, config.patch_um)
        kept, top_left = windows_inside(slide, candidates.centre_xy_px, config.patch_um, sample.mpp)
        if not kept.any():
            raise InputError(inputs["image"], "patches", "at least one patch wholly on the image", f"none of {len(kept):,}")
        dropped = {"not selected as tissue": sample.barcodes[~sample.in_tissue], "reach over the edge": candidates.barcodes[~kept]}
        rows = take_spots(candidates, kept, {reason: len(barcodes) for reason, barcodes in dropped.items()})
        write_patch_file(patch_file, _patches(slide, rows, sample.mpp, config.patch_px), count=len(rows), patch_px=config.patch_px,
                         coords=top_left[kept], barcodes=rows.barcodes, patch_size_src=config.patch_um / sample.mpp,
                         pixel_size=sample.mpp, name=config.sample_id)
    write_expression(gex_file, spot_expression(sample, rows, patch_px=config.patch_px, slide=fingerprint(inputs["image"]),
                                               settings=asdict(config)))
    write_dropped(dropped_file, dropped)
    return [sample.summary(), *sample.notices, quality_line(sample, rows)], rows


def _patches(slide: Slide, spots: Spots, mpp: float, patch_px: int) -> Iterator[np.ndarray]:
    from preprocessing.progress import ProgressBar
    from preprocessing.windows import cut_blocks

    blocks = [slice(start, min(start + BLOCK_SPOTS, len(spots))) for start in range(0, len(spots), BLOCK_SPOTS)]
    with ProgressBar(total=len(spots), desc="cutting", unit="patch") as bar:
        for cut in cut_blocks(slide, spots.centre_xy_px, spots.patch_um, mpp, patch_px, blocks):
            if cut.reasons:
                raise InputError(slide.path, "patches", "pixels under every one", cut.reasons[0])
            yield from cut.patches
            bar.update(len(cut.patches))


def quality_line(sample: Sample, spots: Spots) -> str:
    """What a person checks first: spots kept and lost, and how deeply they were sequenced."""
    from preprocessing.spot_sums import sum_spots

    counts = sum_spots(sample, spots)
    umis, genes = np.asarray(counts.sum(axis=1)).ravel(), counts.getnnz(axis=1)
    lost = "".join(f"; {count:,} {reason}" for reason, count in spots.dropped.items())
    return (f"kept {len(spots):,} of {len(sample.barcodes):,} spots{lost}; median {np.median(umis):,.0f} UMIs and "
            f"{np.median(genes):,.0f} genes a spot, {np.count_nonzero(umis == 0):,} without reads")


@click.command(cls=Command)
@click.option("--counts", type=click.Path(path_type=Path), required=True, help="Counts TSV (.gz too): rows XxY, columns gene symbols.")
@click.option("--spots", type=click.Path(path_type=Path), required=True, help="Positions TSV: x, y, pixel_x, pixel_y[, selected].")
@click.option("--image", type=click.Path(path_type=Path), required=True, help="The image that pixel_x and pixel_y refer to.")
@click.option("--out-dir", type=click.Path(path_type=Path), required=True, help="Folder for imgs.h5 and gex.h5ad.")
@click.option("--sample-id", required=True, help="Name of this section.")
@click.option("--clusters", type=click.Path(path_type=Path), default=None, help="Labels TSV (.gz too): x, y, label.")
@click.option("--mpp", type=float, default=None, help="µm per pixel; by default from the 200 µm pitch of the positions.")
@click.option("--patch-sz-um", "patch_um", default=100.0, help="Side of a patch, µm.")
@click.option("--patch-sz-px", "patch_px", default=128, help="Side of a patch, px.")
def main(counts, spots, image, out_dir, clusters, **settings):
    """Import a legacy Spatial Transcriptomics section: one patch and one row of counts a spot.

    Example: python preprocessing/import_st.py --counts C2/counts.tsv.gz --spots C2/spots.tsv --image C2/image.jpg
    --clusters C2/clusters.tsv.gz --sample-id C2 --out-dir runs/her2st/C2
    """
    for line in import_section(ImportConfig(**settings), counts, spots, image, out_dir, clusters):
        click.echo(line)


if __name__ == "__main__":
    main()
