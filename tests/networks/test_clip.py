"""The CLIP model: published sizes, unit embeddings, a temperature that is used, weights that come back or are refused."""
import json
import shutil

import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

from evaluation.retrieval import both_ways
from networks.clip import CLIP, ClipModelConfig, clip_weights_sha256
from networks.gene_encoders import InputScaling, ProjectionHead
from networks.histo_models import build_encoder
from networks.weights import load_weights_folder, save_weights_folder
from preprocessing.errors import EXIT_WEIGHTS, InputError, OptionError, WeightsError

GENES = ["Actb", "Cd3e", "Epcam", "Krt8", "Ptprc"]


def tiny(**options) -> CLIP:
    torch.manual_seed(0)
    settings = {"gene_encoder": "bottleneck", "gene_hidden": 8, "gene_width": 8, "projection": 6, "dropout": 0.2, "image_dropout": 0.2,
                "image_encoder": "random_tiny"}
    return CLIP(ClipModelConfig(**{**settings, **options}), GENES, image_encoder=build_encoder("random_tiny")).eval()


@pytest.fixture
def expression():
    return torch.rand(7, 5, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def images():
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_the_published_gene_encoder_has_352_million_weights():
    with torch.device("meta"):
        clip = CLIP(ClipModelConfig(), [f"g{i}" for i in range(18248)], feature_width=1024)
    count = sum(parameter.numel() for parameter in clip.gene_encoder.parameters())
    assert count == 18248 * 18248 + 18248 + 18248 * 1024 + 1024 and round(count / 1e6) == 352
    assert clip.gene_head.first.out_features == 512 and clip.gene_encoder[2].p == clip.gene_head.dropout.p == 0.8


def test_a_projection_head_adds_its_first_linears_output(expression):
    head = ProjectionHead(5, 4, dropout=0.8).eval()
    first = expression @ head.first.weight.T + head.first.bias
    second = F.gelu(first) @ head.second.weight.T + head.second.bias
    assert torch.allclose(head(expression), first + second, atol=1e-6)
    head.residual = False
    assert torch.allclose(head(expression), second, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"gene_encoder": "linear_block"}, {"gene_encoder": "hidden", "layer_norm": True},
                                     {"gene_encoder": "identity", "linear_heads": True, "image_views": 8}])
