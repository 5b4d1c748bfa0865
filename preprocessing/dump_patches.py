"""Turn `imgs.h5` into a patch folder of stain-normalised PNG files with `metadata.jsonl` and `stain.json`.

Row order is that of the `gex.h5ad` beside the `imgs.h5` where there is one (joined by barcode), else of the `imgs.h5`.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import numpy as np

from preprocessing.cores import usable_cores
from preprocessing.errors import Command, InputError, OptionError, first_few
from preprocessing.inputs import require_file
from preprocessing.made_ahead import made_ahead

SLIDE_SUFFIXES = (".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".vms", ".bif", ".btf", ".jpg", ".jpeg", ".png")
BLOCK_BYTES, MOST_PATCHES = 1 << 26, 1000     # of a block: what is in memory, and what a killed run may have to repeat


def dump_patches_to_folder_single(images_path: Path | str, wsi_path: Path | str | None, out_dir: Path | str, normalize: bool = True, *,
                                  stain_file: Path | str | None = None, on_stain_failure: str = "error", workers: int | None = None,
                                  progress: bool = False, warn: Callable[[str], object] | None = None) -> int:
    """Write every patch of `images_path` into the folder `out_dir`, unless it was finished from these inputs; returns how many.

    Stain vectors are estimated on the tissue of `wsi_path`, or read from `stain_file` (a `stain.json`). A slide without two
    stains is an InputError, or keeps its colours with `on_stain_failure="skip"`. The slide is not needed without `normalize`.
    A killed run goes on where it was when called again. `workers` None: as many as the process has cores. `warn` is told of a slide
    that is not the one the patches were cut from, by the expression's record; a converted copy of it is not either.
    """
    from preprocessing.done_manifests import fingerprints, is_done, strings_sha256, write_done
    from preprocessing.outputs import locked
    from preprocessing.parts import Parts
    from preprocessing.patch_file import read_patch_file
    from preprocessing.png_folder import finish_patch_folder, name_digits, patch_folder_sha256, refuse_foreign_content
    from preprocessing.stain import find_stain

    images_path, out_dir, gex_path = Path(images_path), Path(out_dir), Path(images_path).parent / "gex.h5ad"
    out_dir = out_dir.resolve() if out_dir.is_symlink() else out_dir      # the folder behind it is replaced, not the link
    named = {"images": images_path, "wsi": wsi_path, "gex": gex_path if gex_path.is_file() else None, "stain_file": stain_file}
    if stain_file is not None:
        require_file(stain_file, "a stain.json")
    if stain_file is not None and not normalize:
        raise OptionError("--stain-file", "patches that are normalised (--normalize)", "--no-normalize")
    for path in filter(None, named.values()):
        if out_dir.resolve() in Path(path).resolve().parents:
            raise OptionError("--out-dir", "a folder without an input in it: it is replaced", str(path))
    inputs = fingerprints({name: path for name, path in named.items() if path is not None and Path(path).is_file()})
    config = {"normalize": normalize, "on_stain_failure": on_stain_failure}
    with read_patch_file(images_path) as file, locked(out_dir):
        if is_done(out_dir, config=config, inputs=inputs, content_sha256=patch_folder_sha256(out_dir)):
            Parts.clear(out_dir)                   # of a run that was killed when all was written
            return len(file)
        refuse_foreign_content(out_dir)
        order, centre_xy_px, sample_id, slide = _rows_of_expression(file, gex_path)
        if warn is not None and normalize and stain_file is None and slide and "wsi" in inputs and not _same_bytes(slide, inputs["wsi"]):
            warn(f"warning: {wsi_path}: not the slide that {gex_path} says its patches were cut from ({slide['name']}): its stain is "
                 "right only if this is a copy of that slide in another format")
        stain, record = find_stain(wsi_path, stain_file, on_stain_failure) if normalize else (None, {"normalised": False})
        if file.barcodes is not None:
            record = record | {"barcode_sha256": strings_sha256(file.barcodes)}
        length = _rows_a_block(file)
        parts = Parts(out_dir, config=config | {"stain": record, "rows_a_block": length}, inputs=inputs)
        working, digits = parts.folder / "patches", name_digits(len(order))
        _write_blocks(parts, working, digits, file, [order[i:i + length] for i in range(0, len(order), length)], stain,
                      workers or usable_cores(), progress)
        finish_patch_folder(
            working, out_dir, count=len(order), digits=digits, sample_id=sample_id, xy=centre_xy_px, stain=record,
            barcodes=[file.barcodes[i] for i in order] if file.barcodes else None,
            record=lambda complete: write_done(out_dir, config=config, inputs=inputs, rows=len(order), stain=record,
                                               content_sha256=patch_folder_sha256(complete)))
        parts.remove()
    return len(order)


dump_patches_to_folder = dump_patches_to_folder_single          # the original's README uses both names


def _same_bytes(one: Mapping, other: Mapping) -> bool:
    """Whether two fingerprints can be of one file, under any name."""
    return all(one[key] == other[key] for key in ("bytes", "sha256", "ends_sha256") if key in one and key in other)


def _rows_of_expression(file, gex_path: Path) -> tuple[np.ndarray, np.ndarray, str, Mapping]:
    """Order in which to write, centres in that order, the sample id - the expression's, else the patches' own, else the folder's - and
    the fingerprint of the slide that the patches were cut from, as far as it is recorded."""
    name = str(file.attrs.get("name", "") or "") or file.path.absolute().parent.name
    if file.barcodes is None or not gex_path.is_file():
        return np.arange(len(file)), file.centre_xy_px, name, {}
    from preprocessing.expression import read_expression, recorded_barcode_sha256, recorded_sample_id, spot_positions
    from preprocessing.patches import match_barcodes

    adata = read_expression(gex_path, backed=True)
    try:
        centre_xy_px = spot_positions(adata, gex_path)
        order = match_barcodes(file.barcodes, file.path, adata.obs_names.tolist(), gex_path, recorded_barcode_sha256(adata),
                               patch_xy_px=file.recorded_xy_px, centre_xy_px=centre_xy_px)
        return (order, file.centre_xy_px[order] if centre_xy_px is None else centre_xy_px, recorded_sample_id(adata) or name,
                adata.uns.get("morphology", {}).get("slide", {}))
    finally:
        adata.file.close()


def _rows_a_block(file) -> int:
    from preprocessing.patches import MAX_SIDE_PX

    _, height, width, _ = file.images(slice(0, 0)).shape
    if max(height, width) > MAX_SIDE_PX:
        raise InputError(file.path, "img", f"patches of at most {MAX_SIDE_PX} x {MAX_SIDE_PX} px", f"{width:,} x {height:,}")
    return min(max(BLOCK_BYTES // (3 * height * width), 1), MOST_PATCHES)


def _write_blocks(parts, working: Path, digits: int, file, blocks: list[np.ndarray], stain, workers: int, progress: bool) -> None:
    """Write the PNG files of those `blocks` (rows of `file`, in order of writing) that `parts` does not know as finished."""
    from preprocessing.outputs import require_free_space
    from preprocessing.png_folder import PNG_SHARE, whole_pngs, write_pngs
    from preprocessing.progress import ProgressBar

    working.mkdir(exist_ok=True)
    starts = np.cumsum([0, *map(len, blocks)])
    done = min(len(parts), int(np.searchsorted(starts, whole_pngs(working, digits), side="right")) - 1)
    _, height, width, _ = file.images(slice(0, 0)).shape
    require_free_space(working, int(PNG_SHARE * (starts[-1] - starts[done]) * 3 * height * width))
    with ProgressBar(total=starts[-1], initial=starts[done], desc="patches", unit="patch", disable=not progress) as bar:
        for number, patches in enumerate(made_ahead(_patches(file, blocks[done:], stain)), start=done):
            write_pngs(working, int(starts[number]), patches, digits, workers)
            parts.write(number, rows=blocks[number])
            bar.update(len(patches))


def _patches(file, blocks: list[np.ndarray], stain) -> Iterator[np.ndarray]:
    """uint8 (n, H, W, 3) of every block, in the stain of the target where `stain` is given."""
    from preprocessing.stain import normalise_stain

    for rows in blocks:
        in_a_row = (np.diff(rows) == 1).all()
        images = file.images(slice(rows[0], rows[-1] + 1)) if in_a_row else np.stack([file.images(int(row)) for row in rows])
        yield images if stain is None else normalise_stain(images, stain)


def find_sample(sample_id: str, root_dir: Path, wsi_dir: Path | None) -> tuple[Path, Path | None]:
    """`ROOT/ID/imgs.h5` (or HEST's `ROOT/ID.h5`) and the one slide named `WSI/ID.*` (or `WSI/ID/` with one slide in it)."""
    candidates = [root_dir / sample_id / "imgs.h5", root_dir / f"{sample_id}.h5"]
    images = next((path for path in candidates if path.is_file()), None)
    if images is None:
        raise InputError(root_dir, sample_id, " or ".join(str(path.relative_to(root_dir)) for path in candidates), "neither")
    if wsi_dir is None:
        return images, None
    named = [path for path in sorted(wsi_dir.glob("*")) if path.stem == sample_id] + sorted((wsi_dir / sample_id).glob("*"))
    slides = [path for path in named if path.is_file() and path.suffix.lower() in SLIDE_SUFFIXES]
    if len(slides) != 1:
        found = first_few(slides) if slides else "none"
        raise InputError(wsi_dir, sample_id, f"one slide {sample_id}.* ({' '.join(SLIDE_SUFFIXES)})", found)
    return images, slides[0]


def _jobs(options: dict) -> list[tuple[Path, Path | None, Path]]:
    """(imgs.h5, slide, folder) of every sample that the options name."""
    by_ids = {"--ids": options["ids"], "--root-dir": options["root_dir"]}
    if options["images"] is not None:
        clash = [name for name, value in by_ids.items() if value is not None]
        if clash or options["wsi_dir"] is not None:
            raise OptionError("--images", "one file, or --ids with --root-dir", f"both: {', '.join(clash or ['--wsi-dir'])} as well")
        return [(options["images"], options["wsi"], options["out_dir"])]
    absent = [name for name, value in by_ids.items() if value is None]
    if absent or options["wsi"] is not None:
        raise OptionError("samples", "--images F.h5 --wsi F, or --ids A,B --root-dir D --wsi-dir D",
                          f"no {' and no '.join(absent)}" if absent else "--wsi beside --ids (the slides' folder is --wsi-dir)")
    ids = [part.strip() for part in options["ids"].split(",") if part.strip()]
    if not ids:
        raise OptionError("--ids", "at least one sample", "none")
    return [(*find_sample(sample_id, options["root_dir"], options["wsi_dir"]), options["out_dir"] / sample_id) for sample_id in ids]


def dump_all(**options) -> Iterator[str]:
    """Dump every sample the options name; yields a line a sample."""
    for images, wsi, out_dir in _jobs(options):
        count = dump_patches_to_folder_single(images, wsi, out_dir, options["normalize"], stain_file=options["stain_file"],
                                              on_stain_failure=options["on_stain_failure"], workers=options["workers"], progress=True,
                                              warn=click.echo)
        yield f"{count:,} patches stand in {out_dir}"


PATH = click.Path(path_type=Path)


@click.command(cls=Command)
@click.option("--images", type=PATH, help="One imgs.h5.")
@click.option("--wsi", type=PATH, help="Its slide; the stain is estimated on its tissue.")
@click.option("--ids", help="Samples, comma-separated: reads ROOT/ID/imgs.h5 (or ROOT/ID.h5) and WSI/ID.*, writes OUT/ID/.")
@click.option("--root-dir", type=PATH, help="Folder with one folder (or HEST .h5 file) a sample.")
@click.option("--wsi-dir", type=PATH, help="Folder of the slides: ID.svs, ID.tif, ..., or ID/ with one slide.")
@click.option("--out-dir", type=PATH, required=True, help="Patch folder to write (with --ids: parent of one folder a sample).")
@click.option("--normalize/--no-normalize", default=True, help="Macenko stain normalisation, or colours as they are.")
@click.option("--stain-file", type=PATH, help="stain.json of an earlier run: use its vectors instead of estimating.")
@click.option("--on-stain-failure", type=click.Choice(["error", "skip"]), default="error",
              help="A slide without two stains: stop, or keep its colours.")
@click.option("--workers", type=click.IntRange(min=1), default=usable_cores, show_default="the cores this process may use",
              help="Threads that encode PNG files.")
def main(**options):
    """Write the patches of imgs.h5 as a folder of stain-normalised PNG files with metadata.jsonl and stain.json.

    Example: python preprocessing/dump_patches.py --images S1/imgs.h5 --wsi S1/slide.tif --out-dir S1/patches
    """
    for line in dump_all(**options):
        click.echo(line)


if __name__ == "__main__":
    main()
