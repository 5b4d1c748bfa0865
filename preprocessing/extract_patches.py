"""Extract patches: one per spot or pseudo-spot with its expression, or at random places in the tissue.

Reads a Space Ranger folder (or any `.h5ad`) and a slide. Writes `imgs.h5` and `gex.h5ad`, row i of one belonging to row i of the
other, `dropped_spots.tsv` (spots whose patch is left out: at the slide's edge, thin in tissue, on damaged tiles; windows of bins that
are not all in tissue are no pseudo-spots and only counted), and a quality page `qc.html` with its picture `qc.png`; for random
patches one HDF5 and its page. A patch folder of PNG files can be made in the same pass.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from click.core import ParameterSource

from preprocessing.cores import usable_cores
from preprocessing.dropped_spots import write_dropped
from preprocessing.errors import Command, InputError, OptionError, first_few
from preprocessing.extraction import BAD_TILES, ExtractConfig, Request, Resources, choose_spots, kept_line, read_any_sample
from preprocessing.extraction_products import PatchFacts, Products
from preprocessing.outputs import locked

if TYPE_CHECKING:
    from preprocessing.block_extraction import MadeBlocks, PatchFolderTarget
    from preprocessing.sample import Sample
    from preprocessing.slide import Slide


def extract(config: ExtractConfig, request: Request, resources: Resources, max_bad: float = 0.01, resume: bool = True,
            dry_run: bool = False) -> Iterator[str]:
    """Do what is asked; yields what there is to say, first what was understood, last the files written."""
    from preprocessing.parts import Parts
    from preprocessing.slide import open_slide

    if not 0 <= max_bad <= 1:
        raise OptionError("--max-bad", "a share between 0 and 1", f"{max_bad:g}")
    of_spots, at_random = Products.of_spots(config, request), Products.of_random_patches(config, request)
    wanted = [products for products in (of_spots, at_random) if products]
    with ExitStack() as stack:
        for products in wanted:
            products.refuse_foreign_files()
        if not dry_run:
            _lock(stack, wanted, request.dump_dir)
        _check_inputs(config, request)
        _ = request.seen                           # fingerprints are taken before anything is read
        done = [products for products in wanted if resume and products.are_done(max_bad)]
        for products in done:
            yield f"{products.files[0]}: already extracted from these files with these settings"
            if not dry_run:
                Parts.clear(products.picture)      # of a run that was killed when all was written
        if len(done) == len(wanted):
            yield from (str(file) for products in done for file in products.files)
            return
        for products in wanted:
            products.refuse_stale_hdf5()
        slide = stack.enter_context(open_slide(request.wsi_file))
        sample = read_any_sample(config, request, slide) if request.sample_path else None
        if sample is not None:
            yield sample.summary()
            yield from sample.notices
        yield from request.notices(sample)
        how = {"resources": resources, "max_bad": max_bad, "resume": resume, "dry_run": dry_run}
        if of_spots and of_spots not in done:
            yield from _extract_spots(of_spots, slide, sample, **how)
        if at_random and at_random not in done:
            yield from _extract_random(at_random, slide, sample, **how)


def _lock(stack: ExitStack, wanted: Sequence[Products], dump_dir: Path | None) -> None:
    for products in wanted:
        first = products.files[0]
        for file in dict.fromkeys((products.picture, first)):
            stack.enter_context(locked(file, covers=products.files if file == first else ()))
    if dump_dir:
        stack.enter_context(locked(dump_dir))


def _check_inputs(config: ExtractConfig, request: Request) -> None:
    """Say now what would only be found out after a long step."""
    from preprocessing.png_folder import refuse_foreign_content
    from preprocessing.space_ranger_folder import find_folder
    from preprocessing.stain import read_stain_file

    if request.dump_dir:
        refuse_foreign_content(request.dump_dir)
    if request.space_ranger_dir is not None:
        find_folder(request.space_ranger_dir, config.is_hd, config.below_v2)
    if request.stain_file is not None:
        read_stain_file(request.stain_file)


# ---- a patch a spot -------------------------------------------------------------------------------------------------

def _extract_spots(products: Products, slide: Slide, sample: Sample, *, dry_run: bool, **how) -> Iterator[str]:
    from preprocessing.expression_file import write_expression_blocks
    from preprocessing.pseudo_spots import as_spots, group_bins, take_spots
    from preprocessing.spot_expression import about_spots

    config, request = products.config, products.request
    candidates = group_bins(sample, config.patch_um, config.stride_bins) if sample.bin_um else as_spots(sample, config.patch_um)
    chosen, top_left, lost = choose_spots(config, slide, sample, candidates)
    unit = "pseudo-spots" if sample.bin_um else "spots"
    yield kept_line(chosen, unit)
    if len(chosen) == 0:
        raise InputError(request.sample_path, "patches", "at least one in tissue and on the slide", "none")
    if dry_run:
        yield f"dry run, nothing written; would write {products.written}"
        return
    with _blocks(products, slide, sample.mpp, chosen.centre_xy_px, sample=sample, spots=chosen, **how) as (made, folder):
        good = np.flatnonzero(made.readable)
        kept = take_spots(chosen, good, {BAD_TILES: len(chosen) - len(good)} if made.reasons else {})
        warnings = _warnings(made, chosen.barcodes)
        yield from warnings
        about = about_spots(sample, kept, patch_px=config.patch_px, slide=request.seen["sample"]["slide"],
                            settings=products.recorded()["config"], stride_bins=config.stride_bins if sample.bin_um else None)
        without = {reason: (candidates.barcodes[rows], candidates.centre_xy_px[rows]) for reason, rows in lost.items()}
        if made.reasons:
            without[BAD_TILES] = (chosen.barcodes[~made.readable], chosen.centre_xy_px[~made.readable])
        facts = PatchFacts(sample.sample_id, sample.mpp, kept.centre_xy_px, top_left[good], kept.barcodes, made.bad_share, kept.dropped)
        with products.finishing(facts, folder) as staged, ThreadPoolExecutor(1) as beside:
            images = beside.submit(products.write_images, staged, facts, made)
            write_expression_blocks(staged[".h5ad"], about, made.counts)
            write_dropped(staged[".tsv"], {reason: names for reason, (names, _) in without.items()})
            products.write_page(staged, facts, made, slide, (sample.summary(), *sample.notices, kept_line(kept, unit), *warnings),
                                dropped_xy_px={reason: xy for reason, (_, xy) in without.items()},
                                numbers={"kept": len(kept), **kept.dropped}, library_sizes=made.column("library_sizes"),
                                n_genes=made.column("row_lengths"))
            images.result()
    yield from map(str, request.written(products.files))


# ---- random patches -------------------------------------------------------------------------------------------------

def _extract_random(products: Products, slide: Slide, sample: Sample | None, *, dry_run: bool, **how) -> Iterator[str]:
    from preprocessing.mpp import decide_mpp
    from preprocessing.random_patches import sample_squares
    from preprocessing.tissue import read_tissue, segment_tissue, write_tissue
    from preprocessing.windows import windows_inside

    config, request = products.config, products.request
    name = sample.sample_id if sample else config.sample_id or slide.path.stem
    mpp = sample.mpp if sample else decide_mpp(slide.path, override=config.mpp, slide_mpp=slide.declared_mpp, slide_path=slide.path,
                                               use_wsi_res=config.use_wsi_res).mpp
    auto = request.tissue_seg_file == "auto"
    mask = segment_tissue(slide) if auto or config.min_tissue > 0 else None
    tissue = mask.outline() if auto else read_tissue(request.tissue_seg_file, slide)
    side_px = config.patch_um / mpp
    accept = (lambda centres: mask.share(centres, side_px) >= config.min_tissue) if config.min_tissue > 0 else None
    n_parts = len(tissue.geoms)
    said = f"{name}: {mpp:.4g} mpp, {tissue.area * mpp ** 2 / 1e6:,.2f} mm² of tissue in {n_parts:,} part{'s' * (n_parts != 1)}"
    yield said
    centres = sample_squares(tissue, side_px, config.n_patches, config.seed, slide.path if auto else request.tissue_seg_file, accept)
    if dry_run:
        yield f"dry run, nothing written; would write {len(centres):,} patches to {products.written}"
        return
    _, top_left = windows_inside(slide, centres, config.patch_um, mpp)
    with _blocks(products, slide, mpp, centres, **how) as (made, folder):
        warnings = _warnings(made)
        yield from warnings
        good = made.readable
        facts = PatchFacts(name, mpp, centres[good], top_left[good], None, made.bad_share)
        with products.finishing(facts, folder) as staged:
            products.write_images(staged, facts, made)
            if auto:
                write_tissue(staged[".geojson"], tissue)
            products.write_page(staged, facts, made, slide, (said, *warnings), tissue=tissue,
                                numbers={"kept": int(good.sum()), **({BAD_TILES: len(made.reasons)} if made.reasons else {})})
    yield from map(str, request.written(products.files))


# ---- what both share ------------------------------------------------------------------------------------------------

@contextmanager
def _blocks(products: Products, slide: Slide, mpp: float, centre_xy_px: np.ndarray, *, resources: Resources, max_bad: float,
            resume: bool, **expression) -> Iterator[tuple[MadeBlocks, PatchFolderTarget | None]]:
    """Make the blocks behind the files that are missing; when the caller has written what it wants of them, they are thrown away."""
    from preprocessing.block_extraction import MadeBlocks, PatchJob, block_length, make_blocks
    from preprocessing.parts import Parts
    from preprocessing.quality_page import sheet_rows

    config, request, recorded = products.config, products.request, products.recorded_of_folder()
    kinds = {"images": request.writes_hdf5, "folder": str(request.dump_dir), "block_length": block_length(config.patch_px)}
    parts = Parts(products.picture, config=recorded["config"] | kinds, inputs=recorded["inputs"], resume=resume, beside=_pngs_of(request))
    folder = None
    if request.dump_dir and not (resume and products.folder_is_done()):
        folder = _folder_target(request, slide, parts.beside, len(centre_xy_px))
    make_blocks(PatchJob(
        slide=slide, centre_xy_px=centre_xy_px, patch_um=config.patch_um, mpp=mpp, patch_px=config.patch_px, edge=config.edge,
        shown_rows=sheet_rows(len(centre_xy_px)), keeps_images=request.writes_hdf5, folder=folder, max_bad=max_bad, **expression),
        parts, resources)
    made = MadeBlocks(parts)
    if not made.readable.any():
        raise InputError(slide.path, "tiles", "at least one patch that can be decoded", f"none; {first_few(made.reasons, 3)}")
    yield made, folder
    parts.remove()


def _pngs_of(request: Request) -> Path | None:
    """Where the patch folder's files wait for their folder's name: on its disk."""
    return request.dump_dir and request.dump_dir.absolute().with_name(f".{request.dump_dir.absolute().name}.pngs")


def _folder_target(request: Request, slide: Slide, working: Path, count: int) -> PatchFolderTarget:
    from preprocessing.block_extraction import PatchFolderTarget
    from preprocessing.png_folder import name_digits
    from preprocessing.stain import find_stain

    stain, record = None, {"normalised": False}
    if request.normalize:
        stain, record = find_stain(request.wsi_file, request.stain_file, request.on_stain_failure, slide=slide)
    return PatchFolderTarget(request.dump_dir.absolute(), working, name_digits(count), stain, record)


def _warnings(made: MadeBlocks, barcodes: Sequence[str] | None = None) -> tuple[str, ...]:
    """A line for each thing that is suspicious; `barcodes` of the candidates."""
    warnings = []
    if made.reasons:
        lost = list(made.reasons)[:5] if barcodes is None else [
            f"{barcode}: {reason}" for barcode, reason in zip(barcodes[~made.readable][:5], made.reasons[:5], strict=True)]
        more = ", ..." if len(made.reasons) > 5 else ""
        warnings.append(f"warning: {len(made.reasons):,} patches {BAD_TILES} and are left out ({'; '.join(lost)}{more})")
    if made.n_black:
        warnings.append(f"warning: {made.n_black:,} of {int(made.readable.sum()):,} patches are mostly black: was the slide scanned there?")
    return tuple(warnings)


@click.command(cls=Command)
@click.option("--space-ranger-dir", type=click.Path(path_type=Path), help="Sample folder, its outs/ or binned_outputs/square_002um.")
@click.option("--gex-file", type=click.Path(path_type=Path), help="Instead of a Space Ranger folder: any .h5ad with obsm['spatial'].")
@click.option("--wsi-file", type=click.Path(path_type=Path), required=True, help="The slide, at full resolution.")
@click.option("--is-hd", is_flag=True, default=None, help="The folder is Visium HD (found out by itself).")
@click.option("--below-v2", is_flag=True, default=None, help="The folder is from Space Ranger 1.x (found out by itself).")
@click.option("--tissue-seg-file", help="Cut random patches inside these outlines: GeoJSON in level-0 px, or `auto`.")
@click.option("--out-file", type=click.Path(path_type=Path), help="HDF5 of the random patches.  [default: random_imgs.h5 in --out-dir]")
@click.option("--out-dir", type=click.Path(path_type=Path),
              help="Folder of everything else.  [default: the Space Ranger folder, or that of --gex-file if this is not named gex.h5ad]")
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
@click.option("--seed", type=click.IntRange(max=2**63 - 1), default=0, help="Seed of the random places.")
@click.option("--dump-dir", type=click.Path(path_type=Path), help="Write the patch folder (PNG files, metadata.jsonl) in the same pass.")
@click.option("--h5/--no-h5", "writes_hdf5", default=True, help="With --dump-dir: whether patches go into an HDF5 file as well.")
@click.option("--normalize/--no-normalize", default=True, help="Of --dump-dir: Macenko stain normalisation, or colours as they are.")
@click.option("--stain-file", type=click.Path(path_type=Path), help="Of --dump-dir: stain.json of an earlier run, instead of estimating.")
@click.option("--on-stain-failure", type=click.Choice(["error", "skip"]), default="error",
              help="Of --dump-dir: a slide without two stains: stop, or keep its colours.")
@click.option("--max-bad", default=0.01, help="Largest share of patches that may lie on tiles that cannot be decoded; they are left out.")
@click.option("--workers", type=click.IntRange(max=1024), default=usable_cores, show_default="all cores",
              help="Threads that cut, sum and compress.")
@click.option("--memory-gb", default=2.0, help="Memory for counts in flight; what exceeds it waits on disk.")
@click.option("--resume/--no-resume", default=True, help="Leave finished files of the same inputs and settings as they are.")
@click.option("--dry-run", is_flag=True, help="Say what would be done; write nothing.")
def main(workers, memory_gb, max_bad, resume, dry_run, **options):
    """Cut one patch per spot and write its expression beside it; or, with --tissue-seg-file, patches at random places.

    Example: python preprocessing/extract_patches.py --space-ranger-dir data/KIDNEY_HD --wsi-file data/KIDNEY_HD/slide.btf
    --out-dir runs/KIDNEY_HD
    """
    context = click.get_current_context()
    given = frozenset(name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE)
    request = Request(given=given, **{name: options.pop(name) for name in Request.__dataclass_fields__ if name != "given"})
    for line in extract(ExtractConfig(**options), request, Resources(workers, memory_gb), max_bad, resume, dry_run):
        click.echo(line)


if __name__ == "__main__":
    main()
