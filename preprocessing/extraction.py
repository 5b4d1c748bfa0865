"""What an extraction is told, what it reads, and which spots get a patch. The command is `extract_patches.py`."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.done_manifests import fingerprints
from preprocessing.errors import InputError, OptionError
from preprocessing.mpp import require_mpp

if TYPE_CHECKING:
    from preprocessing.sample import Sample, Spots
    from preprocessing.slide import Slide

OFF_EDGE, THIN_TISSUE = "reach over the slide's edge", "have less tissue than --min-tissue"
BAD_TILES = "lie on tiles that cannot be decoded"
OF_BINS_AND_SPOTS, OF_RANDOM = {"stride_bins": "--stride", "edge": "--edge"}, {"n_patches": "--n-pts"}
OF_FOLDER = {"normalize": "--normalize", "stain_file": "--stain-file", "on_stain_failure": "--on-stain-failure"}
NEEDS = ((OF_BINS_AND_SPOTS, ("space_ranger_dir", "gex_file")), (OF_RANDOM, ("tissue_seg_file",)),         # option -> any of these
         ({"is_hd": "--is-hd", "below_v2": "--below-v2"}, ("space_ranger_dir",)), ({"spot_um": "--spot-um"}, ("gex_file",)),
         (OF_FOLDER, ("dump_dir",)))
CLAIMS = ("is_hd", "below_v2")          # are checked, and change nothing
MOST_GB = 1e6                           # of --memory-gb


@dataclass(frozen=True)
class ExtractConfig:
    patch_um: float = 55.0          # side of the square of tissue, µm
    patch_px: int = 128             # side of the saved patch, px
    stride_bins: int = 5            # Visium HD: step between pseudo-spots, bins
    edge: str = "drop"              # patches over the slide's edge: drop them, or pad them with white
    min_tissue: float = 0.0         # least share of a patch that is tissue; 0 = not asked
    mpp: float | None = None        # µm per level-0 px; None: found out
    sample_id: str | None = None    # None: from the folder's name
    use_wsi_res: bool = False       # take the mpp of the slide's metadata
    is_hd: bool | None = None       # what the user says of the folder; None: found out
    below_v2: bool | None = None
    spot_um: float | None = None    # any .h5ad: diameter of a spot, µm
    n_patches: int = 50_000         # random patches
    seed: int = 0                   # of the random places

    def __post_init__(self):
        from preprocessing.patches import MAX_SIDE_PX

        for option, value in (("--patch-sz-px", self.patch_px), ("--stride", self.stride_bins), ("--n-pts", self.n_patches)):
            if value < 1:
                raise OptionError(option, "at least 1", str(value))
        if self.patch_px > MAX_SIDE_PX:
            raise OptionError("--patch-sz-px", f"at most {MAX_SIDE_PX}, the largest that is read", str(self.patch_px))
        if self.mpp is not None and self.use_wsi_res:
            raise OptionError("--mpp", "either a number of µm per pixel or --use-wsi-res", "both")
        if not (np.isfinite(self.patch_um) and self.patch_um > 0):
            raise OptionError("--patch-sz-um", "a positive number of µm", f"{self.patch_um:g}")
        if self.mpp is not None:
            require_mpp(self.mpp)
        if not 0 <= self.min_tissue <= 1:
            raise OptionError("--min-tissue", "a share between 0 and 1", f"{self.min_tissue:g}")
        if self.seed < 0:
            raise OptionError("--seed", "0 or more", str(self.seed))
        if self.sample_id is not None and (not self.sample_id or "/" in self.sample_id):
            raise OptionError("--sample-id", "a name without a slash", repr(self.sample_id))

    def settings(self, of_spots: bool) -> dict[str, object]:
        """What patches of spots, or random ones, depend on."""
        without = CLAIMS + (("n_patches", "seed") if of_spots else tuple(OF_BINS_AND_SPOTS))
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class Resources:
    """What a run may use. Results do not depend on it."""

    workers: int = 1
    memory_gb: float = 2.0   # for counts in flight; what exceeds it waits on disk. Strips of the slide and blocks come on top

    def __post_init__(self):
        if self.workers < 1:
            raise OptionError("--workers", "at least 1", str(self.workers))
        if not 0 < self.memory_gb <= MOST_GB:
            raise OptionError("--memory-gb", f"a number above 0, up to {MOST_GB:,.0f}", f"{self.memory_gb:g}")


@dataclass(frozen=True)
class Request:
    """What is read and where results go."""

    wsi_file: Path
    space_ranger_dir: Path | None = None
    gex_file: Path | None = None
    tissue_seg_file: str | None = None   # GeoJSON, or "auto"; asks for random patches
    out_file: Path | None = None         # HDF5 of random patches
    out_dir: Path | None = None          # everything else
    dump_dir: Path | None = None         # patch folder (PNG files), made in the same pass
    writes_hdf5: bool = True             # whether patches go into an HDF5 file
    normalize: bool = True               # of the patch folder: Macenko, or colours as they are
    stain_file: Path | None = None       # of the patch folder: stain vectors; None: estimated on the slide
    on_stain_failure: str = "error"      # of the patch folder: a slide without two stains: error, or skip and keep its colours
    given: frozenset[str] = frozenset()  # options that the user gave, by the name of their field: they must have an effect

    def __post_init__(self):
        if self.dump_dir is not None and self.dump_dir.is_symlink():       # the folder behind it is replaced, not the link
            object.__setattr__(self, "dump_dir", self.dump_dir.resolve())
        if self.space_ranger_dir and self.gex_file:
            raise OptionError("--gex-file", "either --space-ranger-dir or --gex-file", "both")
        if not (self.space_ranger_dir or self.gex_file or self.tissue_seg_file):
            raise OptionError("--space-ranger-dir", "a sample (--space-ranger-dir or --gex-file), or --tissue-seg-file for random patches",
                              "neither")
        if self.out_file and not self.tissue_seg_file:
            raise OptionError("--tissue-seg-file", "a GeoJSON file or `auto` for the random patches of --out-file", "nothing")
        if self.tissue_seg_file and not (self.sample_path or self.out_file or self.out_dir):
            raise OptionError("--out-file", "a file for the random patches (or --out-dir)", "neither")
        if not (self.writes_hdf5 or self.dump_dir):
            raise OptionError("--no-h5", "--dump-dir, so that patches go somewhere", "none")
        if self.dump_dir and self.sample_path and self.tissue_seg_file:
            raise OptionError("--dump-dir", "the patches of a sample or random ones in one run", "both")
        self._require_effect()
        if self.stain_file and not self.normalize:
            raise OptionError("--stain-file", "patches that are normalised (--normalize)", "--no-normalize")
        outlines = None if self.tissue_seg_file == "auto" else self.tissue_seg_file
        for path in (self.wsi_file, self.sample_path, outlines, self.stain_file):
            if path and not Path(path).exists():
                raise InputError(path, "path", "a GeoJSON file, or `auto`" if path == outlines else "a file or folder to read",
                                 "nothing there")
            if path and path != self.space_ranger_dir and not Path(path).is_file():
                raise InputError(path, "path", "a file", "a folder")
        self._require_other_files()

    def _require_other_files(self) -> None:
        """Refuse to write over what is read; links are followed."""
        read = {Path(path).resolve(): path for path in (*self.sample_inputs().values(), self.stain_file) if path}
        if self.tissue_seg_file and self.tissue_seg_file != "auto":
            read[Path(self.tissue_seg_file).resolve()] = self.tissue_seg_file
        for file in (*self.spot_files(), *self.random_files()):
            if file.resolve() in read:
                option = "--out-file" if file == self.out_file else "--out-dir"
                raise OptionError(option, "another place for what is written than for what is read", f"{file}, an input")
        written = [file.resolve() for file in (*self.spot_files(), *self.random_files())]
        twice = next((file for number, file in enumerate(written) if file in written[:number]), None)
        if twice is not None:
            raise OptionError("--out-file", "a file of its own for the random patches", f"{twice}, which the sample's files are written to")
        if self.dump_dir and (holds := [file for file in written if self.dump_dir.resolve() in (file, *file.parents)]):
            raise OptionError("--dump-dir", "a folder of its own: it is replaced", f"the place of {holds[0]}")
        if self.dump_dir and (inside := [path for real, path in read.items() if self.dump_dir.resolve() in (real, *real.parents)]):
            raise OptionError("--dump-dir", "a folder without an input in it: it is replaced", str(inside[0]))

    def _require_effect(self) -> None:
        """Refuse an option that does nothing without another one."""
        for fields, needed in NEEDS:
            options = [f"--{field.replace('_', '-')}" for field in needed]
            for field, option in fields.items():
                if field in self.given and not any(getattr(self, other) for other in needed):
                    raise OptionError(option, f"{' or '.join(options)} beside it", "none")

    def notices(self, sample: Sample | None) -> Iterator[str]:
        """Where files go that no option placed, and options that one command line for all platforms may carry but have no effect."""
        if self.spot_files() and self.out_dir is None:
            yield f"notice: files are written beside the input, into {self.folder}; --out-dir names another folder"
        if "memory_gb" in self.given and (sample is None or sample.bin_um is None):
            yield "notice: --memory-gb has no effect: only sums of bins wait for memory"
        if "stride_bins" in self.given and sample is not None and sample.bin_um is None:
            yield f"notice: --stride has no effect: {sample.platform} has spots, not bins"
        if "seed" in self.given and not self.tissue_seg_file:
            yield "notice: --seed has no effect: only random patches (--tissue-seg-file) are drawn"

    @property
    def sample_path(self) -> Path | None:
        return self.space_ranger_dir or self.gex_file

    @property
    def folder(self) -> Path:
        """Where files without a path of their own go."""
        return self.out_dir or self.space_ranger_dir or (self.gex_file or self.out_file).parent

    def spot_files(self) -> tuple[Path, ...]:
        """What is written for the spots of a sample, pixels first where they are kept; nothing without a sample."""
        names = ("imgs.h5",) * self.writes_hdf5 + ("gex.h5ad", "dropped_spots.tsv", "qc.png", "qc.html")
        return tuple(self.folder / name for name in names) if self.sample_path else ()

    def random_files(self) -> tuple[Path, ...]:
        """What is written for random patches; nothing where none are asked for."""
        if not self.tissue_seg_file:
            return ()
        patches = self.out_file or self.folder / "random_imgs.h5"
        page = (self.out_dir or patches.parent) / f"{patches.stem}_qc"
        outlines = (page.with_name(f"{patches.stem}_tissue.geojson"),) if self.tissue_seg_file == "auto" else ()
        return ((patches,) * self.writes_hdf5 + (page.with_name(f"{page.name}.png"), page.with_name(f"{page.name}.html")) + outlines)

    def hdf5_beside(self, files: tuple[Path, ...]) -> Path | None:
        """The HDF5 file that `files` would hold but for --no-h5."""
        if self.writes_hdf5 or not files:
            return None
        return self.folder / "imgs.h5" if files == self.spot_files() else self.out_file or self.folder / "random_imgs.h5"

    def written(self, files: tuple[Path, ...]) -> tuple[Path, ...]:
        """`files` and, where one is asked for, the patch folder."""
        return (*files, self.dump_dir) if self.dump_dir else files

    def folder_settings(self) -> dict[str, object]:
        """What the patch folder depends on beside the patches; empty where none is asked for."""
        if not self.dump_dir:
            return {}
        return {"normalize": self.normalize, "on_stain_failure": self.on_stain_failure}

    def folder_inputs(self) -> dict[str, Path]:
        """Files that the patch folder depends on beside those of the patches."""
        return {"stain_file": self.stain_file} if self.dump_dir and self.stain_file else {}

    @cached_property
    def seen(self) -> dict[str, dict[str, Mapping]]:
        """Fingerprints of the inputs - of `sample`, `tissue` and `folder` - when this is first asked: they may be replaced later."""
        outlines = {} if self.tissue_seg_file in (None, "auto") else {"tissue": Path(self.tissue_seg_file)}
        return {"sample": fingerprints(self.sample_inputs()), "tissue": fingerprints(outlines),
                "folder": fingerprints(self.folder_inputs())}

    def sample_inputs(self) -> dict[str, Path]:
        """The files, of the sample too where there is one, that results depend on."""
        if not self.sample_path:
            return {"slide": self.wsi_file}
        if self.gex_file:
            return {"slide": self.wsi_file, "gex": self.gex_file}
        from preprocessing.space_ranger_folder import find_folder

        return {"slide": self.wsi_file, **find_folder(self.space_ranger_dir).files()}


def read_any_sample(config: ExtractConfig, request: Request, slide: Slide) -> Sample:
    """The sample of a Space Ranger folder or an `.h5ad`."""
    if request.gex_file:
        from preprocessing.anndata_sample import read_anndata_sample

        return read_anndata_sample(request.gex_file, sample_id=config.sample_id, slide=slide, mpp=config.mpp, spot_um=config.spot_um,
                                   use_wsi_res=config.use_wsi_res)
    from preprocessing.space_ranger import read_sample

    return read_sample(request.space_ranger_dir, sample_id=config.sample_id, slide=slide, mpp=config.mpp, use_wsi_res=config.use_wsi_res,
                       is_hd=config.is_hd, below_v2=config.below_v2)


def choose_spots(config: ExtractConfig, slide: Slide, sample: Sample, candidates: Spots) -> tuple[Spots, np.ndarray, dict[str, np.ndarray]]:
    """Spots that get a patch, the top-left corner of each patch (P, 2) int64, and reason -> rows of `candidates` that get none."""
    from preprocessing.pseudo_spots import take_spots
    from preprocessing.tissue import segment_tissue
    from preprocessing.windows import windows_inside

    on_slide, top_left = windows_inside(slide, candidates.centre_xy_px, config.patch_um, sample.mpp, config.edge)
    enough = np.ones(len(candidates), dtype=bool)
    if config.min_tissue > 0:
        share = segment_tissue(slide).share(candidates.centre_xy_px, config.patch_um / sample.mpp)
        enough = share >= config.min_tissue
    lost = {OFF_EDGE: np.flatnonzero(~on_slide), THIN_TISSUE: np.flatnonzero(on_slide & ~enough)}
    rows = np.flatnonzero(on_slide & enough)
    kept = take_spots(candidates, rows, {reason: len(where) for reason, where in lost.items()})
    return kept, top_left[rows], {reason: where for reason, where in lost.items() if len(where)}


def kept_line(spots: Spots, unit: str) -> str:
    """`kept 9,412 of 9,650 spots; 238 reach over the slide's edge`."""
    lost = "".join(f"; {count:,} {reason}" for reason, count in spots.dropped.items())
    return f"kept {len(spots):,} of {len(spots) + sum(spots.dropped.values()):,} {unit}{lost}"
