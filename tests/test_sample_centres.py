"""A CLIP that scales samples does it over whole samples, in the same way wherever it trains, embeds, guides and judges."""
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clip_runs import GENES, config, write_sample, write_samples

from clip_embeddings import main as clip_embeddings
from networks.clip import CLIP, ClipModelConfig
from networks.clip_model_config import different_settings
from networks.generator import Generator, GeneratorConfig
from networks.histo_models import build_encoder
from networks.layers import images_to_float
from networks.snapshot import load_snapshot, save_snapshot
from networks.weights import load_weights_folder, save_weights_folder
from preprocessing.errors import InputError, WeightsError
from train_clip import train
from training.clip_config import clip_config
from training.clip_data import centre_features, fit_inputs, load_clip_data, use_features
from training.clip_pairs import Pairs
from training.gan_data import load_gan_data
from training.gan_losses import guidance_loss
from training.gan_metrics import SnapshotMetrics
from training.gan_sources import GanSources
from training.guidance import clip_guidance, guidance_centres, wanted_prompts
from training.image_metrics import parse_metrics
from training.sample_centres import SamplePatches
from training.sample_sheet import SampleFiles
from training.spot_choice import SpotChoice

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
BY_SAMPLE = {"feature_sample_scaling": "centre", "gene_sample_scaling": "centre"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples"))


def read(samples, **sections):
    """(training, validation) of a CLIP run that scales by sample, ready to train on."""
    told = clip_config(config(**{"model": BY_SAMPLE, **sections}))
    data, tower = load_clip_data(told, lambda path: samples / path), build_encoder("random_tiny")
    if told.image.cache_features:
        use_features(data, tower, told, lambda path: samples / path, "cpu")
    centre_features(data, tower, told, "cpu")
    return data.train, data.val


def scaled_as(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    return pairs.feature_centres, pairs.scaling.mean


@pytest.mark.parametrize("options", [
    {"image": {"cache_features": 4, "augment": JITTER}},                # recoloured views are cached, not centred on
    {"image": {"augment": JITTER}},
    {"data": {"val_fraction": 0.3, "val_buffer_px": 0}, "val": None},   # a part of each sample is held out
    {"data": {"max_size": 20}},                                         # a random part is trained on
], ids=["cached with jitter", "jitter", "split", "max_size"])
def test_every_way_of_training_scales_by_the_whole_sample_as_an_embedding_does(samples, options):
    train_pairs, val = read(samples, **options)
    whole, _ = read(samples)
    assert all(torch.allclose(own, other, atol=1e-6) for own, other in zip(scaled_as(train_pairs), scaled_as(whole), strict=True))
    if "val" in options:
        assert torch.equal(val.feature_centres, train_pairs.feature_centres) and val.scaling is train_pairs.scaling
    images = whole.images[torch.from_numpy(np.flatnonzero(whole.sample_numbers == 1))]
    own = build_encoder("random_tiny")(images_to_float(images)).mean(0)
    assert torch.allclose(whole.feature_centres[1], own, atol=1e-5) and not torch.allclose(whole.feature_centres[0], own, atol=1e-3)


@pytest.mark.parametrize(("views", "options", "seen_again"), [
    (8, {"image": {"cache_features": 8, "augment": {"rotate": True}}}, 0), (1, {"image": {"cache_features": 2, "augment": JITTER}}, 0),
    (8, {"image": {"cache_features": 8, "augment": {"rotate": True, **JITTER}}}, 2), (8, {"image": {"cache_features": 8}}, 2),
    (8, {"image": {"cache_features": 8, "augment": {"rotate": True}}, "data": {"max_size": 40}}, 2)],
    ids=["all turns", "plain view", "recoloured", "not turned", "a part"])
def test_cached_features_serve_as_means_where_they_are_just_those(samples, views, options, seen_again, monkeypatch):
    seen, sound = [], SamplePatches.mean_features
    monkeypatch.setattr(SamplePatches, "mean_features", lambda self, *args, **told: seen.extend(self.openers) or sound(self, *args, **told))
    model = {**BY_SAMPLE, "image_views": views}
    found, val = read(samples, model=model, **options)
    assert len(seen) == seen_again                      # of A and B; C's cached views are always those
    monkeypatch.undo()
    expected, expected_val = read(samples, model=model)
    assert torch.allclose(found.feature_centres, expected.feature_centres, atol=1e-5)
    assert torch.allclose(val.feature_centres, expected_val.feature_centres, atol=1e-5)


def test_a_sample_of_which_a_split_leaves_no_training_spot_keeps_its_own_mean(samples, tmp_path):
    options = {"val": None, "data": {"val_fraction": 0.3, "val_buffer_px": 0}}
    told = clip_config(config(model=BY_SAMPLE, **options))
    data, tower = load_clip_data(told, lambda path: samples / path), build_encoder("random_tiny")
    only = np.flatnonzero(data.train.sample_numbers == 0)          # as a buffer wider than sample B leaves it
    data.train = replace(data.train, expression=data.train.expression[only], barcodes=data.train.barcodes[only],
                         sample_ids=data.train.sample_ids[only], images=data.train.images.subset(only),
                         sample_numbers=data.train.sample_numbers[only])
    centre_features(data, tower, told, "cpu")
    clip = CLIP(told.model, data.gene_names, image_encoder=tower)
    fit_inputs(clip, data, tower, "cpu")
    batch = data.val.__getitems__([(0, row) for row in range(len(data.val))])
    assert torch.isfinite(batch.centre).all() and torch.allclose(clip.feature_centre, data.train.feature_centres[0], atol=1e-6)


@pytest.mark.parametrize("option", [{"feature_sample_scaling": "centre"}, {"gene_sample_scaling": "standardise"}])
def test_a_sample_of_few_spots_is_refused_where_it_trains(samples, option):
    if not (samples / "few").exists():
        write_sample(samples, "few", 5, seed=9)
    with pytest.raises(InputError, match=r"few: spots of a sample: expected a whole sample, at least 10.* found 5"):
        read(samples, train_samples="A,few", model=option)


def test_a_few_patches_alone_are_refused_where_the_clip_centres_them(samples, tmp_path):
    if not (samples / "few").exists():
        write_sample(samples, "few", 5, seed=9)
    folders = [train(config(run_dir=str(tmp_path / name), model={"feature_sample_scaling": name}), samples) for name in ("centre", "none")]
    done = [CliRunner().invoke(clip_embeddings, ["--network", str(folder / "clip"), "--images", str(samples / "few" / "patches"),
                                                 "--out-dir", str(tmp_path / "out")]) for folder in folders]
    assert [one.exit_code for one in done] == [3, 0] and "at least 10: this CLIP scales every sample" in done[0].output
    assert "patches are scaled within their sample" in (folders[0] / "clip" / "README.md").read_text()
    assert "scaled within their sample" not in (folders[1] / "clip" / "README.md").read_text()


def test_a_checkpoint_of_an_older_version_resumes_wherever_the_tower_lies():
    ours = ClipModelConfig(gene_width=64, image_encoder_weights="here/uni.bin")
    older = {"gene_width": 64, "image_encoder_weights": "there/uni.bin", "temperature": 1.0}
    assert different_settings(older, ours) == []
    assert different_settings({**older, "gene_width": 32}, ours) == ["model.gene_width"]
    assert different_settings(older, replace(ours, feature_sample_scaling="centre")) == ["model.feature_sample_scaling"]


# ---- what judges and guides generated patches ------------------------------------------------------------------------

def image_clip(**options) -> CLIP:
    torch.manual_seed(0)
    settings = ClipModelConfig(gene_encoder="bottleneck", gene_width=8, gene_hidden=8, projection=6, image_encoder="random_tiny", **options)
    return CLIP(settings, GENES, image_encoder=build_encoder("random_tiny")).eval()


def gan_data(samples, tmp_path, **options):
    clip = image_clip(**options)
    clip.save_pretrained(tmp_path / "clip")
    files = tuple(SampleFiles(name, samples / name / "patches", samples / name / "gex_filt.h5ad") for name in "AB")
    data = load_gan_data(GanSources("clip", tmp_path / "clip", files), 16, choice=SpotChoice(n_train=20), progress=False)
    whole = load_gan_data(GanSources("clip", tmp_path / "clip", files), 16, progress=False)
    return clip, data, whole


def test_a_guided_generator_is_centred_as_the_sample_of_its_prompt(samples, tmp_path):
    clip, data, whole = gan_data(samples, tmp_path, feature_sample_scaling="centre")
    means = guidance_centres(clip, data.training.sample_patches, "cpu")
    with torch.no_grad():
        expected = torch.stack([clip.image_features(images_to_float(whole.training.images[whole.training.samples == n])).mean(0)
                                for n in (0, 1)])
    assert torch.allclose(means, expected, atol=1e-5)
    rows = np.array([0, 19, 19, 3])
    assert set(data.training.samples[rows].tolist()) == {0, 1}
    images = images_to_float(data.training.images[rows]).requires_grad_()
    wanted = wanted_prompts(data.training.prompts, rows, in_pairs=False, centres=means[data.training.samples])
    loss = clip_guidance(clip, "spherical", images, torch.zeros(4, 3), wanted, slice(0, 4))
    embeds = torch.nn.functional.normalize(clip.encode_images(images, means[data.training.samples[rows]]), dim=1)
    assert torch.allclose(loss, guidance_loss(embeds, data.training.prompts[rows]), atol=1e-4)
    loss.backward()
    assert images.grad.abs().sum() > 0


@pytest.mark.parametrize("views", [1, 8])
def test_clip_score_centres_a_patch_as_its_sample(samples, tmp_path, views):
    clip, data, whole = gan_data(samples, tmp_path, feature_sample_scaling="centre", image_views=views)
    metrics = SnapshotMetrics(parse_metrics("clip_score"), data, clip, "cpu")
    with torch.no_grad():
        means = torch.stack([clip.view_features(images_to_float(whole.training.images[whole.training.samples == n])).mean((0, 1))
                             for n in (0, 1)])
        embeds = clip.encode_images(images_to_float(data.training.images), means[data.training.samples])
    expected = (embeds * data.training.prompts).sum(1).mean()
    found = metrics._clip_score(metrics.distances.images, torch.arange(20))     # the patches of its prompts, in its order
    assert abs(found - float(expected)) < 1e-5


def test_a_snapshot_names_a_gene_encoder_of_the_hub_by_its_repository_and_commit(samples, tmp_path, monkeypatch):
    clip = image_clip()
    commits = tmp_path / "hub" / "snapshots"
    clip.save_pretrained(commits / "0123")

    def download(repo_id, revision, allow_patterns):
        assert repo_id == "somebody/clip"
        return commits / (revision or newest)
    newest = "0123"
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    files = tuple(SampleFiles(name, samples / name / "patches", samples / name / "gex_filt.h5ad") for name in "AB")
    data = load_gan_data(GanSources("clip", "hf:somebody/clip", files), 16, progress=False)
    generator = Generator(GeneratorConfig(c_dim=6, img_resolution=16, cbase=128, cmax=8, res_blocks=1, norm_groups=4))
    folder = save_snapshot(tmp_path / "snapshot", generator, gene_encoder=data.gene_encoder)
    assert json.loads((folder / "config.json").read_text())["gene_encoder"]["repo_id"] == "somebody/clip@0123"
    newest = "4567"     # what is pushed later does not reach a snapshot
    assert load_snapshot(folder).gene_encoder.gene_names == GENES
    for broken in ("a path", {"path": "clip"}):
        save_snapshot(tmp_path / "broken", generator)
        tensors, description = load_weights_folder(tmp_path / "broken")
        save_weights_folder(tmp_path / "broken", tensors, {**description, "gene_encoder": broken})
        with pytest.raises(WeightsError, match="gene_encoder: expected an MLP, or where CLIP weights lie and their sha256"):
            load_snapshot(tmp_path / "broken")
