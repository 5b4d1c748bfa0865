"""A fine-tune: exact resume, live weights that nothing but the optimiser touches, and what a run refuses."""
import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusion_world import PX, WIDTH, config, differing, run, tiny_vae, weights, write_world

from diffusion_utils import finetune
from diffusion_utils.ema import Ema
from diffusion_utils.finetune import open_run
from diffusion_utils.latents import OnlineLatents, cached_latents
from diffusion_utils.noising import noising_of, scheduler_config
from diffusion_utils.schedulers import make_scheduler
from preprocessing.errors import DivergedError, InputError, OptionError, WeightsError
from training.checkpoints import latest_checkpoint
from training.patch_cache import PatchRows


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def straight(world, tmp_path_factory):
    """Four steps of two micro-batches of two, without a checkpoint or validation on the way."""
    return weights(run(world, tmp_path_factory.mktemp("straight") / "run", train_batch_size=2, gradient_accumulation_steps=2))


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_stopped_in_an_epoch_and_resumed_equals_the_run_that_was_not(world, straight, tmp_path, stop):
    options = {"train_batch_size": 2, "gradient_accumulation_steps": 2}       # an epoch is 3 steps
    run(world, tmp_path / "run", stop_after=stop, **options)
    torch.manual_seed(123)                                                    # what global streams hold does not matter
    resumed = run(world, tmp_path / "run", resume_from_checkpoint="latest", **options)
    assert resumed.standing.step == 4 and differing(weights(resumed), straight) == []


def test_saving_and_validating_every_step_leaves_live_weights_as_without(world, straight, tmp_path):
    np.save(tmp_path / "shown.npy", np.load(world / "emb.npy")[:1])
    made = run(world, tmp_path / "run", train_batch_size=2, gradient_accumulation_steps=2, checkpointing_steps=1, validation_steps=1,
               validation_prompts=str(tmp_path / "shown.npy"), val_data_dir=str(world / "patches"), val_embs=str(world / "emb.npy"))
    assert differing(weights(made), straight) == []
    assert made.live.training
    assert [path.name for path in sorted((tmp_path / "run" / "samples").iterdir())] == [f"step-{step:08d}.png" for step in range(1, 5)]
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    assert sum("val/loss" in line for line in lines) == 4
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-00000003", "checkpoint-00000004"]


@pytest.mark.parametrize("keep", [1, 3])
def test_as_many_checkpoints_are_kept_as_asked(world, tmp_path, keep):
    run(world, tmp_path / "run", checkpointing_steps=1, checkpoints_total_limit=keep)
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == keep


def test_the_average_never_enters_live_weights_and_its_counter_comes_back(world, straight, tmp_path):
    without = run(world, tmp_path / "no", train_batch_size=2, gradient_accumulation_steps=2, use_ema=False)
    live = {name: tensor for name, tensor in straight.items() if not name.startswith("ema.")}
    assert differing(weights(without), live) == []
    run(world, tmp_path / "run", stop_after=3)
    resumed = open_run(config(world, tmp_path / "run", resume_from_checkpoint="latest"))
    assert resumed.ema.n_updates == 3
    assert differing({n: t for n, t in resumed.ema.average.state_dict().items()}, dict(resumed.live.state_dict())) != []


def test_the_average_moves_by_its_decay_and_shares_what_is_frozen():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].requires_grad_(False)
    ema, before = Ema(model), model[0].weight.detach().clone()
    assert ema.average[1].weight is model[1].weight and ema.average[0].weight is not model[0].weight
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(model)
    assert torch.allclose(ema.average[0].weight, before + 0.9) and ema.n_updates == 1       # decay of the first step: 1 / 10
    assert ema.decay() == 2 / 11


