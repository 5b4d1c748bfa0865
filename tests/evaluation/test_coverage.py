"""Precision, recall, density and coverage against hand values and known limits."""
import numpy as np
import pytest

from evaluation.coverage import coverage_metrics, own_radius


def brute(real, generated, k):
    distance = np.linalg.norm(real[:, None] - generated[None], axis=2)

    def radius(x):
        return np.sort(np.linalg.norm(x[:, None] - x[None], axis=2), axis=1)[:, k]
    inside = distance <= radius(real)[:, None]
    return {"precision": inside.any(0).mean(), "recall": (distance <= radius(generated)[None]).any(1).mean(),
            "density": inside.sum(0).mean() / k, "coverage": inside.any(1).mean()}


def test_the_four_numbers_are_their_definitions():
    rng = np.random.default_rng(0)
    real, generated = rng.normal(size=(60, 4)), rng.normal(0.5, 0.7, size=(45, 4))
    assert coverage_metrics(real, generated, k=3) == pytest.approx(brute(real, generated, 3))
    assert own_radius(np.array([[0.0], [1.0], [3.0]]), 1).tolist() == [1, 1, 2]


def test_two_sets_of_one_distribution_cover_each_other_and_a_collapsed_one_does_not():
    rng = np.random.default_rng(1)
    real, same = rng.normal(size=(1000, 8)), rng.normal(size=(1000, 8))
    found = coverage_metrics(real, same)
    assert abs(found["coverage"] - (1 - 0.5 ** 5)) < 0.03 and abs(found["density"] - 1) < 0.1
    collapsed = coverage_metrics(real, np.zeros((1000, 8)) + rng.normal(0, 0.01, size=(1000, 8)))
    assert collapsed["precision"] == 1 and collapsed["coverage"] < 0.5 and collapsed["recall"] < 0.01
    far = coverage_metrics(real, same + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="more than k = 5 images a side; found 5 and 9"):
        coverage_metrics(np.zeros((5, 2)), np.zeros((9, 2)))
