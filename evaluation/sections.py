"""Score held-out sections: retrieval, distances with their floor, faithfulness by a second CLIP, diversity.

Reads generated folders; everything else comes in as arrays. Retrieval sees patches at their own size. Distances, diversity
and the judge compare at the size of the generated patches: real ones are brought to it by area, so that neither side is sharper.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from torch import Tensor, nn

from evaluation.distances import distances_to_halves, frechet_distance, full_kernel_distance, half_size, mean_and_interval
from evaluation.diversity import mean_group_deviation, within_prompt_diversity
from evaluation.features import image_features, read_samples_csv, resize_by_area
from evaluation.linear_baseline import LinearBaseline
from evaluation.retrieval import both_ways, places, r10_difference, retrieval_metrics, summarise_places
from networks.clip import CLIP
from networks.sample_scaling import patches_for_mean
from preprocessing.errors import InputError, first_few
from preprocessing.patches import read_patch

N_SPLITS = 20
N_SHUFFLES = 5


@dataclass(frozen=True)
class Section:
    """One held-out section; row i of everything is one spot."""

    sample_id: str
    barcodes: list[str]              # N, as in the h5ad
    images: np.ndarray               # uint8 (N, H, W, 3) real patches at their own size
    expression: sp.csr_matrix        # (N, G) normalised as the CLIP wants it
    judge_expression: sp.csr_matrix  # (N, G) normalised as the judge wants it
    clusters: np.ndarray | None      # (N,) str, "" where a spot has none
    centre_xy_px: np.ndarray | None = None   # (N, 2) level-0 px


def named_clusters(obs: pd.DataFrame) -> np.ndarray | None:
    """(N,) str of obs['cluster'], "" where a spot has none; None without such a column."""
    if "cluster" not in obs:
        return None
    labels = obs["cluster"].astype(object)
    return np.where(labels.isna(), "", labels.astype(str)).astype(str)


@dataclass(frozen=True)
class Generated:
    """Patches of one generated folder, sorted into spots and seeds."""

    rows: np.ndarray       # (n,) rows of the section that were prompts
    seeds: list[str]       # k
    images: np.ndarray     # uint8 (n, k, px, px, 3)

    @property
    def px(self) -> int:
        return self.images.shape[2]

    @property
    def flat(self) -> np.ndarray:
        """uint8 (n * k, px, px, 3)."""
        return self.images.reshape(-1, *self.images.shape[2:])


def patch_places(folder: Path, sample_id: str, barcodes: Sequence[str]) -> dict[tuple[int, str], Path]:
    """Where the patch of every (row of `barcodes`, seed) lies, as a generated folder's `samples.csv` says: it must name barcode and seed,
    and every prompt needs the same seeds. Opens no image."""
    source = folder / "samples.csv"
    rows = read_samples_csv(folder)
    absent = [column for column in ("barcode", "seed") if column not in rows[0]]
    if absent:
        raise InputError(source, "columns", "file, barcode, seed", f"no {', '.join(absent)}")
    rows = [row for row in rows if row["barcode"]] or rows      # a null control is a picture of no spot
    without = [row["file"] for row in rows if not row["barcode"] or not row["seed"]]
    if without:
        raise InputError(source, "barcode and seed", "both in every row", f"none for {first_few(without)}")
    row_of = {barcode: i for i, barcode in enumerate(barcodes)}
    places_of: dict[tuple[int, str], Path] = {}
    foreign = []
    for row in rows:
        number = row_of.get(row["barcode"], row_of.get(row["barcode"].removeprefix(f"{sample_id}__")))
        if number is None:
            foreign.append(row["barcode"])
        elif (number, row["seed"]) in places_of:
            raise InputError(source, "barcode and seed", "one patch for each pair", f"two of {row['barcode']} and seed {row['seed']}")
        else:
            places_of[number, row["seed"]] = folder / row["file"]
    if foreign:
        raise InputError(source, "barcode", f"spots of {sample_id}", f"others: {first_few(list(dict.fromkeys(foreign)))}")
    seeds = _seeds_of(places_of)
    prompts = sorted({number for number, _ in places_of})
    gaps = [f"{barcodes[number]} seed {seed}" for number in prompts for seed in seeds if (number, seed) not in places_of]
    if gaps:
        raise InputError(source, "seeds", "the same for every prompt", f"none for {first_few(gaps)}")
    return places_of


def _seeds_of(places_of: Mapping[tuple[int, str], Path]) -> list[str]:
    return sorted({seed for _, seed in places_of}, key=lambda seed: (len(seed), seed))


def read_generated(folder: Path, sample_id: str, barcodes: Sequence[str]) -> Generated:
    """Read a generated folder: `patch_places`, and the patches there."""
    places_of = patch_places(folder, sample_id, barcodes)
    prompts, seeds = sorted({number for number, _ in places_of}), _seeds_of(places_of)
    images = [read_patch(places_of[number, seed]) for number in prompts for seed in seeds]
    if len({image.shape for image in images}) > 1 or images[0].shape[0] != images[0].shape[1]:
        raise InputError(folder, "size", "square patches of one size", first_few(sorted({f"{i.shape[1]} x {i.shape[0]}" for i in images})))
    return Generated(np.array(prompts), seeds, np.stack(images).reshape(len(prompts), len(seeds), *images[0].shape))


@dataclass
class FeatureBank:
    """Encodes a named set of images once for each encoder, whoever asks."""

    batch_size: int = 32
    device: str = "cpu"
    progress: bool = True
    known: dict[tuple, np.ndarray] = field(default_factory=dict)

    def features(self, name: str, images: np.ndarray, encoder: nn.Module) -> np.ndarray:
        """float32 (N, F)."""
        key = (name, encoder.source, getattr(encoder, "input_px", None))    # one weight file may be used at two sides
        if key not in self.known:
            self.known[key] = image_features(images, encoder, self.batch_size, self.device, self.progress)
        return self.known[key]

    def embeddings(self, name: str, images: np.ndarray, clip: CLIP, centre: Tensor | None = None) -> np.ndarray:
        """float32 (N, D), as `clip.encode_images` gives it; a tower that sees one view shares its features with the distances."""
        if clip.config.image_views == 1:
            features = torch.from_numpy(self.features(name, images, clip.image_encoder))
            with torch.inference_mode():
                return clip.project_image_features(features.to(next(clip.parameters()).device), centre).cpu().numpy()
        encoder = ImageEncoder(lambda batch: clip.encode_images(batch, centre))
        return image_features(images, encoder, self.batch_size, self.device, self.progress)

    def sample_centre(self, name: str, images: np.ndarray, clip: CLIP) -> Tensor | None:
        """(F,) mean features of a sample's patches, by which its own and generated ones are centred; None where the CLIP asks for none."""
        if not clip.centres_features:
            return None
        chosen = patches_for_mean(np.zeros(len(images), int), 0)
        if clip.config.image_views == 1:
            features = self.features(name, images, clip.image_encoder)[chosen]
        else:
            encoder = ImageEncoder(lambda batch: clip.view_features(batch).mean(1))
            features = image_features(images[chosen], encoder, self.batch_size, self.device, self.progress)
        return torch.from_numpy(features.mean(axis=0)).to(next(clip.parameters()).device)


