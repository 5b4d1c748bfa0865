"""The projected discriminator: which tokens it sees, how its heads count, and what its batch statistics depend on."""
import math
from types import SimpleNamespace

import pytest
import timm
import torch
import torch.nn.functional as F

from networks.discriminator import BatchNormLocal, Discriminator, FeatureTaps, Head, SpectralConv1d
from networks.histo_models import build_encoder
from preprocessing.errors import OptionError


def as_encoder(body, input_px):
    mean = torch.full((1, 3, 1, 1), 0.5)
    return SimpleNamespace(body=body.eval(), input_px=input_px, mean=mean, std=mean)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return timm.models.vision_transformer.VisionTransformer(img_size=224, patch_size=16, embed_dim=16, depth=12, num_heads=2, num_classes=0)


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Discriminator(build_encoder("random_tiny"), c_dim=8, img_resolution=32).train()


def test_a_vit_gives_980_logits_an_image_from_five_taps(vit):
    discriminator = Discriminator(as_encoder(vit, 224), c_dim=8, img_resolution=64)
    assert len(discriminator.heads) == 5 and discriminator.logits_per_image == 980
    assert discriminator(torch.zeros(8, 3, 64, 64), torch.zeros(8, 8)).shape == (8, 980)


def test_vit_taps_are_patch_tokens_plus_class_token_after_blocks_2_5_8_11_and_the_embedding(vit):
    images, seen = torch.randn(2, 3, 224, 224), []
    hooks = [vit.blocks[number].register_forward_hook(lambda _m, _i, out: seen.append(out)) for number in (2, 5, 8, 11)]
    hooks.append(vit.blocks[0].register_forward_pre_hook(lambda _m, args: seen.insert(0, args[0])))
    vit(images)
    for hook in hooks:
        hook.remove()
    taps = FeatureTaps(vit)(images)
    for tap, tokens in zip(taps, seen, strict=True):
        assert torch.allclose(tap, (tokens[:, 1:] + tokens[:, :1]).transpose(1, 2), atol=1e-5)


def test_a_vit_without_class_token_gives_its_patch_tokens_as_they_are():
    torch.manual_seed(0)
    body = timm.models.vision_transformer.VisionTransformer(img_size=32, patch_size=8, embed_dim=16, depth=3, num_heads=2, num_classes=0,
                                                            class_token=False, global_pool="avg").eval()
    seen = []
    body.blocks[2].register_forward_hook(lambda _m, _i, out: seen.append(out))
    taps = FeatureTaps(body)(torch.randn(2, 3, 32, 32))
    assert taps[-1].shape == (2, 16, 16) and torch.equal(taps[-1], seen[0].transpose(1, 2))


@pytest.mark.parametrize(("model", "input_px"), [("resnet10t", 64), ("swin_tiny_patch4_window7_224", 224), ("vit_tiny_patch16_224", 100)])
def test_a_backbone_whose_maps_cannot_be_found_is_refused(model, input_px):
    body = timm.create_model(model, pretrained=False, num_classes=0)
    with pytest.raises(OptionError, match="--backbone: expected a ViT, or a network of the EfficientNet"):
        Discriminator(as_encoder(body, 224), c_dim=8, img_resolution=64, input_px=input_px)


def test_efficientnet_gives_maps_at_strides_4_8_16_32_and_drops_those_under_3_x_3():
    body = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=0)
    at_128 = Discriminator(as_encoder(body, 224), c_dim=8, img_resolution=128)
    assert [head.conv_in.weight.shape[0] for head in at_128.heads] == [24, 40, 112, 320]
    assert at_128.logits_per_image == 32 ** 2 + 16 ** 2 + 8 ** 2 + 4 ** 2
    at_64 = Discriminator(as_encoder(body, 224), c_dim=8, img_resolution=64)
    assert at_64.logits_per_image == 16 ** 2 + 8 ** 2 + 4 ** 2


