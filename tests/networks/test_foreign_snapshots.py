"""A snapshot whose config.json asks for other shapes than its tensors have is refused before any memory is taken, with agreeing sums."""
import json
import resource

import pytest

from networks.condition_mlp import ConditionMlp
from networks.generator import Generator, GeneratorConfig
from networks.snapshot import load_snapshot, save_snapshot
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import WeightsError

SMALL = GeneratorConfig(16, c_dim=6, z_dim=8, cbase=128, cmax=8, res_blocks=1, norm_groups=4)


def snapshot(folder, part, **changes):
    encoder = ConditionMlp(["a", "b"], hidden=4, width=6)
    save_snapshot(folder, Generator(SMALL), gene_encoder=encoder)
    config = json.loads((folder / "config.json").read_text())
    config[part].update(changes)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "SHA256SUMS").write_text("".join(f"{file_sha256(folder / name)}  {name}\n" for name in ("model.safetensors", "config.json")))
    return folder


def test_what_was_saved_loads(tmp_path):
    loaded = load_snapshot(snapshot(tmp_path / "s", "generator"))
    assert loaded.generator.config == SMALL and loaded.gene_encoder.width == 6
    assert {tensor.device.type for tensor in loaded.generator.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize(("part", "changes"), [
    ("generator", {"c_dim": 10 ** 12}), ("generator", {"z_dim": 10 ** 18}), ("generator", {"c_dim": 10 ** 30}),
    ("generator", {"z_dim": 10 ** 5}), ("generator", {"img_resolution": 2 ** 40}), ("generator", {"res_blocks": 10 ** 9}),
    ("generator", {"z_dim": "8"}), ("generator", {"z_dim": 8.5}), ("generator", {"c_dim": None}), ("generator", {"nobody": 1}),
    ("gene_encoder", {"hidden": 10 ** 12}), ("gene_encoder", {"width": 10 ** 18}), ("gene_encoder", {"hidden": -4}),
    ("gene_encoder", {"gene_names": 5})], ids=str)
def test_other_shapes_than_those_of_the_tensors_are_refused_without_taking_memory(tmp_path, part, changes):
    folder, before = snapshot(tmp_path / "s", part, **changes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError):
        load_snapshot(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000     # kB; 10^5 squared floats are 40 GB