@pytest.mark.slow
def test_the_run_learns_and_prompts_matter(tmp_path):
    world = write_world(tmp_path, n=32)
    made = run(world, tmp_path / "run", max_train_steps=150, train_batch_size=16, learning_rate=3e-3, ema_decay=0.9, validation_steps=150,
               val_data_dir=str(world / "patches"), val_embs=str(world / "emb.npy"))
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    found = next(line for line in lines if "val/loss" in line)
    assert np.mean(losses[-20:]) < 0.6 * np.mean(losses[:20])
    assert found["val/gene_gap"] > 0.2 * found["val/loss"]
    assert made.standing.bad_steps == 0


def test_adapters_learn_alone_resume_and_are_worked_into_the_folder(world, tmp_path):
    base = run(world, tmp_path / "base")
    options = {"pretrained_model_name_or_path": str(tmp_path / "base" / "pipeline"), "pixel_space": True, "lora_rank": 2}
    frozen = {name: tensor.clone() for name, tensor in base.ema.average.state_dict().items()}
    straight = run(world, tmp_path / "straight", **options)
    n_trained, n_all = sum(p.numel() for p in straight.trained), sum(p.numel() for p in straight.live.parameters())
    assert n_trained < 0.2 * n_all
    own = straight.live.state_dict()
    assert all(torch.equal(own[name], tensor) for name, tensor in frozen.items() if name in own and "encoder_hid_proj" not in name)
    run(world, tmp_path / "run", stop_after=2, **options)
    resumed = run(world, tmp_path / "run", resume_from_checkpoint="latest", **options)
    assert differing(weights(resumed), weights(straight)) == []

    other = run(world, tmp_path / "other", seed=5)
    with pytest.raises(WeightsError, match="base"):
        open_run(config(world, tmp_path / "run", resume_from_checkpoint="latest",
                        **{**options, "pretrained_model_name_or_path": str(other.config.output_dir / "pipeline")}))

    from diffusion_utils.pipeline import load_pipeline
    plain, x = load_pipeline(tmp_path / "straight").denoiser, torch.randn(2, 3, PX, PX)
    tokens = straight.prompts(straight.data.embeddings[:2])
    with torch.no_grad():
        ours = straight.ema.average(x, torch.tensor([3, 700]), tokens).sample
        theirs = plain(x, torch.tensor([3, 700]), tokens).sample
    assert not any("lora" in name for name in plain.state_dict()) and torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_loss_on_cached_latents_is_the_online_loss(world, tmp_path, kind):
    tiny_vae(kind).save_pretrained(tmp_path / "vae")
    cached = open_run(config(world, tmp_path / "a", pretrained_vae_path=str(tmp_path / "vae")))
    online = open_run(config(world, tmp_path / "b", pretrained_vae_path=str(tmp_path / "vae"), latent_cache=False))
    assert isinstance(online.source, OnlineLatents) and not isinstance(cached.source, OnlineLatents)
    for a, b in zip(cached.train(), online.train(), strict=True):
        assert abs(a - b) < 2e-3 * abs(b)                                     # half precision on the disk
    draws = cached.batches.read((0, 0)).draws
    first, second = (made.source.read(torch.tensor([0, 1]), torch.tensor([5, 2]), draws.posterior[:2], "cpu") for made in (cached, online))
    assert torch.allclose(first, second, atol=5e-3) and first.std() > 0.01
    other = online.source.read(torch.tensor([0, 1]), torch.tensor([0, 0]), draws.posterior[:2], "cpu")
    assert not torch.allclose(second, other, atol=1e-3)                       # orientations are seen


