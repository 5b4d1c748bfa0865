"""The generator is its formulas: every part against a plain re-computation in float64."""
import math

import pytest
import torch
import torch.nn.functional as F

from networks.generator import Generator, GeneratorConfig, Mapping
from networks.layers import (
    ConditionNorm,
    EqualizedLinear,
    SecondOrderStyle,
    images_to_float,
    images_to_uint8,
    upsample_conv,
    upsample_image,
)
from networks.snapshot import load_snapshot, move_fourier_input, save_snapshot
from networks.synthesis_layers import FourierInput, ModulatedConv, ToRGB
from preprocessing.errors import InputError, OptionError, WeightsError

TINY = {"img_resolution": 16, "c_dim": 8, "z_dim": 6, "cbase": 128, "cmax": 16, "res_blocks": 1, "norm_groups": 4}


@pytest.fixture(autouse=True)
def float64():
    torch.manual_seed(3)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def zero_insert(x):
    up = x.new_zeros(*x.shape[:2], x.shape[2] * 2, x.shape[3] * 2)
    up[:, :, ::2, ::2] = x
    return up


def fir(x):
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    kernel = torch.outer(taps, taps) / 64 * 4
    return F.conv2d(x.flatten(0, 1)[:, None], kernel[None, None]).unflatten(0, x.shape[:2])[:, :, 0]


def leaky(x):
    return torch.where(x > 0, x, 0.2 * x)


def test_equalised_linear_scales_weights_at_run_time():
    layer = EqualizedLinear(5, 3, bias_init=2.0, lr_mult=0.01)
    x = torch.randn(4, 5)
    assert torch.allclose(layer.bias, torch.full((3,), 200.0))
    assert torch.allclose(layer(x), x @ (layer.weight * 0.01 / math.sqrt(5)).T + layer.bias * 0.01)


def test_doubling_convolution_has_the_gradients_of_its_formula():
    x, weight = torch.randn(1, 2, 2, 2, requires_grad=True), torch.randn(1, 2, 3, 3, requires_grad=True)
    assert torch.autograd.gradcheck(upsample_conv, (x, weight)) and torch.autograd.gradgradcheck(upsample_conv, (x, weight))


def test_style_is_second_order_in_w():
    style, w = SecondOrderStyle(6, 4), torch.randn(3, 6)
    m = w @ style.affine.weight.T / math.sqrt(6) + 1.0
    assert torch.allclose(style(w), m[:, :4] * m[:, 4:8] + m[:, 8:])


def test_mapping_normalises_z_and_leaves_the_genes_alone():
    mapping, z, c = Mapping(6), torch.randn(3, 6), torch.randn(3, 8)
    unit = z / torch.sqrt((z ** 2).mean(1, keepdim=True) + 1e-8)
    hidden = leaky(unit @ mapping.fc0.weight.T * 0.01 / math.sqrt(6)) * math.sqrt(2)
    x = hidden @ mapping.fc1.weight.T * 0.01 / math.sqrt(6)
    assert torch.allclose(mapping(z, c), torch.cat((x, c), 1))


def test_running_mean_of_x_moves_when_asked_and_never_by_a_forward():
    generator = Generator(GeneratorConfig(**TINY)).train()
    z, c = torch.randn(16, 6), torch.randn(16, 8)
    w = generator.mapping(z, c)
    assert (generator.mapping_network.x_avg == 0).all()
    generator.mapping_network.update_average(z)
    assert torch.allclose(generator.mapping_network.x_avg, 0.005 * w[:, 0, :6].mean(0))


def test_truncation_zero_ignores_z_and_one_changes_nothing():
    generator = Generator(GeneratorConfig(**TINY)).eval()
    c, first, second = torch.randn(2, 8), torch.randn(2, 6), torch.randn(2, 6)
    images = [generator(z, c, truncation_psi=0, noise_mode="const") for z in (first, second)]
    assert torch.equal(*images)
    full = generator(first, c, truncation_psi=1, noise_mode="const")
    assert not torch.allclose(full, generator(second, c, noise_mode="const"))
    w = generator.mapping(first, c)
    halved = torch.cat((w[..., :6] / 2, w[..., 6:]), dim=2)      # x_avg is 0 before training
    assert torch.allclose(generator(first, c, truncation_psi=0.5, noise_mode="const"), generator.synthesis(halved, noise_mode="const"))


def test_truncation_pulls_x_to_its_running_mean_and_never_the_genes():
    mapping, z, c = Mapping(6), torch.randn(3, 6), torch.randn(3, 8)
    mapping.x_avg.copy_(torch.randn(6))
    x = mapping(z, c)[:, :6]
    for psi in (0.0, 0.3, 1.0):
        expected = mapping.x_avg + psi * (x - mapping.x_avg)
        assert torch.allclose(mapping(z, c, truncation_psi=psi), torch.cat((expected, c), dim=1))


