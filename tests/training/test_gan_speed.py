"""How a GAN computes may change its rounding and its speed, and nothing else."""
import time
from functools import partial

import pytest
import torch
from gan_runs import make_run, same
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from networks.generator import Generator, GeneratorConfig
from preprocessing.errors import OptionError
from training.checkpoints import latest_checkpoint
from training.gan_config import resolve
from training.gan_speed import Ahead, default_precision, place_patches, prepare, set_up_gpu

FOURIER = [(name, 8, 8) for name in ("add", "mul", "sin", "cos")]     # of the first input, whose waves are laid out when all are there
GUIDED = {"clip_weight": 0.2, "mismatch_weight": 0.5}


def gradients(run) -> tuple[dict, torch.Tensor]:
    losses = run.gan.gradients(0, sigma=1.0, clip_weight=run.config.clip_weight)
    return losses, torch.cat([p.grad.flatten() for p in (*run.gan.generator.parameters(), *run.gan.discriminator.heads.parameters())
                              if p.grad is not None])


@pytest.mark.parametrize("preset", ["best", "reference"])
def test_bfloat16_rounds_and_keeps_weights_and_losses_in_float32(tmp_path, preset):
    plain, reduced = (gradients(make_run(tmp_path / precision, preset, precision=precision, **GUIDED)) for precision in ("fp32", "bf16"))
    assert plain[1].dtype == reduced[1].dtype == torch.float32
    difference = (plain[1] - reduced[1]).norm() / plain[1].norm()
    assert 1e-4 < difference < 0.2
    assert all(abs(plain[0][name] - reduced[0][name]) < 0.1 for name in plain[0])
    run = make_run(tmp_path / "one", preset, precision="bf16")
    seen = []
    hook = run.gan.generator.blocks[-1].convs[-1].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    assert run.one_step() is not None and set(seen) == {torch.bfloat16}
    hook.remove()
    assert {p.dtype for p in run.gan.generator.parameters()} == {torch.float32}
    assert run.average.blocks[0].compute_dtype is None      # snapshots and pictures are computed as gen_images computes them


