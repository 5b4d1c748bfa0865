"""Retrieval: ranks, chance, ties and intervals of paired embeddings."""
import numpy as np
import pytest

from evaluation.retrieval import both_ways, places, r10_difference, retrieval_by_sample, retrieval_metrics, summarise_places


def test_planted_pairs_are_always_first(rng):
    embeddings = rng.normal(size=(60, 16))
    found = retrieval_metrics(embeddings, 3 * embeddings + 1e-3 * rng.normal(size=(60, 16)))
    assert (found["r1"], found["r5"], found["r10"], found["median_rank"], found["r10_ci95"]) == (1, 1, 1, 1, [1, 1])
    assert found["chance_r10"] == pytest.approx(10 / 60)


def test_shuffled_pairs_score_chance(rng):
    embeddings = rng.normal(size=(2000, 8))
    found = retrieval_metrics(embeddings, rng.permutation(embeddings))
    low, high = found["r10_ci95"]
    assert low - 0.002 <= found["chance_r10"] <= high + 0.002
    assert 900 < found["median_rank"] < 1100


def test_collapsed_embeddings_score_exactly_chance_not_one():
    same = np.ones((40, 8), dtype=np.float32) / 3
    found = retrieval_metrics(same, same)
    assert found["r1"] == pytest.approx(1 / 40)
    assert found["r10"] == pytest.approx(found["chance_r10"]) == pytest.approx(10 / 40)
    assert found["median_rank"] == 20.5


def test_the_rank_is_the_number_of_candidates_above_plus_one():
    queries = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    pool = np.array([[0.9, 0.5], [1.0, 0.1], [0.8, 0.6]])
    above, level = places(queries, pool)
    # query 0: pool 1 is closer than its own pool 0; query 1: all others are closer; query 2: none
    assert above.tolist() == [1, 2, 0] and level.tolist() == [0, 0, 0]


def test_not_a_number_ranks_last_and_never_first(rng):
    embeddings = rng.normal(size=(30, 4))
    broken = embeddings.copy()
    broken[:15] = np.nan
    assert retrieval_metrics(broken, embeddings, ks=(1,))["r1"] == 0.5


def test_several_seeds_are_averaged_over_the_same_queries(rng):
    embeddings = rng.normal(size=(50, 8))
    good, bad = places(embeddings, embeddings), places(embeddings, np.roll(embeddings, 1, axis=0))
    both = summarise_places([good, bad])
    assert both["r1"] == pytest.approx((summarise_places([good])["r1"] + summarise_places([bad])["r1"]) / 2)


def test_more_pairing_means_better_scores_and_the_seed_fixes_the_interval(rng):
    embeddings = rng.normal(size=(300, 8))
    noise = rng.normal(size=(300, 8))
    scores = [retrieval_metrics(embeddings, embeddings + level * noise)["r10"] for level in (0.3, 1, 3)]
    assert scores == sorted(scores, reverse=True) and scores[0] > scores[2] + 0.2
    assert retrieval_metrics(embeddings, noise, seed=5) == retrieval_metrics(embeddings, noise, seed=5)


def test_unpaired_shapes_are_refused(rng):
    with pytest.raises(ValueError, match=r"found \(5, 2\) and \(4, 2\)"):
        retrieval_metrics(np.zeros((5, 2)), np.zeros((4, 2)))


def test_the_difference_to_another_model_is_drawn_over_the_same_spots():
    rng = np.random.default_rng(0)
    spots = rng.normal(size=(200, 8))
    good, random = (spots, spots + 0.1 * rng.normal(size=spots.shape)), (spots, rng.normal(size=spots.shape))
    better = r10_difference(good, random)
    assert better["ci95"][0] > 0.5 and better["mean"] > 0.8
    assert r10_difference(good, good) == {"mean": 0.0, "ci95": [0.0, 0.0]}
    assert r10_difference(random, good)["mean"] == pytest.approx(-better["mean"])


def test_every_number_has_its_interval_and_its_chance(rng):
    embeddings = rng.normal(size=(200, 8))
    found = retrieval_metrics(embeddings, embeddings + 2 * rng.normal(size=embeddings.shape))
    for name in ("r1", "r5", "r10", "median_rank"):
        low, high = found[f"{name}_ci95"]
        assert low <= found[name] <= high and low < high
    assert [found[f"chance_{name}"] for name in ("r1", "r5", "r10", "median_rank")] == [1 / 200, 5 / 200, 10 / 200, 100.5]


def test_samples_are_scored_in_pools_of_their_own_and_jointly(rng):
    genes, samples = rng.normal(size=(90, 6)), np.array(["A", "B", "B"] * 30)
    images = genes + 0.5 * rng.normal(size=genes.shape)
    found = retrieval_by_sample(genes, images, samples, seed=3)
    assert found["joint"] == {"n_spots": 90, **both_ways(genes, images, seed=3)} and list(found["samples"]) == ["A", "B"]
    only_b = samples == "B"
    assert found["samples"]["B"] == {"n_spots": 60, **both_ways(genes[only_b], images[only_b], seed=3)}
    assert found["samples"]["A"]["image_to_gene"] == retrieval_metrics(images[~only_b], genes[~only_b], seed=3)


def test_a_shift_between_samples_costs_the_joint_pool_and_not_their_own(rng):
    genes = rng.normal(size=(100, 6))
    samples = np.array(["A", "B"] * 50)
    images = genes + 8 * np.where(samples == "A", 1, -1)[:, None] * np.eye(6)[0]   # a batch effect on one side alone
    found = retrieval_by_sample(genes, images, samples, n_bootstrap=10)
    assert found["joint"]["gene_to_image"]["r10"] < min(sample["gene_to_image"]["r10"] for sample in found["samples"].values())
