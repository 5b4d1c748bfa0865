"""Weights load whole or not at all, and never by running code from a file."""
import json
import os

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from networks.weights import load_into, load_weights_folder, read_state_dict, save_weights_folder, weights_sha256
from preprocessing.errors import EXIT_WEIGHTS, InputError, WeightsError


@pytest.fixture
def layer():
    return nn.Linear(3, 2)


@pytest.fixture
def folder(tmp_path, layer):
    return save_weights_folder(tmp_path / "weights", layer.state_dict(), {"class": "Linear", "genes": ["A", "B"]})


def test_a_weights_folder_comes_back_as_it_went(folder, layer):
    tensors, config = load_weights_folder(folder)
    assert torch.equal(tensors["weight"], layer.weight) and torch.equal(tensors["bias"], layer.bias)
    assert config["genes"] == ["A", "B"] and "torch" in config["versions"]
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "SHA256SUMS"}


def test_the_hash_names_the_tensors_not_the_config(folder, layer, tmp_path):
    other = save_weights_folder(tmp_path / "other", layer.state_dict(), {"class": "Linear"})
    assert weights_sha256(other) == weights_sha256(folder)
    changed = save_weights_folder(tmp_path / "changed", {"weight": layer.weight + 1, "bias": layer.bias}, {})
    assert weights_sha256(changed) != weights_sha256(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_one_flipped_byte_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}: SHA-256.*damaged") as error:
        load_weights_folder(folder)
    assert error.value.exit_code == EXIT_WEIGHTS


def test_a_missing_file_of_the_folder_is_named(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match="missing model.safetensors"):
        load_weights_folder(folder)


def test_a_failed_write_leaves_the_old_folder_whole(folder, layer):
    with pytest.raises(TypeError):
        save_weights_folder(folder, layer.state_dict(), {"not JSON": object()})
    assert load_weights_folder(folder)[1]["class"] == "Linear"
    assert [path.name for path in folder.parent.iterdir()] == ["weights"]


def test_every_kind_of_wrong_tensor_is_listed_and_nothing_is_loaded(layer):
    before = layer.bias.clone()
    wrong = {"weight": torch.zeros(2, 4), "bias": torch.tensor([0.0, float("nan")]), "extra": torch.zeros(1)}
    with pytest.raises(WeightsError) as error:
        load_into(layer, wrong, "file.pt")
    message = str(error.value)
    assert "unexpected: 1 (extra)" in message and "misshapen: 1 (weight (2, 4) for (2, 3))" in message and "not finite: 1 (bias)" in message
    with pytest.raises(WeightsError, match=r"missing: 1 \(bias\)"):
        load_into(layer, {"weight": torch.zeros(2, 3)}, "file.pt")
    assert torch.equal(layer.bias, before)


class Payload:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors", ".pkl", ".npy"])
def test_a_pickle_payload_is_refused_under_any_suffix_and_does_not_run(tmp_path, suffix):
    canary = tmp_path / "canary"
    torch.save({"weight": Payload(canary)}, tmp_path / f"evil{suffix}")
    with pytest.raises(WeightsError):
        read_state_dict(tmp_path / f"evil{suffix}")
    assert not canary.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_refusal_never_passes_on_the_advice_to_run_what_is_in_the_file(tmp_path, zipped):
    path = tmp_path / "evil.pt"
    torch.save({"weight": Payload(tmp_path / "canary")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="evil.pt: contents: .* found a file that holds more than tensors and plain values$") as error:
        read_state_dict(path)
    assert "weights_only" not in str(error.value) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 truncated"], ids=["empty", "text", "cut zip"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_damaged_file_is_one_clear_line(tmp_path, content, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="expected tensors that load without running code") as error:
        read_state_dict(path)
    assert "\n" not in str(error.value)


def test_a_wrapped_state_dict_is_opened_and_both_formats_agree(tmp_path, layer):
    torch.save({"state_dict": layer.state_dict(), "epoch": 3}, tmp_path / "a.pt")
    save_file(layer.state_dict(), tmp_path / "a.safetensors")
    torch_file, safe_file = read_state_dict(tmp_path / "a.pt"), read_state_dict(tmp_path / "a.safetensors")
    assert torch_file.keys() == safe_file.keys() and all(torch.equal(torch_file[name], safe_file[name]) for name in safe_file)


def test_a_missing_file_is_bad_input_not_damaged_weights(tmp_path):
    with pytest.raises(InputError, match="nothing there") as error:
        read_state_dict(tmp_path / "absent.pt")
    assert not isinstance(error.value, WeightsError)


def test_the_config_is_plain_json(folder):
    assert json.loads((folder / "config.json").read_text())["class"] == "Linear"
