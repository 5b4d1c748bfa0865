"""Going on: with a run that stopped, from a checkpoint elsewhere, or from a pipeline that learned before; and what is refused."""
import json
import logging

import numpy as np
import pytest
import torch
from diffusion_world import PX, WIDTH, config, differing, run, tiny_vae, weights, write_world

from diffusion_utils import finetune
from diffusion_utils.finetune import open_run
from diffusion_utils.noising import scheduler_config
from diffusion_utils.pipeline import load_pipeline
from diffusion_utils.train_diffusion import train_diffusion
from preprocessing.errors import DivergedError, InputError, OptionError, WeightsError
from preprocessing.outputs import only_writer
from training.checkpoints import latest_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("continuing"))


@pytest.fixture(scope="module")
def base(world, tmp_path_factory):
    """A run of two steps, every one kept."""
    return run(world, tmp_path_factory.mktemp("base") / "run", max_train_steps=2, checkpointing_steps=1).config.output_dir


def test_a_run_that_diverged_goes_on_with_a_lower_rate_as_its_message_says(world, tmp_path, monkeypatch, caplog):
    real, bad = finetune.losses_of, [False, False, True]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "losses_of", lambda *arguments: real(*arguments) * (float("nan") if bad.pop(0) else 1.0))
        with pytest.raises(DivergedError, match="Lower --learning-rate, then --resume-from-checkpoint latest"):
            run(world, tmp_path / "run", checkpointing_steps=1, max_bad_steps=1)
    with caplog.at_level(logging.WARNING):
        resumed = run(world, tmp_path / "run", resume_from_checkpoint="latest", learning_rate=1e-5)
    assert resumed.standing.step == 4 and "from here on --learning-rate is 1e-05" in caplog.text
    assert resumed.optimiser.param_groups[0]["lr"] == 1e-5


def test_a_checkpoint_goes_on_in_another_folder_which_says_how_it_came_to_be(world, base, tmp_path):
    resumed = run(world, tmp_path / "new", resume_from_checkpoint=str(base / "checkpoint-00000001"), max_train_steps=3)
    said = json.loads((tmp_path / "new" / "config.json").read_text())
    assert said["resumed_from"] == str(base / "checkpoint-00000001") and said["first_step"] == 1 and said["config"]["max_train_steps"] == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "new" / "stats.jsonl").read_text().splitlines()] == [2, 3]
    straight = run(world, tmp_path / "straight", max_train_steps=3)
    assert differing(weights(resumed), weights(straight)) == []
    run(world, tmp_path / "new", resume_from_checkpoint="latest", max_train_steps=3)
    said["config"]["resume_from_checkpoint"] = "latest"
    assert json.loads((tmp_path / "new" / "config.json").read_text()) == said, "but not how often it was stopped"


def test_going_back_beside_later_checkpoints_is_refused(world, base):
    with pytest.raises(OptionError, match="no checkpoints later than checkpoint-00000001"):
        open_run(config(world, base, resume_from_checkpoint=str(base / "checkpoint-00000001")))


def test_a_checkpoint_is_not_deleted_for_a_damaged_later_one(world, tmp_path):
    run(world, tmp_path / "run", max_train_steps=3, checkpointing_steps=1)
    (tmp_path / "run" / "checkpoint-00000003" / "state.json").write_text("{}")
    resumed = open_run(config(world, tmp_path / "run", resume_from_checkpoint="latest", checkpoints_total_limit=1))
    assert resumed.standing.step == 2
    resumed.save()
    assert latest_checkpoint(tmp_path / "run").state["step"] == 2


def test_a_folder_of_damaged_checkpoints_is_not_started_anew(world, tmp_path):
    run(world, tmp_path / "run", max_train_steps=1)
    (tmp_path / "run" / "checkpoint-00000001" / "state.json").write_text("{}")
    with pytest.raises(WeightsError, match="damaged ones alone"):
        open_run(config(world, tmp_path / "run", resume_from_checkpoint="latest"))