def test_weights_start_as_published():
    generator = Generator(GeneratorConfig(32, c_dim=40, z_dim=24, cbase=4096, cmax=128, res_blocks=1))
    block, mapping = generator.blocks[1], generator.mapping_network
    conv0, plain, residual = block.convs
    for tensor, deviation in ((conv0.weight, 1), (residual.weight, 1), (block.to_rgb.weight, 0.1), (conv0.style.affine.weight, 1),
                              (mapping.fc0.weight, 100), (mapping.fc1.weight, 100), (generator.blocks[0].input.weight, 1)):
        assert tensor.std().item() == pytest.approx(deviation, rel=0.15) and abs(tensor.mean().item()) < 0.2 * deviation
    assert (conv0.style.affine.bias == 1).all() and (block.to_rgb.style.affine.bias == 1).all() and (mapping.fc0.bias == 0).all()
    assert all((conv.bias == 0).all() and conv.noise_strength == 0 for conv in block.convs)
    assert (residual.gamma == 1e-5).all() and plain.gamma is None and plain.norm is None and residual.norm.num_groups == 32
    assert (conv0.gain, plain.gain, residual.gain) == pytest.approx((1, math.sqrt(0.5), math.sqrt(0.5)))
    affine = generator.blocks[0].input.affine
    assert (affine.weight == 0).all() and affine.bias.tolist() == [1, 0, 0, 0]


def test_frequencies_and_phases_of_the_input_start_as_published():
    torch.manual_seed(5)
    rows, phases = torch.randn(50, 2), torch.rand(50) - 0.5
    torch.manual_seed(5)
    layer = FourierInput(6, 50)
    radius = rows.norm(dim=1, keepdim=True)
    assert torch.allclose(layer.frequencies, rows / (radius * torch.exp(radius ** 2) ** 0.25) * 2)
    assert torch.equal(layer.phases, phases) and torch.equal(layer.user_transform, torch.eye(3))


def test_synthesis_is_its_layers_in_order_and_colours_add_up_across_resolutions():
    generator = Generator(GeneratorConfig(**TINY))
    w = torch.randn(2, generator.num_ws, generator.config.w_dim)
    first, second = generator.blocks
    x = first.input(w[:, 0])
    x = first.convs[1](first.convs[0](x, w[:, 1], None), w[:, 2], None)
    image = first.to_rgb(x, w[:, 3])                                     # reads the style of the next block's first layer
    x = second.convs[0](x, w[:, 3], None)
    x = second.convs[2](second.convs[1](x, w[:, 4], None), w[:, 5], None)
    image = fir(F.pad(zero_insert(image), (2, 1, 2, 1))) + second.to_rgb(x, w[:, 6])
    assert generator.num_ws == 7 and torch.allclose(generator.synthesis(w, noise_mode="none"), image)


def test_noise_is_dealt_to_the_layers_in_order_and_the_const_mode_takes_their_buffers():
    generator = Generator(GeneratorConfig(**TINY, noise_init=0.7))
    w = generator.mapping(torch.randn(2, 6), torch.randn(2, 8))
    buffers = [conv.noise_const.flatten() for block in generator.blocks for conv in block.convs]
    dealt = torch.cat(buffers).expand(2, -1)
    assert dealt.shape[1] == generator.noise_size == 2 * 8 ** 2 + 3 * 16 ** 2
    assert torch.allclose(generator.synthesis(w, "random", dealt), generator.synthesis(w, "const"))
    conv, x = generator.blocks[0].convs[0], torch.randn(2, 16, 8, 8)
    noise = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        conv.bias.normal_()
        quiet, loud = (conv(x, w[:, 0], values) / (math.sqrt(2) * conv.gain) for values in (None, noise))
    before = torch.where(quiet > 0, quiet, quiet / 0.2) + 0.7 * noise    # noise comes before the activation
    assert torch.allclose(loud, leaky(before))


def test_colours_are_clamped_at_256_and_pictures_saved_by_the_published_formula():
    layer = ToRGB(4, 6)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([1e4, -1e4, 0.0]))
    colours = layer(torch.zeros(1, 4, 2, 2), torch.randn(1, 6))
    assert colours[0, :, 0, 0].tolist() == [256, -256, 0]
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
    assert images_to_uint8(values).tolist() == [min(max(int(v * 127.5 + 128), 0), 255) for v in values.tolist()]
    grey = torch.tensor([0, 127, 128, 255], dtype=torch.uint8)
    assert torch.allclose(images_to_float(grey).double(), grey / 127.5 - 1, atol=1e-7)
    assert torch.equal(images_to_uint8(images_to_float(torch.arange(256).byte())), torch.arange(256).byte())


