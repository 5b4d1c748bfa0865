"""The GAN's losses, blur, schedules, augmentation and average against values worked out by hand."""
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from preprocessing.errors import OptionError
from training.diff_augment import diff_augment
from training.ema import ema_beta, frozen_copy, half_life_kimg, update_average
from training.gan_draws import batch_rows, draw, draw_z, real_views
from training.gan_losses import (
    blur,
    blur_sigma,
    blur_taps,
    discriminator_loss,
    diversity_loss,
    generator_loss,
    guidance_loss,
    pair_deviations,
    scheduled_weight,
)


def test_hinge_losses():
    real, fake = torch.tensor([[2.0, 0.5], [-1.0, 1.0]]), torch.tensor([[-3.0, 0.0], [1.0, -1.0]])
    assert discriminator_loss(real, fake).item() == pytest.approx((0 + 0.5 + 2 + 0) / 4 + (0 + 1 + 2 + 0) / 4)
    assert generator_loss(fake).item() == pytest.approx(0.75)


def test_guidance_is_the_squared_angle():
    prompts = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    images = torch.tensor([[0.0, 1.0], [math.sqrt(0.5), math.sqrt(0.5)]])
    assert guidance_loss(images, prompts).item() == pytest.approx(((math.pi / 2) ** 2 + (math.pi / 4) ** 2) / 2)


def test_guidance_has_a_finite_gradient_where_image_and_prompt_agree():
    images = torch.tensor([[1.0, 0.0]], requires_grad=True)
    guidance_loss(images, torch.tensor([[1.0, 0.0]])).backward()
    assert torch.isfinite(images.grad).all()


def test_diversity_asks_for_the_difference_of_real_pairs_and_no_more():
    first, second = torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.4)
    assert torch.allclose(pair_deviations(first, second), torch.full((4,), 0.4))
    assert diversity_loss(first, first, torch.full((4,), 0.4)).item() == pytest.approx(1.0)
    assert diversity_loss(first, second, torch.full((4,), 0.8)).item() == pytest.approx(0.25)
    assert diversity_loss(first, second, torch.full((4,), 0.3)).item() == 0


def test_pixel_noise_does_not_pass_for_diversity():
    torch.manual_seed(0)
    noise = torch.randn(2, 4, 3, 32, 32)
    deviations = pair_deviations(*noise)
    assert deviations[-1] < deviations[0] / 6       # averages over 8 x 8 px


def test_blur_taps_are_powers_of_two_of_the_squared_distance():
    taps = blur_taps(1.5)
    expected = torch.tensor([2 ** -((t / 1.5) ** 2) for t in range(-4, 5)], dtype=torch.float64)
    assert torch.allclose(taps, expected / expected.sum())
    assert len(blur_taps(0.3)) == 1


def test_blur_equals_a_zero_padded_separable_convolution_also_when_wider_than_the_image():
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    for sigma in (1.0, 8.0):
        taps = blur_taps(sigma)
        reach = len(taps) // 2
        kernel = torch.outer(taps, taps)[None, None]
        expected = F.conv2d(images.flatten(0, 1)[:, None], kernel, padding=reach).view_as(images)
        assert torch.allclose(blur(images, sigma), expected)
    assert blur(images, 0.0) is images


def test_blur_reaches_three_widths():
    for sigma in (0.4, 1.0, 2.7, 32.0):
        taps = blur_taps(sigma)
        assert len(taps) == 2 * math.floor(3 * sigma) + 1 and taps.sum().item() == pytest.approx(1)
    taps = blur_taps(2.0)
    assert taps[6 + 2] / taps[6] == pytest.approx(0.5) and taps[6 + 4] / taps[6] == pytest.approx(1 / 16)


def test_blur_fades_linearly():
    assert [blur_sigma(kimg, 32, 1000) for kimg in (0, 250, 1000, 2000)] == [32, 24, 0, 0]


def test_schedules_count_in_kimg():
    assert [scheduled_weight(0.2, "const", kimg, 100) for kimg in (0, 99)] == [0.2, 0.2]
    assert [scheduled_weight(0.2, "step", kimg, 100) for kimg in (49, 50)] == pytest.approx([0.2, 0.02])
    assert [scheduled_weight(0.2, "linear", kimg, 100) for kimg in (0, 50, 100)] == pytest.approx([0, 0.1, 0.2])
    assert [scheduled_weight(0.2, "exp", kimg, 100) for kimg in (0, 50, 100)] == pytest.approx([0.002, 0.02, 0.2])
    with pytest.raises(OptionError, match="const, step, linear, exp"):
        scheduled_weight(1, "cosine", 0, 1)


def test_average_halves_the_distance_in_one_half_life():
    assert half_life_kimg(128) == 40
    n_images, batch = 10_000_000, 100
    steps = int(half_life_kimg(batch) * 1000 / batch)
    assert ema_beta(n_images, batch, half_life_kimg(batch)) ** steps == pytest.approx(0.5, rel=5e-3)
    assert ema_beta(1000, 50, 1000) == pytest.approx(0.5)       # ramp-up: at most 5 % of the images seen
    assert ema_beta(640_000, 128, 40) == pytest.approx(0.5 ** (128 / 32_000)) and ema_beta(800_000, 128, 40) == ema_beta(10 ** 9, 128, 40)


def test_average_moves_parameters_and_copies_buffers_and_frozen_ones():
    model = nn.BatchNorm1d(2)
    model.bias.requires_grad_(False)
    average = frozen_copy(model)
    with torch.no_grad():
        model.weight.fill_(3.0)
        model.bias.fill_(5.0)
        model.running_mean.fill_(7.0)
    update_average(average, model, beta=0.75)
    assert average.weight.tolist() == [1.5, 1.5] and average.bias.tolist() == [5, 5] and average.running_mean.tolist() == [7, 7]


