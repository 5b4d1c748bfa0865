"""Attributions: they add up, they find the genes that were planted, they leave the process' random numbers alone."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from evaluation.attribution import MAX_DELTA, Attributer, higher_genes_only
from networks.clip import CLIP, ClipModelConfig
from training.clip_losses import clip_loss

GENES, PLANTED, SPOTS = 60, 4, 160
NAMES = ["cortex", "medulla", "stroma"]
SHAPES = {"bottleneck": {"gene_hidden": 24, "gene_width": 16}, "gene_tokens": {"gene_tokens": GENES, "gene_token_width": 16,
          "gene_token_heads": 2, "gene_token_layers": 1, "gene_width": 16}}


def sections(seed=0):
    """(N, G) expression, (N, F) image features, (N,) cluster: genes 4k .. 4k + 3 and feature k are high in cluster k alone.

    Gene 50 differs as much from spot to spot as a planted gene between clusters, and goes with nothing."""
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.arange(len(NAMES)).repeat_interleave(SPOTS)
    genes = 1 + 0.3 * torch.randn(len(cluster), GENES, generator=generator)
    for k in range(len(NAMES)):
        genes[cluster == k, k * PLANTED:(k + 1) * PLANTED] += 1.5
    genes[:, 50] += 1.5 * torch.randint(0, 2, (len(cluster),), generator=generator)
    features = F.one_hot(cluster, 8).float() * 2 + 0.3 * torch.randn(len(cluster), 8, generator=generator)
    return genes.clamp_min(0), features, cluster


@pytest.fixture(scope="module")
def trained():
    """A CLIP that has learnt those sections, their cluster means."""
    return train("bottleneck")


def train(kind, n_steps=200, **changes):
    genes, features, cluster = sections()
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder=kind, projection=8, dropout=0, image_dropout=0, temperature=0.2, **{**SHAPES[kind], **changes})
    clip = CLIP(config, [f"g{i}" for i in range(GENES)], feature_width=8)
    optimizer = torch.optim.AdamW(clip.parameters(), lr=3e-3, weight_decay=1.0)
    for _ in range(n_steps):
        optimizer.zero_grad()
        clip_loss(clip.project_image_features(features), clip.encode_genes(genes), 0.2).backward()
        optimizer.step()
    means = torch.stack([genes[cluster == k].mean(0) for k in range(len(NAMES))])
    return clip.eval().requires_grad_(False), means


@pytest.mark.parametrize("kind", SHAPES)
def test_integrated_gradients_add_up_to_the_distance_between_the_clusters(trained, kind):
    clip, means = trained if kind == "bottleneck" else train(kind, n_steps=0)
    for attribution in Attributer(clip.encode_genes).between_clusters(means, NAMES):
        i, j = NAMES.index(attribution.query), NAMES.index(attribution.other)
        with torch.no_grad():
            distance = (clip.encode_genes(means)[i] - clip.encode_genes(means)[j]).square().sum().item()
        assert attribution.change == pytest.approx(distance, rel=1e-3) and distance > 1e-5
        assert attribution.values.sum() == pytest.approx(distance, rel=MAX_DELTA) and attribution.delta < MAX_DELTA


def first_and_most(values, cluster) -> bool:
    """Whether the two highest values and more than half of their sum are those of the cluster's planted genes, a fifteenth of all.

    Which of the four a network goes by is chance: they tell it the same."""
    planted = range(cluster * PLANTED, (cluster + 1) * PLANTED)
    return set(np.argsort(-values)[:2]) <= set(planted) and values[planted].sum() > 0.5 * values.sum()


@pytest.mark.parametrize("method", ["ig", "sg"])
def test_planted_genes_of_a_cluster_come_first_in_its_lists(trained, method):
    clip, means = trained
    found = list(Attributer(clip.encode_genes, method).between_clusters(means, NAMES))
    assert [attribution.column for attribution in found] == [f"{a} vs. {b}" for a in NAMES for b in NAMES if a != b]
    for attribution in found:
        i, j = NAMES.index(attribution.query), NAMES.index(attribution.other)
        values = higher_genes_only(attribution, means[i].numpy(), means[j].numpy())
        assert first_and_most(values, i)
        assert (values >= 0).all() and (values[j * PLANTED:(j + 1) * PLANTED] == 0).all()      # lower in the query


def test_an_encoder_that_jumps_is_reported_not_hidden():
    clip, means = train("gene_tokens", n_steps=15, gene_tokens=24)       # the 24 highest of 60 genes: others join along the line
    found = next(Attributer(clip.encode_genes).between_clusters(means, NAMES))
    assert found.delta > MAX_DELTA
    assert found.delta == pytest.approx(abs(found.values.sum() - found.change) / found.change, rel=1e-6)


def test_distances_to_a_picture_are_attributed_from_the_average_spot(trained):
    clip, means = trained
    with torch.no_grad():
        target = clip.project_image_features(F.one_hot(torch.tensor([1]), 8).float() * 2)      # a picture of the medulla
        embeddings = clip.encode_genes(torch.cat([means, means.mean(0)[None]]))
    found = list(Attributer(clip.encode_genes).to_targets(means, NAMES, means.mean(0), target, ["picture"]))
    assert [attribution.column for attribution in found] == [f"{name} vs. picture" for name in NAMES]
    for i, attribution in enumerate(found):
        change = (embeddings[i] - target[0]).square().sum() - (embeddings[-1] - target[0]).square().sum()
        assert attribution.values.sum() == pytest.approx(change.item(), rel=MAX_DELTA)
    nearer = found[1]
    assert nearer.change < 0 and first_and_most(np.where(means[1] > means.mean(0), (-nearer.values).clip(min=0), 0), 1)


def test_a_cluster_that_equals_another_differs_from_it_by_nothing_and_keeps_its_name(trained):
    clip, means = trained
    twins = torch.stack([means[0], means[0], means[2]])
    found = {attribution.column: attribution for attribution in Attributer(clip.encode_genes).between_clusters(twins, ["a", "b", "c"])}
    assert np.abs(found["a vs. b"].values).max() < 1e-6 and found["a vs. b"].delta == 0
    assert found["a vs. c"].change == pytest.approx(found["b vs. c"].change) and found["a vs. c"].change > 0.1


def test_few_rows_at_a_time_give_the_same_values(trained):
    clip, means = trained
    runs = [Attributer(clip.encode_genes, batch_size=size).between_clusters(means, NAMES) for size in (5, 64)]
    for small, large in zip(*runs, strict=True):
        assert np.allclose(small.values, large.values, atol=1e-6)


def test_smooth_gradients_repeat_with_the_seed_and_leave_random_numbers_as_they_were(trained):
    clip, means = trained
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = (next(iter(Attributer(clip.encode_genes, "sg", seed=seed).between_clusters(means, NAMES))).values
                           for seed in (0, 0, 1))
    assert torch.rand(1) == expected
    assert (first == again).all() and not np.allclose(first, other)
