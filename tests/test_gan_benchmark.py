"""benchmarks/gan.py runs where little is installed, and what it calls plain gives what ours gives."""
import subprocess
import sys
from math import isfinite

import click
import pytest
import torch
from bare_machine import run_benchmark

from benchmarks.gan import GUIDED, STEP, Row, print_bars
from benchmarks.gan import main as benchmark
from benchmarks.stages import gan as stage
from benchmarks.stages.gan import Job, build_clip, build_data, build_generator, build_step
from benchmarks.stages.plain_gan import PlainGenerator
from networks.generator import Generator, GeneratorConfig
from train_gan import main as train_gan

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


def test_ours_is_set_up_as_a_run_sets_it_up_and_plain_is_left_alone():
    said = {name: value for name, value in SIZES.items() if name != "batch"}
    for device, fp32, dtype, layout in (("cuda", None, torch.bfloat16, torch.channels_last), ("cpu", None, None, torch.contiguous_format),
                                        ("cuda", True, None, torch.channels_last), ("cpu", False, torch.bfloat16, torch.contiguous_format)):
        job = Job("ours", STEP, device, batch=16, fp32=fp32, **said)
        data = build_data(Job("ours", STEP, **SIZES), None)              # on the CPU in any case
        for block in build_generator(job, data).blocks:
            assert (block.compute_dtype, block.memory_format) == (dtype, layout)
            assert all(conv.weight.is_contiguous(memory_format=layout) for conv in block.convs)
        plain = Job("plain", STEP, device, batch=16, fp32=fp32, **said)
        assert plain.config.precision == "fp32" and build_generator(plain, data).blocks[0].memory_format == torch.contiguous_format
    gan = build_step(Job("ours, two passes", STEP, fp32=False, batch_gpu=16, workers=0, **SIZES), data, None)
    assert gan.discriminator.taps.compute_dtype == torch.bfloat16 and (gan.config.batch_gpu, gan.config.workers) == (16, 0)
    assert all(map(isfinite, gan.gradients(0, sigma=1.0, clip_weight=0.0).values())) and len(gan.own) == 1


def test_compile_is_of_ours_alone():
    data = build_data(Job("ours", STEP, **SIZES), None)
    ours, plain = (build_generator(Job(way, STEP, compile="blocks", **SIZES), data) for way in ("ours", "plain"))
    assert all(block._compiled_call_impl for block in ours.blocks) and not any(block._compiled_call_impl for block in plain.blocks)


def test_the_device_is_told_and_every_go_is_a_step_of_its_own(monkeypatch, capsys):
    told, taken = [], []
    monkeypatch.setattr(stage, "set_up_gpu", lambda precision, search_kernels: told.append((precision, search_kernels)))
    monkeypatch.setattr(stage.GanStep, "gradients", lambda self, step, **_: taken.append(step))
    monkeypatch.setattr("sys.stdin", ["go", "go"])
    stage.main(Job("ours", STEP, **SIZES))
    assert told == [("fp32", True)] and taken == [0, 1, 2] and len(capsys.readouterr().out.splitlines()) == 4


def test_the_benchmark_has_train_gans_options_and_defaults():
    theirs, ours = ({option.name: option for option in command.params} for command in (train_gan, benchmark))
    for name in ("batch_gpu", "compile", "fp32", "workers"):
        assert ours[name].default == theirs[name].default and set(ours[name].opts) <= set(theirs[name].opts)
        assert ours[name].secondary_opts == theirs[name].secondary_opts
    config = Job("ours", STEP, **SIZES).config
    assert [theirs[name].default for name in ("batch_gpu", "compile", "workers")] == [config.batch_gpu, config.compile, config.workers]


def test_the_gan_benchmark_prints_every_row_and_what_ours_is_worth(tmp_path):
    printed = run_benchmark("gan", tmp_path, rounds=1, parts=GUIDED, ways="ours, two passes;plain", batch_gpu=16, workers=1, **SIZES)
    first, second, worth = printed.splitlines()[2:]
    for line, way in ((first, "ours, two passes"), (second, "plain")):
        assert line.startswith(f"{GUIDED}  {way}") and all(float(number) > 0 for number in line[38:].split())
    assert worth.strip().startswith("ours, two passes is ") and " x as fast as plain" in worth
    assert next(option.default for option in benchmark.params if option.name == "ways") == "ours;ours, two passes;plain"


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