def test_a_run_does_not_go_on_with_another_autoencoder(world, tmp_path):
    for name in ("one", "two"):
        vae = tiny_vae()
        if name == "two":
            torch.nn.init.zeros_(vae.quant_conv.bias)
            vae.quant_conv.weight.data.mul_(1.1)
        vae.save_pretrained(tmp_path / name)
    run(world, tmp_path / "run", max_train_steps=1, pretrained_vae_path=str(tmp_path / "one"))
    with pytest.raises(WeightsError, match="autoencoder, noise schedule and frozen weights"):
        open_run(config(world, tmp_path / "run", resume_from_checkpoint="latest", pretrained_vae_path=str(tmp_path / "two")))


def test_two_runs_do_not_write_into_one_folder(world, tmp_path):
    options = {name: value for name, value in vars(config(world, tmp_path / "run")).items()}
    with only_writer(tmp_path / "run"), pytest.raises(OSError, match="another process is at work in this folder"):
        train_diffusion(**options)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".run.lock"]


def test_latents_are_waited_for_at_their_lock_and_not_in_a_collective_that_times_out(world, tmp_path, monkeypatch):
    def collective(*_):
        raise AssertionError("in a collective")
    for name in ("main_process_first", "local_main_process_first", "wait_for_everyone"):
        monkeypatch.setattr(f"accelerate.Accelerator.{name}", collective)
    tiny_vae().save_pretrained(tmp_path / "vae")
    made = open_run(config(world, tmp_path / "run", pretrained_vae_path=str(tmp_path / "vae"), val_data_dir=str(world / "patches"),
                           val_embs=str(world / "emb.npy")))
    assert made.source.posteriors.shape[0] == made.held_source.posteriors.shape[0] == 12


# ---- bases of ours --------------------------------------------------------------------------------------------------

def test_a_base_of_ours_goes_on_with_what_it_learned_of_prompts(world, base, tmp_path):
    other = write_world(tmp_path / "other", seed=1)
    options = {"pretrained_model_name_or_path": str(base), "pixel_space": True}
    before = load_pipeline(base)
    kept = open_run(config(other, tmp_path / "kept", **options))
    assert torch.equal(kept.live.encoder_hid_proj.weight, before.denoiser.encoder_hid_proj.weight)
    assert torch.equal(kept.prompts.norm.mean, before.prompts.norm.mean)
    assert torch.allclose(kept.prompts.null, torch.from_numpy(np.load(other / "emb.npy")).mean(dim=0))
    for name, more in (("fresh", {"fresh_prompts": True}), ("tokens", {"n_tokens": 2})):
        fresh = open_run(config(other, tmp_path / name, **options, **more))
        assert not torch.equal(fresh.prompts.norm.mean, before.prompts.norm.mean)
        assert not torch.equal(fresh.live.encoder_hid_proj.weight[:, :WIDTH], before.denoiser.encoder_hid_proj.weight[:, :WIDTH])


def test_a_run_goes_on_with_its_own_statistics_of_prompts(world, base, tmp_path):
    other = write_world(tmp_path / "other", seed=1)
    options = {"pretrained_model_name_or_path": str(base), "pixel_space": True, "max_train_steps": 1}
    first = run(other, tmp_path / "run", **options)
    run(other, tmp_path / "second", max_train_steps=1)                              # a base whose prompts have other statistics
    options["pretrained_model_name_or_path"] = str(tmp_path / "second")
    resumed = open_run(config(other, tmp_path / "run", resume_from_checkpoint="latest", **options))
    assert differing(resumed.prompts.state_dict(), first.prompts.state_dict()) == []


