"""The options that may better the published GAN: each does what it says, none depends on the micro-batch, all survive a stop."""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gan_runs import make_run, same, tiny_data
from torch import nn

from networks.discriminator import Head
from networks.snapshot import load_snapshot
from preprocessing.errors import OptionError, WeightsError
from training.checkpoints import latest_checkpoint
from training.diff_augment import adapted_p, augment_some, diff_augment
from training.ema import Averages, ema_beta, half_life_kimg
from training.gan_config import PRESETS, GanConfig, resolve
from training.gan_draws import UNLIKE_POOL, batch_rows, draw, unlike_rows
from training.gan_losses import contrastive_guidance, feature_penalty, mismatch_loss
from training.guidance import wanted_prompts
from training.held_out import HeldOut, real_logits

EVERYTHING = {"mismatch_weight": 0.5, "clip_weight": 0.2, "clip_loss": "infonce", "augment_target": 0.1, "augment_kimg": 0.04,
              "r1_weight": 1.0, "r1_interval": 2, "emas": "0.5,1,2"}
OFF = {"mismatch_weight": 0.0, "clip_loss": "spherical", "augment_target": None, "r1_weight": 0.0, "emas": "1"}


def gradients(run, step=0, clip_weight=0.0):
    run.gan.gradients(step, sigma=1.0, clip_weight=clip_weight)
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone()
            for p in (*run.gan.generator.parameters(), *run.gan.discriminator.heads.parameters())]


@pytest.mark.parametrize("preset", PRESETS)
def test_all_options_together_survive_a_stop_bit_for_bit(tmp_path, preset):
    straight, stopped = make_run(tmp_path / "a", preset, **EVERYTHING), make_run(tmp_path / "b", preset, **EVERYTHING)
    for _ in range(5):
        straight.one_step()
    for _ in range(2):
        stopped.one_step()
    stopped.save()
    resumed = make_run(tmp_path / "b", preset, **EVERYTHING)
    resumed.load(latest_checkpoint(tmp_path / "b"))
    assert same(resumed, stopped) and resumed.gan.augment_p == stopped.gan.augment_p > 0
    for _ in range(3):
        resumed.one_step()
    assert same(resumed, straight) and resumed.progress.augment_p == straight.progress.augment_p


@pytest.mark.parametrize("preset", PRESETS)
def test_no_option_depends_on_the_micro_batch(tmp_path, preset):
    found = []
    for micro in (8, 16, 32):
        run = make_run(tmp_path / str(micro), preset, data=tiny_data(n=32), batch=32, batch_gpu=micro,
                       **{**EVERYTHING, "diversity_weight": 1.0})
        run.gan.augment_p = 0.5
        losses = run.gan.gradients(0, sigma=1.0, clip_weight=0.2)
        found.append((losses, [p.grad for p in (*run.gan.generator.parameters(), *run.gan.discriminator.heads.parameters())]))
    for losses, moved in found[1:]:
        assert losses == pytest.approx(found[0][0], rel=1e-4)
        for a, b in zip(moved, found[0][1], strict=True):
            assert torch.allclose(a, b, atol=1e-4 * max(b.abs().max().item(), 1e-2))


@pytest.mark.parametrize("said", [{"mismatch_weight": 0.5}, {"r1_weight": 1.0}, {"r1_weight": 1.0, "r1_interval": 1},
                                  {"augment_target": 0.6}], ids=str)
@pytest.mark.parametrize("shared_pass", [True, False], ids=["one pass", "two passes"])
def test_an_option_of_the_discriminator_changes_its_gradients_and_off_is_the_published_step(tmp_path, said, shared_pass):
    plain = gradients(make_run(tmp_path / "a", shared_pass=shared_pass))
    off = gradients(make_run(tmp_path / "b", shared_pass=shared_pass, **OFF))
    changed = gradients(make_run(tmp_path / "c", shared_pass=shared_pass, **said))
    assert all(torch.equal(a, b) for a, b in zip(plain, off, strict=True))
    assert any(not torch.allclose(a, b, rtol=1e-3) for a, b in zip(plain, changed, strict=True))


def test_the_reference_has_none_of_them():
    config = resolve("reference", "lite", img_resolution=64, batch=32)
    assert {name: getattr(config, name) for name in OFF} == OFF