def test_a_killed_latent_cache_goes_on_where_it_was(tmp_path, monkeypatch):
    images, vae = PatchRows(torch.randint(0, 255, (520, 3, 4, 4), dtype=torch.uint8)), tiny_vae("AutoencoderTiny")
    from diffusion_utils import latents
    whole = np.array(cached_latents(images, vae, tmp_path / "whole", progress=False).posteriors)
    real, calls = latents.posterior_of, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 8 * 50:
            raise KeyboardInterrupt
        return real(*arguments)
    monkeypatch.setattr(latents, "posterior_of", killed)
    with pytest.raises(KeyboardInterrupt):
        cached_latents(images, vae, tmp_path / "cut", progress=False)
    assert not list((tmp_path / "cut").glob("*.npy"))
    n_before = len(calls)
    again = cached_latents(images, vae, tmp_path / "cut", progress=False).posteriors
    assert len(calls) - n_before < 8 * 65 - 8 * 30 and np.array_equal(again, whole)


# ---- objectives -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
def test_a_perfect_prediction_has_no_loss_and_the_solver_finds_the_picture_in_it(prediction):
    scheduler = make_scheduler(scheduler_config(prediction), "euler" if prediction == "flow" else "ddim", 10)
    noising, x0 = noising_of(make_scheduler(scheduler_config(prediction), "dpm++", 1)), torch.rand(1, 3, 4, 4) * 2 - 1
    noise = torch.randn_like(x0)
    timesteps = noising.timesteps(torch.tensor([0.3]))
    assert noising.losses(noising.target(x0, noise, timesteps), x0, noise, timesteps) < 1e-9
    x = noise.clone()
    for timestep in scheduler.timesteps:                       # the exact target at every step leads to x0
        a, b = noising._weights(timestep[None])
        implied = (x - a * x0) / b
        x = scheduler.step(noising.target(x0, implied, timestep[None]), timestep, x, return_dict=False)[0]
    assert (x - x0).abs().max() < 0.05


def test_min_snr_weights_and_zero_terminal_snr_are_the_papers():
    plain = noising_of(make_scheduler(scheduler_config("epsilon"), "ddim", 1))
    v = noising_of(make_scheduler(scheduler_config("v_prediction"), "ddim", 1))
    snr = (plain.signal / plain.noise) ** 2
    t = torch.arange(1000)
    assert torch.allclose(plain.loss_weights(t), torch.minimum(snr, torch.tensor(5.0)) / snr, rtol=1e-3)
    assert float(v.signal[-1]) == 0 and float(plain.signal[-1]) > 0.01
    assert float(v.loss_weights(t)[-1]) == 0 and torch.isfinite(v.loss_weights(t)).all()
    assert (replace(plain, snr_gamma=None).loss_weights(t) == 1).all()


