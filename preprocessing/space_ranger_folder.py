"""Find the files of a Space Ranger folder, whatever its version, without being told which it is.

The folder may be the sample's, its `outs/`, or a bin folder `binned_outputs/square_002um`. Files downloaded one by one carry
the data set's name in front (`X_filtered_feature_bc_matrix.h5`); that is accepted where it is unambiguous.
"""
from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.mtx_folder import matrix_files

POSITIONS = {"tissue_positions.parquet": "Visium HD", "tissue_positions.csv": "Visium (Space Ranger 2.x and later)",
             "tissue_positions_list.csv": "Visium (Space Ranger 1.x)"}
BIN_FOLDER = re.compile(r"square_(\d{3})um")
MATRICES = ("filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "raw_feature_bc_matrix.h5", "raw_feature_bc_matrix")
CLUSTERS = ("analysis/clustering/gene_expression_graphclust/clusters.csv", "analysis/clustering/graphclust/clusters.csv")
IMAGES = {"hires": ("tissue_hires_image.png", "tissue_hires_image.jpg"), "lowres": ("tissue_lowres_image.png", "tissue_lowres_image.jpg")}


@dataclass(frozen=True)
class SpaceRangerFolder:
    """The files of one sample. `clusters` belong to bins of `cluster_bin_um`, where that is not None."""

    folder: Path                                     # the one that holds counts and spatial/
    platform: str
    is_hd: bool
    positions: Path
    matrix: Path
    scalefactors: Path | None
    images: dict[str, Path] = field(default_factory=dict)
    clusters: Path | None = None
    notices: tuple[str, ...] = ()

    @property
    def default_sample_id(self) -> str:
        """The name of the sample folder: without `outs`, `binned_outputs` and `square_002um`."""
        names = self.folder.resolve().parts[1:]
        own = [name for name in names if name not in ("outs", "binned_outputs") and not BIN_FOLDER.fullmatch(name)]
        return own[-1] if own else "sample"

    def files(self) -> dict[str, Path]:
        """Every file that is read, by its part: of an MTX folder its members."""
        single = {"positions": self.positions, "scalefactors": self.scalefactors, "clusters": self.clusters,
                  **{f"{kind} image": path for kind, path in self.images.items()}}
        matrix = {f"matrix {path.name}": path for path in matrix_files(self.matrix)}
        return {**matrix, **{part: path for part, path in single.items() if path}}


def find_folder(space_ranger_dir: Path | str, is_hd: bool | None = None, below_v2: bool | None = None) -> SpaceRangerFolder:
    """Find the files; what the user claims (`--is-hd`, `--below-v2`) must not contradict the folder."""
    base = Path(space_ranger_dir)
    if not base.is_dir():
        raise InputError(base, "folder", "a Space Ranger folder", "a file" if base.exists() else "nothing at this path")
    notices: list[str] = []
    folder = _bin_folder(base, notices) or next((place for place in (base, base / "outs") if _positions(place)), None)
    if folder is None or (positions := _positions(folder)) is None:
        searched = folder or base
        raise InputError(searched, "positions", f"spatial/ with {' or '.join(POSITIONS)}, or binned_outputs/square_002um",
                         f"entries {first_few(sorted(entry.name for entry in searched.iterdir()))}")
    platform = next(name for suffix, name in POSITIONS.items() if positions.name.endswith(suffix))
    found_hd = platform == "Visium HD"
    _check_claims(positions, platform, is_hd, below_v2)
    matrix = next((path for name in MATRICES if (path := _find(folder, name, is_folder=not name.endswith(".h5")))), None)
    if matrix is None:
        raise InputError(folder, "counts", f"{MATRICES[0]} or the folder {MATRICES[1]}",
                         f"entries {first_few(sorted(entry.name for entry in folder.iterdir()))}")
    if "raw_feature_bc_matrix" in matrix.name:
        notices.append(f"{matrix}: no filtered matrix was found, so the raw one is read; in_tissue alone says what counts")
    spatial = positions.parent
    images = {kind: path for kind, names in IMAGES.items() if (path := next(filter(None, (_find(spatial, name) for name in names)), None))}
    return SpaceRangerFolder(
        folder=folder, platform=platform, is_hd=found_hd, positions=positions, matrix=matrix, images=images,
        scalefactors=_find(spatial, "scalefactors_json.json"), clusters=_clusters(folder, found_hd), notices=tuple(notices))


def _bin_folder(base: Path, notices: list[str]) -> Path | None:
    """The folder of the smallest bins at or below `base`, or None where there is none."""
    if BIN_FOLDER.fullmatch(base.name):
        return base
    for place in (base, base / "outs"):
        groups = [place, place / "binned_outputs", *sorted(place.glob("*_binned_outputs"))]
        bins = sorted((entry for group in groups if group.is_dir() for entry in group.iterdir()
                       if entry.is_dir() and BIN_FOLDER.fullmatch(entry.name)), key=lambda entry: entry.name)
        if bins:
            if bins[0].name != "square_002um":
                notices.append(f"{bins[0].parent}: there is no square_002um, so {bins[0].name} is read")
            return bins[0]
    return None


def _positions(folder: Path) -> Path | None:
    spatial = folder / "spatial"
    return next((path for name in POSITIONS if spatial.is_dir() and (path := _find(spatial, name))), None)


def _find(folder: Path, name: str, is_folder: bool = False) -> Path | None:
    """`name` in `folder`, or the only `*_name` there."""
    exact = folder / name
    if exact.is_dir() if is_folder else exact.is_file():
        return exact
    prefixed = [path for path in sorted(folder.glob(f"*_{name}")) if path.is_dir() == is_folder]
    if len(prefixed) > 1:
        raise InputError(folder, name, "one such file", first_few([path.name for path in prefixed]))
    return prefixed[0] if prefixed else None


def _clusters(folder: Path, is_hd: bool) -> Path | None:
    """Space Ranger's graph-based clusters; Visium HD has them for larger bins only, beside the folder of the 2 µm bins."""
    folders = [folder, *(sorted(folder.parent.glob("square_*um")) if is_hd else [])]
    return next((place / name for place in folders for name in CLUSTERS if (place / name).is_file()), None)


def _check_claims(positions: Path, platform: str, is_hd: bool | None, below_v2: bool | None) -> None:
    """A flag that contradicts the folder is an error that says both."""
    found_hd, found_v1 = platform == "Visium HD", platform.endswith("1.x)")
    if is_hd is not None and is_hd != found_hd:
        raise OptionError("--is-hd" if is_hd else "--is-hd (off)", "a Visium HD folder" if is_hd else "a Visium folder, not Visium HD",
                          f"{platform}: {positions}")
    if below_v2 is not None and below_v2 != found_v1:
        expected = "a folder of Space Ranger below 2.0 (tissue_positions_list.csv)" if below_v2 else "a folder of Space Ranger 2.0 or later"
        raise OptionError("--below-v2" if below_v2 else "--below-v2 (off)", expected, f"{platform}: {positions}")
