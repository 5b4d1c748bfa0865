"""Extract patches: one per spot or pseudo-spot with its expression, or at random places in the tissue.

Reads a Space Ranger folder (or any `.h5ad`) and a slide. Writes `imgs.h5` and `gex.h5ad`, row i of one belonging to row i of the
other, `dropped_spots.tsv`, and a quality page `qc.html` with its picture `qc.png`; for random patches one HDF5 and its page.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from click.core import ParameterSource

from preprocessing.dropped_spots import write_dropped
from preprocessing.errors import Command, InputError, OptionError
from preprocessing.extraction import ExtractConfig, Request, choose_spots, kept_line, read_any_sample
from preprocessing.outputs import is_done, locked, strings_sha256, write_done

if TYPE_CHECKING:
    from preprocessing.sample import Sample
    from preprocessing.slide import Slide

NEARLY_BLACK, MOSTLY = 8, 0.5        # a patch with this share of pixels this dark was cut where nothing was scanned


def extract(config: ExtractConfig, request: Request, workers: int = 1, resume: bool = True, dry_run: bool = False) -> Iterator[str]:
    """Do what is asked; yields what there is to say, first what was understood, last the files written."""
    from preprocessing.slide import open_slide

    if workers < 1:
        raise OptionError("--workers", "at least 1", str(workers))
    wanted = [part for part in (request.spot_files(), request.random_files()) if part]
    with ExitStack() as stack:
        if not dry_run:
            for files in wanted:
                stack.enter_context(locked(files[0]))
        done = [files for files in wanted if resume and _all_done(files, config, request)]
        for files in done:
            yield f"{files[0]}: already extracted from these files with these settings"
        if len(done) == len(wanted):
            yield from (str(file) for files in done for file in files)
            return
        slide = stack.enter_context(open_slide(request.wsi_file))
        sample = read_any_sample(config, request, slide) if request.sample_path else None
        if sample is not None:
            yield sample.summary()
            yield from (*sample.notices, *request.notices(sample))
        if request.spot_files() and request.spot_files() not in done:
            yield from _extract_spots(config, request, slide, sample, workers, dry_run)
        if request.random_files() and request.random_files() not in done:
            yield from _extract_random(config, request, slide, sample, workers, dry_run)


def _recorded(config: ExtractConfig, request: Request, files: tuple[Path, ...]) -> dict[str, Mapping]:
    """`config` and `inputs` of a done-manifest: what these files depend on."""
    if files == request.spot_files():
        return {"config": asdict(replace(config, n_patches=1, seed=0)), "inputs": request.sample_inputs()}
    outlines = {} if request.tissue_seg_file == "auto" else {"tissue": Path(request.tissue_seg_file)}
    return {"config": {**asdict(config), "tissue": request.tissue_seg_file}, "inputs": {**request.sample_inputs(), **outlines}}


def _all_done(files: tuple[Path, ...], config: ExtractConfig, request: Request) -> bool:
    recorded = _recorded(config, request, files)
    return all(is_done(file, **recorded) for file in files)


# ---- a patch a spot -------------------------------------------------------------------------------------------------

def _extract_spots(config: ExtractConfig, request: Request, slide: Slide, sample: Sample, workers: int, dry_run: bool) -> Iterator[str]:
    from preprocessing.expression import check_counts, write_expression
    from preprocessing.patch_file import write_patch_file
    from preprocessing.pseudo_spots import as_spots, group_bins
    from preprocessing.spot_expression import spot_expression

    files = request.spot_files()
    candidates = group_bins(sample, config.patch_um, config.stride_bins) if sample.bin_um else as_spots(sample, config.patch_um)
    kept, top_left, lost = choose_spots(config, slide, sample, candidates)
    said = kept_line(kept, "pseudo-spots" if sample.bin_um else "spots")
    yield said
    if len(kept) == 0:
        raise InputError(request.sample_path, "patches", "at least one patch in tissue and on the slide", said)
    if dry_run:
        yield f"dry run, nothing written; would write {', '.join(map(str, files))}"
        return
    recorded = _recorded(config, request, files)
    expression = spot_expression(sample, kept, patch_px=config.patch_px, slide_path=request.wsi_file, settings=recorded["config"],
                                 stride_bins=config.stride_bins if sample.bin_um else None)
    check_counts(request.sample_path, expression.X)
    seen = SeenPatches(len(kept))
    write_patch_file(files[0], seen.pass_on(slide, kept.centre_xy_px, sample.mpp, config, workers), count=len(kept),
                     patch_px=config.patch_px, coords=top_left, barcodes=kept.barcodes, patch_size_src=config.patch_um / sample.mpp,
                     pixel_size=sample.mpp, name=sample.sample_id)
    write_expression(files[1], expression)
    write_dropped(files[2], {reason: candidates.barcodes[rows] for reason, rows in lost.items()})
    lines = (sample.summary(), *sample.notices, said, *seen.warnings())
    _write_page(files, config, slide, sample.sample_id, sample.mpp, kept.centre_xy_px, seen, lines,
                dropped_xy_px={reason: candidates.centre_xy_px[rows] for reason, rows in lost.items()},
                numbers={"kept": len(kept), **kept.dropped}, library_sizes=np.asarray(expression.X.sum(axis=1)).ravel(),
                n_genes=expression.X.getnnz(axis=1))
    for file in files:
        write_done(file, **recorded, rows=len(kept), barcode_sha256=strings_sha256(kept.barcodes))
    yield from (*seen.warnings(), *map(str, files))


# ---- random patches -------------------------------------------------------------------------------------------------

def _extract_random(config: ExtractConfig, request: Request, slide: Slide, sample: Sample | None, workers: int,
                    dry_run: bool) -> Iterator[str]:
    from preprocessing.mpp import decide_mpp
    from preprocessing.patch_file import write_patch_file
    from preprocessing.random_patches import sample_squares
    from preprocessing.tissue import read_tissue, segment_tissue, write_tissue
    from preprocessing.windows import windows_inside

    files = request.random_files()
    name = sample.sample_id if sample else config.sample_id or slide.path.stem
    mpp = sample.mpp if sample else decide_mpp(slide.path, override=config.mpp, slide_mpp=slide.declared_mpp, slide_path=slide.path,
                                               use_wsi_res=config.use_wsi_res).mpp
    auto = request.tissue_seg_file == "auto"
    mask = segment_tissue(slide) if auto or config.min_tissue > 0 else None
    tissue = mask.outline() if auto else read_tissue(request.tissue_seg_file, slide)
    side_px = config.patch_um / mpp
    accept = (lambda centres: mask.share(centres, side_px) >= config.min_tissue) if config.min_tissue > 0 else None
    said = f"{name}: {mpp:.4g} mpp, {tissue.area * mpp ** 2 / 1e6:,.2f} mm² of tissue in {len(tissue.geoms):,} parts"
    yield said
    centres = sample_squares(tissue, side_px, config.n_patches, config.seed, slide.path if auto else request.tissue_seg_file, accept)
    if dry_run:
        yield f"dry run, nothing written; would write {len(centres):,} patches to {', '.join(map(str, files))}"
        return
    seen = SeenPatches(len(centres))
    _, top_left = windows_inside(slide, centres, config.patch_um, mpp)
    write_patch_file(files[0], seen.pass_on(slide, centres, mpp, config, workers), count=len(centres), patch_px=config.patch_px,
                     coords=top_left, barcodes=None, patch_size_src=side_px, pixel_size=mpp, name=name)
    if auto:
        write_tissue(files[3], tissue)
    _write_page(files, config, slide, name, mpp, centres, seen, (said, *seen.warnings()), tissue=tissue, numbers={"kept": len(centres)})
    recorded = _recorded(config, request, files)
    for file in files:
        write_done(file, **recorded, rows=len(centres))
    yield from (*seen.warnings(), *map(str, files))


# ---- what both share ------------------------------------------------------------------------------------------------

class SeenPatches:
    """Remembers a few of the patches that pass by, for the quality page, and counts black ones."""

    def __init__(self, count: int):
        from preprocessing.quality_page import sheet_rows

        self.count, self.rows = count, set(sheet_rows(count).tolist())
        self.shown: list[np.ndarray] = []
        self.n_black = 0

    def pass_on(self, slide: Slide, centre_xy_px: np.ndarray, mpp: float, config: ExtractConfig, workers: int) -> Iterable[np.ndarray]:
        """Cut the patches, in order, under a progress bar."""
        from tqdm import tqdm

        from preprocessing.windows import cut_patches

        cut = cut_patches(slide, centre_xy_px, config.patch_um, mpp, config.patch_px, config.edge, workers)
        for row, patch in tqdm(cut, total=self.count, desc="cutting", unit="patch"):
            if row in self.rows:
                self.shown.append(patch)
            self.n_black += np.mean(patch[::4, ::4].max(axis=2) < NEARLY_BLACK) > MOSTLY
            yield patch

    def warnings(self) -> tuple[str, ...]:
        """A line where something is suspicious."""
        if not self.n_black:
            return ()
        return (f"warning: {self.n_black:,} of {self.count:,} patches are mostly black: was the slide scanned there?",)


def _write_page(files: tuple[Path, ...], config: ExtractConfig, slide: Slide, name: str, mpp: float, centres: np.ndarray,
                seen: SeenPatches, lines: tuple[str, ...], **details) -> None:
    """The quality page beside the patches; `details` are further fields of `PatchQuality`."""
    from preprocessing.quality_page import MAP_PX, PatchQuality, write_quality_page

    picture, page = (next(file for file in files if file.suffix == suffix) for suffix in (".png", ".html"))
    other = ("n_patches", "seed") if "library_sizes" in details else ("edge", "stride_bins")          # of the other kind of patches
    settings = {key: value for key, value in asdict(config).items() if value is not None and key not in other}
    write_quality_page(picture, page, PatchQuality(
        title=name, lines=lines, thumbnail=slide.thumbnail(MAP_PX), slide_px=(slide.width_px, slide.height_px),
        side_px=config.patch_um / mpp, centre_xy_px=centres, patches=np.stack(seen.shown), settings={"mpp": round(mpp, 5), **settings},
        files=files, **{"dropped_xy_px": {}, **details}))


@click.command(cls=Command)
@click.option("--space-ranger-dir", type=click.Path(path_type=Path), help="Sample folder, its outs/ or binned_outputs/square_002um.")
@click.option("--gex-file", type=click.Path(path_type=Path), help="Instead of a Space Ranger folder: any .h5ad with obsm['spatial'].")
@click.option("--wsi-file", type=click.Path(path_type=Path), required=True, help="The slide, at full resolution.")
@click.option("--is-hd", is_flag=True, default=None, help="The folder is Visium HD (found out by itself).")
@click.option("--below-v2", is_flag=True, default=None, help="The folder is from Space Ranger 1.x (found out by itself).")
@click.option("--tissue-seg-file", help="Cut random patches inside these outlines: GeoJSON in level-0 px, or `auto`.")
@click.option("--out-file", type=click.Path(path_type=Path), help="HDF5 of the random patches.  [default: random_imgs.h5 in --out-dir]")
@click.option("--out-dir", type=click.Path(path_type=Path), help="Folder of everything else.  [default: the Space Ranger folder]")
@click.option("--n-pts", "n_patches", default=50_000, help="How many random patches.")
@click.option("--stride", "stride_bins", default=5, help="Visium HD: step between pseudo-spots, in bins.")
@click.option("--patch-sz-px", "patch_px", default=128, help="Side of a saved patch, px.")
@click.option("--patch-sz-um", "patch_um", default=55.0, help="Side of a patch, µm of tissue.")
@click.option("--use-wsi-res", is_flag=True, help="Take the mpp of the slide's metadata.")
@click.option("--mpp", type=float, help="µm per level-0 pixel; overrides every other source.")
@click.option("--spot-um", type=float, help="With --gex-file: diameter of a spot, µm.")
@click.option("--sample-id", help="Name of the sample.  [default: from the folder]")
@click.option("--edge", type=click.Choice(["drop", "pad"]), default="drop", help="Patches over the slide's edge: drop, or pad with white.")
@click.option("--min-tissue", default=0.0, help="Least share of a patch that is tissue, by Otsu's threshold on saturation.")
@click.option("--seed", default=0, help="Seed of the random places.")
@click.option("--workers", default=1, help="Threads that cut patches.")
@click.option("--resume/--no-resume", default=True, help="Leave finished files of the same inputs and settings as they are.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
def main(workers, resume, dry_run, **options):
    """Cut one patch per spot and write its expression beside it; or, with --tissue-seg-file, patches at random places.

    Example: python preprocessing/extract_patches.py --space-ranger-dir data/KIDNEY_HD --wsi-file data/KIDNEY_HD/slide.btf
    --out-dir runs/KIDNEY_HD
    """
    context = click.get_current_context()
    given = frozenset(name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    request = Request(given=given, **{name: options.pop(name) for name in Request.__dataclass_fields__ if name != "given"})
    for line in extract(ExtractConfig(**options), request, workers, resume, dry_run):
        click.echo(line)


if __name__ == "__main__":
    main()