class GpuLayouts(TorchDispatchMode):
    """Group norms return and differentiate in NCHW, as on a GPU; lists every other feature map of `shape` (N, C) that lies so."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shape, self.seen, self.lost = shape, 0, []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made, packet = operation(*args, **(kwargs or {})), operation.overloadpacket
        if packet in (torch.ops.aten.native_group_norm, torch.ops.aten.native_group_norm_backward):
            return made[0].contiguous(), *made[1:]
        maps = [x for x in (made if isinstance(made, (tuple, list)) else (made,))
                if isinstance(x, torch.Tensor) and x.dim() == 4 and x.shape[:2] == self.shape and min(x.shape[2:]) >= 8]
        self.seen += len(maps)
        if packet not in (torch.ops.aten._to_copy, torch.ops.aten.slice):     # a norm is given NCHW on purpose; a slice is a view
            self.lost += [(packet.__name__, *x.shape[2:]) for x in maps if not x.is_contiguous(memory_format=torch.channels_last)]
        return made


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_channels_last_holds_in_every_feature_map_and_gradient_and_changes_only_the_layout(dtype):
    torch.manual_seed(0)
    generator = Generator(GeneratorConfig(16, c_dim=6, cbase=192, cmax=12, res_blocks=2, norm_groups=4))
    z, c, noise = torch.randn(3, 64), torch.randn(3, 6), torch.randn(3, generator.noise_size)

    def take(channels_last):
        generator.compute_in(dtype, channels_last=channels_last)
        generator.zero_grad()
        with GpuLayouts(3, 12) as maps:
            image = generator(z, c, noise=noise)
            image.square().mean().backward()
        return image, torch.cat([p.grad.flatten() for p in generator.parameters()]), maps
    (plain, expected, nchw), (image, found, maps) = take(False), take(True)
    rounding = 1e-5 if dtype is None else 0.05
    assert (image - plain).norm() < rounding * plain.norm() and (found - expected).norm() < rounding * expected.norm()
    assert not [what for what in maps.lost if what not in FOURIER] and maps.seen > 200 and len(nchw.lost) > 100
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) and conv.weight.grad.stride() == conv.weight.stride()
               for conv in generator._convs())


@pytest.mark.parametrize("preset", ["best", "reference"])
def test_a_compiled_step_is_the_step(tmp_path, preset):
    eager, compiled = (make_run(tmp_path / name, preset, **GUIDED) for name in ("eager", "compiled"))
    used = []

    def backend(graph: nn.Module, examples):       # what torch.compile traced, run as it is: compilers are its authors' to test
        used.append(graph)
        return graph.forward
    prepare(compiled.gan.generator, compiled.gan.discriminator, precision="fp32", compiled="blocks", on_gpu=preset == "best",
            penalised=False, backend=backend)
    (losses, found), (expected_losses, expected) = gradients(compiled), gradients(eager)
    assert losses == pytest.approx(expected_losses, abs=1e-5) and torch.allclose(found, expected, atol=1e-5)
    assert len(used) >= len(compiled.gan.generator.blocks) + len(compiled.gan.discriminator.heads) + 1
    assert set(compiled.gan.generator.state_dict()) == set(eager.gan.generator.state_dict())


def test_compile_is_an_option_of_a_run_and_leaves_penalised_heads_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("training.gan_loop.prepare", partial(prepare, backend="aot_eager"))    # the real compiler takes minutes
    run = make_run(tmp_path / "run", compile="blocks", r1_weight=1.0, r1_interval=1)
    assert run.one_step()["loss/r1"] > 0         # the penalty differentiates the heads twice
    assert all(block._compiled_call_impl is not None for block in run.gan.generator.blocks)
    assert all("judge" not in vars(head) for head in run.gan.discriminator.heads)
    assert run.average.blocks[0]._compiled_call_impl is None
    with pytest.raises(OptionError, match="--compile: expected one of off, blocks, max; found fast"):
        resolve("best", "lite", img_resolution=16, batch=8, compile="fast")
    with pytest.raises(OptionError, match="--precision: expected one of fp32, bf16; found fp16"):
        resolve("best", "lite", img_resolution=16, batch=8, precision="fp16")


def test_the_real_compiler_takes_a_block():
    generator = Generator(GeneratorConfig(img_resolution=8, c_dim=6, cbase=64, cmax=8, res_blocks=1, norm_groups=4))
    z, c, noise = torch.randn(2, 64), torch.randn(2, 6), torch.randn(2, generator.noise_size)
    with torch.no_grad():
        expected = generator(z, c, noise=noise)
        generator.blocks[0].compile(dynamic=False)
        assert torch.allclose(generator(z, c, noise=noise), expected, atol=1e-4)


def test_threads_that_read_ahead_change_no_bit_and_do_read_ahead(tmp_path):
    alone, ahead = (make_run(tmp_path / str(workers), workers=workers) for workers in (0, 3))
    for _ in range(4):
        alone.one_step()
        ahead.one_step()
    assert same(alone, ahead)
    made, read = Ahead(lambda step: read.append(step) or -step, workers=2), []
    assert made.of_step(4) == -4
    for _ in range(100):
        if sorted(read) == [4, 5, 6]:
            break
        time.sleep(0.05)
    assert sorted(read) == [4, 5, 6]
    assert made.of_step(5) == -5 and made.of_step(9) == -9                # also after a jump
    assert set(made.waiting) == {10, 11}


def test_what_a_thread_fails_at_fails_the_step():
    def fail(step):
        raise OSError("the disk is gone")
    for workers in (0, 2):
        with pytest.raises(OSError, match="the disk is gone"):
            Ahead(fail, workers).of_step(0)


@pytest.mark.parametrize("preset", ["best", "reference"])
def test_a_step_never_waits_for_a_number_of_the_device(tmp_path, preset):
    gan, read = make_run(tmp_path / "run", preset, batch=16, **GUIDED).gan, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            if operation is torch.ops.aten._local_scalar_dense.default:          # what item(), float() and bool() come down to
                read.append(args[0].shape)
            return operation(*args, **(kwargs or {}))
    with Watch():
        losses = gan.gradients(0, sigma=1.0, clip_weight=0.2)
    assert not read and len(losses) >= 6
    draws = gan._draw(0).to("meta")
    assert draws.noise.is_meta and draws.z.is_meta and not any(x.is_meta for x in (draws.view, draws.crop_fake, draws.augment_fake))


def test_patches_stay_on_the_host_where_they_would_fill_the_device(monkeypatch):
    images = torch.zeros(10, 3, 4, 4, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * images.numel() - 1, 10 ** 9))
    assert place_patches(images, "cuda:0") is images
    assert place_patches(images, "cpu") is images


def test_the_default_is_bfloat16_on_a_gpu_and_float32_on_a_cpu():
    assert [default_precision(*said) for said in (("cuda:1", None), ("cpu", None), ("cuda", True), ("cpu", False))] == [
        "bf16", "fp32", "fp32", "bf16"]


@pytest.mark.parametrize("precision, search", [("fp32", False), ("bf16", True)])
def test_the_gpus_libraries_are_told(precision, search):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        set_up_gpu(precision, search_kernels=search)
        assert torch.backends.cudnn.benchmark is search and torch.backends.cudnn.allow_tf32 is (precision == "bf16")
        assert torch.get_float32_matmul_precision() == {"fp32": "highest", "bf16": "high"}[precision]
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


def test_a_run_may_go_on_in_another_precision(tmp_path):
    run = make_run(tmp_path / "run")
    run.one_step()
    run.save()
    resumed = make_run(tmp_path / "run", precision="bf16", workers=0)
    resumed.load(latest_checkpoint(tmp_path / "run"))
    assert resumed.progress.step == 1 and resumed.one_step() is not None