def test_doubling_convolution_equals_zero_insertion_and_valid_convolution_borders_included():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(4, 3, 3, 3)
    assert torch.allclose(upsample_conv(x, weight), F.conv2d(fir(F.pad(zero_insert(x), (3, 2, 3, 2))), weight))


def test_image_doubling_equals_zero_insertion_and_fir():
    x = torch.randn(2, 3, 5, 5)
    assert torch.allclose(upsample_image(x), fir(F.pad(zero_insert(x), (2, 1, 2, 1))))
    assert torch.allclose(upsample_image(torch.ones(1, 1, 8, 8))[:, :, 1:-1, 1:-1], torch.ones(1))   # the FIR's sum is 4 over 4 phases


@pytest.mark.parametrize("up", [False, True], ids=["same size", "doubling"])
def test_modulation_equals_the_fused_per_sample_convolution(up):
    conv = ModulatedConv(3, 5, 6, 8 if up else 4, gain=0.7, up=up, noise_init=0.3)
    x, w, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 6), torch.randn(2, 1, conv.resolution, conv.resolution)
    expected = []
    for row, s in enumerate(conv.style(w)):
        weight = conv.weight * s[None, :, None, None]
        weight = weight / torch.sqrt((weight ** 2).sum((1, 2, 3), keepdim=True) + 1e-8)
        y = F.conv2d(fir(F.pad(zero_insert(x[row:row + 1]), (3, 2, 3, 2))), weight) if up else F.conv2d(x[row:row + 1], weight, padding=1)
        expected.append(leaky(y + 0.3 * noise[row]) * math.sqrt(2) * 0.7)
    assert torch.allclose(conv(x, w, noise), torch.cat(expected))


def test_activations_are_clamped_at_256_times_the_gain():
    conv = ModulatedConv(2, 2, 4, 4, gain=0.5)
    with torch.no_grad():
        conv.bias.fill_(1e6)
    assert conv(torch.randn(1, 2, 4, 4), torch.randn(1, 4), None).max() == 128


def test_residual_layers_add_the_normalised_input():
    conv = ModulatedConv(4, 4, 6, 5, gain=math.sqrt(0.5), residual_groups=2)
    x, w = torch.randn(2, 4, 5, 5) * 7 + 3, torch.randn(2, 6)
    assert torch.allclose(conv.gamma, torch.tensor(1e-5))
    groups = x.view(2, 2, -1)
    x_hat = ((groups - groups.mean(2, keepdim=True)) / torch.sqrt(groups.var(2, correction=0, keepdim=True) + 1e-5)).view_as(x)
    plain = ModulatedConv(4, 4, 6, 5, gain=math.sqrt(0.5))
    plain.load_state_dict({name: value for name, value in conv.state_dict().items() if name not in ("gamma", "norm.weight", "norm.bias")})
    with torch.no_grad():
        conv.gamma.fill_(0.4)
    assert torch.allclose(conv(x, w, None), math.sqrt(2) * (0.4 * plain(x_hat, w, None) + x_hat))


def test_fourier_input_is_waves_moved_by_w():
    layer = FourierInput(6, 5)
    with torch.no_grad():
        layer.affine.weight.normal_()
        layer.user_transform.copy_(torch.tensor([[0.0, -1, 0.1], [1, 0, 0.2], [0, 0, 1]]))
    w, image = torch.randn(1, 6), torch.zeros(1, 5, 8, 8)
    t = (w @ layer.affine.weight.T / math.sqrt(6) + layer.affine.bias)[0].detach()
    t = t / torch.sqrt(t[0] ** 2 + t[1] ** 2)
    turn = torch.tensor([[t[0], -t[1], 0], [t[1], t[0], 0], [0, 0, 1]])
    m = turn @ torch.tensor([[1, 0, -t[2]], [0, 1, -t[3]], [0, 0, 1]]) @ layer.user_transform
    for channel in range(5):
        f = layer.frequencies[channel]
        phase, f = layer.phases[channel] + f @ m[:2, 2], f @ m[:2, :2]
        amplitude = min(max(1 - (f.norm().item() - 2) / 2, 0), 1)
        for row in range(8):
            for column in range(8):
                place = torch.tensor([(column + 0.5) / 8 - 0.5, (row + 0.5) / 8 - 0.5])
                image[0, channel, row, column] = amplitude * torch.sin(2 * math.pi * (f @ place + phase))
    assert torch.allclose(layer(w), torch.einsum("nchw,oc->nohw", image, layer.weight / math.sqrt(5)))


