"""Diversity within a prompt: grey levels between seeds, and nothing else."""
import numpy as np
import pytest

from evaluation.diversity import mean_group_deviation, prompt_distances, within_prompt_diversity


def test_a_generator_that_ignores_z_has_no_diversity(rng):
    one_per_prompt = rng.integers(0, 256, size=(5, 1, 8, 8, 3), dtype=np.uint8)
    assert within_prompt_diversity(np.repeat(one_per_prompt, 4, axis=1)) == 0


def test_the_number_is_the_pixel_deviation_in_grey_levels_for_any_k(rng):
    for k in (2, 3, 20):
        images = 128 + 20 * rng.normal(size=(40, k, 16, 16, 3))
        assert within_prompt_diversity(images) == pytest.approx(20, rel=0.02)


def test_differences_between_prompts_do_not_count(rng):
    images = rng.normal(size=(6, 3, 8, 8, 3)) + np.array([0, 40, 80, 120, 160, 200])[:, None, None, None, None]
    assert within_prompt_diversity(images) == pytest.approx(1, rel=0.1)


def test_uint8_does_not_wrap_around():
    images = np.array([[[0], [255]]], dtype=np.uint8)
    assert within_prompt_diversity(images) == pytest.approx(255 / np.sqrt(2))


def test_groups_of_one_are_left_out(rng):
    pair = np.array([[0.0], [2.0]])
    assert mean_group_deviation([pair, np.array([[100.0]])]) == pytest.approx(np.sqrt(2))
    assert np.isnan(mean_group_deviation([pair[:1]]))


def test_features_of_one_prompt_lie_as_far_apart_as_their_seeds_move_them(rng):
    centres = rng.normal(size=(30, 1, 6)) * 10
    features = (centres + rng.normal(size=(30, 4, 6))).reshape(120, 6)
    prompts = np.repeat([f"p{i}" for i in range(30)], 4)
    found = prompt_distances(features, prompts)
    assert found["within_prompt"] == pytest.approx(np.sqrt(2 * 6), rel=0.1) and found["between_prompts"] > 5 * found["within_prompt"]
    deaf = prompt_distances(centres.repeat(4, axis=1).reshape(120, 6), prompts)
    assert deaf["within_prompt"] == 0 < deaf["between_prompts"]
    assert np.isnan(prompt_distances(features[::4], prompts[::4])["within_prompt"])
    assert np.isnan(prompt_distances(features[:4], prompts[:4])["between_prompts"])
