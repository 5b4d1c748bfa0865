"""Score faithfulness and memorisation of generated folders, for calculate_image_quality_metrics.py.

Reads the section's patches and expression, paired by barcode, and a generated folder whose samples.csv names barcode and seed.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from evaluation.faithfulness import score_all
from evaluation.faithfulness_page import faithfulness_parts, memorisation_parts
from evaluation.features import list_images, resize_by_area
from evaluation.memorisation import QUANTILE, Pixels, closest_pairs, find_memorised
from evaluation.sections import FeatureBank, Section, named_clusters, patch_places, read_generated
from evaluation.tissue_map import maps_side_by_side
from networks.clip import CLIP, clip_weights_sha256
from preprocessing.cores import usable_cores
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.expression import recorded_scale
from preprocessing.outputs import nan_to_none
from preprocessing.patches import read_patch
from training.data import ImageGeneDataset, expression_only
from training.sample_sheet import sample_files

PATCH_UM = 55.0            # side of a patch where the expression file does not say
MOST_PATCHES = 2000        # of one side in the search for copies: every patch is seen under eight flips and turns


@dataclass(frozen=True)
class ReportConfig:
    """What is asked beyond distances."""

    reference: tuple[Path, ...]
    generated: tuple[Path, ...]
    gex: Path | None = None                # expression of the reference's spots: faithfulness
    judge: Path | None = None              # CLIP weights, of other spots or another seed than the generator's
    null: Path | None = None               # folder of patches of the null prompt
    training: tuple[Path, ...] = ()        # patches the generator was trained on: memorisation
    patch_um: float | None = None          # side of a patch; None: as the .h5ad says
    num: int | None = None                 # patches a side in the search for copies
    batch_size: int = 64
    seed: int = 0
    judge_encoder_weights: Path | None = None

    def __post_init__(self):
        for option, value in (("--judge", self.judge), ("--null-img-path", self.null), ("--patch-um", self.patch_um)):
            if value is not None and self.gex is None:
                raise OptionError(option, "--gex beside it, the expression that patches are held against", "none")
        if self.judge_encoder_weights is not None and self.judge is None:
            raise OptionError("--judge-encoder-weights", "--judge beside it, whose image tower they are", "none")
        known = {folder.resolve() for folder in self.reference}
        both = [str(folder) for folder in self.training if folder.resolve() in known]
        if both:
            raise OptionError("--train-img-path", "other folders than --ref-img-path: what is near by chance, held-out patches tell",
                              ", ".join(both))
        if self.gex is not None and (len(self.reference) > 1 or len(self.generated) > 1):
            raise OptionError("--gex", "one folder of real and one of generated patches, of one section",
                              f"{len(self.reference)} and {len(self.generated)}")
        if self.patch_um is not None and not self.patch_um > 0:
            raise OptionError("--patch-um", "more than 0", str(self.patch_um))


@dataclass(frozen=True)
class Extra:
    """What joins the report."""

    numbers: dict[str, object]
    parts: list[str]           # of the page
    lines: list[str]           # to say at the end


def require_inputs(config: ReportConfig) -> None:
    """Look at all that is asked for before long work starts: files, pairs of patches and spots. Opens no image."""
    if config.judge is not None:
        CLIP.from_pretrained(config.judge, image_encoder=False)
    if config.gex is not None:
        (files,) = sample_files(config.reference[0], config.gex)
        data = ImageGeneDataset([files])
        patch_places(config.generated[0], files.sample_id, spot_barcodes(data.barcodes, files.sample_id))
    for folder in (*([config.null] if config.null is not None else []), *config.training):
        list_images(folder)


def spot_barcodes(keys: Sequence[str], sample_id: str) -> list[str]:
    """`sample_id__barcode` -> barcode."""
    return [key.removeprefix(f"{sample_id}__") for key in keys]


def score_extra(config: ReportConfig, encoders: Mapping[str, nn.Module], device: str, progress: bool = True) -> Extra:
    """Faithfulness if there is expression, memorisation if there are training patches. The first encoder reads expression off patches."""
    found = Extra({}, [], [])
    if config.gex is not None:
        _faithfulness(config, next(iter(encoders.values())), device, progress, found)
    if config.training:
        _memorisation(config, encoders, device, progress, found)
    return found


def _faithfulness(config: ReportConfig, encoder: nn.Module, device: str, progress: bool, found: Extra) -> None:
    judge = CLIP.from_pretrained(config.judge, image_encoder_weights=config.judge_encoder_weights).to(device) if config.judge else None
    section, patch_um = load_section(config, judge, progress)
    made = read_generated(config.generated[0], section.sample_id, section.barcodes)
    null = None if config.null is None else np.concatenate(
        [resize_by_area(read_patch(path)[None], made.px) for path in list_images(config.null).paths])
    bank = FeatureBank(config.batch_size, device, progress)
    scores = score_all(section, made, encoder, bank, judge=judge, um_per_px=(config.patch_um or patch_um) / made.px, null=null,
                       workers=usable_cores(), seed=config.seed)
    scores["judge_sha256"] = clip_weights_sha256(config.judge) if config.judge else None
    real, first = resize_by_area(section.images[made.rows], made.px), made.images[:, 0]
    xy = None if section.centre_xy_px is None else section.centre_xy_px[made.rows]
    tissue = None if xy is None or not np.isfinite(xy).all() else maps_side_by_side(real, first, xy)
    found.numbers["faithfulness"] = nan_to_none(scores)
    found.parts.extend(faithfulness_parts(scores, real, first, tissue))
    for name in ("retrieval", "readout", "clusters", "nuclei", "spatial"):
        if name in scores:
            number = scores[name]
            found.lines.append(f"{name}: generated {number['generated']['score']:.3f}, shuffled {number['shuffled']['score']:.3f}, real "
                               f"{number['real']['score']:.3f}")


def load_section(config: ReportConfig, judge: CLIP | None, progress: bool) -> tuple[Section, float]:
    """The reference as a section, and the side of its patches, µm."""
    (files,) = sample_files(config.reference[0], config.gex)
    data = ImageGeneDataset([files])
    judged = data.expression if judge is None else \
        expression_only([files], target_sum=judge.target_sum, vocabulary=judge.gene_names).expression
    images = data.load_images(progress=progress).permute(0, 2, 3, 1).numpy()
    clusters = named_clusters(data.obs)
    barcodes = spot_barcodes(data.barcodes, files.sample_id)
    return Section(files.sample_id, barcodes, images, data.expression, judged, clusters, data.centre_xy_px), \
        recorded_scale(config.gex).get("patch_um", PATCH_UM)


def _memorisation(config: ReportConfig, encoders: Mapping[str, nn.Module], device: str, progress: bool, found: Extra) -> None:
    rng = np.random.default_rng(config.seed)
    generated, held_out = (some_images(folders, rng, min(config.num or MOST_PATCHES, MOST_PATCHES))
                           for folders in (config.generated, config.reference))
    training = [path for folder in config.training for path in list_images(folder).paths]
    require_held_out(held_out, training)
    px = min(read_patch(paths[0]).shape[0] for paths in (generated, held_out, training))
    if len(encoders) == 1:
        encoders = {**encoders, Pixels.name: Pixels()}
    memorised = find_memorised(generated, held_out, training, encoders, batch_size=config.batch_size, device=device, progress=progress,
                               match_px=px)
    summary = memorised.summary(config.seed)
    found.numbers["memorisation"] = summary
    found.parts.extend(memorisation_parts(summary, closest_pairs(memorised, generated, training)))
    found.lines.append(f"memorisation: {summary['copies']:,} of {summary['n_generated']:,} generated patches are copies "
                       f"({summary['copies_among_held_out']:,} of {summary['n_held_out']:,} held-out ones)")


def require_held_out(held_out: Sequence[Path], training: Sequence[Path]) -> None:
    """Refuse held-out patches that are training patches, whatever their names: nothing would lie nearer, and every copy would pass."""
    known = {file_sha256(path) for path in training}
    shared = [path.name for path in held_out if file_sha256(path) in known]
    if len(shared) > QUANTILE * len(held_out):                   # blank patches may be equal by chance
        raise InputError(held_out[0].parent, "reference", "held-out patches, which the generator was not trained on",
                         f"the same files as in --train-img-path: {first_few(shared)}")


def some_images(folders: Sequence[Path], rng: np.random.Generator, count: int) -> list[Path]:
    """The images of the folders, or `count` of them drawn."""
    paths = [path for folder in folders for path in list_images(folder).paths]
    return paths if len(paths) <= count else [paths[i] for i in np.sort(rng.choice(len(paths), count, replace=False))]
