"""Options of a fine-tune that change how it works and not what it learns: each does what it says."""
import json
from functools import partial

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner
from diffusion_world import PX, config, differing, run, weights, write_world

from diffusion_utils import denoisers, finetune, generation, train_diffusion
from diffusion_utils.finetune import open_run
from diffusion_utils.pipeline import load_pipeline
from diffusion_utils.sampling import Solver
from evaluation.distances import frechet_distance, kernel_distance
from evaluation.features import image_features
from networks.histo_models import build_encoder
from preprocessing.errors import OptionError


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("options"))


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    """Two steps without any of these options."""
    return weights(run(world, tmp_path_factory.mktemp("plain") / "run", max_train_steps=2))


@pytest.fixture
def new_accelerator():
    """accelerate keeps the precision of a process; a user's process has one run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def stats(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def test_distances_while_training_are_those_of_the_averaged_weights_and_leave_the_run_as_it_was(world, plain, tmp_path):
    made = run(world, tmp_path / "run", max_train_steps=2, validation_steps=1, metrics="fd_random_tiny@8,kd_random_tiny@8")
    assert differing(weights(made), plain) == [] and made.live.training
    found = [line for line in stats(tmp_path / "run") if "metrics/fd_random_tiny@8" in line]
    assert [line["step"] for line in found] == [1, 2]

    rows, encoder = made.validation.rows, build_encoder("random_tiny")
    pipeline = load_pipeline(tmp_path / "run" / "pipeline")            # written from the average
    pictures = pipeline.generate(made.data.embeddings[rows], [(0, int(row)) for row in rows], Solver(guidance_scale=3.0))
    real, fake = (image_features(images, encoder, progress=False) for images in (made.data.images[rows], pictures))
    assert len(rows) == 8 and np.isclose(found[1]["metrics/fd_random_tiny@8"], frechet_distance(fake, real), rtol=1e-4)
    assert np.isclose(found[1]["metrics/kd_random_tiny@8"], kernel_distance(fake, real)[0], rtol=1e-3, atol=1e-7)
    assert found[0]["metrics/fd_random_tiny@8"] != found[1]["metrics/fd_random_tiny@8"]


@pytest.mark.parametrize("metrics", ["clip_score", "fd", "kid0"])
def test_metrics_that_a_run_cannot_measure_are_refused_before_data_are_read(world, tmp_path, metrics):
    with pytest.raises(OptionError, match="--metrics"):
        config(world, tmp_path / "run", metrics=metrics)


def test_bf16_computes_in_half_and_keeps_weights_in_full(world, plain, tmp_path, new_accelerator):
    made, seen = open_run(config(world, tmp_path / "run", max_train_steps=2, mixed_precision="bf16")), []
    made.live.conv_out.register_forward_hook(lambda _module, _inputs, out: seen.append(out.dtype))
    losses = list(made.train())
    assert set(seen) == {torch.bfloat16}
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.float32}
    apart = [float((tensor - plain[name]).abs().max()) for name, tensor in weights(made).items() if name.startswith("live.")]
    assert 0 < max(apart) < 2e-3 and np.isfinite(losses).all()             # two moves of 3e-4


def test_gradient_checkpointing_computes_blocks_twice_and_learns_the_same(world, plain, tmp_path):
    made, calls = open_run(config(world, tmp_path / "run", max_train_steps=2, gradient_checkpointing=True)), []
    made.live.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    list(made.train())
    assert len(calls) == 4                                                  # two steps, forward and again before backward
    found = weights(made)
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in plain.items() if name.startswith("live."))


def test_compiled_blocks_learn_the_same_under_the_same_names(world, plain, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, _examples):              # what was traced, run as it is: compilers are their authors' to test
        graphs.append(graph)
        return graph.forward
    monkeypatch.setattr(finetune, "compile_blocks", partial(denoisers.compile_blocks, backend=backend))
    found = weights(run(world, tmp_path / "run", max_train_steps=2, compile=True))
    assert graphs and found.keys() == plain.keys()
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in plain.items() if name.startswith("live."))

    asked = []
    monkeypatch.setattr(generation, "compile_blocks", asked.append)
    pipeline = generation.open_pipeline(generation.GenerateConfig(model_checkpoint=tmp_path / "run", prompt_file=world / "emb.npy",
                                                                  gen_img_path=tmp_path / "out", compile=True, device="cpu"))
    assert asked == [pipeline.denoiser]


class Hub:
    """Records what a run does with the hub."""

    def __init__(self):
        self.calls = []

    def create_repo(self, repository, **how):
        self.calls.append(("create", repository, how))

    def upload_folder(self, **how):
        self.calls.append(("upload", how["repo_id"], (how["folder_path"] / "model_index.json").is_file()))


def command(world, out, *more):
    return CliRunner().invoke(train_diffusion.main, [
        "--train_data_dir", str(world / "patches"), "--dataset_embs", str(world / "emb.npy"), "--output_dir", str(out), "--from-scratch",
        "small", "--pixel-space", "--resolution", str(PX), "--train_batch_size", "4", "--max_train_steps", "1", "--report_to", "none",
        "--n-tokens", "3", "--no-progress", "--mixed_precision", "no", "--push_to_hub", "me/genes", *more])


def test_the_finished_folder_goes_to_a_private_repository_of_the_hub(world, tmp_path, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: hub)
    assert command(world, tmp_path / "run").exit_code == 0
    assert hub.calls == [("create", "me/genes", {"private": True, "exist_ok": True}), ("upload", "me/genes", True)]


def test_without_a_hub_the_folder_stays_and_one_line_says_how_to_upload_it(world, tmp_path, monkeypatch):
    def unreachable():
        raise ConnectionError("no route")
    monkeypatch.setattr("huggingface_hub.HfApi", unreachable)
    result = command(world, tmp_path / "run")
    assert result.exit_code == 3 and "hf upload" in result.output and "Traceback" not in result.output
    assert (tmp_path / "run" / "pipeline" / "model_index.json").is_file()