def test_embeddings_are_unit_rows_and_each_depends_on_its_own_input(options, expression, images):
    clip = tiny(**options)
    genes, pictures = clip.encode_genes(expression), clip.encode_images(images)
    assert genes.shape == (7, 6) and pictures.shape == (3, 6)
    assert torch.allclose(genes.norm(dim=1), torch.ones(7), atol=1e-5) and torch.allclose(pictures.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(clip.encode_genes(expression[2:3]), genes[2:3], atol=1e-6)


def test_embedding_sparse_expression_streams_to_the_same_rows(expression):
    clip = tiny().train()
    embedded = clip.embed_expression(sp.csr_matrix(expression.numpy()), batch_size=2)
    assert clip.training
    assert torch.allclose(embedded, clip.eval().encode_genes(expression), atol=1e-6) and embedded.dtype == torch.float32


@pytest.mark.parametrize("kind", ["centre", "standardise"])
def test_samples_are_scaled_by_their_own_genes_so_that_shift_and_factor_vanish(expression, kind):
    clip, samples = tiny(gene_sample_scaling=kind), np.array(list("ABABAAB") * 4)
    rows = expression.repeat(4, 1).numpy()
    with pytest.raises(InputError, match="B: spots of a sample: expected a whole sample, at least 10.* found 3"):
        clip.embed_expression(sp.csr_matrix(rows[:7]), sample_ids=samples[:7])
    embedded = clip.embed_expression(sp.csr_matrix(rows), batch_size=2, sample_ids=samples)
    shifted = rows + (samples == "B")[:, None] * np.arange(1, 6, dtype=np.float32)   # a batch effect of sample B
    assert torch.allclose(clip.embed_expression(sp.csr_matrix(shifted), sample_ids=samples), embedded, atol=1e-4)
    only_b = samples == "B"
    alone = clip.embed_expression(sp.csr_matrix(rows[only_b]))
    assert torch.allclose(alone, embedded[only_b], atol=1e-6)   # a sample does not depend on who is embedded beside it
    scaled = (rows[only_b] - rows[only_b].mean(0)) / (rows[only_b].std(0) + 0.2 if kind == "standardise" else 1)
    assert torch.allclose(alone, clip.encode_genes(torch.from_numpy(scaled)), atol=1e-5)


@pytest.mark.parametrize("views", [1, 8])
def test_features_are_centred_by_sample_so_that_a_stain_shift_vanishes(images, views):
    clip = tiny(feature_sample_scaling="centre", image_views=views)
    features = torch.randn(len(images), views, clip.feature_width, generator=torch.Generator().manual_seed(1))
    shift = torch.randn(clip.feature_width, generator=torch.Generator().manual_seed(2))
    centre = features.mean((0, 1))
    embedded = clip.project_views(features, centre)
    assert torch.allclose(clip.project_views(features + shift, centre + shift), embedded, atol=1e-5)
    assert torch.allclose(clip.project_views(features, centre.expand(len(features), -1)), embedded, atol=1e-6)   # a centre a row
    clip.fit_inputs(torch.zeros(2, 5), features.flatten(0, 1), centres=centre.expand(len(features) * views, -1))
    assert torch.allclose(clip.project_views(features), embedded, atol=1e-5)   # no known sample: as the training patches
    assert torch.allclose(clip.encode_images(images, centre), clip.project_views(clip.view_features(images), centre), atol=1e-6)


def test_rare_genes_are_known_before_samples_are_centred():
    scaling = InputScaling(2, "centre", min_share=0.5)
    rows = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 0.0]])
    centred = rows - rows.mean(0)                                   # no value is zero any more
    scaling.fit(centred, (rows != 0).float().mean(0))
    assert scaling.scale.tolist() == [1, 0]


def test_eight_views_make_the_embedding_independent_of_how_the_patch_lies(images):
    clip, one = tiny(image_views=8), tiny()
    turned = torch.rot90(images, 1, (-2, -1)).flip(-1)
    assert torch.allclose(clip.encode_images(images), clip.encode_images(turned), atol=1e-5)
    assert not torch.allclose(one.encode_images(images), one.encode_images(turned), atol=1e-5)


def test_the_temperature_of_the_config_is_the_temperature_of_the_model():
    assert tiny(temperature=0.3).temperature.item() == pytest.approx(0.3) and not tiny().log_temperature.requires_grad
    learned = tiny(temperature=0.07, learn_temperature=True)
    assert learned.log_temperature.requires_grad
    with torch.no_grad():
        learned.log_temperature.fill_(-9)
    assert learned.temperature.item() == pytest.approx(0.01)


def test_gene_dropout_acts_in_training_alone(expression):
    clip = tiny(gene_dropout=0.5, dropout=0.0)
    assert torch.equal(clip.encode_genes(expression), clip.encode_genes(expression))
    clip.train()
    assert not torch.equal(clip.encode_genes(expression), clip.encode_genes(expression))


def test_principal_axes_are_those_of_the_training_rows():
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 0.1, 0.1])
    scaling = InputScaling(5, "centre", components=2)
    scaling.fit(rows)
    projected = scaling(rows)
    expected = np.linalg.svd((rows - rows.mean(0)).numpy(), full_matrices=False)
    scores = expected[0][:, :2] * expected[1][:2]
    correlation = np.corrcoef(projected.T.numpy(), scores.T)[:2, 2:]
    assert np.allclose(np.abs(np.diag(correlation)), 1, atol=1e-4) and np.allclose(projected.mean(0), 0, atol=1e-4)
    ratio = projected.std(0, correction=0)[0] / projected.std(0, correction=0)[1]
    assert ratio == pytest.approx(expected[1][0] / expected[1][1], rel=1e-3)   # the axes keep their proportions