def test_the_backbone_sees_its_own_statistics_unless_told_imagenets():
    encoder = build_encoder("random_tiny")
    images, seen = torch.rand(8, 3, 32, 32) * 2 - 1, []
    for statistics in ("own", "imagenet"):
        discriminator = Discriminator(encoder, c_dim=8, img_resolution=32, statistics=statistics)
        handle = discriminator.taps.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
        discriminator.features(images)
        handle.remove()
    assert torch.allclose(seen[0], encoder.normalise(images), atol=1e-6)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    assert torch.allclose(seen[1], ((images + 1) / 2 - mean) / std, atol=1e-6)


def test_only_heads_learn_and_the_backbone_stays_frozen(small):
    small(torch.randn(8, 3, 32, 32), torch.randn(8, 8)).sum().backward()
    assert all(p.grad is None for p in small.taps.parameters())
    assert all(p.grad is not None for p in small.heads.parameters())
    assert not small.taps.training


def test_head_is_its_formula():
    torch.manual_seed(1)
    head, x, c = Head(6, 8).double(), torch.randn(8, 6, 12).double(), torch.randn(8, 8).double()

    def conv(layer, x, padding=0):
        weight = layer.weight / (layer.u @ layer.weight.flatten(1) @ layer.v)
        return F.conv1d(F.pad(x, (padding, padding), mode="circular"), weight, layer.bias)

    def norm(x):
        return (x - x.mean((0, 2), keepdim=True)) / torch.sqrt(x.var((0, 2), correction=0, keepdim=True) + 1e-5)

    first = F.leaky_relu(norm(conv(head.conv_in, x)), 0.2)
    second = (F.leaky_relu(norm(conv(head.conv_mid, first, 4)), 0.2) + first) / math.sqrt(2)
    out, prompt = conv(head.conv_out, second), c @ head.prompt.weight.T / math.sqrt(8) + head.prompt.bias
    assert torch.allclose(head(x, c), (out * prompt[:, :, None]).sum(1) / 8)


def test_logits_are_those_of_independent_heads_side_by_side_for_the_scaled_prompt(small):
    small.condition.fit(torch.randn(30, 8) + 2)
    images, c = torch.randn(8, 3, 32, 32), torch.randn(8, 8)
    features = small.features(images)
    whole, apart = small(images, c), [head(x, small.condition(c)) for head, x in zip(small.heads, features, strict=True)]
    assert torch.equal(whole, torch.cat(apart, dim=1)) and whole.shape[1] == small.logits_per_image
    assert len({parameter.data_ptr() for head in small.heads for parameter in head.parameters()}) == len(list(small.heads.parameters()))


def test_another_prompt_changes_the_projection_alone():
    torch.manual_seed(1)
    head, x, c = Head(6, 8).double().requires_grad_(False), torch.randn(8, 6, 12).double(), torch.randn(2, 8, 8).double()
    judged = head.judge(x)
    assert torch.equal(head.project(judged, c[0]), head(x, c[0])) and torch.equal(head.project(judged, c[1]), head(x, c[1]))
    prompt = c[1] @ head.prompt.weight.T / math.sqrt(8) + head.prompt.bias
    by_hand = [[sum(judged[n, k, t] * prompt[n, k] for k in range(64)) / 8 for t in range(12)] for n in range(2)]
    assert torch.allclose(head.project(judged, c[1])[:2], torch.tensor(by_hand, dtype=torch.float64))


def test_batch_norm_takes_eight_neighbours_and_all_their_tokens():
    torch.manual_seed(1)
    norm, x = BatchNormLocal(3).double(), torch.randn(24, 3, 5).double() * torch.arange(1, 25).double()[:, None, None]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 2.0, 0.5]))
        norm.bias.copy_(torch.tensor([0.0, -1.0, 3.0]))
    for first in (0, 8, 16):
        for channel in range(3):
            values = x[first:first + 8, channel]
            mean = values.sum() / 40
            deviation = math.sqrt(((values - mean) ** 2).sum() / 40 + 1e-5)
            expected = (values - mean) / deviation * norm.weight[channel] + norm.bias[channel]
            assert torch.allclose(norm(x)[first:first + 8, channel], expected)


