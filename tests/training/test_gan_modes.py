"""What a step trains and where its prompts come from: nowhere, an encoder trained along, or weights that are partly frozen."""
from dataclasses import replace

import numpy as np
import pytest
import torch
from gan_runs import GENES, TINY, tiny_data, weights
from gan_runs import make_run as make_clip_run

from networks.condition_mlp import DROPOUT, ConditionMlp
from networks.histo_models import build_encoder
from networks.snapshot import load_snapshot
from preprocessing.errors import OptionError
from training.checkpoints import latest_checkpoint
from training.gan_config import PRESETS, resolve
from training.gan_data import gan_data
from training.gan_loop import GanRun
from training.gan_parts import TrainingData
from training.mlp_prompts import MlpPrompts
from training.train_modes import TRAIN_MODES

BARCODES = np.array([f"s__{i}" for i in range(24)])


def mlp_data():
    plain = tiny_data().training
    torch.manual_seed(0)
    mlp = ConditionMlp([f"gene{i}" for i in range(GENES)], hidden=16, width=12)
    training = TrainingData(plain.images, mlp.embed_expression(plain.expression), expression=plain.expression)
    return gan_data("TINY", training, BARCODES, mlp=mlp)


def no_prompts():
    return gan_data("TINY", TrainingData(tiny_data().training.images, torch.zeros(24, 0)), BARCODES)


DATA = {"mlp": mlp_data, "none": no_prompts}


def make_run(folder, encoder, preset="best", **said):
    folder.mkdir(exist_ok=True)
    config = resolve(preset, "custom", **{**TINY, **said}, encoder=encoder)
    return GanRun(config, DATA[encoder](), build_encoder("random_tiny"), folder, tensorboard=False)


def all_weights(run):
    parts = [] if run.mlp is None else [*run.mlp.state_dict().values(), *run.mlp_average.state_dict().values()]
    return [*weights(run), *parts]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(all_weights(first), all_weights(second), strict=True))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(("encoder", "mode"), [("none", "all"), ("none", "freeze8"), ("mlp", "all"), ("mlp", "text_encoder"),
                                               ("mlp", "freeze8")])
def test_a_resumed_run_equals_the_straight_one_in_every_mode(tmp_path, encoder, mode, preset):
    straight, stopped = (make_run(tmp_path / name, encoder, preset, train_mode=mode) for name in "ab")
    for _ in range(4):
        straight.one_step()
    for _ in range(int(np.random.default_rng().integers(1, 4))):
        stopped.one_step()
    stopped.save()
    resumed = make_run(tmp_path / "b", encoder, preset, train_mode=mode)
    resumed.load(latest_checkpoint(tmp_path / "b"))
    assert same(resumed, stopped)
    while resumed.progress.step < 4:
        resumed.one_step()
    assert same(resumed, straight)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("encoder", DATA)
def test_micro_batches_change_neither_gradients_nor_running_statistics(tmp_path, encoder, preset):
    found = []
    for micro in (8, 16):
        run = make_run(tmp_path / str(micro), encoder, preset, batch=16, batch_gpu=micro)
        losses = run.gan.gradients(3, sigma=1.0, clip_weight=0)
        gradients = [p.grad.clone() for p in (*run.gan.g_parameters, *run.gan.discriminator.heads.parameters())]
        run.gan.move(0.001, 0.001)
        found.append((losses, gradients, [] if run.mlp is None else list(run.mlp.norm.buffers())))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(b.abs().max().item(), 1e-2))
    assert all(torch.equal(a, b) for a, b in zip(found[0][2], found[1][2], strict=True))


@pytest.mark.parametrize(("encoder", "mode"), [("mlp", mode) for mode in ("all", "text_encoder", "freeze8")] + [("none", "freeze8")])
def test_what_is_frozen_has_no_optimiser_state_and_does_not_move_and_the_rest_does(tmp_path, encoder, mode):
    run = make_run(tmp_path / "run", encoder, train_mode=mode, noise_init=0.5)
    networks = {"generator": run.gan.generator} | ({} if run.mlp is None else {"mlp": run.mlp})
    before = {f"{part}.{name}": tensor.clone() for part, network in networks.items() for name, tensor in network.state_dict().items()}
    for _ in range(3):
        run.one_step()
    after = {f"{part}.{name}": tensor for part, network in networks.items() for name, tensor in network.state_dict().items()}
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    parameters = {f"{part}.{name}" for part, network in networks.items() for name, _ in network.named_parameters()}
    buffers = {"generator.mapping_network.x_avg", "mlp.norm.running_mean", "mlp.norm.running_var", "mlp.norm.num_batches_tracked"}
    expected = {
        "all": parameters | buffers,
        "text_encoder": {name for name in before if name.startswith("mlp.")},
        "freeze8": {name for name in parameters if name.startswith("generator.blocks.1.") or ".to_rgb." in name},
    }[mode]
    assert moved == expected & before.keys()
    assert len(run.gan.g_optimiser.state) == len(expected & parameters)
    average = run.average.state_dict()
    assert all(torch.equal(average[name.removeprefix("generator.")], before[name]) for name in before.keys() - moved
               if name.startswith("generator."))


def test_a_checkpoint_older_than_the_modes_goes_on(tmp_path):
    run = make_clip_run(tmp_path / "run")
    run.one_step()
    run.save()
    checkpoint = latest_checkpoint(tmp_path / "run")
    told = {name: value for name, value in checkpoint.state["config"].items() if name not in ("encoder", "train_mode")}
    state = {name: value for name, value in checkpoint.state.items() if name not in ("genes_sha256", "first_step")}
    resumed = make_clip_run(tmp_path / "run")
    resumed.load(replace(checkpoint, state={**state, "config": told}))
    assert all(torch.equal(a, b) for a, b in zip(weights(run), weights(resumed), strict=True)) and resumed.progress.first_step == 0


