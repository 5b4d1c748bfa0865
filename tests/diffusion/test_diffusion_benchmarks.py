"""The measuring scripts: commands with options that exist, work that is not done twice, counts that a small network confirms."""
import json

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusion_world import PX, TINY, WIDTH, run, tiny_vae, write_world

import clip_embeddings
from benchmarks import diffusion, diffusion_learning
from benchmarks.diffusion_learning import EMBEDDINGS, WAYS, Plan, between_clusters
from benchmarks.learning_scores import table
from benchmarks.stages.diffusion_memory import kept_gb, state_gb, ways
from diffusion_utils import generate_img, train_diffusion

COMMANDS = {"diffusion_utils.train_diffusion": train_diffusion.main, "diffusion_utils.generate_img": generate_img.main,
            "clip_embeddings.py": clip_embeddings.main}


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """A plan whose commands are read as the real ones read them, and leave what a finished command leaves."""
    said = []

    def pretend(script, *arguments):
        context = COMMANDS[script].make_context(script, [str(argument) for argument in arguments])
        said.append((script, context.params))
        marks = {"clip_embeddings.py": ("out_dir", EMBEDDINGS), "diffusion_utils.generate_img": ("gen_img_path", "samples.csv"),
                 "diffusion_utils.train_diffusion": ("output_dir", "pipeline/model_index.json")}
        option, name = marks[script]
        path = context.params[option] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.full((3, 4), 2.0)) if path.suffix == ".npy" else path.write_text("{}")
        (path.parent / "embeddings.json").write_text(json.dumps({"files": [EMBEDDINGS]}))
    monkeypatch.setattr(diffusion_learning, "run", pretend)
    made = Plan(tmp_path / "data", ["A", "C"], "B", tmp_path / "out", kimg=0.8, resolution=32, guidance=3.0, images=4, prompts=None)
    return made, said


def test_all_ways_see_equally_many_images_and_what_is_finished_is_not_done_again(plan):
    made, said = plan
    for _ in range(2):
        folders = {way: made.patches(way, 1) for way in WAYS}
    trained = [options for script, options in said if script == "diffusion_utils.train_diffusion"]
    assert len(set(folders.values())) == len(WAYS) and len(trained) == len(WAYS) - 1       # null is drawn from the learned run
    assert {(options["max_train_steps"], options["train_batch_size"], options["seed"]) for options in trained} == {(50, 16, 1)}
    assert [(options["prompt_tokens"], options["shuffle_prompts"]) for options in trained] == \
        [("published", False), ("learned", False), ("learned", True)]
    assert all(len(options["dataset_embs"].split(",")) == len(options["train_data_dir"].split(",")) == 2 for options in trained)


def test_the_null_control_is_drawn_from_the_learned_run_with_the_mean_prompt_at_every_spot(plan):
    made, said = plan
    made.patches("null", 0)
    drawn = said[-1][1]
    assert drawn["model_checkpoint"] == made.out / "learned-0" and drawn["guidance_scale"] == 1
    assert np.load(drawn["prompt_file"]).tolist() == [[2.0] * 4] * 3 and drawn["prompt_file"].with_name("embeddings.json").is_file()


def test_prompts_of_different_clusters_alone_are_compared():
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    assert between_clusters(rows, np.array(["a", "a", "b"])) == 0
    assert between_clusters(rows, np.array(["a", "b", "b"])) == pytest.approx(0.5)      # of the pairs 0-1 and 0-2


def test_the_table_says_how_the_second_way_differs_from_the_first():
    scores = {"published": [{"x": (1.0, 4.0)}, {"x": (2.0, 4.0)}], "learned": [{"x": (3.0, 4.0)}, {"x": (4.0, 4.0)}],
              "null": [{"x": (0.0, 4.0)}, {"x": (0.0, 4.0)}]}
    header, _, line = table(scores)
    assert header.endswith("learned - published (95 %) |") and line.endswith("| 0.000 (0.000-0.000) | +2.000 (+2.000 to +2.000) |")


def tiny_unet():
    return UNet2DConditionModel(sample_size=PX, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
                                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **TINY)


def test_adapters_need_less_memory_and_checkpointing_keeps_less():
    every, adapters = ways(tiny_unet, 2).values()
    n_weights = sum(parameter.numel() for parameter in tiny_unet().parameters())
    assert state_gb(every) == pytest.approx({"weights": n_weights * 4e-9, "gradients": n_weights * 4e-9, "optimiser": n_weights * 8e-9,
                                             "average": n_weights * 4e-9})
    assert state_gb(adapters)["optimiser"] < 0.2 * state_gb(every)["optimiser"]
    plain = kept_gb(every, PX, 3, TINY["cross_attention_dim"])
    assert kept_gb(every, 2 * PX, 3, TINY["cross_attention_dim"]) > 3.5 * plain         # four times the pixels
    every.enable_gradient_checkpointing()
    assert kept_gb(every, PX, 3, TINY["cross_attention_dim"]) < 0.5 * plain


def test_what_is_counted_as_kept_is_what_the_backward_pass_holds():
    layer = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 1), torch.nn.SiLU())
    layer.config = type("Config", (), {"in_channels": 4})

    class Net(torch.nn.Module):
        config = layer.config

        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, timesteps, tokens):
            return type("Out", (), {"sample": self.layer(x)})
    with torch.device("meta"):
        net = Net().to("meta")
    assert kept_gb(net, 10, 1, 4) == pytest.approx(2 * 4 * 100 * 4e-9)                  # the input of either layer


def test_both_ways_are_timed_at_the_size_of_stable_diffusion_too(monkeypatch, capsys):
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    channels = {"in_channels": 4, "out_channels": 4, "norm_num_groups": 8}
    monkeypatch.setattr(diffusion, "SD_UNET", {**TINY, **blocks, **channels, "sample_size": PX})
    monkeypatch.setattr(diffusion, "SD_VAE", {name: value for name, value in tiny_vae().config.items() if name[0] != "_"})
    monkeypatch.setattr(diffusion, "PUBLISHED_STEPS", 2)
    monkeypatch.setattr(diffusion, "OUR_STEPS", 2)
    diffusion.time_both(device="cpu", side=16, size="sd", batch=2, rounds=1)
    told = capsys.readouterr().out
    assert "sd UNet, 16 px" in told and told.count("images/s, ours") == 2


def test_quality_compares_both_ways_and_draws_each_once(tmp_path, capsys):
    world = write_world(tmp_path)
    run(world, tmp_path / "run", max_train_steps=1)
    capsys.readouterr()                                                                 # what training said

    def ask():
        diffusion.compare_quality(tmp_path / "run", world / "emb.npy", world / "patches", tmp_path / "out", 6, 3.0, "random_tiny")
        return capsys.readouterr().out
    first = ask()
    dates = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert first.count("(") >= 3 and "ddpm, 50 steps" in first and "dpm++, 20 steps" in first and "interval of the published" in first
    assert ask() == first and dates == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.png")}
    assert len(dates) == 2 * (6 + 1) and WIDTH == np.load(world / "emb.npy").shape[1]
