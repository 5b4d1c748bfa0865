"""Fréchet and kernel distances against closed forms and textbook sums, and the intervals around them."""
import numpy as np
import pytest

from evaluation.distances import (
    distances_to_halves,
    frechet_at_infinity,
    frechet_distance,
    full_kernel_distance,
    half_sample_interval,
    kernel_distance,
    mean_and_interval,
    squared_mmd,
)


def test_frechet_distance_of_gaussians_is_the_closed_form(rng):
    # diagonal covariances: |shift|^2 + sum (s_a - s_b)^2
    scale_a, scale_b, shift = np.array([1.0, 2.0, 0.5]), np.array([1.5, 1.0, 0.5]), np.array([3.0, 0.0, 1.0])
    a, b = rng.normal(size=(200_000, 3)) * scale_a, rng.normal(size=(200_000, 3)) * scale_b + shift
    assert frechet_distance(a, b) == pytest.approx(10 + 0.25 + 1, rel=0.01)


def test_frechet_distance_is_exact_for_rotated_covariances(rng):
    # whitened samples have exactly the covariance asked for
    def exactly(covariance, n=500):
        x = rng.normal(size=(n, len(covariance)))
        x -= x.mean(axis=0)
        x = x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False)).T)
        return x @ np.linalg.cholesky(covariance).T
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = turn @ np.diag([1, 2, 3, 4, 5, 6.0]) @ turn.T, turn @ np.diag([6, 5, 4, 3, 2, 1.0]) @ turn.T
    expected = sum((np.sqrt(x) - np.sqrt(7 - x)) ** 2 for x in range(1, 7))
    assert frechet_distance(exactly(a), exactly(b)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("n", "m", "width"), [(40, 60, 128), (300, 250, 64), (30, 200, 64)],
                         ids=["fewer images than numbers", "more", "mixed"])
def test_distances_equal_torch_fidelity_on_the_same_features(rng, n, m, width):
    torch = pytest.importorskip("torch")
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    a, b = (np.abs(rng.normal(size=(count, width)) + offset).astype(np.float32) for count, offset in ((n, 0), (m, 0.1)))
    first, second = torch.from_numpy(a), torch.from_numpy(b)
    fid = fid_statistics_to_metric(fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False)
    kid = kid_features_to_metric(first, second, kid_subset_size=25, kid_subsets=40, rng_seed=11, verbose=False)
    mean, deviation = kernel_distance(a, b, subset_size=25, n_subsets=40, seed=11)
    assert frechet_distance(a, b) == pytest.approx(fid["frechet_inception_distance"], rel=1e-3)
    assert mean == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)
    assert deviation == pytest.approx(kid["kernel_inception_distance_std"], rel=1e-3)


@pytest.mark.parametrize("n", [20, 200], ids=["fewer images than numbers", "more"])
def test_a_set_against_itself_is_zero_in_any_order(rng, n):
    features = rng.normal(size=(n, 50)).astype(np.float32)
    other = rng.normal(size=(n, 50)).astype(np.float32)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(features, rng.permutation(features)) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(rng.permutation(features), other) == pytest.approx(frechet_distance(features, other), rel=1e-9)
    assert squared_mmd(rng.permutation(features), other) == pytest.approx(squared_mmd(features, other), rel=1e-6)


def test_the_kernel_distance_is_the_textbook_sum(rng):
    a, b = rng.normal(size=(6, 3)), rng.normal(size=(9, 3))

    def k(x, y):
        return (x @ y / 3 + 1) ** 3
    expected = (np.mean([k(a[i], a[j]) for i in range(6) for j in range(6) if i != j])
                + np.mean([k(b[i], b[j]) for i in range(9) for j in range(9) if i != j])
                - 2 * np.mean([k(x, y) for x in a for y in b]))
    assert squared_mmd(a, b) == pytest.approx(expected)


def test_both_ways_of_summing_subsets_agree(rng):
    a, b = rng.normal(size=(60, 8)), rng.normal(size=(50, 8))
    few = kernel_distance(a, b, subset_size=5, n_subsets=3, seed=4)      # direct: 3 x 25 pairs are fewer than 3,600
    generator = np.random.RandomState(4)
    values = [squared_mmd(a[generator.choice(60, 5, replace=False)], b[generator.choice(50, 5, replace=False)]) for _ in range(3)]
    assert few == pytest.approx((np.mean(values), np.std(values)))
    generator = np.random.RandomState(4)
    values = [squared_mmd(a[generator.choice(60, 40, replace=False)], b[generator.choice(50, 40, replace=False)]) for _ in range(6)]
    assert kernel_distance(a, b, subset_size=40, n_subsets=6, seed=4) == pytest.approx((np.mean(values), np.std(values)))


