"""The five numbers of faithfulness on simulated tissue: real > good > poor generator > shuffled prompts, and noise beside the last.

The truth of a spot is what the simulation planted there: its cells by type, and its programmes. Both generators give the patch of the spot
of another section whose truth is nearest, a little noisy; to a share of prompts they do not listen (15 % good, 50 % poor), and give any
patch. Shuffled: the good patches at other spots. Noise: pixels in the colours of real ones, in disorder.
"""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks.ordering import scrambled
from evaluation.faithfulness import score_all
from evaluation.sections import FeatureBank, Generated, Section
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from networks.layers import images_to_float
from preprocessing.expression import normalise_expression
from preprocessing.simulation.expression import cluster_by_expression, gene_programmes, sample_spot_counts, slide_profiles, spot_weights
from preprocessing.simulation.slide import SlidePainter, slide_stains
from preprocessing.simulation.tissue import Tissue
from preprocessing.stain import estimate_stain, normalise_stain
from training.clip_losses import clip_loss

PATCH_UM, PX, N_GENES = 55.0, 48, 120
MPP = PATCH_UM / PX
ORDER = ("real", "good", "poor", "shuffled", "noise")
MARGIN = 0.02              # between neighbours in the order
LEVEL = 0.1                # shuffled patches and noise lie no further apart: neither has to do with its spot
NUMBERS = ("retrieval", "readout", "clusters", "nuclei", "spatial")


def simulated(seed, side_um=(1430, 1320)):
    """A section tiled by spots: patches, expression (N, G), cluster, place and planted truth (N, C) of each."""
    tissue = Tissue(*side_um, seed=seed)
    cells = tissue.place_cells()
    painter = SlidePainter(tissue, cells, slide_stains(seed), mpp=MPP)
    slide = painter.paint(0, 0, painter.width_px, painter.height_px)
    slide = normalise_stain(slide, estimate_stain(slide))
    y, x = (part.ravel() for part in np.mgrid[:slide.shape[0] // PX, :slide.shape[1] // PX])
    centre = (np.stack([x, y], axis=1) + 0.5) * PATCH_UM
    inside = tissue.edge_depth(*centre.T) > PATCH_UM / 2
    x, y, centre = x[inside], y[inside], centre[inside]
    truth = spot_weights(cells, tissue.layout(*centre.T), *centre.T)
    counts = sample_spot_counts(truth, slide_profiles(gene_programmes(N_GENES, 0), 0.0, seed), 6000, np.random.default_rng(seed))
    patches = np.stack([slide[row * PX:(row + 1) * PX, column * PX:(column + 1) * PX] for row, column in zip(y, x, strict=True)])
    return SimpleNamespace(patches=patches, genes=normalise_expression(counts, 1e4), truth=truth, centre=centre,
                           clusters=cluster_by_expression(counts, 4, seed).astype(str))


def trained_judge(sections, encoder):
    """A CLIP that has learnt sections of its own."""
    genes = torch.from_numpy(np.concatenate([section.genes.toarray() for section in sections])).float()
    with torch.inference_mode():
        features = encoder(images_to_float(torch.from_numpy(np.concatenate([section.patches for section in sections])).permute(0, 3, 1, 2)))
    features = features.clone()
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=32, gene_width=32, projection=16, dropout=0, image_dropout=0,
                             image_encoder="efficientnet_lite0", temperature=0.1, gene_scaling="standardise", feature_scaling="standardise")
    clip = CLIP(config, [f"g{i}" for i in range(N_GENES)], image_encoder=encoder)
    clip.fit_inputs(genes, features)
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        clip_loss(clip.project_image_features(features), clip.encode_genes(genes), 0.1).backward()
        optimizer.step()
    return clip.eval()


def of_a_generator(ignored, section, donor, rng):
    """(N, 1, PX, PX, 3): the donor's patch nearest in truth, any of its patches for a share of the prompts; noise of a few grey levels."""
    scale = donor.truth.std(axis=0) + 1e-6
    apart = (((section.truth[:, None] - donor.truth[None]) / scale) ** 2).sum(axis=2)
    chosen = np.argsort(apart, axis=1)[:, :1]
    deaf = rng.permutation(len(chosen))[:round(ignored * len(chosen))]
    chosen[deaf] = rng.integers(len(donor.patches), size=(len(deaf), 1))
    return np.clip(donor.patches[chosen] + rng.normal(0, 3, (*chosen.shape, PX, PX, 3)), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def scores():
    """number -> key -> values by ORDER."""
    rng, encoder = np.random.default_rng(0), build_encoder("efficientnet_lite0", input_px=96).eval()
    section, donor, *others = (simulated(seed) for seed in (1, 2, 3))
    held_out = Section("S", [f"b{i}" for i in range(len(section.patches))], section.patches, section.genes, section.genes, section.clusters,
                       section.centre)
    good, poor = (of_a_generator(share, section, donor, rng) for share in (0.15, 0.5))
    noise = scrambled(section.patches, rng)[:, None]
    judge = trained_judge(others, encoder)
    found = {name: score_all(held_out, Generated(np.arange(len(images)), ["0"], images), encoder,
                             FeatureBank(progress=False), judge=judge, um_per_px=MPP)
             for name, images in (("good", good), ("poor", poor), ("noise", noise))}

    def of(number, key):
        return dict(zip(ORDER, [found["good"][number]["real"][key], found["good"][number]["generated"][key],
                                found["poor"][number]["generated"][key], found["good"][number]["shuffled"][key],
                                found["noise"][number]["generated"][key]], strict=True))
    return of


@pytest.mark.parametrize("number", NUMBERS)
def test_real_is_above_good_good_above_poor_and_poor_above_shuffled_patches(scores, number):
    values = scores(number, "score")
    steps = -np.diff([values[name] for name in ORDER[:4]])
    assert (steps > MARGIN).all(), values


@pytest.mark.parametrize("number", NUMBERS)
def test_noise_stands_at_the_floor_with_shuffled_patches_where_a_number_asks_for_pairing_alone(scores, number):
    values = scores(number, "score")
    assert values["poor"] > values["noise"] + MARGIN and abs(values["noise"] - values["shuffled"]) < LEVEL, values


def test_a_number_that_sees_the_level_too_puts_noise_below_shuffled_patches(scores):
    values = scores("nuclei", "explained")
    assert list(values) == sorted(values, key=values.get, reverse=True), values