def test_to_rgb_has_a_scaled_style_and_no_demodulation():
    layer, x, w = ToRGB(4, 6), torch.randn(1, 4, 3, 3), torch.randn(1, 6)
    expected = torch.einsum("nchw,oc->nohw", x * (layer.style(w) / 2)[:, :, None, None], layer.weight[:, :, 0, 0])
    assert torch.allclose(layer(x, w), expected)


def test_lite_at_64_px_has_19_convolutions_and_21_styles():
    with torch.device("meta"):
        generator = Generator(GeneratorConfig(64))
    assert sum(len(block.convs) for block in generator.blocks) == 19
    assert generator.num_ws == 21
    assert [generator.config.channels(r) for r in (8, 64, 128)] == [512, 512, 256]


def test_noise_modes_do_what_they_say():
    generator = Generator(GeneratorConfig(**TINY, noise_init=1.0)).eval()
    z, c = torch.randn(1, 6), torch.randn(1, 8)
    for mode in ("const", "none"):
        assert torch.equal(generator(z, c, noise_mode=mode), generator(z, c, noise_mode=mode))
    assert not torch.allclose(generator(z, c, noise_mode="random"), generator(z, c, noise_mode="random"))
    noise = torch.randn(1, generator.noise_size)
    assert torch.equal(generator(z, c, noise=noise), generator(z, c, noise=noise))
    assert torch.allclose(generator(z, c, noise=noise * 0), generator(z, c, noise_mode="none"))
    with pytest.raises(OptionError, match="random, const, none"):
        generator(z, c, noise_mode="loud")


@pytest.mark.parametrize("wrong", [{"img_resolution": 48}, {"img_resolution": 4}, {"cmax": 6}, {"res_blocks": 0}], ids=str)
def test_impossible_shapes_are_refused(wrong):
    with pytest.raises(OptionError):
        GeneratorConfig(**{**TINY, **wrong})


@pytest.mark.parametrize("kind", ["scaled", "standardize"])
def test_condition_norm_brings_prompts_to_unit_second_moment(kind):
    prompts = F.normalize(torch.randn(50, 8) * 0.1 + torch.arange(8.0), dim=1)
    norm = ConditionNorm(8, kind)
    norm.fit(prompts)
    scaled = norm(prompts)
    assert torch.isclose((scaled ** 2).mean(), torch.tensor(1.0))
    assert (scaled.mean(0).abs().max() < 1e-9) == (kind == "standardize")
    assert torch.allclose(ConditionNorm(8, "l2")(prompts * 5), prompts)


def test_user_transform_moves_the_picture_by_whole_pixels():
    layer, w = FourierInput(6, 5), torch.randn(1, 6)
    generator = Generator(GeneratorConfig(**TINY))
    generator.blocks[0].input = layer
    before = layer(w)
    move_fourier_input(generator, translate=(1 / 8, 0))
    assert torch.allclose(layer(w)[..., 1:], before[..., :-1])     # one pixel to the right
    move_fourier_input(generator, rotate_deg=90)
    assert torch.allclose(layer(w), torch.rot90(before, -1, dims=(2, 3)))   # y points down: clockwise


def test_snapshot_gives_the_same_pictures_and_refuses_what_is_not_one(tmp_path):
    torch.set_default_dtype(torch.float32)
    generator = Generator(GeneratorConfig(**TINY)).eval()
    z, c = torch.randn(2, 6), torch.randn(2, 8)
    save_snapshot(tmp_path / "snapshot", generator, kimg=1.0)
    loaded = load_snapshot(tmp_path / "snapshot")
    assert loaded.gene_encoder is None and loaded.config["kimg"] == 1.0
    assert torch.allclose(loaded.generator(z, c, noise_mode="const"), generator(z, c, noise_mode="const"))
    with pytest.raises(InputError, match="nothing there"):
        load_snapshot(tmp_path / "missing")
    (tmp_path / "network.pkl").write_bytes(b"cos\nsystem\n(S'touch canary'\ntR.")
    with pytest.raises(WeightsError, match="pickled networks are never read"):
        load_snapshot(tmp_path / "network.pkl")
    with open(tmp_path / "snapshot" / "model.safetensors", "r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(WeightsError, match="damaged"):
        load_snapshot(tmp_path / "snapshot")


@pytest.mark.parametrize("cond_norm", ["l2", "scaled", "standardize"])
def test_without_prompts_the_style_is_the_mapped_z_alone(cond_norm):
    generator = Generator(GeneratorConfig(**{**TINY, "c_dim": 0, "cond_norm": cond_norm})).eval()
    generator.condition.fit(torch.zeros(5, 0))
    z = torch.randn(2, 6)
    w = generator.mapping(z, torch.zeros(2, 0))
    assert torch.equal(w[:, 0], generator.mapping_network._mapped(z)) and w.shape == (2, generator.num_ws, 6)
    assert torch.isfinite(generator(z, torch.zeros(2, 0))).all()