def test_a_subset_never_exceeds_the_smaller_set(rng):
    mean, deviation = kernel_distance(rng.normal(size=(30, 4)), rng.normal(size=(12, 4)))
    assert np.isfinite(mean) and deviation > 0                           # 12 of 30 vary
    assert kernel_distance(rng.normal(size=(12, 4)), rng.normal(size=(12, 4)))[1] == 0


def test_the_unbiased_kernel_distance_of_equal_distributions_is_zero_on_average(rng):
    values = [squared_mmd(rng.normal(size=(40, 4)), rng.normal(size=(50, 4))) for _ in range(400)]
    assert abs(np.mean(values)) < 3 * np.std(values) / 20


@pytest.mark.parametrize("distance", [frechet_distance, full_kernel_distance])
def test_floor_lies_below_noise_and_noise_grows(rng, distance):
    real = rng.normal(size=(200, 16))
    others = {name: rng.normal(size=(300, 16)) + shift for name, shift in (("like real", 0), ("a little off", 0.5), ("far off", 2))}
    values = {name: mean_and_interval(column) for name, column in distances_to_halves(real, others, distance, rng=rng).items()}
    assert values["like real"]["mean"] < values["real_vs_real"]["ci95"][1]
    assert values["real_vs_real"]["ci95"][1] < values["a little off"]["ci95"][0]
    assert values["a little off"]["ci95"][1] < values["far off"]["ci95"][0]


def test_halves_are_disjoint_and_every_side_has_the_same_size(rng):
    sizes = []

    def record(a, b):
        sizes.append((len(a), len(b)))
        return float(len(set(a[:, 0]) & set(b[:, 0])))
    real = np.arange(21.0)[:, None]
    shared = distances_to_halves(real, {"generated": -1 - np.arange(7.0)[:, None]}, record, rng=rng, n_splits=3)
    assert set(sizes) == {(7, 7)} and shared["real_vs_real"].tolist() == [0, 0, 0]
    assert len(shared["generated"]) == 3


def test_the_floor_depends_on_n_as_a_frechet_distance_does(rng):
    small, large = (np.mean(distances_to_halves(rng.normal(size=(n, 32)), {}, frechet_distance, rng=rng)["real_vs_real"])
                    for n in (80, 800))
    assert small > 5 * large > 0


def test_the_interval_of_the_whole_holds_what_repeating_the_experiment_gives(rng):
    def draw():
        return rng.normal(size=(150, 4)), rng.normal(size=(150, 4)) + 0.5
    truth = np.array([frechet_distance(*draw()) for _ in range(100)])
    a, b = draw()
    low, high = half_sample_interval(a, b, frechet_distance, frechet_distance(a, b), rng=rng, n_splits=60)
    assert 0.5 < (high - low) / (3.92 * truth.std()) < 2


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (0.5, 1), (0.3, 2)], ids=["alike", "moved", "moved and wider"])
def test_the_distance_at_infinite_n_is_the_closed_form_where_the_distance_at_n_lies_above(rng, shift, scale):
    width, n = 12, 400
    truth = width * (shift ** 2 + (scale - 1) ** 2)                      # |shift|^2 + tr of (1 - scale)^2
    draws = [(rng.normal(size=(n, width)), rng.normal(size=(n, width)) * scale + shift) for _ in range(12)]
    followed, at_n = (np.array([measure(a, b) for a, b in draws])
                      for measure in (lambda a, b: frechet_at_infinity(a, b, rng=rng), frechet_distance))
    error = followed.std(ddof=1) / np.sqrt(len(draws))
    assert abs(followed.mean() - truth) < 3 * error + 0.01 and at_n.mean() - truth > 3 * abs(followed.mean() - truth)
    assert at_n.mean() - truth > 0.1                                     # what the line takes away


def test_unequal_sets_are_followed_from_the_smaller_size(rng):
    a, b = rng.normal(size=(1000, 6)), rng.normal(size=(250, 6)) + 1
    assert frechet_at_infinity(a, b, rng=rng) == pytest.approx(6, rel=0.25)
    with pytest.raises(ValueError, match="needs at least 8 images a side; found 7"):
        frechet_at_infinity(a, b[:7], rng=rng)


def test_one_image_has_no_distance(rng):
    with pytest.raises(ValueError, match="at least 2 images; found 1"):
        frechet_distance(np.ones((1, 4)), np.ones((3, 4)))
    with pytest.raises(ValueError, match="at least 2 images a side; found 1"):
        kernel_distance(np.ones((1, 4)), np.ones((3, 4)))