def test_one_power_iteration_by_hand():
    torch.manual_seed(2)
    conv = SpectralConv1d(5, 7, 3).double()
    matrix, v = conv.weight.detach().flatten(1), conv.weight.detach().flatten(1).T @ conv.u
    v = v / v.norm()
    u = matrix @ v / (matrix @ v).norm()
    before = conv.u.clone()
    conv(torch.randn(1, 5, 9).double())
    assert torch.equal(conv.u, before)                                   # a forward iterates nothing
    conv.iterate()
    assert torch.allclose(conv.u, u) and torch.allclose(conv.v, v)


def test_spectral_norm_approaches_one_by_power_iterations():
    torch.manual_seed(2)
    conv = SpectralConv1d(5, 7, 3)
    for _ in range(100):
        conv.iterate()
    largest = torch.linalg.svdvals(conv.weight.detach().flatten(1))[0]
    delta = torch.zeros(1, 5, 3)
    response = torch.stack([conv(F.one_hot(torch.tensor([i]), 5).T[None].float() * 1.0 + delta[:, :, :1]) for i in range(5)])
    assert torch.isclose(conv.u @ conv.weight.flatten(1) @ conv.v, largest, rtol=1e-4)
    assert torch.isfinite(response).all()


def test_circular_padding_wraps_sequences_shorter_than_the_kernel():
    torch.manual_seed(2)
    conv, x = SpectralConv1d(2, 2, 9), torch.randn(1, 2, 3)
    rolled = conv(x.roll(1, dims=2))
    assert torch.allclose(rolled, conv(x).roll(1, dims=2), atol=1e-6)


@pytest.mark.parametrize("micro_batch", [8, 16, 32])
def test_micro_batches_do_not_change_logits_or_gradients(small, micro_batch):
    images, c = torch.randn(32, 3, 32, 32), torch.randn(32, 8)
    whole = small(images, c)
    whole.mean().backward()
    gradients = [p.grad.clone() for p in small.heads.parameters()]
    small.zero_grad()
    parts = []
    for start in range(0, 32, micro_batch):
        part = small(images[start:start + micro_batch], c[start:start + micro_batch])
        (part.mean() * micro_batch / 32).backward()
        parts.append(part)
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)
    for parameter, gradient in zip(small.heads.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-5)


def test_batch_norm_refuses_incomplete_groups_and_has_no_memory():
    norm = BatchNormLocal(4)
    with pytest.raises(OptionError, match="multiple of 8"):
        norm(torch.randn(9, 4, 5))
    x = torch.randn(8, 4, 5)
    first = norm(x)
    norm(torch.randn(8, 4, 5) * 100)
    assert torch.equal(norm(x), first)


def test_crops_are_taken_only_from_images_wider_than_the_backbone_sees(small):
    small.input_px = 16
    images = torch.randn(8, 3, 32, 32)
    cropped = torch.tensor([[0.0, 0.5, 0.25]]).repeat(8, 1)
    seen = []
    handle = small.taps.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    small.features(images, cropped)
    small.features(images, torch.ones(8, 3) * 0.9)
    handle.remove()
    assert torch.allclose(seen[0], ((images[:, :, 4:20, 8:24] + 1) / 2 - small.mean) / small.std)
    assert torch.allclose(seen[1], ((F.interpolate(images, (16, 16), mode="area") + 1) / 2 - small.mean) / small.std)


def test_a_head_without_prompts_has_no_projection_and_gives_its_last_convolution():
    head, tokens = Head(12, 0), torch.randn(8, 12, 9)
    x = F.leaky_relu(head.norm_in(head.conv_in(tokens)), 0.2)
    x = (F.leaky_relu(head.norm_mid(head.conv_mid(x)), 0.2) + x) / math.sqrt(2)
    assert torch.equal(head(tokens, torch.zeros(8, 0)), head.conv_out(x)[:, 0]) and head.conv_out.weight.shape == (1, 12, 1)
    assert not any(name.startswith("prompt") for name, _ in head.named_parameters())
