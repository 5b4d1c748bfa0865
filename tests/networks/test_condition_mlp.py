"""The gene encoder trained with the generator: its published layers, and that it embeds the same alone and in a batch."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from networks.condition_mlp import ConditionMlp
from networks.generator import Generator, GeneratorConfig
from networks.snapshot import load_snapshot, save_snapshot
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import OptionError, WeightsError

NAMES = [f"gene{i}" for i in range(5)]


def rows(n=7):
    return torch.rand(n, 5, generator=torch.Generator().manual_seed(0))


def test_the_layers_are_the_published_ones():
    mlp = ConditionMlp(NAMES)
    assert mlp.first.weight.shape == (1024, 5) and mlp.second.weight.shape == (768, 1024) and mlp.activation.weight.item() == 0.25
    x = mlp.first(rows())
    x = (x - x.mean(dim=0)) / (x.var(dim=0, correction=0) + 1e-5).sqrt()
    expected = F.normalize(mlp.second(torch.where(x > 0, x, 0.25 * x)), dim=1)
    assert torch.allclose(mlp.train()(rows()), expected, atol=1e-5)


def test_running_statistics_are_those_of_torchs_batch_norm_and_move_when_told():
    mlp, plain = ConditionMlp(NAMES, hidden=4, width=3), torch.nn.BatchNorm1d(4)
    for _ in range(3):
        mlp.train()(rows())
        assert torch.allclose(mlp.norm.running_mean, plain.running_mean)
        mlp.update_statistics()
        plain(mlp.first(rows()))
        assert torch.allclose(mlp.norm.running_mean, plain.running_mean) and torch.allclose(mlp.norm.running_var, plain.running_var)


def test_expression_is_embedded_row_by_row_in_evaluation_mode_whatever_the_batch():
    mlp, table = ConditionMlp(NAMES, hidden=4, width=3).train(), sp.csr_matrix(rows().numpy())
    whole = mlp.embed_expression(table)
    assert mlp.training and torch.allclose(whole, mlp.embed_expression(table, batch_size=2), atol=1e-6)
    assert torch.allclose(whole.norm(dim=1), torch.ones(7)) and torch.allclose(whole, mlp.eval()(rows()), atol=1e-6)
    assert mlp.embed_expression(sp.csr_matrix((0, 5), dtype=np.float32)).shape == (0, 3)


def snapshot(folder):
    generator = Generator(GeneratorConfig(img_resolution=8, c_dim=3, z_dim=4, cbase=64, cmax=8, res_blocks=1, norm_groups=4))
    mlp = ConditionMlp(NAMES, 1000.0, hidden=4, width=3)
    save_snapshot(folder, generator, gene_encoder=mlp)
    return mlp


def test_a_snapshot_holds_the_encoder_with_its_genes_and_library_size(tmp_path):
    mlp, loaded = snapshot(tmp_path / "s"), load_snapshot(tmp_path / "s")
    assert torch.equal(loaded.gene_encoder(rows()), mlp.eval()(rows())) and loaded.gene_encoder.target_sum == 1000
    assert loaded.gene_encoder.gene_names == NAMES and load_snapshot(tmp_path / "s", gene_encoder=False).gene_encoder is None
    with pytest.raises(OptionError, match="--clip: expected nothing"):
        load_snapshot(tmp_path / "s", gene_encoder_path=tmp_path)


@pytest.mark.parametrize(("old", "new"), [('"gene4"', '"gene4", "gene5"'), ('"hidden": 4', '"hidden": "x"'), ('"hidden": 4', '"depth": 4')])
def test_a_snapshot_whose_encoder_does_not_fit_its_description_is_refused(tmp_path, old, new):
    snapshot(tmp_path / "s")
    config = tmp_path / "s" / "config.json"
    before = file_sha256(config)
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    sums = tmp_path / "s" / "SHA256SUMS"
    sums.write_text(sums.read_text().replace(before, file_sha256(config)))
    with pytest.raises(WeightsError):
        load_snapshot(tmp_path / "s")
