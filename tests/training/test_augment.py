"""Fast augmentation equals its formula, written plainly, and draws the numbers it always drew."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from training.augment import LUMA, TO_YIQ, AugmentConfig, apply_views, draw_views, plain_views
from training.clip_pairs import Pairs
from training.gan_data import mean_colour


def one_view(image, view):
    """The formula on one uint8 (3, H, H), in [0, 1], in float64: flips after turns, then colour step by step, each clamped."""
    flip_x, flip_y, turns, brightness, contrast, saturation, hue = view.tolist()
    pixels = np.rot90(image.double().numpy() / 255, int(turns), (1, 2))
    pixels = pixels[:, :, ::-1] if flip_x else pixels
    pixels = pixels[:, ::-1] if flip_y else pixels
    luma = LUMA.double().numpy()

    def grey(values):
        return np.tensordot(luma, values, 1)

    pixels = (pixels * brightness).clip(0, 1)
    pixels = ((pixels - grey(pixels).mean()) * contrast + grey(pixels).mean()).clip(0, 1)
    pixels = ((pixels - grey(pixels)) * saturation + grey(pixels)).clip(0, 1)
    yiq, angle = TO_YIQ.double().numpy(), hue * 2 * np.pi
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    return np.tensordot(np.linalg.inv(yiq) @ turn @ yiq, pixels, 1).clip(0, 1) * 2 - 1


@pytest.mark.parametrize("config", [AugmentConfig(rotate=True), AugmentConfig(True, True, 0.9, 0.9, 0.9, 0.5),
                                    AugmentConfig(True, True, 0, 0, 0, 0)], ids=["usual", "far", "laid only"])
def test_views_of_a_batch_equal_the_formula_of_each(config):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (21, 3, 16, 16), generator=generator, dtype=torch.uint8)      # more than two blocks
    views = draw_views(21, config, generator)
    expected = torch.from_numpy(np.stack([one_view(image, view) for image, view in zip(images, views, strict=True)]))
    assert (apply_views(images, views) - expected).abs().max() < 1e-5                           # a grey level is 0.008


def test_images_are_left_as_they_were():
    images = torch.full((3, 3, 8, 8), 9, dtype=torch.uint8)
    apply_views(images, draw_views(3, AugmentConfig(), torch.Generator().manual_seed(0)))
    assert (images == 9).all() and apply_views(images[:0], plain_views(0)).shape == (0, 3, 8, 8)


def test_a_batch_draws_for_every_row_what_it_draws_alone():
    images = torch.randint(0, 256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    config = AugmentConfig(rotate=True)
    pairs = Pairs(sp.csr_matrix((6, 2), dtype=np.float32), np.arange(6).astype(str), np.full(6, "S1"), images, np.zeros(6, int),
                  augment=config, seed=4)
    keys = [(10, 5), (10, 0), (11, 5)]
    seen = pairs.__getitems__(keys).seen
    for (step, row), view in zip(keys, seen, strict=True):
        generator = torch.Generator().manual_seed((4 * 1_000_003 + step) * 1_000_003 + row)
        assert torch.allclose(view, apply_views(images[[row]], draw_views(1, config, generator))[0], atol=1e-6)


def test_the_mean_colour_is_that_of_all_patches_whatever_the_block():
    images = torch.randint(0, 256, (7, 3, 4, 4), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for rows in (1, 3, 100):
        assert torch.allclose(mean_colour(images, rows), (images.double() / 127.5 - 1).mean((0, 2, 3)).float(), atol=1e-7)
