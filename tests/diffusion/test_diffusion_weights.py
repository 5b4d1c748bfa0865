"""Checkpoints and bases that do not fit a run are refused as a whole, and what lies beside them does not run."""
import shutil

import pytest
import torch
from diffusion_world import config, differing, run, weights, write_world
from safetensors.torch import load_file, save_file

from diffusion_utils.finetune import open_run
from preprocessing.errors import InputError, WeightsError
from training.checkpoints import latest_checkpoint, read_checkpoint, save_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def finished(world, tmp_path_factory):
    """Run folder of two steps."""
    return run(world, tmp_path_factory.mktemp("finished") / "run", max_train_steps=2).config.output_dir


@pytest.mark.parametrize("change", [lambda tensors: tensors.popitem(), lambda tensors: tensors.update(other=torch.zeros(1)),
                                    lambda tensors: tensors.update({next(iter(tensors)): torch.zeros(1)})],
                         ids=["missing", "unexpected", "wrong shape"])
@pytest.mark.parametrize("part", ["denoiser", "ema"])
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_of_it_is_taken(world, finished, tmp_path, part, change):
    sound = latest_checkpoint(finished)
    tensors = {name: dict(values) for name, values in sound.tensors.items()}
    change(tensors[part])
    damaged = save_checkpoint(tmp_path, 9, state=sound.state, tensors=tensors, optimisers=sound.optimisers)
    made = open_run(config(world, tmp_path / "run", max_train_steps=2))
    before = weights(made)
    with pytest.raises(WeightsError, match=part):
        made.load(read_checkpoint(damaged))
    assert differing(weights(made), before) == [] and made.standing.step == 0


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.popitem(), "missing"),
    (lambda tensors: tensors.update({"conv_in.weight": torch.zeros(2, 3, 3, 3)}), "conv_in.weight")], ids=["missing", "wrong shape"])
def test_a_base_whose_weights_do_not_fit_is_refused_by_name(world, finished, tmp_path, change, message):
    shutil.copytree(finished / "pipeline", tmp_path / "base")
    path = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    with pytest.raises(WeightsError, match=message):
        open_run(config(world, tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "base"), pixel_space=True))


def test_code_beside_the_weights_of_a_base_does_not_run(world, finished, tmp_path):
    shutil.copytree(finished / "pipeline", tmp_path / "base")
    canary = tmp_path / "canary"
    for name in ("pipeline.py", "unet/model.py", "scheduler/scheduler.py"):
        (tmp_path / "base" / name).write_text(f"open({str(canary)!r}, 'w')")
    made = open_run(config(world, tmp_path / "run", pretrained_model_name_or_path=str(tmp_path / "base"), pixel_space=True))
    assert type(made.live).__name__ == "UNet2DConditionModel" and not canary.exists()


def test_one_held_out_patch_is_too_few_to_exchange_prompts(world, tmp_path):
    one = write_world(tmp_path / "one", n=1)
    with pytest.raises(InputError, match="at least 2"):
        open_run(config(world, tmp_path / "run", val_data_dir=str(one / "patches"), val_embs=str(one / "emb.npy")))