# ---- faults ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, error, message", [
    ({"train_batch_size": 13}, InputError, "at least one step of 13"),
    ({"resolution": 9}, OptionError, "--resolution: expected a multiple of 2"),
    ({"pretrained_model_name_or_path": "nowhere/at_all/base", "pixel_space": True}, InputError, "from-scratch small"),
    ({"from_scratch": None}, OptionError, "one of them"),
    ({"pixel_space": False}, OptionError, "autoencoder"),
    ({"p_uncond": 1.5}, OptionError, "--p-uncond"),
    ({"max_grad_norm": float("nan")}, OptionError, "--max-grad-norm"),
], ids=["N < batch", "side", "no base", "neither", "no vae", "rate", "NaN"])
def test_a_run_that_cannot_be_is_refused_in_one_line(world, tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        open_run(config(world, tmp_path / "run", **options))
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped byte", "missing file"])
def test_a_damaged_checkpoint_is_passed_over_and_refused_by_name(world, tmp_path, damage, caplog):
    run(world, tmp_path / "run", checkpointing_steps=1)
    file = tmp_path / "run" / "checkpoint-00000004" / "denoiser.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    if damage == "missing file":
        file.unlink()
    else:
        file.write_bytes(content[:100] if damage == "cut" else content)
    assert latest_checkpoint(tmp_path / "run").state["step"] == 3 and "damaged" in caplog.text
    with pytest.raises(WeightsError):
        open_run(config(world, tmp_path / "run", resume_from_checkpoint=str(file.parent)))


def test_a_checkpoint_of_other_options_or_other_patches_is_refused(world, tmp_path):
    run(world, tmp_path / "run", stop_after=1)
    for options, message in (({"seed": 1}, "seed"), ({"n_tokens": 2}, "n_tokens"), ({"use_ema": False}, "use_ema")):
        with pytest.raises(WeightsError, match=message):
            open_run(config(world, tmp_path / "run", resume_from_checkpoint="latest", **options))
    with pytest.raises(WeightsError, match="patches and prompts"):
        open_run(config(write_world(tmp_path / "other", seed=9), tmp_path / "run", resume_from_checkpoint="latest"))
    with pytest.raises(OptionError, match="resume-from-checkpoint latest"):
        open_run(config(world, tmp_path / "run"))


def test_a_step_with_nan_is_skipped_and_a_run_of_them_stops(world, tmp_path, monkeypatch):
    real = finetune.losses_of
    made = open_run(config(world, tmp_path / "run", max_bad_steps=3, max_train_steps=8, checkpointing_steps=1))
    bad = {1, 4, 5, 6}

    def broken(*arguments):
        return real(*arguments) * (float("nan") if made.standing.step in bad else 1.0)
    monkeypatch.setattr(finetune, "losses_of", broken)
    with pytest.raises(DivergedError, match="3 steps in a row"):
        list(made.train())
    assert made.standing.bad_steps == 4
    assert all(torch.isfinite(tensor).all() for tensor in made.live.state_dict().values())
    kept = latest_checkpoint(tmp_path / "run")
    assert kept.state["step"] == 4 and kept.state["bad_in_a_row"] == 0, "no checkpoint of a skipped step"
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-00000003", "checkpoint-00000004"]


def break_steps(monkeypatch, made, bad):
    """Make the loss of chosen steps, counted from 0, not a number."""
    real = finetune.losses_of
    monkeypatch.setattr(finetune, "losses_of",
                        lambda *arguments: real(*arguments) * (float("nan") if made.standing.step in bad else 1.0))


def test_a_checkpoint_due_while_steps_are_skipped_is_written_after_the_next_good_one(world, tmp_path, monkeypatch):
    made = open_run(config(world, tmp_path / "run", max_train_steps=5, checkpointing_steps=2, checkpoints_total_limit=9))
    break_steps(monkeypatch, made, {1, 2})
    list(made.train())
    assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == [
        f"checkpoint-{step:08d}" for step in (4, 5)]


@pytest.mark.parametrize("every, kept", [(1, 2), (2, 2), (3, None)])
def test_a_run_that_ends_while_steps_are_skipped_diverged_and_has_no_pipeline(world, tmp_path, monkeypatch, every, kept):
    made = open_run(config(world, tmp_path / "run", checkpointing_steps=every))
    break_steps(monkeypatch, made, {2, 3})
    with pytest.raises(DivergedError, match="in the last 2 steps of the run") as error:
        list(made.train())
    found = latest_checkpoint(tmp_path / "run")
    assert error.value.exit_code == 1 and (found and found.state["step"]) == kept and not (tmp_path / "run" / "pipeline").exists()


def test_one_skipped_step_at_the_end_is_no_divergence(world, tmp_path, monkeypatch):
    made = open_run(config(world, tmp_path / "run"))
    break_steps(monkeypatch, made, {3})
    list(made.train())
    assert latest_checkpoint(tmp_path / "run").state["step"] == 4 and (tmp_path / "run" / "pipeline").is_dir()


@pytest.mark.parametrize("part", ["weights", "optimiser", "average", "half precision"])
def test_weights_that_are_not_finite_are_never_saved(world, tmp_path, part):
    made = open_run(config(world, tmp_path / "run", checkpointing_steps=1, power_ema=True))
    training = made.train()
    next(training), next(training)                 # a checkpoint of step 1
    with torch.no_grad():
        broken = {"weights": made.trained[0], "average": next(iter(made.ema.state().values())), "half precision": made.trained[0],
                  "optimiser": next(iter(made.optimiser.state.values()))["exp_avg"]}[part]
        broken.view(-1)[0] = 1e30 if part == "half precision" else float("inf")
        made.power_ema.update(made.live)
    with pytest.raises(DivergedError, match="weights: expected finite numbers.*not saved") as error:
        list(training)
    assert error.value.exit_code == 1 and latest_checkpoint(tmp_path / "run").state["step"] == 1
    assert not (tmp_path / "run" / "pipeline").exists()
    assert [path.name for path in (tmp_path / "run" / "averages").iterdir()] == ["update-00000001"]
    with pytest.raises(DivergedError):
        made.save()


@pytest.mark.parametrize("stops", [(1,), (3, 5), (4,), (5,)], ids=str)
def test_a_run_stopped_by_signals_ends_with_the_checkpoints_of_one_never_stopped(world, tmp_path, stops):
    options = {"max_train_steps": 6, "checkpointing_steps": 2, "power_ema": True, "resume_from_checkpoint": "latest"}
    list(open_run(config(world, tmp_path / "whole", **options)).train())
    for step in stops:
        made = open_run(config(world, tmp_path / "run", **options))
        with pytest.raises(SystemExit, match="130"):
            for _ in made.train():
                if made.standing.step == step:
                    os.kill(os.getpid(), signal.SIGINT)
        assert latest_checkpoint(tmp_path / "run").state["step"] == step
    list(open_run(config(world, tmp_path / "run", **options)).train())
    whole, found = (sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "events" not in path.name)
                    for folder in (tmp_path / "whole", tmp_path / "run"))
    assert found == whole and "checkpoint-00000004" in whole


