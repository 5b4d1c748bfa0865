"""Simulate a complete sample whose truth is known: Space Ranger folder, H&E slide, tissue outline, and the truth itself.

Writes into one folder: `outs/` (Space Ranger 1.x, 2.x or Visium HD), `slide.tif` (pyramidal, with mpp), `tissue.geojson`
(level-0 px), `truth/` (cells, genes, spots, stain vectors) and `sample.json`. The embedded default of demo, tests and
benchmarks; the same seed gives the same sample.
"""
from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from preprocessing.done_manifests import fingerprint, is_done, write_done
from preprocessing.errors import Command
from preprocessing.output_places import FolderKind, require_replaceable
from preprocessing.outputs import finished_folder, locked, require_free_space
from preprocessing.simulation.config import BIN_UM, PLATFORMS, SimulateConfig

if TYPE_CHECKING:
    from preprocessing.simulation.expression import Genes
    from preprocessing.simulation.pyramid import Painter
    from preprocessing.simulation.repeat import RepeatedTissue
    from preprocessing.simulation.slide import Stains
    from preprocessing.simulation.tissue import Cells, Tissue

KIND = FolderKind("a simulated sample", r"outs/|slide\.tif|tissue\.geojson|truth/|sample\.json", mark="sample.json")


@dataclass(frozen=True)
class SimulatedSample:
    """Where the parts of a simulated sample lie."""

    folder: Path
    sample_id: str
    mpp: float
    platform: str
    facts: dict = field(default_factory=dict)     # what `sample.json` says: spots, cells, ...
    was_kept: bool = False                        # it stood finished before

    @property
    def space_ranger_dir(self) -> Path:
        return self.folder / "outs"

    @property
    def slide(self) -> Path:
        return self.folder / "slide.tif"

    @property
    def tissue_geojson(self) -> Path:
        return self.folder / "tissue.geojson"

    @property
    def truth(self) -> Path:
        """`cells.parquet`, `genes.csv`, `spots.parquet`, `stain.json`."""
        return self.folder / "truth"


def simulate_sample(config: SimulateConfig, progress: bool = False) -> SimulatedSample:
    """Write the sample unless exactly this one stands finished; replaces only an older simulated sample."""
    folder = Path(config.out_dir)
    settings = {name: value for name, value in asdict(config).items() if name != "out_dir"}
    if _stands(folder, settings):
        return _kept(config)
    require_replaceable(folder, KIND)
    require_free_space(folder, _needed_bytes(config))
    with locked(folder):
        if _stands(folder, settings):              # another process has just made it
            return _kept(config)
        with finished_folder(folder, kind=KIND) as temporary:
            facts = _write_parts(config, temporary, settings, progress)
        write_done(folder, config=settings, inputs={}, **facts, content=_content(folder))
    return SimulatedSample(folder, config.sample_id, config.mpp, config.platform, facts)


def _stands(folder: Path, settings: dict) -> bool:
    """Whether exactly this sample stands finished."""
    return is_done(folder, config=settings, inputs={}, content=_content(folder))


def _kept(config: SimulateConfig) -> SimulatedSample:
    folder = Path(config.out_dir)
    facts = json.loads((folder / "sample.json").read_text())
    return SimulatedSample(folder, config.sample_id, config.mpp, config.platform, facts, was_kept=True)


