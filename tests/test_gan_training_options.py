"""Options of train_gan.py that no other test turns: each changes what it should, and a refused one leaves no folder."""
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import train_gan
from preprocessing.patch_file import write_patch_file

N, PX = 16, 16


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """Patches alone: unconditional runs take the fewest seconds."""
    path, order = tmp_path_factory.mktemp("options") / "imgs.h5", np.random.default_rng(0)
    write_patch_file(path, order.integers(0, 256, (N, PX, PX, 3), dtype=np.uint8), count=N, patch_px=PX,
                     coords=np.arange(2 * N).reshape(N, 2) * PX, barcodes=[f"AAAC{i:04d}-1" for i in range(N)], patch_size_src=PX,
                     pixel_size=0.5, name="S")
    return path


def train(patches, outdir, **changes):
    options = {"outdir": outdir, "data": patches, "img_resolution": PX, "batch": 8, "cfg": "custom", "cbase": 128, "cmax": 8,
               "res_blocks": 1, "backbone": "random_tiny", "kimg": 0.032, "device": "cpu", **changes}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return CliRunner().invoke(train_gan.main, [*words, "--no-tensorboard"], catch_exceptions=False)


def trained(patches, outdir, **changes):
    result = train(patches, outdir, **changes)
    assert result.exit_code == 0, result.output
    return next(outdir.iterdir())


def last_rates(folder):
    """Learning rates of the last step, as the last checkpoint keeps them."""
    checkpoint = max(folder.glob("checkpoint-*"))
    return {name: torch.load(checkpoint / f"{name}_optimiser.pt", weights_only=True)["param_groups"][0]["lr"] for name in "gd"}


@pytest.mark.parametrize("stepped", ["g", "d", ""])
def test_a_schedule_of_learning_rates_moves_that_of_its_network_alone(patches, tmp_path, stepped):
    schedule = {f"{stepped}_lr_schedule": "step"} if stepped else {}
    rates = last_rates(trained(patches, tmp_path / "run", g_lr=0.002, d_lr=0.004, **schedule))
    expected = {"g": 0.002, "d": 0.004}
    assert rates == pytest.approx({name: rate / 10 if name == stepped else rate for name, rate in expected.items()})


def test_snap_is_the_number_of_ticks_between_snapshots(patches, tmp_path):
    found = {snap: sorted(int(path.name[9:]) for path in trained(patches, tmp_path / str(snap), kimg=0.08, tick=0.008, snap=snap)
                          .glob("snapshot-*")) for snap in (1, 100)}
    assert found[1] == list(range(0, 88, 8)) and found[100] == [0, 16, 32, 48, 64, 80]      # at least five a run


def test_backbone_weights_are_those_the_discriminator_sees_through(patches, tmp_path):
    import timm
    from safetensors.torch import save_file

    from preprocessing.done_manifests import file_sha256
    seen = {}
    for seed in (0, 1):
        torch.manual_seed(seed)
        weights = tmp_path / f"{seed}.safetensors"
        save_file(timm.create_model("mobilenetv2_035", pretrained=False, num_classes=0).state_dict(), weights)
        folder = trained(patches, tmp_path / f"run{seed}", backbone="timm:mobilenetv2_035", backbone_weights=weights, backbone_px=32,
                         kimg=0.008)
        told = json.loads((folder / "config.json").read_text())["backbone"]
        assert told == {"name": "timm:mobilenetv2_035", "source": file_sha256(weights)}
        seen[seed] = [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]
    losses = [[line["loss/D"] for line in lines if "loss/D" in line] for lines in seen.values()]
    assert losses[0] and losses[0] != losses[1]


@pytest.mark.parametrize("minutes", ["nan", "-1", "0", "1e300"])
def test_a_timeout_that_is_none_is_refused(patches, tmp_path, minutes):
    result = train(patches, tmp_path / "refused", timeout_minutes=minutes)
    assert result.exit_code == 2 and "--timeout-minutes: expected" in result.output and not (tmp_path / "refused").exists()


def test_compiling_without_a_compiler_leaves_no_folder(patches, tmp_path):
    import torch._inductor.config as inductor
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        result = train(patches, tmp_path / "refused", compile="blocks")
    assert result.exit_code == 2 and "--compile: expected a working C++ compiler" in result.output
    assert not (tmp_path / "refused").exists()