class ImageEncoder(nn.Module):
    """A function of image batches as `image_features` takes it."""

    name = "clip"

    def __init__(self, encode: Callable[[Tensor], Tensor]):
        super().__init__()
        self.encode = encode

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(images)


def score_retrieval(section: Section, clip: CLIP, baseline: LinearBaseline, tower: nn.Module, bank: FeatureBank,
                    seed: int = 0) -> dict[str, object]:
    """The CLIP and the linear baseline on one section: `retrieval`, `baseline_linear`, and how far apart they are on these spots.

    `tower` is the encoder whose features the baseline was fitted to.
    """
    name = f"{section.sample_id}, real"
    genes = clip.embed_expression(section.expression).numpy()
    images = bank.embeddings(name, section.images, clip, bank.sample_centre(name, section.images, clip))
    predicted, projected = baseline.predict(section.expression), baseline.project(bank.features(name, section.images, tower))
    difference = {way: r10_difference(*pairs, seed=seed) for way, pairs in (
        ("gene_to_image", ((genes, images), (predicted, projected))), ("image_to_gene", ((images, genes), (projected, predicted))))}
    return {"retrieval": both_ways(genes, images, seed=seed), "baseline_linear": both_ways(predicted, projected, seed=seed),
            "r10_above_baseline": difference}