def test_genes_seen_in_too_few_spots_are_ignored():
    rows = torch.zeros(10, 2)
    rows[:, 0], rows[0, 1] = 1.0, 50.0
    scaling = InputScaling(2, "none", min_share=0.2)
    scaling.fit(rows)
    assert scaling(rows)[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"gene_scaling": "standardise", "gene_components": 3, "feature_scaling": "centre"}])
def test_weights_come_back_and_leave_the_frozen_tower_out(tmp_path, expression, images, options):
    clip = tiny(**options)
    clip.fit_inputs(expression, clip.image_features(images))
    folder = clip.save_pretrained(tmp_path / "clip")
    loaded = CLIP.from_pretrained(folder)
    assert torch.equal(loaded.encode_genes(expression), clip.encode_genes(expression))
    assert torch.equal(loaded.encode_images(images), clip.encode_images(images))
    assert loaded.gene_names == GENES and loaded.target_sum == "median" and not loaded.training
    tensors, config = load_weights_folder(folder)
    assert not any(name.startswith("image_encoder") for name in tensors) and config["image_encoder_sha256"] == "seeded"
    genes_only = CLIP.from_pretrained(folder, image_encoder=False)
    assert genes_only.image_encoder is None and torch.equal(genes_only.encode_genes(expression), clip.encode_genes(expression))
    assert len(clip_weights_sha256(folder)) == 64


def test_what_is_pushed_to_the_hub_is_a_weights_folder_that_comes_back(tmp_path, expression, monkeypatch):
    asked = []

    class FakeHub:
        def __init__(self, token):
            asked.append(("token", token))

        def create_repo(self, repo_id, *, private, exist_ok):
            asked.append((repo_id, private, exist_ok))

        def upload_folder(self, *, repo_id, folder_path):
            shutil.copytree(folder_path, tmp_path / repo_id)
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    clip = tiny()
    assert clip.push_to_hub("me/clip", token="secret", private=True) == "https://hub/me/clip/commit/1"
    assert asked == [("token", "secret"), ("me/clip", True, True)]
    downloaded = tmp_path / "me" / "clip"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda repo_id, revision, allow_patterns: tmp_path / repo_id)
    assert torch.equal(CLIP.from_pretrained("hf:me/clip").encode_genes(expression), clip.encode_genes(expression))
    assert clip_weights_sha256("hf:me/clip") == clip_weights_sha256(downloaded)
    assert torch.equal(CLIP.from_pretrained(downloaded).encode_genes(expression), clip.encode_genes(expression))
    assert sorted(path.name for path in downloaded.iterdir()) == ["README.md", "SHA256SUMS", "config.json", "model.safetensors"]
    assert not any("image_encoder" in name or "secret" in name for name in load_weights_folder(downloaded)[0])
    assert "secret" not in (downloaded / "config.json").read_text() + (downloaded / "README.md").read_text()


def test_weights_that_are_neither_here_nor_on_the_hub_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(repo_id, revision, allow_patterns):
        raise OSError("no connection")
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"hf:nobody/clip: .*the hub says: no connection"):
        CLIP.from_pretrained("hf:nobody/clip")
    with pytest.raises(InputError, match=r"runs/clpi: folder: .*nothing there$"):   # the hub is asked where its name is given alone
        CLIP.from_pretrained("runs/clpi")


def test_the_hash_of_a_folder_without_weights_says_which_files_it_lacks(tmp_path):
    with pytest.raises(WeightsError, match=r"files: expected model.safetensors.*missing model.safetensors, config.json, SHA256SUMS"):
        clip_weights_sha256(tmp_path)


