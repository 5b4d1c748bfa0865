"""The GAN's loop: what a step depends on, that a run can be stopped anywhere, and what it leaves behind."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gan_runs import TINY, gene_encoder, make_run, same, tiny_data, weights
from processes import press_twice

from networks.histo_models import build_encoder
from networks.snapshot import load_snapshot
from preprocessing.errors import DivergedError, InputError, OptionError, WeightsError
from training.checkpoints import latest_checkpoint
from training.cond_dropout import CondDropout
from training.ema import frozen_copy
from training.gan_config import PRESETS, GanConfig, resolve
from training.gan_data import gan_data, neighbour_deviations
from training.gan_draws import batch_rows
from training.gan_grids import generate
from training.gan_loop import GanRun
from training.gan_step import alternate
from training.warm_start import _set_clock

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_resumed_run_equals_the_straight_one_bit_for_bit(tmp_path, preset):
    straight, stopped = make_run(tmp_path / "a", preset), make_run(tmp_path / "b", preset)
    for _ in range(6):
        straight.one_step()
    for _ in range(int(np.random.default_rng().integers(1, 6))):
        stopped.one_step()
    stopped.save()
    resumed = make_run(tmp_path / "b", preset)
    resumed.load(latest_checkpoint(tmp_path / "b"))
    assert resumed.progress.step == stopped.progress.step and same(resumed, stopped)
    while resumed.progress.step < 6:
        resumed.one_step()
    assert same(resumed, straight)


@pytest.mark.parametrize("preset", PRESETS)
def test_micro_batches_do_not_change_the_gradients(tmp_path, preset):
    found = []
    for micro in (8, 16):
        run = make_run(tmp_path / str(micro), preset, batch=16, batch_gpu=micro)
        losses = run.gan.gradients(3, sigma=1.0, clip_weight=0)
        found.append((losses, [p.grad for p in (*run.gan.generator.parameters(), *run.gan.discriminator.heads.parameters())]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(b.abs().max().item(), 1e-2))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_step_moves_the_weights_alike_at_micro_batches_of_8_16_and_32(tmp_path, preset):
    moved = []
    for micro in (8, 16, 32):
        run = make_run(tmp_path / str(micro), preset, data=tiny_data(n=32), batch=32, batch_gpu=micro)
        losses = run.gan.gradients(0, sigma=1.0, clip_weight=0)
        grads = [p.grad.clone() for p in (*run.gan.generator.parameters(), *run.gan.discriminator.heads.parameters())]
        for optimiser in (run.gan.g_optimiser, run.gan.d_optimiser):     # plain steps: Adam's first one is the sign of the gradient
            for parameter in optimiser.param_groups[0]["params"]:
                parameter.data.sub_(parameter.grad)
        run.gan.discriminator.update_spectral_norm()
        after = run.gan.gradients(1, sigma=0.5, clip_weight=0)
        moved.append(([*losses.values(), *after.values()], grads))
    for numbers, grads in moved[1:]:
        assert numbers == pytest.approx(moved[0][0], rel=1e-3, abs=1e-4)
        for a, b in zip(grads, moved[0][1], strict=True):
            assert torch.allclose(a, b, atol=1e-5 * max(b.abs().max().item(), 1.0))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_running_mean_of_x_moves_once_a_step_whatever_the_micro_batch(tmp_path, preset):
    means = []
    for micro in (8, 16):
        run = make_run(tmp_path / str(micro), preset, batch=16, batch_gpu=micro)
        z = run.gan._draw(0).z
        x = run.gan.generator.mapping_network._mapped(z).detach()
        run.one_step()
        means.append(run.gan.generator.mapping_network.x_avg.clone())
        assert torch.allclose(means[-1], 0.005 * x.mean(dim=0), rtol=1e-4)
    assert torch.equal(*means) and torch.equal(run.average.mapping_network.x_avg, means[-1])


def test_a_checkpoint_at_every_step_leaves_the_weights_as_without(tmp_path):
    plain, saving = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    for _ in range(3):
        plain.one_step()
        saving.one_step()
        saving.save()
        saving.showcase.diversity(saving.average)
    assert same(plain, saving)


def test_the_discriminators_loss_does_not_move_the_generator_nor_the_other_way_round(tmp_path):
    run = make_run(tmp_path / "a")
    run.gan.gradients(0, sigma=0, clip_weight=0)
    both = [p.grad.clone() for p in run.gan.generator.parameters()]
    run.gan._discriminator_backward = lambda *_: None
    run.gan.gradients(0, sigma=0, clip_weight=0)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(run.gan.generator.parameters(), both, strict=True))
    assert all(p.grad is None for p in run.gan.discriminator.heads.parameters())


def test_a_short_run_leaves_an_untrained_snapshot_and_at_least_five_more_with_pictures(tmp_path):
    run = make_run(tmp_path / "run", data=tiny_data(validation=True))
    steps = sum(1 for _ in run.train())
    assert steps == 10
    names = sorted(path.name for path in run.folder.glob("snapshot-*"))
    assert names[0] == "snapshot-000000" and names[-1] == "snapshot-000080" and len(names) >= 6
    assert sorted(path.stem for path in (run.folder / "samples").iterdir()) == names
    lines = [json.loads(line) for line in (run.folder / "stats.jsonl").read_text().splitlines()]
    assert {"loss/D", "loss/G", "sec_per_kimg"} <= set().union(*lines) and any("diversity/real" in line for line in lines)
    assert latest_checkpoint(run.folder).state["step"] == 10
    snapshot = load_snapshot(run.folder / names[-1])
    keys = [(0, 0)] * 8
    assert torch.equal(generate(snapshot.generator, run.showcase.prompts, keys), generate(run.average, run.showcase.prompts, keys))


def test_diversity_is_measured_with_and_without_the_per_pixel_noise_and_kept_in_the_snapshot(tmp_path):
    run = make_run(tmp_path / "run", kimg=0.008)
    list(run.train())
    facts = load_snapshot(run.folder / "snapshot-000008").config["diversity"]
    shown = [line for line in map(json.loads, (run.folder / "stats.jsonl").read_text().splitlines()) if "diversity/real" in line][-1]
    assert {name: facts[name] for name in ("generated", "generated_z", "real")} == {
        name: shown[f"diversity/{name}"] for name in ("generated", "generated_z", "real")}


def test_a_generator_that_ignores_z_has_diversity_by_noise_but_none_by_z(tmp_path):
    run = make_run(tmp_path / "run", noise_init=1.0)
    with torch.no_grad():
        run.average.mapping_network.fc1.weight.zero_()               # z no longer reaches the picture
    found = run.showcase.diversity(run.average)
    assert found["generated"] > 1 and found["generated_z"] == 0
    assert run.showcase.diversity(frozen_copy(run.gan.generator))["generated_z"] > 0


def test_the_blur_fades_over_a_tenth_of_the_run_also_under_a_time_budget(tmp_path, monkeypatch):
    run, seen = make_run(tmp_path / "a", kimg=1000.0, budget_minutes=10.0), []
    monkeypatch.setattr(run.gan, "gradients", lambda step, sigma, clip_weight: seen.append(sigma) or {"loss/D": float("nan")})
    for seconds in (0, 30, 60, 300):
        run.progress.elapsed_s = float(seconds)
        run.one_step()
    assert seen == pytest.approx([2.0, 1.0, 0.0, 0.0])


def sigmas_of(run, monkeypatch, n, seconds=0.0):
    seen, real = [], run.gan.gradients
    monkeypatch.setattr(run.gan, "gradients", lambda step, **kwargs: seen.append(kwargs["sigma"]) or real(step, **kwargs))
    for _ in range(n):
        run.progress.elapsed_s += seconds
        run.one_step()
    return seen


def test_a_longer_run_does_not_blur_again_when_resumed(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=0.32)                            # fades over 0.032 kimg: 4 steps
    assert sigmas_of(run, monkeypatch, 3) == pytest.approx([2.0, 1.5, 1.0])
    run.save()
    longer = make_run(tmp_path / "a", kimg=320.0)
    longer.load(latest_checkpoint(tmp_path / "a"))
    assert sigmas_of(longer, monkeypatch, 3) == pytest.approx([0.5, 0.0, 0.0])


def test_the_blur_of_a_larger_time_budget_does_not_rise_again(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=1000.0, budget_minutes=1.0)
    assert sigmas_of(run, monkeypatch, 2, seconds=2.0) == pytest.approx([2 - 2 / 3, 2 - 4 / 3])
    run.save()
    longer = make_run(tmp_path / "a", kimg=1000.0, budget_minutes=10.0)
    longer.load(latest_checkpoint(tmp_path / "a"))
    seen = sigmas_of(longer, monkeypatch, 4, seconds=14.0)
    assert seen == pytest.approx([2 - 4 / 3, 2 - 4 / 3, 2 * (1 - 46 / 60), 0.0])


def test_guidance_is_scheduled_by_images_and_not_by_the_clock(tmp_path, monkeypatch):
    run, seen = make_run(tmp_path / "a", kimg=0.16, budget_minutes=10.0, clip_weight=1.0, clip_schedule="linear"), []
    monkeypatch.setattr(run.gan, "gradients", lambda step, sigma, clip_weight: seen.append(clip_weight) or {"loss/D": float("nan")})
    for seconds in (0, 300, 500):
        run.progress.elapsed_s = float(seconds)
        run.one_step()
    assert seen == pytest.approx([0.0, 0.05, 0.1])


def test_the_reference_multiplies_guidance_by_its_micro_batch_and_fades_its_blur_over_1000_kimg():
    published = resolve("reference", "lite", img_resolution=64, batch=32, batch_gpu=16, clip_weight=0.2)
    ours = resolve("best", "lite", img_resolution=64, batch=32, batch_gpu=16, clip_weight=0.2)
    assert published.guidance_weight == pytest.approx(3.2) and ours.guidance_weight == 0.2
    assert (published.blur_fade_kimg, published.cond_dropout) == (1000.0, 0.8)
    assert (ours.blur_fade_kimg, ours.cond_dropout) == (None, 0.0)


def test_condition_dropout_gives_the_generator_prompts_from_a_dropped_encoder_and_the_discriminator_the_plain_ones(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", "reference")
    given, judged, project = [], [], run.gan.discriminator.project
    run.gan.generator.register_forward_pre_hook(lambda _module, args: given.append(args[1].clone()))
    monkeypatch.setattr(run.gan.discriminator, "project", lambda maps, c: judged.append(c.clone()) or project(maps, c))
    run.gan.gradients(0, sigma=0.0, clip_weight=0.0)
    plain = run.training.prompts[batch_rows(run.config.seed, 0, 8, len(run.training.prompts))]
    assert all(torch.equal(c, plain) for c in judged) and len(judged) == 3
    assert len(given) == 2 and not torch.allclose(*given)                # the generator's and the discriminator's phase
    assert all(torch.allclose(c.norm(dim=1), torch.ones(8)) and not torch.allclose(c, plain) for c in given)


def test_condition_dropout_without_expression_or_without_a_dropout_layer_is_refused(tmp_path):
    data = tiny_data()
    config = resolve("reference", "custom", **TINY)
    with pytest.raises(OptionError, match="--cond-dropout: expected expression and a gene encoder"):
        GanRun(config, data, build_encoder("random_tiny"), tmp_path)
    data.training.expression = None
    with pytest.raises(OptionError, match="ready-made prompt embeddings"):
        GanRun(config, data, build_encoder("random_tiny"), tmp_path, clip=gene_encoder())
    with pytest.raises(OptionError, match="a gene encoder with dropout"):
        CondDropout(gene_encoder(gene_encoder="identity"), tiny_data().training.expression, 0.8, seed=0)


def test_a_run_in_which_no_step_moved_ends_with_an_error_and_no_last_snapshot(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=0.016)
    monkeypatch.setattr(run.gan, "gradients", lambda step, **_: {"loss/D": float("nan")})
    with pytest.raises(DivergedError, match="nothing was learned") as stopped:
        list(run.train())
    assert stopped.value.exit_code == 1 and not (run.folder / "snapshot-000016").exists()


def test_other_images_under_the_same_prompts_are_other_data(tmp_path):
    run, others = make_run(tmp_path / "a"), tiny_data()
    run.save()
    others.training.images[0, 0, 0, 0] += 1
    changed = gan_data("TINY", others.training, others.barcodes)
    assert changed.record["images_sha256"] != run.data.record["images_sha256"]
    assert changed.record["prompts_sha256"] == run.data.record["prompts_sha256"]
    with pytest.raises(WeightsError, match="patches and prompts"):
        make_run(tmp_path / "a", data=changed).load(latest_checkpoint(tmp_path / "a"))


def test_a_time_budget_ends_the_run_cleanly(tmp_path):
    run = make_run(tmp_path / "a", kimg=1000.0, budget_minutes=1.0)
    for _ in run.train():
        run.config = replace(run.config, budget_minutes=1e-6)
    assert run.share == 1 and latest_checkpoint(run.folder) is not None and run.progress.step < 5


def test_one_bad_step_is_skipped_and_counted(tmp_path, monkeypatch, caplog):
    run = make_run(tmp_path / "a")
    run.one_step()
    before, real = [tensor.clone() for tensor in weights(run)], run.gan.gradients

    def poisoned(step, **kwargs):
        losses = real(step, **kwargs)
        next(run.gan.generator.parameters()).grad.fill_(float("nan"))
        return losses

    monkeypatch.setattr(run.gan, "gradients", poisoned)
    assert run.one_step() is None
    now, kept = run.gan.generator.state_dict(), dict(zip(run.gan.generator.state_dict(), before, strict=False))
    assert all(torch.equal(now[name], kept[name]) for name in now)       # x_avg too
    assert run.progress.bad_steps == 1 and "skipped" in caplog.text
    monkeypatch.setattr(run.gan, "gradients", real)
    assert run.one_step() is not None and run.progress.bad_in_a_row == 0


def test_bad_steps_without_end_stop_the_run_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", max_bad_steps=3, tick=0.008, snap=1)     # every step is due
    break_steps(monkeypatch, run, {2, 3, 4})
    steps = next_steps(run, 2)
    good = [tensor.clone() for tensor in run.gan.generator.parameters()]
    with pytest.raises(DivergedError, match="3 steps in a row") as stopped:
        list(steps)
    assert stopped.value.exit_code == 1 and len(list(run.folder.glob("snapshot-*"))) == 3, "that of the start, and two"
    assert sorted(path.name for path in run.folder.glob("checkpoint-*")) == ["checkpoint-00000001", "checkpoint-00000002"]
    kept = latest_checkpoint(run.folder).tensors["generator"]
    names = [name for name, _ in run.gan.generator.named_parameters()]
    assert all(torch.equal(kept[name], tensor) for name, tensor in zip(names, good, strict=True))


def test_a_snapshot_due_while_steps_are_skipped_is_written_after_the_next_good_one(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=0.048, tick=0.016, snap=1)          # due after steps 2 and 4, and every fifth of the run
    break_steps(monkeypatch, run, {1, 2})
    list(run.train())
    assert [path.name for path in sorted(run.folder.glob("snapshot-*"))] == [
        f"snapshot-{images:06d}" for images in (0, 32, 40, 48)]


def test_a_gan_run_that_ends_while_steps_are_skipped_diverged(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=0.048)
    break_steps(monkeypatch, run, {4, 5})
    with pytest.raises(DivergedError, match="in the last 2 steps of the run") as stopped:
        list(run.train())
    assert stopped.value.exit_code == 1 and latest_checkpoint(run.folder).state["step"] == 4
    assert not (run.folder / "snapshot-000048").exists()


def test_one_skipped_step_at_the_end_is_no_divergence(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=0.048)
    break_steps(monkeypatch, run, {5})
    list(run.train())
    assert latest_checkpoint(run.folder).state["step"] == 6 and (run.folder / "snapshot-000048").is_dir()


@pytest.mark.parametrize("part", ["generator", "average", "optimiser"])
def test_gan_weights_that_are_not_finite_are_never_saved(tmp_path, part):
    run = make_run(tmp_path / "a", tick=0.008, snap=1)
    steps = next_steps(run, 2)
    with torch.no_grad():
        broken = {"generator": next(run.gan.generator.parameters()), "average": next(run.average.parameters()),
                  "optimiser": next(iter(run.gan.d_optimiser.state.values()))["exp_avg"]}[part]
        broken.view(-1)[0] = float("nan")
    run.gan.finite = lambda losses: True            # as where the last step alone ruins the weights
    with pytest.raises(DivergedError, match="weights: expected finite numbers.*not saved") as stopped:
        list(steps)
    assert stopped.value.exit_code == 1 and latest_checkpoint(run.folder).state["step"] == 1
    assert len(list(run.folder.glob("snapshot-*"))) == 2


def test_a_gan_run_that_diverged_goes_on_with_lower_rates_as_its_message_says(tmp_path, monkeypatch, caplog):
    run = make_run(tmp_path / "a", max_bad_steps=1, tick=0.008, snap=1)
    break_steps(monkeypatch, run, {2})
    with pytest.raises(DivergedError, match="Lower --g-lr and --d-lr, then --resume auto"):
        list(run.train())
    resumed = make_run(tmp_path / "a", g_lr=1e-4, d_lr=2e-4)
    resumed.load(latest_checkpoint(run.folder))
    assert "from here on --g-lr is 0.0001; it was 0.002" in caplog.text and "--d-lr is 0.0002" in caplog.text
    list(resumed.train())
    used = [optimiser.param_groups[0]["lr"] for optimiser in (resumed.gan.g_optimiser, resumed.gan.d_optimiser)]
    assert used == [1e-4, 2e-4] and resumed.progress.step == 10


@pytest.mark.parametrize("name", ["g_lr", "d_lr"])
def test_a_rate_without_sense_is_refused(tmp_path, name):
    with pytest.raises(OptionError, match=f"--{name[0]}-lr: expected at most 10"):
        make_run(tmp_path / "a", **{name: 1e30})


def next_steps(run, n):
    """A run that has begun: the generator of its further steps, after `n` of them."""
    steps = run.train()
    for _ in range(n):
        next(steps)
    return steps


def break_steps(monkeypatch, run, bad):
    """Make the loss of chosen steps, counted from 0, infinite."""
    real = run.gan.gradients
    monkeypatch.setattr(run.gan, "gradients", lambda step, **told: {
        **real(step, **told), **({"loss/D": float("inf")} if step in bad else {})})


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_finishes_its_step_saves_and_can_be_resumed(tmp_path, number, code):
    run = make_run(tmp_path / "a")
    with pytest.raises(SystemExit) as stopped:
        for step, _ in enumerate(run.train()):
            if step == 2:
                os.kill(os.getpid(), number)
    assert stopped.value.code == code
    assert latest_checkpoint(run.folder).state["step"] == 3
    resumed = make_run(tmp_path / "a")
    resumed.load(latest_checkpoint(run.folder))
    assert sum(1 for _ in resumed.train()) == 7


@pytest.mark.parametrize("stop", range(1, 10))
def test_a_run_stopped_by_a_signal_ends_with_the_checkpoints_of_one_never_stopped(tmp_path, stop):
    list(make_run(tmp_path / "whole").train())
    run = make_run(tmp_path / "run")
    with pytest.raises(SystemExit, match="130"):
        for _ in run.train():
            if run.progress.step == stop:
                os.kill(os.getpid(), signal.SIGINT)
    resumed = make_run(tmp_path / "run")
    resumed.load(latest_checkpoint(run.folder))
    assert resumed.progress.step == stop
    list(resumed.train())
    whole, found = (sorted(path.name for path in folder.glob("*-*")) for folder in (tmp_path / "whole", tmp_path / "run"))
    assert found == whole and len([name for name in whole if name.startswith("checkpoint-")]) == 2


def test_a_batch_system_that_signals_twice_still_gets_its_checkpoint(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(SystemExit, match="143"):
        for _ in run.train():
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
    assert latest_checkpoint(run.folder) is not None


SLOW = """
import sys
from pathlib import Path
from gan_runs import make_run
from processes import slow_places
from preprocessing.errors import one_line_errors