def test_adapters_without_an_average_are_worked_in_under_autocast_too(world, base, tmp_path):
    from accelerate.state import AcceleratorState
    AcceleratorState._reset_state(reset_partial_state=True)
    made = run(world, tmp_path / "run", pretrained_model_name_or_path=str(base), pixel_space=True, lora_rank=2, use_ema=False,
               mixed_precision="bf16", max_train_steps=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert "forward" in vars(made.live)                                             # accelerate's is back where it was
    assert not any("lora" in name for name in load_pipeline(tmp_path / "run").denoiser.state_dict())


@pytest.mark.parametrize("part, change, message", [
    ("scheduler/scheduler_config.json", {"_class_name": None}, "a scheduler of diffusers"),
    ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "beta_schedule"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL and its like"),
], ids=["no class of scheduler", "unknown schedule", "SDXL"])
def test_a_base_that_a_run_could_not_finish_with_is_refused_at_its_start(world, base, tmp_path, part, change, message):
    import shutil
    shutil.copytree(base / "pipeline", tmp_path / "base")
    path = tmp_path / "base" / part
    path.write_text(json.dumps({**scheduler_config("epsilon"), **json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        open_run(config(world, tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "base"), pixel_space=True))


def test_a_base_without_autoencoder_says_how_to_name_one(world, base, tmp_path):
    with pytest.raises(InputError, match="--pretrained-vae-path"):
        open_run(config(world, tmp_path / "run", pretrained_model_name_or_path=str(base)))


@pytest.mark.parametrize("options, message", [
    ({"lora_rank": 2}, "trained weights to adapt"), ({"guidance_scale": float("nan")}, "--guidance-scale"),
    ({"timeout_minutes": 1e12}, "--timeout-minutes"), ({"max_train_steps": 10 ** 20}, "--max-train-steps"), ({"seed": 2 ** 64}, "--seed"),
])
def test_options_that_cannot_be_are_refused_before_data_are_read(tmp_path, options, message):
    with pytest.raises(OptionError, match=message):
        config(tmp_path / "nowhere", tmp_path / "run", **options)


def test_embeddings_that_are_infinite_in_single_precision_are_refused(world, tmp_path):
    np.save(tmp_path / "big.npy", np.full((12, 6), 1e300))
    with pytest.raises(InputError, match="NaN or infinite ones in rows 12"):
        open_run(config(world, tmp_path / "run", dataset_embs=str(tmp_path / "big.npy")))


def test_patches_learned_larger_are_brought_back_to_their_size(world, tmp_path):
    from PIL import Image

    from diffusion_utils.generation import GenerateConfig, generate_images
    run(world, tmp_path / "run", max_train_steps=1, resolution=2 * PX)
    for name, output_px, side in (("as before", None, PX), ("as asked", 2 * PX, 2 * PX)):
        generate_images(GenerateConfig(model_checkpoint=tmp_path / "run", prompt_file=world / "emb.npy", gen_img_path=tmp_path / name,
                                       steps=1, n_prompts=1, num_imgs=1, device="cpu", progress=False, output_px=output_px))
        assert Image.open(tmp_path / name / "prompt00000_seed0000.png").size == (side, side)


def test_guidance_of_a_model_that_never_saw_the_null_prompt_is_warned_of(world, tmp_path, caplog):
    from diffusion_utils.generation import GenerateConfig, generate_images
    run(world, tmp_path / "run", max_train_steps=1, p_uncond=0.0)
    for scale, warned in ((1.0, False), (3.0, True)):
        generate_images(GenerateConfig(model_checkpoint=tmp_path / "run", prompt_file=world / "emb.npy", gen_img_path=tmp_path / "out",
                                       steps=1, n_prompts=1, num_imgs=1, device="cpu", progress=False, guidance_scale=scale))
        assert ("without the null prompt" in caplog.text) == warned


def test_a_run_without_pipeline_says_to_let_it_finish(world, tmp_path):
    run(world, tmp_path / "run", stop_after=1)
    with pytest.raises(InputError, match="a run without one. Let the run finish"):
        load_pipeline(tmp_path / "run")
