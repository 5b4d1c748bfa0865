"""Memorisation: planted copies are found, also turned and flipped ones; independent draws are not called copies."""
import numpy as np
import pytest
from PIL import Image

from evaluation.memorisation import VIEWS, Pixels, closest_pairs, find_memorised, turned_back
from networks.histo_models import build_encoder
from preprocessing.errors import InputError

PX = 48


def draw(rng, n):
    """uint8 (n, PX, PX, 3): pink ground with dark discs, as many and as large as chance has it."""
    y, x = np.mgrid[:PX, :PX]
    patches = []
    for _ in range(n):
        patch = np.full((PX, PX, 3), rng.normal([225, 170, 205], 8))
        for _ in range(rng.integers(4, 14)):
            inside = np.hypot(x - rng.uniform(0, PX), y - rng.uniform(0, PX)) < rng.uniform(2, 6)
            patch[inside] = rng.normal([90, 60, 140], 15)
        patches.append(np.clip(patch + rng.normal(0, 3, patch.shape), 0, 255).astype(np.uint8))
    return np.stack(patches)


def turn(patch, view):
    flip, turns = VIEWS[view]
    return np.rot90(patch[:, ::-1] if flip else patch, turns).copy()


@pytest.fixture(scope="module")
def encoders():
    return {"efficientnet_lite0": build_encoder("efficientnet_lite0", input_px=64), "random_tiny": build_encoder("random_tiny")}


@pytest.fixture(scope="module")
def world(encoders):
    """40 training, 30 held-out, 20 independent patches and 16 copies: training patch k in view k % 8, with a little noise."""
    rng = np.random.default_rng(1)
    training, held_out, independent = draw(rng, 40), draw(rng, 30), draw(rng, 20)
    copies = np.stack([turn(training[k], k % 8) for k in range(16)]).astype(int)
    copies = np.clip(copies + rng.integers(-2, 3, copies.shape), 0, 255).astype(np.uint8)
    generated = np.concatenate([independent, copies])
    return training, generated, find_memorised(generated, held_out, training, encoders, progress=False)


def test_planted_copies_are_found_in_every_flip_and_turn_and_nothing_else(world):
    _, _, found = world
    assert found.copies.tolist() == [False] * 20 + [True] * 16
    assert found.summary()["copies"] == 16 and found.summary()["copies_among_held_out"] == 0
    for near in found.generated.values():
        assert near.row[20:].tolist() == list(range(16))


def test_the_share_nearer_than_held_out_patches_is_five_percent_by_chance_and_far_above_with_copies(encoders):
    rng = np.random.default_rng(2)
    training, held_out = draw(rng, 40), draw(rng, 60)
    tiny = {"random_tiny": encoders["random_tiny"]}
    honest = find_memorised(draw(rng, 60), held_out, training, tiny, progress=False).summary()["encoders"]["random_tiny"]
    copied = find_memorised(training[:20], held_out, training, tiny, progress=False).summary()["encoders"]["random_tiny"]
    assert honest["share_nearer_ci95"][0] <= 0.05 <= honest["share_nearer_ci95"][1]
    assert copied["share_nearer"] == 1 and copied["share_nearer_ci95"][0] > 0.9 and copied["smallest_distance"] < 1e-3


def test_a_training_patch_that_is_there_twice_does_not_hide_its_copies(encoders):
    rng = np.random.default_rng(3)
    training = draw(rng, 20)
    twice = np.concatenate([training, training[:5]])
    found = find_memorised(training[:5], draw(rng, 12), twice, encoders, progress=False)
    assert found.copies.all()


def test_turned_back_undoes_each_view():
    patch = draw(np.random.default_rng(4), 1)[0]
    for view in range(len(VIEWS)):
        assert (turn(turned_back(patch, view), view) == patch).all()


def test_pairs_show_the_copies_first_with_the_training_patch_turned_like_them(world):
    training, generated, found = world
    assert set(found.closest(16)) == set(range(20, 36))
    sheet = closest_pairs(found, generated, training, count=8, cell_px=PX)
    top = sheet.shape[0] - 3 * (PX + 2)
    left = sheet.shape[1] - 8 * (PX + 2)
    above, below = (sheet[top + row * (PX + 2):][:PX, left:left + PX].astype(int) for row in (0, 1))
    assert np.abs(above - below).max() <= 2


def test_files_are_compared_at_one_size(tmp_path, encoders, write_images):
    rng = np.random.default_rng(5)
    training = draw(rng, 20)
    folder = write_images(tmp_path / "training", training)
    small = np.stack([np.asarray(Image.fromarray(patch).resize((24, 24), Image.Resampling.BOX)) for patch in training[:6]])
    copies = write_images(tmp_path / "copies", small)
    held_out = write_images(tmp_path / "held_out", draw(rng, 12))
    found = find_memorised(*(sorted(path.iterdir()) for path in (copies, held_out, folder)), encoders, progress=False, match_px=24)
    assert found.copies.all()


def test_pixels_are_a_space_of_their_own():
    rng = np.random.default_rng(7)
    training, held_out, fresh = draw(rng, 30), draw(rng, 20), draw(rng, 20)
    copies = np.stack([turn(training[k], k) for k in range(8)])
    found = find_memorised(np.concatenate([fresh, copies]), held_out, training, {"pixels": Pixels()}, progress=False)
    assert found.copies.tolist() == [False] * 20 + [True] * 8


def test_too_few_held_out_patches_are_refused(encoders):
    patches = draw(np.random.default_rng(6), 5)
    with pytest.raises(InputError, match="held-out: patches to look for copies: expected at least 10; found 5"):
        find_memorised(patches, patches, patches, encoders, progress=False)
