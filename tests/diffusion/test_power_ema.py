"""Averages whose length is chosen after the training: their profile, what other lengths are made of, and that they touch no weight."""
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusion_world import differing, run, weights, write_world
from torch import nn

from diffusion_utils import choose_ema
from diffusion_utils.pipeline import load_pipeline
from diffusion_utils.power_ema import PowerEma, gamma_of, inner_product, shares
from preprocessing.errors import OptionError

STEPS = 400


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("power"))


class Steps(nn.Module):
    """Whose weights at step s are the s-th unit vector: an average of them is its own profile."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(STEPS, dtype=torch.float64))

    def go_to(self, step: int) -> None:
        self.weight.data.zero_()
        self.weight.data[step - 1] = 1


def profiles(lengths, every: int):
    """(length, step) -> profile (STEPS,), at every so many steps."""
    model = Steps()
    ema, found = PowerEma(model, lengths), {}
    for step in range(1, STEPS + 1):
        model.go_to(step)
        ema.update(model)
        if step % every == 0:
            found |= {(length, step): average[0].numpy().copy() for length, average in ema.averages.items()}
    return found


@pytest.mark.parametrize("length", [0.05, 0.1, 0.2])
def test_the_weights_of_steps_are_a_power_of_them_as_wide_as_asked(length):
    profile, gamma = profiles([length], STEPS)[length, STEPS], gamma_of(length)
    steps = np.arange(1, STEPS + 1)
    assert np.isclose((gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5, length)
    assert np.isclose(profile.sum(), 1)
    # the product of all (1 - 1/t)^(gamma + 1) from s + 1 to T is (s / T)^(gamma + 1)
    closed = (1 - (1 - 1 / steps) ** (gamma + 1)) * (steps / STEPS) ** (gamma + 1)
    assert np.allclose(profile, closed, atol=1e-12)
    mean = profile @ steps
    assert np.isclose((profile @ (steps - mean) ** 2) ** 0.5 / STEPS, length, rtol=0.02)


def test_any_length_is_made_of_the_two_that_were_kept():
    kept, direct = profiles([0.05, 0.10], 20), profiles([0.07, 0.2], STEPS)
    for length, most in ((0.07, 0.01), (0.2, 0.1)):
        found, missed = shares([(gamma_of(other), step) for other, step in kept], (gamma_of(length), STEPS))
        made = sum(share * profile for share, profile in zip(found, kept.values(), strict=True))
        wanted = direct[length, STEPS]
        assert np.linalg.norm(made - wanted) / np.linalg.norm(wanted) < most and missed < most
        assert np.isclose(made.sum(), 1, atol=0.01)


def test_an_inner_product_is_the_integral_of_both_profiles():
    (p, s), (q, t) = a, b = (3.0, 70), (6.5, 100)
    x = (np.arange(200_000) + 0.5) * 70 / 200_000
    integral = ((p + 1) * x ** p / s ** (p + 1) * (q + 1) * x ** q / t ** (q + 1)).sum() * 70 / 200_000
    assert np.isclose(inner_product(a, b), integral) and np.isclose(inner_product(b, a), integral)


def test_live_weights_are_as_without_it_and_a_resumed_run_keeps_the_same_averages(world, tmp_path):
    plain = run(world, tmp_path / "plain")
    straight = run(world, tmp_path / "straight", power_ema=True, checkpointing_steps=2)
    assert differing(weights(straight), weights(plain)) == []
    run(world, tmp_path / "run", stop_after=3, power_ema=True, checkpointing_steps=2)
    resumed = run(world, tmp_path / "run", resume_from_checkpoint="latest", power_ema=True, checkpointing_steps=2)
    assert resumed.power_ema.n_updates == 4
    assert differing(resumed.power_ema.state(), straight.power_ema.state()) == []
    assert sorted(path.name for path in (tmp_path / "straight" / "averages").iterdir()) == ["update-00000002", "update-00000004"]


def test_the_pipeline_of_a_kept_length_is_that_average_and_others_are_refused(world, tmp_path):
    made = run(world, tmp_path / "run", power_ema=True, checkpointing_steps=2)
    left = [tmp_path / "run" / "averages" / name for name in ("update-00000002.tmp.7", "update-00000004.old.17")]   # by killed runs
    for folder in left:
        folder.mkdir()
    result = CliRunner().invoke(choose_ema.main, ["--run-dir", str(tmp_path / "run"), "--sigma-rel", "0.1"])
    assert result.exit_code == 0 and "averages of 2 moments, whose profile misses 0.0%" in result.output, result.output
    found = load_pipeline(tmp_path / "run" / "pipeline-ema0.1").denoiser.state_dict()
    for name, average in zip(made.power_ema.names, made.power_ema.averages[0.10], strict=True):
        assert torch.allclose(found[name], average, atol=2e-3, rtol=2e-3)                 # kept in half precision
    assert any(not torch.equal(found[name], tensor) for name, tensor in made.live.state_dict().items())
    for arguments, code, message in ((["--sigma-rel", "0.5"], 2, "0.01 to 0.28"), (["--sigma-rel", "nan"], 2, "--sigma-rel")):
        refused = CliRunner().invoke(choose_ema.main, ["--run-dir", str(tmp_path / "run"), *arguments])
        assert refused.exit_code == code and message in refused.output
    run(world, tmp_path / "without", max_train_steps=1)
    refused = CliRunner().invoke(choose_ema.main, ["--run-dir", str(tmp_path / "without"), "--sigma-rel", "0.1"])
    assert refused.exit_code == 3 and "--power-ema" in refused.output
    with pytest.raises(OptionError, match="--power-ema"):
        run(world, tmp_path / "lora", power_ema=True, lora_rank=2, pretrained_model_name_or_path="x", pixel_space=True)