@pytest.mark.parametrize("wrong", [{"augment_target": 1.5}, {"augment_target": -0.1}, {"augment_kimg": 0.0}, {"r1_weight": -1.0},
                                   {"r1_interval": 0}, {"mismatch_weight": float("nan")}, {"emas": "0.5,2"}, {"emas": "1,-2"},
                                   {"emas": "one"}, {"emas": ""}, {"emas": "1,inf"}, {"clip_loss": "infonce"}], ids=str)
def test_impossible_values_are_refused_by_the_options_name(wrong):
    with pytest.raises(OptionError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        GanConfig(img_resolution=16, batch=8, **wrong)


# ---- mismatch --------------------------------------------------------------------------------------------------------


def test_a_mismatched_pair_is_a_negative():
    assert mismatch_loss(torch.tensor([[-3.0, 0.0], [1.0, -1.0]])).item() == pytest.approx((0 + 1 + 2 + 0) / 4)


def test_an_unlike_spot_is_never_the_spot_itself_and_lies_beyond_the_median():
    prompts = torch.linspace(0, 1, 200)[:, None] ** 2                    # on a line, so that the order of distances is plain
    rows, draws = torch.arange(200).repeat(20), torch.rand(4000, UNLIKE_POOL + 1, generator=torch.Generator().manual_seed(0))
    chosen = unlike_rows(prompts, rows, draws)
    assert (chosen != rows).all()
    distance = (prompts - prompts.T).abs()
    rank = distance.argsort(dim=1).argsort(dim=1)[rows, chosen]          # 0 is the spot itself
    assert (rank > 60).all() and (rank > 95).float().mean() > 0.9
    assert abs((rank[rank > 100] - 150).float().mean().item()) < 3       # about evenly over the farther half


def test_an_unlike_spot_depends_on_seed_step_and_place_alone():
    prompts = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    sizes = {"z_dim": 4, "noise_size": 9, "c_dim": 6}

    def chosen(seed, step, batch):
        return unlike_rows(prompts, torch.zeros(8, dtype=torch.int64), draw(seed, step, range(batch), **sizes).unlike[:8]).tolist()

    assert chosen(0, 3, 8) == chosen(0, 3, 32) and len({tuple(chosen(*key, 8)) for key in ((0, 3), (0, 4), (1, 3))}) == 3
    assert len(set(chosen(0, 3, 8))) > 1


def test_the_mismatch_loss_of_a_step_is_that_of_its_real_patches_with_the_drawn_prompts(tmp_path):
    run = make_run(tmp_path / "a", mismatch_weight=1.0, shared_pass=False, cond_noise=0.0, flips=False, max_shift_px=0)
    found = run.gan.gradients(0, sigma=0.0, clip_weight=0)["loss/mismatch"]
    rows, draws, discriminator = torch.from_numpy(batch_rows(0, 0, 8, 24)), run.gan._draw(0, phase=1), run.gan.discriminator
    other = run.training.prompts[unlike_rows(run.training.prompts, rows, draws.unlike)]
    seen = diff_augment(run.training.images[rows] / 127.5 - 1, draws.augment_real, run.config.colour_strength)
    assert found == pytest.approx(F.relu(1 + discriminator(seen, other, draws.crop_real)).mean().item(), rel=1e-5)


def test_a_discriminator_that_is_shown_mismatches_looks_at_the_genes_sooner(tmp_path):
    gaps = []
    for weight in (0.0, 1.0):
        run = make_run(tmp_path / str(weight), mismatch_weight=weight, kimg=0.032, d_lr=0.01)
        while run.share < 1:
            run.one_step()
        images, prompts = run.training.images[:16], run.training.prompts[:16]
        own, other = (real_logits(run.gan, images, c, 0.0).mean().item() for c in (prompts, prompts.roll(1, dims=0)))
        gaps.append(own - other)                                         # red patches under the genes of blue ones
    assert gaps[1] > gaps[0] + 0.5


# ---- guidance --------------------------------------------------------------------------------------------------------


def test_contrastive_guidance_is_the_log_share_of_the_own_prompt():
    images, prompts = torch.tensor([[1.0, 0.0], [0.6, 0.8]]), torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    expected = 0.0
    for cosines, own in (([1.0, 0.0, -1.0], 0), ([0.6, 0.8, -0.6], 1)):
        expected -= math.log(math.exp(cosines[own] / 0.5) / sum(math.exp(cosine / 0.5) for cosine in cosines)) / 2
    assert contrastive_guidance(images, prompts, torch.tensor([0, 1]), 0.5).item() == pytest.approx(expected)


def test_a_prompt_that_comes_twice_in_a_batch_is_no_negative_of_itself():
    prompts, rows = torch.eye(5) * 3, np.array([4, 2, 4, 0])
    wanted = wanted_prompts(prompts, rows, in_pairs=False)
    assert torch.equal(wanted.prompts[wanted.index], torch.eye(5)[[4, 2, 4, 0]]) and len(wanted.prompts) == 3
    pairs = wanted_prompts(prompts, rows, in_pairs=True)
    assert torch.equal(pairs.prompts[pairs.index], torch.eye(5)[[4, 4, 4, 4]])


def test_either_guidance_pulls_generated_patches_to_their_prompts_and_they_differ(tmp_path):
    found = []
    for kind in ("spherical", "infonce"):
        run = make_run(tmp_path / kind, clip_weight=1.0, clip_loss=kind)
        plain, guided = gradients(run), gradients(run, clip_weight=1.0)
        n = len(list(run.gan.generator.parameters()))
        assert any(not torch.allclose(a, b) for a, b in zip(plain[:n], guided[:n], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(plain[n:], guided[n:], strict=True))      # the discriminator is not guided
        found.append(guided[:n])
    assert any(not torch.allclose(a, b) for a, b in zip(*found, strict=True))


# ---- adaptive augmentation and the alarm -----------------------------------------------------------------------------


def test_augmentation_rises_over_the_target_falls_under_it_and_stays_a_probability():
    assert adapted_p(0.2, sign=0.7, target=0.6, n_images=100, kimg=1.0) == pytest.approx(0.3)
    assert adapted_p(0.2, sign=0.5, target=0.6, n_images=100, kimg=1.0) == pytest.approx(0.1)
    assert adapted_p(0.2, sign=0.6, target=0.6, n_images=100, kimg=1.0) == 0.2
    assert adapted_p(0.95, 1.0, 0.6, 100, 1.0) == 1 and adapted_p(0.05, -1.0, 0.6, 100, 1.0) == 0


def test_only_images_whose_coin_falls_under_p_are_augmented():
    images, draws = torch.rand(4, 3, 16, 16) * 2 - 1, torch.rand(4, 7, generator=torch.Generator().manual_seed(0))
    coins, whole = torch.tensor([[0.1], [0.5], [0.4], [0.9]]), diff_augment(images, draws)
    seen = augment_some(images, draws, coins, p=0.5)
    assert torch.equal(seen[[0, 2]], whole[[0, 2]]) and torch.equal(seen[[1, 3]], images[[1, 3]])
    assert torch.equal(augment_some(images, draws, coins, p=1.0), whole) and torch.equal(augment_some(images, draws, coins, p=0.0), images)


def test_real_and_generated_patches_have_coins_of_their_own():
    sizes = {"z_dim": 1, "noise_size": 1, "c_dim": 1}
    drawn = draw(0, 5, range(4000), **sizes)
    coins = torch.cat((drawn.coin_fake, drawn.coin_real), dim=1)
    assert ((coins.mean(dim=0) - 0.5).abs() < 0.02).all() and abs(torch.corrcoef(coins.T)[0, 1]) < 0.05
    assert torch.equal(drawn.coin_real[:8], draw(0, 5, range(8), **sizes).coin_real)


def test_augmentation_starts_at_none_follows_the_sign_and_is_always_on_without_a_target(tmp_path):
    run = make_run(tmp_path / "a", augment_target=0.5, augment_kimg=0.08)
    assert run.gan.augment_p == 0
    seen = []
    for _ in range(4):
        before = run.gan.augment_p
        sign = run.one_step()["logits/sign"]
        seen.append((run.gan.augment_p, min(max(before + (0.1 if sign > 0.5 else -0.1), 0), 1)))
    assert all(p == pytest.approx(expected) for p, expected in seen) and run.progress.augment_p == run.gan.augment_p
    assert make_run(tmp_path / "b").gan.augment_p == 1


def test_the_sign_statistic_is_over_all_logits_of_the_real_patches(tmp_path):
    run = make_run(tmp_path / "a", shared_pass=False)
    seen, real = [], run.gan._discriminator_backward
    run.gan._discriminator_backward = lambda logits, *rest: seen.append(logits.detach()) or real(logits, *rest)
    assert run.gan.gradients(0, sigma=0.0, clip_weight=0)["logits/sign"] == pytest.approx(seen[0].sign().mean().item())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_overfitting_alarm_speaks_at_every_tick_and_touches_nothing(tmp_path, preset):
    plain, watched = make_run(tmp_path / "a", preset), make_run(tmp_path / "b", preset, data=tiny_data(validation=True))
    for run in (plain, watched):
        list(run.train())
    assert same(plain, watched)
    ticks = [[line for line in map(json.loads, (run.folder / "stats.jsonl").read_text().splitlines()) if "loss/D" in line]
             for run in (plain, watched)]
    assert all({"logits/val", "logits/gap"} <= set(line) for line in ticks[1]) and not any("logits/val" in line for line in ticks[0])
    assert len(ticks[1]) == 10


def test_the_gap_is_nought_for_the_same_patches_and_grows_when_training_ones_are_known_by_heart(tmp_path):
    run = make_run(tmp_path / "a")
    alike = HeldOut(run.training, run.training, seed=0)
    assert alike.measure(run.gan, 0.0)["logits/gap"] == 0
    strangers = replace(run.training, images=255 - run.training.images)   # held-out tissue that looks otherwise
    watch = HeldOut(run.training, strangers, seed=0)
    before = watch.measure(run.gan, 0.0)["logits/gap"]
    for _ in range(40):
        run.one_step()
    assert watch.measure(run.gan, 0.0)["logits/gap"] > before + 0.1


def test_few_held_out_patches_are_judged_in_whole_groups(tmp_path):
    run = make_run(tmp_path / "a")
    few = replace(run.training, images=run.training.images[:3], prompts=run.training.prompts[:3])
    images, prompts = HeldOut(run.training, few, seed=0).sets["val"]
    assert len(images) == len(prompts) == 8 and len(torch.unique(images, dim=0)) == 3
    assert math.isfinite(HeldOut(run.training, few, seed=0).measure(run.gan, 1.0)["logits/val"])


# ---- gradient penalty ------------------------------------------------------------------------------------------------


def tiny_head():
    torch.manual_seed(0)
    return Head(4, 3).double(), torch.randn(16, 4, 5, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)


def penalty_of(head, tokens, c, images=slice(None)):
    tokens = tokens.detach().requires_grad_()
    return feature_penalty(head(tokens, c)[images], [tokens], images)


def test_the_penalty_is_the_squared_gradient_of_the_summed_logits_a_token():
    head, tokens, c = tiny_head()
    for images in (slice(None), slice(1, None, 2)):
        slopes, step = torch.zeros_like(tokens), 1e-6
        for index in np.ndindex(*tokens.shape):
            up, down = tokens.clone(), tokens.clone()
            up[index] += step
            down[index] -= step
            slopes[index] = (head(up, c)[images].sum() - head(down, c)[images].sum()).item() / (2 * step)
        assert penalty_of(head, tokens, c, images).item() == pytest.approx((slopes[images] ** 2).sum(dim=1).mean().item(), rel=1e-6)


def test_the_penalty_moves_the_heads_as_finite_differences_say():
    head, tokens, c = tiny_head()
    penalty_of(head, tokens, c).backward()
    for name, index in (("conv_in.weight", (1, 2, 0)), ("norm_in.weight", (3,)), ("norm_in.bias", (0,)), ("conv_mid.weight", (2, 1, 4)),
                        ("conv_out.weight", (7, 0, 0)), ("prompt.weight", (9, 1))):
        weight, step, values = head.get_parameter(name), 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                weight[index] += sign * step
            values.append(penalty_of(head, tokens, c).item())
            with torch.no_grad():
                weight[index] -= sign * step
        assert weight.grad[index].item() == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-4, abs=1e-8), name


def test_the_penalty_comes_every_interval_counts_that_often_and_leaves_the_generator_alone(tmp_path):
    runs = {interval: make_run(tmp_path / str(interval), r1_weight=2.0, r1_interval=interval) for interval in (1, 3)}
    plain = make_run(tmp_path / "plain")
    values = {interval: [run.gan.gradients(step, sigma=1.0, clip_weight=0)["loss/r1"] for step in range(4)]
              for interval, run in runs.items()}
    assert all(value > 0 for value in values[1]) and values[3][1:3] == [0, 0]
    assert [values[3][step] / values[1][step] for step in (0, 3)] == pytest.approx([3, 3])
    n, without = len(list(plain.gan.generator.parameters())), gradients(plain)
    once, thrice = gradients(runs[1]), gradients(runs[3])
    for a, b, c in zip(without, once, thrice, strict=True):
        assert torch.allclose(c - a, 3 * (b - a), atol=1e-4 * max(c.abs().max().item(), 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(without[:n], thrice[:n], strict=True))
    assert all(p.grad is None for p in runs[3].gan.discriminator.taps.parameters())


# ---- several averages ------------------------------------------------------------------------------------------------


def test_an_average_of_a_multiple_forgets_that_much_more_slowly():
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    averages = Averages(model, (0.5, 1.0, 2.0), batch=8)
    with torch.no_grad():
        model.weight.fill_(1.0)
    n_images = 10_000_000
    averages.update(model, n_images)
    left = {multiple: 1 - average.weight.item() for multiple, average in averages.models.items()}
    beta = ema_beta(n_images, 8, half_life_kimg(8))
    assert beta == pytest.approx(0.5 ** (8 / 2500))
    assert [left[multiple] for multiple in (0.5, 1.0, 2.0)] == pytest.approx([beta ** 2, beta, beta ** 0.5], rel=1e-6)
    assert list(averages.others) == ["ema-1.25", "ema-5"]


def test_further_averages_lie_in_the_snapshot_and_the_published_one_is_as_without_them(tmp_path):
    one, several = make_run(tmp_path / "a", kimg=0.08), make_run(tmp_path / "b", kimg=0.08, emas="0.5,1,2")
    for run in (one, several):
        list(run.train())
    ours, theirs = one.average.state_dict(), several.average.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    folder = several.folder / "snapshot-000080"
    published = load_snapshot(folder).generator.state_dict()
    for name, multiple in (("ema-1.25", 0.5), ("ema-5", 2.0)):
        other = load_snapshot(folder / name)
        tensors = several.averages.models[multiple].state_dict()
        assert all(torch.equal(tensor, tensors[key]) for key, tensor in other.generator.state_dict().items())
        assert any(not torch.equal(tensor, published[key]) for key, tensor in tensors.items())
        shown = [line for line in map(json.loads, (several.folder / "stats.jsonl").read_text().splitlines())
                 if f"diversity/generated/{name}" in line][-1]
        assert shown[f"diversity/generated/{name}"] == other.config["diversity"]["generated"] != shown["diversity/generated"]


def test_a_checkpoint_without_an_average_that_is_asked_for_is_refused(tmp_path):
    run = make_run(tmp_path / "a", emas="1,2")
    checkpoint = latest_checkpoint(run.save().parent)
    with pytest.raises(WeightsError, match="emas 1,2 -> 1,4"):
        make_run(tmp_path / "a", emas="1,4").load(checkpoint)
    lacking = replace(checkpoint, tensors={name: part for name, part in checkpoint.tensors.items() if name != "average-2"})
    with pytest.raises(WeightsError, match="no average-2"):
        make_run(tmp_path / "a", emas="1,2").load(lacking)


def test_a_checkpoint_older_than_these_options_goes_on_without_them(tmp_path):
    run = make_run(tmp_path / "a")
    run.one_step()
    checkpoint = latest_checkpoint(run.save().parent)
    younger = {*OFF, "augment_kimg", "r1_interval"}
    state = {name: value for name, value in checkpoint.state.items() if name != "augment_p"}
    state["config"] = {name: value for name, value in state["config"].items() if name not in younger}
    resumed = make_run(tmp_path / "a")
    resumed.load(replace(checkpoint, state=state))
    for each in (run, resumed):
        each.one_step()
    assert same(run, resumed) and resumed.gan.augment_p == 1
    with pytest.raises(WeightsError, match="mismatch_weight 0.0 -> 0.5"):
        make_run(tmp_path / "a", mismatch_weight=0.5).load(replace(checkpoint, state=state))