def test_the_model_card_says_what_the_weights_are_and_names_no_path(tmp_path):
    clip = tiny(image_encoder_weights="/home/someone/uni.bin", temperature=0.2)
    clip.training_record = {"samples": ["S1", "S2"], "n_spots": 1234, "patch_px": 128, "chosen": "last, at step 7"}
    before = (clip.save_pretrained(tmp_path / "clip") / "README.md").read_text()
    assert "Retrieval was not measured" in before and "someone" not in before
    clip.training_record["retrieval"] = {"samples": ["S3"], "n_spots": 40, **both_ways(np.eye(40), np.eye(40))}
    card = (clip.save_pretrained(tmp_path / "clip") / "README.md").read_text()
    for said in ("gene encoder | bottleneck |", "random_tiny, frozen, 32 features; its licence: ours", "1,234 spots of 2 samples: S1, S2",
                 "5 genes, library size median", "last, at step 7", "| gene to image | 1.000 | 1.000 | 1.000 (1.000-1.000) | 1 |",
                 "among 40 validation spots of S3 (chance R@10 0.250)", "CLIP.from_pretrained", "not for diagnosis"):
        assert said in card, said


def edited(folder, change):
    tensors, config = load_weights_folder(folder)
    change(tensors, config)
    return save_weights_folder(folder, tensors, config)


@pytest.mark.parametrize("change, said", [
    (lambda tensors, config: tensors.pop("gene_head.first.bias"), r"missing: 1 \(gene_head.first.bias\)"),
    (lambda tensors, config: tensors.update(extra=torch.zeros(1)), r"unexpected: 1 \(extra\)"),
    (lambda tensors, config: config["model"].update(projection=7), "misshapen: "),
    (lambda tensors, config: config["gene_names"].reverse(), "another gene list"),
    (lambda tensors, config: config["model"].update(surprise=1), r"unknown \['surprise'\]"),
    (lambda tensors, config: config.update({"class": "GAN"}), "expected CLIP; found GAN"),
    (lambda tensors, config: config.update(image_encoder_sha256="0" * 64), "with which this CLIP was trained"),
], ids=["missing", "unexpected", "misshapen", "gene list", "unknown setting", "other class", "other tower"])
def test_weights_of_another_model_are_refused_with_exit_5(tmp_path, change, said):
    folder = edited(tiny().save_pretrained(tmp_path / "clip"), change)
    with pytest.raises(WeightsError, match=said) as error:
        CLIP.from_pretrained(folder)
    assert error.value.exit_code == EXIT_WEIGHTS


def test_another_gene_list_is_refused_naming_the_first_difference():
    with pytest.raises(WeightsError, match="first difference at gene 2: Cd3e expected, Cd4 found"):
        tiny().require_genes(["Actb", "Cd4", *GENES[2:]], "gex.h5ad")


def test_a_single_file_of_plain_tensors_is_the_same_model(tmp_path, expression):
    clip = tiny()
    tensors = {f"clip.{name}": tensor for name, tensor in clip.weights().items()}
    torch.save({"state_dict": tensors, "clip": json.dumps(clip.description()), "optimizer_states": []}, tmp_path / "last.ckpt")
    path = CLIP.convert_ckpt_to_dict(tmp_path / "last.ckpt", {"model": {"projection": 6}}, tmp_path / "mymodel.pt")
    assert torch.equal(CLIP.from_pretrained(path).encode_genes(expression), clip.encode_genes(expression))
    with pytest.raises(WeightsError, match="projection 512 told, 6 trained"):
        CLIP.convert_ckpt_to_dict(tmp_path / "last.ckpt", {"model": {"projection": 512}}, tmp_path / "other.pt")
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize("options, said", [({"gene_encoder": "wide"}, "model.gene_encoder: expected one of linear_block"),
                                           ({"dropout": 1.0}, "model.dropout"), ({"temperature": 0.0}, "model.temperature"),
                                           ({"image_views": 2}, "model.image_views")])
def test_a_config_that_cannot_be_built_is_refused_at_once(options, said):
    with pytest.raises(OptionError, match=said):
        ClipModelConfig(**options)