def _content(folder: Path) -> dict[str, dict]:
    """Fingerprint of every file of the sample: tells a damaged one."""
    return {str(path.relative_to(folder)): fingerprint(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def _needed_bytes(config: SimulateConfig) -> int:
    """Pixels wait uncompressed at half their size, counts of Visium HD wait in random order; about three times what stays."""
    width, height = config.slide_um
    bins = config.width_um * config.height_um / BIN_UM**2 if config.is_hd else 0
    return int(3 * width * height / config.mpp**2 + 12 * config.mean_umis * bins)


def _write_parts(config: SimulateConfig, folder: Path, settings: dict, progress: bool) -> dict:
    from preprocessing.simulation.counting import write_expression
    from preprocessing.simulation.expression import gene_programmes
    from preprocessing.simulation.slide import slide_stains
    from preprocessing.simulation.space_ranger_files import HD_FOLDER

    stains = slide_stains(config.seed if config.stain_seed is None else config.stain_seed)
    tissue, cells, painter = _section(config, stains)
    genes = gene_programmes(config.genes, config.biology_seed)
    space_ranger = folder / "outs" / HD_FOLDER if config.is_hd else folder / "outs"
    (space_ranger / "spatial").mkdir(parents=True)
    (folder / "truth").mkdir()

    _write_slide(config, painter, folder, space_ranger / "spatial", progress)
    _write_tissue_outline(tissue, config.mpp, folder / "tissue.geojson")
    counted = write_expression(config, tissue, cells, genes, space_ranger, folder / "truth", progress)
    _write_truth(cells, genes, stains, config.mpp, folder / "truth")
    facts = {"simulated": True, "cells": len(cells), **counted}
    (folder / "sample.json").write_text(json.dumps({**facts, "settings": settings}, indent=2) + "\n")
    return facts


def _section(config: SimulateConfig, stains: Stains) -> tuple[Tissue | RepeatedTissue, Cells, Painter]:
    """The tissue, its cells and who draws them."""
    from preprocessing.simulation.outline import Outline
    from preprocessing.simulation.repeat import RepeatedPainter, RepeatedTissue, whole_tiles_um
    from preprocessing.simulation.slide import SlidePainter
    from preprocessing.simulation.tissue import Tissue

    outline = Outline(*config.slide_um, config.seed, config.rim_um, config.margin_um, is_torn=config.repeat_um > 0)
    if config.repeat_um:
        tissue = RepeatedTissue(outline, whole_tiles_um(config.repeat_um, config.mpp), config.region_um)
        return tissue, tissue.place_cells(), RepeatedPainter(tissue, stains, config.mpp)
    tissue = Tissue(*config.slide_um, config.seed, config.region_um, outline)
    cells = tissue.place_cells()
    return tissue, cells, SlidePainter(tissue, cells, stains, config.mpp)


def _write_slide(config: SimulateConfig, painter: Painter, folder: Path, spatial: Path, progress: bool) -> None:
    from preprocessing.progress import ProgressBar
    from preprocessing.simulation.pyramid import write_pyramid
    from preprocessing.simulation.space_ranger_files import HD_LIMIT, HIRES_LIMIT, write_images

    with ProgressBar(total=painter.height_px, desc="slide", unit="px row", disable=not progress) as bar:
        overview = write_pyramid(painter, folder / "slide.tif", overview_px=HD_LIMIT if config.is_hd else HIRES_LIMIT,
                                 jpeg_quality=config.jpeg_quality, rows_done=bar.update)
    write_images(spatial, overview, painter.width_px, painter.height_px, config.mpp, bin_um=BIN_UM if config.is_hd else None)


def _write_tissue_outline(tissue: Tissue | RepeatedTissue, mpp: float, path: Path) -> None:
    """GeoJSON of the outline in level-0 px, one feature a piece of tissue."""
    from functools import reduce

    import numpy as np
    from shapely.geometry import Polygon, mapping
    from skimage.measure import find_contours

    step_um = max(4.0, max(tissue.width_um, tissue.height_um) / 1000)
    y, x = np.arange(0, tissue.height_um, step_um), np.arange(0, tissue.width_um, step_um)
    depth = tissue.edge_depth(x[None, :], y[:, None])
    rings = [Polygon(ring[:, ::-1] * step_um / mpp).buffer(0) for ring in find_contours(depth, 0.0) if len(ring) > 3]
    outline = reduce(lambda one, other: one.symmetric_difference(other), rings)     # a ring inside a ring is a hole
    pieces = [piece for piece in getattr(outline, "geoms", [outline]) if piece.area > 0]
    features = [{"type": "Feature", "properties": {"tissue_id": k, "name": "tissue"}, "geometry": mapping(piece)}
                for k, piece in enumerate(pieces)]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}) + "\n")