def score_distances(section: Section, generated: Generated, untrained: Generated | None, encoders: Mapping[str, nn.Module],
                    bank: FeatureBank, seed: int = 0) -> dict[str, dict]:
    """`frechet` and `kid` by feature set: generated, untrained and real_vs_real against a random half of the real patches."""
    sets = {"generated": generated} if untrained is None else {"generated": generated, "untrained": untrained}
    real = resize_by_area(section.images, generated.px)
    n = half_size(len(real), [len(images.flat) for images in sets.values()])
    if n < 2:
        raise InputError(section.sample_id, "patches", "at least 4 real and 2 generated ones", f"{len(real)} real")
    scores: dict[str, dict] = {"frechet": {}, "kid": {}}
    for label, encoder in encoders.items():
        real_features = bank.features(f"{section.sample_id}, real at {generated.px}", real, encoder)
        others = {name: bank.features(f"{section.sample_id}, {name}", images.flat, encoder) for name, images in sets.items()}
        for key, distance in (("frechet", frechet_distance), ("kid", full_kernel_distance)):
            splits = distances_to_halves(real_features, others, distance, rng=np.random.default_rng(seed), n_splits=N_SPLITS)
            scores[key][label] = {**{name: mean_and_interval(values) for name, values in splits.items()}, "n": n, "n_splits": N_SPLITS}
    return scores


def score_faithfulness(section: Section, generated: Generated, judge: CLIP, bank: FeatureBank, seed: int = 0) -> dict[str, object]:
    """`paired`: the judge looks for each prompt's patch in the pool of all prompts' patches of one seed; seeds are averaged.

    Floor: the same with each spot's genes exchanged for another spot's. Ceiling: the real patches of the same spots. A judge that
    centres features by sample takes the real patches' mean for both: a generated patch belongs to the section of its genes.
    """
    genes = judge.embed_expression(section.judge_expression).numpy()[generated.rows]
    name, patches = f"{section.sample_id}, real at {generated.px}", resize_by_area(section.images, generated.px)
    centre = bank.sample_centre(name, patches, judge)
    images = bank.embeddings(f"{section.sample_id}, generated", generated.flat, judge, centre)
    pools = images.reshape(*generated.images.shape[:2], -1).swapaxes(0, 1)                              # (k, n, D)
    real = bank.embeddings(name, patches, judge, centre)
    rng = np.random.default_rng(seed)
    others = [exchange(len(genes), rng) for _ in range(N_SHUFFLES)]
    return {"own_genes": summarise_places([places(genes, pool) for pool in pools], seed=seed),
            "shuffled_genes": summarise_places([places(genes[other], pool) for pool in pools for other in others], seed=seed),
            "real_patches": retrieval_metrics(genes, real[generated.rows], seed=seed),
            "n_prompts": len(genes), "n_seeds": len(pools)}


def exchange(n: int, rng: np.random.Generator) -> np.ndarray:
    """A random permutation in which nobody keeps its own place."""
    order = rng.permutation(n)
    exchanged = np.empty(n, dtype=np.int64)
    exchanged[order] = np.roll(order, 1)
    return exchanged


def score_diversity(section: Section, generated: Generated, noise_held: Generated | None) -> dict[str, object]:
    """`within_prompt_diversity`, grey levels 0..255: over the seeds of one prompt, and over the real patches of one cluster.

    `noise_held` are patches of the same prompts whose per-pixel noise is one and the same: they differ by z alone (`generated_z`).
    """
    real = resize_by_area(section.images, generated.px)
    groups = [real] if section.clusters is None else [real[section.clusters == name] for name in
                                                            np.unique(section.clusters[section.clusters != ""])]
    several = generated.images.shape[1] > 1
    by_z = {} if noise_held is None else {"generated_z": within_prompt_diversity(noise_held.images)}
    return {"generated": within_prompt_diversity(generated.images) if several else None, **by_z, "real": mean_group_deviation(groups),
            "real_groups": "section" if section.clusters is None else "cluster"}