def test_neutral_draws_leave_an_image_alone_but_for_its_hole():
    images = torch.rand(1, 3, 40, 40) * 2 - 1
    neutral = torch.tensor([[0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5]])
    seen = diff_augment(images, neutral)
    hole = torch.zeros(40, 40, dtype=torch.bool)
    hole[16:24, 16:24] = True
    assert torch.allclose(seen[..., ~hole], images[..., ~hole], atol=1e-6)
    assert (seen[..., hole] == 0).all()


def test_the_hole_reaches_every_edge_and_may_lie_half_outside():
    side, still = 40, [0.5, 0.5, 0.5, 0.5, 0.5]
    draws = torch.tensor([[*still, x, y] for x, y in ((0.0, 0.0), (0.999, 0.999), (0.5, 0.0))])
    holes = [(image[0] == 0).nonzero().tolist() for image in diff_augment(torch.ones(3, 3, side, side), draws)]
    assert [(min(hole), max(hole)) for hole in holes] == [([0, 0], [3, 3]), ([36, 36], [39, 39]), ([0, 16], [3, 23])]
    centres = (torch.arange(41) + 0.5) / 41
    cut = [(image[0, 20] == 0).sum().item() for image in
           diff_augment(torch.ones(41, 3, side, side), torch.tensor([[*still, x, 0.5] for x in centres.tolist()]))]
    assert cut == [4, 5, 6, 7] + [8] * 33 + [7, 6, 5, 4]              # every place of the centre once


def test_augmentation_moves_by_up_to_an_eighth_and_fills_with_zero():
    images, away = torch.ones(1, 3, 32, 32), 0.999
    seen = diff_augment(images, torch.tensor([[0.5, 0.5, 0.5, away, 0.0, away, away]]))[0, 0]
    assert (seen[:4] == 0).all() and (seen[:, -4:] == 0).all()
    assert (seen[4:26, :26] == 1).all()


def test_augmentation_brightens_before_it_scales_saturation_and_contrast():
    images = torch.tensor([0.2, 0.4, 0.9]).view(1, 3, 1, 1).expand(1, 3, 10, 10)
    seen = diff_augment(images, torch.tensor([[0.9, 0.25, 0.75, 0.5, 0.5, 0.0, 0.0]]))[0, :, 5, 5]
    bright = torch.tensor([0.6, 0.8, 1.3])
    saturated = bright.mean() + (bright - bright.mean()) * 0.5
    assert torch.allclose(seen, saturated.mean() + (saturated - saturated.mean()) * 1.25)
    unchanged = diff_augment(images, torch.tensor([[0.9, 0.25, 0.75, 0.5, 0.5, 0.0, 0.0]]), strength=0)[0, :, 5, 5]
    assert torch.allclose(unchanged, images[0, :, 5, 5])


SIZES = {"z_dim": 4, "noise_size": 9, "c_dim": 3}


def test_draws_depend_on_seed_step_phase_and_position_alone():
    whole, half = draw(1, 5, range(16), **SIZES), draw(1, 5, range(8), **SIZES)
    assert torch.equal(whole.part(0, 8).noise, half.noise) and torch.equal(whole.z[:8], half.z)
    for other in (draw(2, 5, range(8), **SIZES), draw(1, 6, range(8), **SIZES), draw(1, 5, range(8), **SIZES, phase=1)):
        assert not torch.equal(other.z, half.z)
    assert len(torch.unique(whole.z[:, 0])) == 16


def test_a_rank_draws_its_own_places_and_z_of_all_as_one_process_does():
    whole, own = draw(1, 5, range(16), **SIZES), draw(1, 5, range(4, 8), **SIZES)
    for name in vars(whole):
        assert torch.equal(getattr(whole, name)[4:8], getattr(own, name)), name
    assert torch.equal(draw_z(1, 5, range(16), 4), whole.z)


def test_a_place_draws_its_normal_numbers_and_then_its_uniform_ones():
    stream = np.random.Generator(np.random.Philox(key=[1, 5], counter=[0, 0, 1, 3]))
    normal, uniform = stream.standard_normal(4 + 9 + 3, dtype=np.float32), stream.random(7 + 7 + 3 + 3 + 3 + 1 + 1 + 65, dtype=np.float32)
    drawn = draw(1, 5, [3], **SIZES, phase=1)
    values = list(vars(drawn).values())
    assert torch.cat(values[:3], dim=1).tolist() == [normal.tolist()] and torch.cat(values[3:], dim=1).tolist() == [uniform.tolist()]


def test_every_epoch_shows_every_patch_once_in_another_order():
    rows = [row for step in range(6) for row in batch_rows(seed=0, step=step, batch=5, n_images=10)]
    for epoch in range(3):
        assert sorted(rows[epoch * 10:(epoch + 1) * 10]) == list(range(10))
    assert rows[:10] != rows[10:20]


def test_real_views_are_the_eight_flips_and_turns_and_small_mirrored_shifts():
    image = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    draws = torch.tensor([[(k + 0.5) / 8, 0.5, 0.5] for k in range(8)])
    views = real_views(image.expand(8, -1, -1, -1), draws, flips=True, max_shift_px=0)
    assert len({view.numpy().tobytes() for view in views}) == 8
    assert torch.equal(views[1], torch.rot90(image[0], 1, dims=(1, 2)))
    assert torch.equal(real_views(image, draws[:1], flips=False, max_shift_px=0), image)
    shifted = real_views(image, torch.tensor([[0.0, 0.99, 0.5]]), flips=False, max_shift_px=1)
    assert torch.equal(shifted[..., :3], image[..., 1:]) and torch.equal(shifted[..., 3], image[..., 2])