def test_modes_name_the_resolutions_there_are():
    assert TRAIN_MODES == ("all", "text_encoder", "freeze8", "freeze16", "freeze32", "freeze64", "freeze128")
    import train_gan
    assert train_gan.MODES == TRAIN_MODES


@pytest.mark.parametrize(("said", "says"), [
    ({"train_mode": "freeze16"}, "--train-mode: expected to freeze less than the 16 px"),
    ({"train_mode": "freeze12"}, "--train-mode: expected one of all, text_encoder"),
    ({"train_mode": "text_encoder"}, "text_encoder with --encoder mlp alone"),
    ({"encoder": "mlp", "cond_norm": "standardize"}, "--cond-norm: expected l2 or scaled with --encoder mlp"),
    ({"encoder": "mlp", "clip_weight": 1.0}, "--clip-weight: expected 0 unless"),
    ({"encoder": "mlp", "cond_dropout": 0.5}, "--cond-dropout: expected 0 where"),
    ({"encoder": "ready", "cond_dropout": 0.5}, "--cond-dropout: expected 0 where"),
    ({"encoder": "none", "cond_noise": 0.1}, "--cond-noise: expected 0 without prompts"),
    ({"encoder": "none", "diversity_weight": 1.0}, "--diversity-weight: expected 0 without prompts"),
    ({"encoder": "none", "clip_weight": 1.0}, "--clip-weight: expected 0 unless"),
    ({"encoder": "bert"}, "--encoder: expected one of clip, mlp, ready, none"),
], ids=str)
def test_modes_and_encoders_that_cannot_hold_are_refused(said, says):
    with pytest.raises(OptionError, match=says):
        resolve("best", "custom", **{**TINY, **said})


def test_the_encoder_trained_alone_is_trained_slowly_and_every_encoder_takes_its_share_of_the_preset():
    assert resolve("best", "small", img_resolution=16, batch=8, encoder="mlp", train_mode="text_encoder").g_lr == 3e-6
    assert resolve("best", "small", img_resolution=16, batch=8, encoder="mlp", train_mode="text_encoder", g_lr=0.1).g_lr == 0.1
    told = {kind: resolve("reference", "lite", img_resolution=16, batch=8, encoder=kind) for kind in ("clip", "mlp", "ready", "none")}
    assert [config.cond_dropout for config in told.values()] == [0.8, 0, 0, 0] and told["mlp"].cond_norm == "l2"
    assert resolve("best", "lite", img_resolution=16, batch=8, encoder="mlp").cond_norm == "scaled"


def test_masks_belong_to_step_and_place_and_drop_at_their_rate():
    data = mlp_data()
    prompts = MlpPrompts(data.mlp, data.training.expression, seed=0)
    seen = []
    data.mlp.first.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0].clone()))
    for step, rows in ((0, np.arange(16)), (0, np.arange(16)[::-1]), (1, np.arange(16)), (0, np.arange(8))):
        prompts.embed(rows, step, "cpu")
    dropped = [rows == 0 for rows in seen]
    assert torch.equal(dropped[0], dropped[1]) and torch.equal(dropped[0][:8], dropped[3]) and not torch.equal(dropped[0], dropped[2])
    assert dropped[0].float().mean() == pytest.approx(DROPOUT, abs=0.08) and not torch.equal(dropped[0][0], dropped[0][1])
    assert torch.allclose(seen[0].max(), torch.from_numpy(data.training.expression[:16].toarray())[~dropped[0]].max() / (1 - DROPOUT))


def test_a_skipped_step_leaves_the_running_statistics_of_the_encoder(tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "mlp")
    before = [tensor.clone() for tensor in run.mlp.state_dict().values()]
    monkeypatch.setattr(run.gan, "finite", lambda losses: False)
    assert run.one_step() is None
    assert all(torch.equal(a, b) for a, b in zip(before, run.mlp.state_dict().values(), strict=True))


def test_the_discriminators_loss_does_not_move_the_encoder(tmp_path):
    run = make_run(tmp_path / "run", "mlp")
    run.gan.gradients(0, sigma=0, clip_weight=0)
    both = [p.grad.clone() for p in run.mlp.parameters()]
    run.gan._discriminator_backward = lambda *_: None
    run.gan.gradients(0, sigma=0, clip_weight=0)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(run.mlp.parameters(), both, strict=True))
    assert any(gradient.abs().max() > 0 for gradient in both)


def test_a_snapshot_holds_the_average_of_the_encoder_and_pictures_follow_it(tmp_path):
    run = make_run(tmp_path / "run", "mlp", kimg=0.024)
    shown = run.showcase.prompts.clone()
    for _ in run.train():
        pass
    snapshot = load_snapshot(run.folder / "snapshot-000024")
    rows = run.data.training.expression
    assert torch.equal(snapshot.gene_encoder.embed_expression(rows), run.mlp_average.embed_expression(rows))
    assert snapshot.gene_encoder.gene_names == run.mlp.gene_names and not snapshot.gene_encoder.training
    assert not torch.equal(run.showcase.prompts, shown)
    assert torch.equal(run.showcase.prompts, run.mlp_average.embed_expression(run.showcase.expression))


def test_unconditional_pictures_differ_by_z_from_column_to_column_and_diversity_is_measured(tmp_path):
    run = make_run(tmp_path / "run", "none")
    assert run.gan.generator.config.c_dim == 0 and run.showcase.columns == list(range(8))
    found = run.showcase.diversity(run.average)
    assert found["generated_z"] > 0 and found["real_groups"] == "any spots" and found["real"] > 30