run = make_run(Path(sys.argv[1]))
run.one_step = slow_places(run.one_step, sys.argv[2], after=2)
with one_line_errors():
    for _ in run.train():
        if run.progress.step == 2:
            run.save()
"""


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C")
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_second_ctrl_c_kills_a_gan_run_which_goes_on_from_the_checkpoint_before(tmp_path, where):
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "training")))
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path / "a"), where], text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"})
    code, errors = press_twice(process, where)
    assert code == -signal.SIGINT and errors == ""
    resumed = make_run(tmp_path / "a")
    resumed.load(latest_checkpoint(resumed.folder))
    assert resumed.progress.step == 2 and sum(1 for _ in resumed.train()) == 8


def test_the_pace_of_a_status_line_leaves_snapshots_out_and_starts_at_the_clock_of_the_run(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", kimg=0.08)
    _set_clock(run, 0.04)
    monkeypatch.setattr(type(run), "_snapshot", lambda run, stats: time.sleep(0.5))
    list(run.train())
    lines = [json.loads(line) for line in (tmp_path / "a" / "stats.jsonl").read_text().splitlines()]
    paces, elapsed_s = [line["sec_per_kimg"] for line in lines if "sec_per_kimg" in line], lines[-1]["elapsed_s"]
    trained_s = 0.008 * sum(paces)                # one step of 8 images a line
    assert len(paces) == 5 and trained_s < elapsed_s - 0.5 and max(paces) < elapsed_s / 0.008


def test_a_checkpoint_of_other_options_or_data_is_refused(tmp_path):
    run = make_run(tmp_path / "a")
    run.save()
    checkpoint = latest_checkpoint(tmp_path / "a")
    make_run(tmp_path / "a", kimg=5.0).load(checkpoint)      # a longer run is the same run
    with pytest.raises(WeightsError, match="r1_weight 0.0 -> 0.5"):
        make_run(tmp_path / "a", r1_weight=0.5).load(checkpoint)
    with pytest.raises(WeightsError, match="patches and prompts"):
        make_run(tmp_path / "a", data=tiny_data(n=26)).load(checkpoint)


def test_fewer_patches_than_a_batch_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least one batch of 8; found 7"):
        make_run(tmp_path / "a", data=tiny_data(n=7))


def test_a_prompt_that_is_not_a_number_is_refused():
    data = tiny_data()
    data.training.prompts[3, 2] = float("nan")
    with pytest.raises(InputError, match="in 1 of 24 rows"):
        gan_data("TINY", data.training, data.barcodes)


@pytest.mark.parametrize("wrong", [{"batch": 12}, {"batch_gpu": 9}, {"batch_gpu": 0}, {"kimg": 0.0}, {"budget_minutes": -1.0},
                                   {"img_resolution": 20}, {"g_lr": 0.0}, {"seed": -1}, {"seed": 2 ** 63}, {"blur_init": -5.0},
                                   {"clip_weight": float("nan")}, {"clip_weight": -0.1}, {"rec_weight": float("inf")},
                                   {"blur_fade_kimg": -1.0}, {"cond_dropout": 1.0}, {"cond_noise": -1.0}, {"prompt_bias": float("nan")},
                                   {"kimg": float("nan")}, {"kimg": float("inf")}, {"max_shift_px": 16}, {"batch": 0},
                                   {"budget_minutes": float("nan")}, {"backbone_px": -1}, {"colour_strength": -1.0}], ids=str)
def test_options_that_cannot_hold_are_refused_before_data_is_read(wrong):
    with pytest.raises(OptionError):
        GanConfig(**{**TINY, **wrong})


def test_presets_and_sizes_are_laid_under_what_was_said():
    assert resolve("reference", "lite", img_resolution=64, batch=8).shared_pass is False
    assert resolve("best", "small", img_resolution=64, batch=8).cmax < resolve("best", "lite", img_resolution=64, batch=8).cmax == 512
    assert resolve("best", "full", img_resolution=64, batch=8, cmax=64, g_lr=None).cmax == 64
    with pytest.raises(OptionError, match="reference, best"):
        resolve("worst", "lite", img_resolution=64, batch=8)


def test_like_prompts_set_how_much_patches_should_differ():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    images[1] = 51                                                     # 0.4 in [-1, 1]
    prompts = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [0.01, 1.0]])
    assert torch.allclose(neighbour_deviations(images, prompts), torch.full((4,), 0.2), atol=1e-6)


def test_alternating_rows():
    assert alternate(torch.tensor([0, 2]), torch.tensor([1, 3])).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("said", [{"diversity_weight": 5.0}, {"rec_weight": 1.0}, {"cond_noise": 0.5}, {"flips": False},
                                  {"max_shift_px": 0}, {"colour_strength": 0.1}, {"statistics": "imagenet"},
                                  {"shared_pass": False}, {"noise_init": 0.0}, {"prompt_bias": 0.0},
                                  {"cond_norm": "l2"}, {"seed": 1}, {"blur_init": 8.0}, {"backbone_px": 32}], ids=str)
def test_every_option_of_a_step_changes_what_is_learned(tmp_path, said):
    runs = [make_run(tmp_path / name, **{"max_shift_px": 2, **options}) for name, options in (("a", {}), ("b", said))]
    for run in runs:
        run.one_step()
    gradients = [[p.grad for p in (*run.gan.generator.parameters(), *run.gan.discriminator.heads.parameters())] for run in runs]
    shapes_differ = any(a.shape != b.shape for a, b in zip(*gradients, strict=False))
    assert shapes_differ or any(not torch.allclose(a, b, rtol=1e-4) for a, b in zip(*gradients, strict=True))


def test_the_generator_learns_which_prompt_is_which_colour(tmp_path):
    run = make_run(tmp_path / "a", kimg=0.8, g_lr=0.01, d_lr=0.01)
    while run.share < 1:
        run.one_step()
    prompts = run.training.prompts[:16]
    made = generate(run.average, prompts, [(seed, 0) for seed in range(16)]).float().mean(dim=(2, 3))      # (16, 3)
    redness = (made[:, 0] - made[:, 2]).view(8, 2)
    assert (redness[:, 0] > redness[:, 1] + 60).all()