def test_a_signal_while_steps_are_skipped_leaves_the_checkpoint_before_them(world, tmp_path, monkeypatch):
    made = open_run(config(world, tmp_path / "run", max_train_steps=9, checkpointing_steps=1))
    real = finetune.losses_of

    def broken(*arguments):
        if made.standing.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments) * (float("nan") if made.standing.step in (2, 3) else 1.0)
    monkeypatch.setattr(finetune, "losses_of", broken)
    with pytest.raises(SystemExit, match="143"):
        list(made.train())
    assert latest_checkpoint(tmp_path / "run").state["step"] == 2


@pytest.mark.parametrize("options", [{"learning_rate": 1e30}, {"adam_weight_decay": 1e300}])
def test_rates_without_sense_are_refused(world, tmp_path, options):
    with pytest.raises(OptionError, match="at most"):
        config(world, tmp_path / "run", **options)


def test_a_pickle_in_place_of_weights_is_refused_and_does_not_run(world, tmp_path):
    run(world, tmp_path / "run")
    folder = tmp_path / "run" / "pipeline"
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self):
            return (open, (str(canary), "w"))
    torch.save({"weight": Payload()}, folder / "unet" / "diffusion_pytorch_model.bin")
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    with pytest.raises(WeightsError, match="more than tensors"):
        open_run(config(world, tmp_path / "out", pretrained_model_name_or_path=str(folder), pixel_space=True))
    assert not canary.exists()


def test_a_class_that_a_file_names_is_not_built(world, tmp_path):
    run(world, tmp_path / "run")
    path = tmp_path / "run" / "pipeline" / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_class_name": "os.system"}))
    with pytest.raises(InputError, match="_class_name"):
        open_run(config(world, tmp_path / "out", pretrained_model_name_or_path=str(tmp_path / "run" / "pipeline"), pixel_space=True))


def test_embeddings_of_another_width_than_the_validations_are_refused(world, tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((2, WIDTH + 1), np.float32))
    with pytest.raises(InputError, match="prompt embeddings"):
        open_run(config(world, tmp_path / "run", validation_prompts=str(tmp_path / "wide.npy")))
