"""benchmarks/gan.py runs where little is installed, and what it calls plain gives what ours gives."""
import subprocess
import sys

import click
import pytest
import torch
from bare_machine import run_benchmark

from benchmarks.gan import GUIDED, STEP, Row, print_bars
from benchmarks.stages.gan import Job, build_clip, build_data, build_step
from benchmarks.stages.plain_gan import PlainGenerator
from networks.generator import Generator, GeneratorConfig

SIZES = {"cfg": "small", "img_resolution": 16, "batch": 16, "backbone": "random_tiny", "tower": "random_tiny", "genes": 50}


@pytest.mark.parametrize("noise_mode", ["random", "const", "none"])
def test_the_plain_generator_makes_our_images_and_gradients(noise_mode):
    torch.manual_seed(0)
    config = GeneratorConfig(32, c_dim=8, z_dim=6, cbase=256, cmax=16, res_blocks=2, norm_groups=4, noise_init=0.3)
    ours, plain = Generator(config).double(), PlainGenerator(config).double()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            if name.endswith(("gamma", "bias", "input.affine.weight")):      # away from starts at which a layer would not be heard
                parameter.add_(torch.randn_like(parameter) * 0.3)
    plain.load_state_dict(ours.state_dict())
    z, c, noise = (torch.randn(3, width, dtype=torch.float64) for width in (6, 8, ours.noise_size))
    images = [generator(z, c, noise_mode=noise_mode, noise=noise) for generator in (ours, plain)]
    assert torch.allclose(*images, atol=1e-9)
    for made in images:
        made.pow(3).mean().backward()
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None) and (a.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-9)), name


def test_a_plain_step_is_ours_to_rounding():
    found = []
    for way in ("ours, two passes", "plain"):
        job = Job(way, GUIDED, **SIZES)
        torch.manual_seed(1)
        clip = build_clip(job)
        gan = build_step(job, build_data(job, clip), clip)
        losses = gan.gradients(2, sigma=1.0, clip_weight=0.2)
        found.append((losses, [p.grad for p in (*gan.generator.parameters(), *gan.discriminator.heads.parameters())]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4) and "loss/clip" in found[0][0]
    for a, b in zip(found[0][1], found[1][1], strict=True):
        assert torch.allclose(a, b, atol=1e-4 * max(b.abs().max().item(), 1e-2))


def test_the_plain_step_embeds_prompts_four_times_a_micro_batch_and_ours_never():
    for way, times in (("ours", 0), ("plain", 8)):
        job = Job(way, GUIDED, **SIZES)
        clip = build_clip(job)
        gan = build_step(job, build_data(job, clip), clip)
        calls = []
        clip.gene_encoder.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        gan.gradients(0, sigma=0.0, clip_weight=0.2)
        assert len(calls) == times


def test_the_gan_benchmark_prints_every_row_and_what_ours_is_worth(tmp_path):
    printed = run_benchmark("gan", tmp_path, rounds=1, parts=GUIDED, **{**SIZES, "batch": 8})
    first, second, worth = printed.splitlines()[2:]
    for line, way in ((first, "ours"), (second, "plain")):
        assert line.startswith(f"{GUIDED}  {way}") and all(float(number) > 0 for number in line[38:].split())
    assert worth.strip().startswith("ours is ") and " x as fast as plain" in worth


def test_images_a_second_are_held_against_the_bars(capsys):
    rows = []
    for part, seconds in ((STEP, 0.1), (GUIDED, 0.2), (GUIDED, 0.4)):
        rows.append(Row(part, "ours", 100, None))
        rows[-1].goes.append({"wall_s": seconds, "cpu_s": seconds})
    print_bars(rows)
    said = capsys.readouterr().out.splitlines()
    assert [line.split("(")[0].strip() for line in said] == [
        "step: 1000 images/s reaches its aim", "step with guidance: 500 images/s passes its bar",
        "step with guidance: 250 images/s misses its bar"]


def test_a_process_that_fails_ends_the_benchmark():
    dead = subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"], stdout=subprocess.PIPE, text=True)
    with pytest.raises(click.ClickException, match="step, ours: the process ended with code 3"):
        Row(STEP, "ours", 8, dead).answer()
