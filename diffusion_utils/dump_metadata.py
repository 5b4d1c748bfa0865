"""Give a foreign folder of patches its metadata.jsonl, so that later steps pair it by name and row, not by the order of a directory."""
from __future__ import annotations

import json
from pathlib import Path

import click

from diffusion_utils.options import option
from preprocessing.errors import Command, InputError
from preprocessing.inputs import read_text


def dump_metadata(image_dir: Path | str, gex: Path | str | None = None) -> Path:
    """Write `metadata.jsonl`; returns its path. With `gex` (an .h5ad) every line has its barcode, sample and position.

    File names are barcodes of `gex`, or carry the row numbers 0..N-1; anything else is refused, as is a folder that has another one.
    """
    import numpy as np

    from preprocessing.outputs import finished_file, locked
    from preprocessing.patches import METADATA, foreign_folder, pair, read_patch_folder

    image_dir = Path(image_dir)
    metadata = image_dir / METADATA
    folder = foreign_folder(image_dir) if metadata.is_file() else read_patch_folder(image_dir)
    if gex is None:
        paths = pair(folder, [str(row) for row in range(len(folder.paths))], image_dir)
        lines = [{"gex_emb": row} for row in range(len(paths))]
    else:
        from training.data import expression_only

        table = expression_only(gex)
        barcodes = [str(barcode).split("__", 1)[-1] for barcode in table.barcodes]
        paths, xy = pair(folder, barcodes, gex), table.centre_xy_px
        lines = [{"barcode": barcode, "sample_id": str(sample)} | ({"x": float(x), "y": float(y)} if np.isfinite([x, y]).all() else {})
                 | {"gex_emb": row} for row, (barcode, sample, (x, y)) in enumerate(zip(barcodes, table.sample_ids, xy, strict=True))]
    text = "".join(json.dumps({"file_name": path.name, **line}) + "\n" for path, line in zip(paths, lines, strict=True))
    if metadata.is_file():
        if read_text(metadata, "JSON lines") != text:
            raise InputError(metadata, "file", "none, or what would be written", "another one", "Remove it first if it is wrong")
        return metadata
    with locked(metadata), finished_file(metadata) as temporary:
        temporary.write_text(text)
    return metadata


@click.command(cls=Command)
@option("image-dir", type=click.Path(path_type=Path), required=True, help="Folder of images named by barcode or row number.")
@option("gex", type=click.Path(path_type=Path), help="Their expression (.h5ad): adds barcode, sample and position.")
def main(image_dir: Path, gex: Path | None):
    """Write metadata.jsonl into a folder of patches that was not made by this project.

    \b
    python -m diffusion_utils.dump_metadata --image-dir downloaded/patches --gex downloaded/gex_filt.h5ad
    """
    click.echo(f"wrote {dump_metadata(image_dir, gex)}")


if __name__ == "__main__":
    main()
