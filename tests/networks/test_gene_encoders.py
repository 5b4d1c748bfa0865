"""Gene encoders that use structure: sets of gene tokens, and sums over pathways."""
import pytest
import torch

from networks.clip import CLIP, ClipModelConfig
from networks.gene_encoders import MemberLinear
from networks.gene_tokens import GeneTokens
from networks.histo_models import build_encoder
from networks.weights import load_weights_folder
from preprocessing.errors import OptionError

GENES = [f"g{i}" for i in range(9)]
SETS = {"apoptosis": ["g0", "g3"], "cell cycle": ["g3", "g4", "g8"]}
TOKENS = {"gene_encoder": "gene_tokens", "gene_tokens": 4, "gene_token_width": 8, "gene_token_heads": 2, "gene_width": 6, "dropout": 0.1}


def tokens(**options) -> GeneTokens:
    torch.manual_seed(0)
    return GeneTokens(len(GENES), ClipModelConfig(**{**TOKENS, **options})).eval()


@pytest.fixture
def expression():
    """7 spots; no two values are alike; about a third of the genes is absent."""
    generator = torch.Generator().manual_seed(1)
    values = torch.rand(7, 9, generator=generator) + 0.1
    return values * (torch.rand(7, 9, generator=generator) > 0.35)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_the_order_of_the_genes_does_not_matter_to_tokens(expression, pooling):
    encoder, shuffled = (tokens(gene_token_pooling=pooling) for _ in range(2))
    order = torch.randperm(9, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        shuffled.gene.weight.copy_(encoder.gene.weight[order])   # the table of the shuffled vocabulary
    assert torch.allclose(encoder(expression), shuffled(expression[:, order]), atol=1e-6)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_absent_genes_do_not_influence_the_embedding(expression, pooling):
    encoder = tokens(gene_token_pooling=pooling, gene_tokens=9)
    before = encoder(expression)
    absent = expression[2] == 0
    assert absent.any() and not absent.all()
    with torch.no_grad():
        encoder.gene.weight[absent] += 5
    assert torch.allclose(encoder(expression[2:3]), before[2:3], atol=1e-6)
    fewer = tokens(gene_token_pooling=pooling, gene_tokens=int((expression[2] > 0).sum()))
    assert torch.allclose(fewer(expression[2:3]), before[2:3], atol=1e-6)   # room for absent genes changes nothing


def test_only_the_most_expressed_genes_are_tokens(expression):
    encoder = tokens()
    least = expression[0].topk(4).indices.tolist()
    left_out = [gene for gene in range(9) if gene not in least]
    changed = expression[:1].clone()
    changed[0, left_out] *= 0.5
    assert torch.allclose(encoder(changed), encoder(expression[:1]), atol=1e-6)


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_a_spot_without_any_gene_has_an_embedding_and_a_gradient(pooling):
    encoder = tokens(gene_token_pooling=pooling)
    out = encoder(torch.zeros(2, 9))
    out.sum().backward()
    assert torch.isfinite(out).all() and torch.isfinite(encoder.spot.grad).all() and encoder.spot.grad.abs().sum() > 0


def test_the_value_of_a_gene_counts(expression):
    encoder = tokens()
    assert not torch.allclose(encoder(2 * expression), encoder(expression), atol=1e-3)


def test_a_pathway_sums_its_own_genes_alone(expression):
    torch.manual_seed(0)
    layer = MemberLinear(GENES, SETS)
    expected = expression[:, 0] * layer.weight[0, 0] + expression[:, 3] * layer.weight[0, 3]
    assert torch.allclose(layer(expression)[:, 0], expected, atol=1e-6)


def test_a_weight_outside_its_pathway_is_zero_and_stays_zero(expression):
    torch.manual_seed(0)
    layer = MemberLinear(GENES, SETS)
    inside = torch.zeros(2, 9, dtype=torch.bool)
    inside[0, [0, 3]], inside[1, [3, 4, 8]] = True, True
    before = layer.weight.detach().clone()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(expression).square().sum().backward()
        optimizer.step()
    assert (before[~inside] == 0).all() and (layer.weight[~inside] == 0).all()
    assert (before[inside] != 0).all() and (layer.weight[inside] != before[inside]).all()


@pytest.mark.parametrize("options, gene_sets", [(TOKENS, {}), ({"gene_encoder": "pathways", "pathways_file": "absent.gmt"}, SETS)],
                         ids=["tokens", "pathways"])
def test_weights_come_back_without_any_other_file(tmp_path, expression, options, gene_sets):
    settings = {"gene_width": 6, "projection": 5, "dropout": 0.1, "image_encoder": "random_tiny"}
    clip = CLIP(ClipModelConfig(**{**settings, **options}), GENES, image_encoder=build_encoder("random_tiny"), gene_sets=gene_sets).eval()
    loaded = CLIP.from_pretrained(clip.save_pretrained(tmp_path / "clip"))
    assert torch.equal(loaded.encode_genes(expression), clip.encode_genes(expression)) and loaded.gene_sets == gene_sets
    assert not any("members" in name for name in load_weights_folder(tmp_path / "clip")[0])


@pytest.mark.parametrize("options, said", [
    ({**TOKENS, "gene_token_heads": 3}, "a multiple of model.gene_token_heads=3; found 8"),
    ({**TOKENS, "gene_components": 5}, "gene_tokens reads genes, not principal axes"), ({**TOKENS, "gene_tokens": 0}, "model.gene_tokens"),
    ({"gene_encoder": "pathways"}, "model.pathways_file"), ({"pathways_file": "a.gmt"}, "with no other"),
], ids=["heads", "axes", "no tokens", "no file", "file without pathways"])
def test_settings_that_cannot_hold_together_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        ClipModelConfig(**options)