def _write_truth(cells: Cells, genes: Genes, stains: Stains, mpp: float, truth: Path) -> None:
    """`cells.parquet`, `genes.csv`, `profiles.npz` and `stain.json`."""
    import numpy as np
    import pandas as pd

    from preprocessing.simulation.expression import COMPONENTS, MORPHOLOGY
    from preprocessing.simulation.tissue import CELL_NAMES

    pd.DataFrame({
        "x_px": cells.x_um / mpp, "y_px": cells.y_um / mpp, "cell_type": np.array(CELL_NAMES)[cells.cell_type],
        "has_nucleus": cells.darkness > 0, "half_major_um": cells.major_um, "half_minor_um": cells.minor_um, "angle_rad": cells.angle,
    }).to_parquet(truth / "cells.parquet", index=False)
    pd.DataFrame({"gene": genes.names, "gene_id": genes.ids, "programme": genes.programme,
                  "morphology": [MORPHOLOGY[name] for name in genes.programme]}).to_csv(truth / "genes.csv", index=False)
    np.savez(truth / "profiles.npz", profiles=genes.profiles, components=np.array(COMPONENTS), genes=genes.names)
    (truth / "stain.json").write_text(json.dumps(asdict(stains), indent=2) + "\n")


def describe(sample: SimulatedSample) -> str:
    """What was simulated and where it lies, for the last lines of the command."""
    facts, unit = sample.facts, "bins" if sample.platform == "visium-hd" else "spots"
    return (f"{sample.sample_id}: {sample.platform}, {sample.mpp:g} mpp, {facts['cells']:,} cells, {facts['in_tissue']:,} {unit} in tissue "
            f"({facts['zero_read']:,} without a read), {facts['umis']:,} UMIs\n"
            f"{'kept' if sample.was_kept else 'wrote'} {sample.space_ranger_dir}, {sample.slide}, {sample.tissue_geojson}, {sample.truth}")


@click.command(cls=Command)
@click.option("--out-dir", type=click.Path(path_type=Path), required=True, help="Folder of the sample; an older simulated one is replaced.")
@click.option("--platform", type=click.Choice(PLATFORMS), default="visium-v2", help="Which Space Ranger layout to write.")
@click.option("--sample-id", default="SIM1", help="Name of the sample.")
@click.option("--width-um", default=2000.0, help="Width of the array, µm: of the slide without its rim.")
@click.option("--height-um", default=2000.0, help="Height of the array, µm.")
@click.option("--mpp", default=0.5, help="µm per level-0 pixel.")
@click.option("--genes", default=500, help="Number of genes.")
@click.option("--seed", type=click.IntRange(max=2**32 - 1), default=0, help="Tissue, counts and slide effect of this sample.")
@click.option("--biology-seed", type=click.IntRange(max=2**32 - 1), default=0,
              help="Which genes carry which morphology; the same for all samples of a cohort.")
@click.option("--stain-seed", type=click.IntRange(max=2**32 - 1), help="The slide's stain vectors.  [default: as --seed]")
@click.option("--slide-effect", default=0.15, help="Deviation of every gene's log batch effect on this slide; 0 is none.")
@click.option("--umis", type=float, help="Mean UMIs of a spot or bin.  [default: 6000 a spot, 12 a bin]")
@click.option("--zero-read-fraction", default=0.004, help="Share of spots in tissue that caught nothing; at least two unless 0.")
@click.option("--clusters", default=6, help="Clusters in clusters.csv.")
@click.option("--region-um", default=280.0, help="Scale at which tubules, stroma and lymphoid tissue alternate, µm.")
@click.option("--jpeg-quality", default=90, help="Of the slide's tiles.")
@click.option("--margin-um", type=float, help="Mean width of the glass between the array's border and the tissue, µm.  "
                                              "[default: 8 % of the shorter side, 20 to 400]")
@click.option("--rim-um", default=0.0, help="Width of the glass about the array, µm: makes the slide larger.")
@click.option("--repeat-um", default=0.0, help="Repeat the tissue, mirrored, after this length, and tear it: gigapixels in minutes.")
def main(**options):
    """Simulate a complete sample in 10x's formats, with an H&E slide and its known truth.

    \b
    python -m preprocessing.simulate_sample --out-dir demo_run/sample --platform visium-hd --width-um 2000 --height-um 2000
    \b
    A full slide of 11.2 million bins and 2.1 gigapixels (memory below 3 GB):
    python -m preprocessing.simulate_sample --out-dir full --platform visium-hd --width-um 6700 --height-um 6700 --rim-um 3000
        --mpp 0.274 --genes 19000 --umis 30 --margin-um 100 --repeat-um 1500
    """
    click.echo(describe(simulate_sample(SimulateConfig(**options), progress=True)))


if __name__ == "__main__":
    main()
