"""CLIP training: the loss by hand, views and caches that agree, batches by step, configurations that are checked."""
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from omegaconf import OmegaConf

from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from preprocessing.errors import OptionError
from training.augment import AugmentConfig, apply_views, draw_views, plain_views, turned_views
from training.clip_config import TrainerConfig, clip_config, from_launch_folder
from training.clip_features import cached_features, compute_features, view_table
from training.clip_losses import clip_loss, sample_mmd
from training.clip_pairs import Pairs, StepBatches
from training.clip_ranks import find_devices
from training.clip_run import limit_threads
from training.patch_cache import PatchRows

GENERATOR = torch.Generator


@pytest.fixture
def patches():
    return torch.randint(0, 256, (5, 3, 16, 16), generator=GENERATOR().manual_seed(0), dtype=torch.uint8)


def test_the_loss_equals_its_hand_value():
    eye = torch.eye(2)
    expected = -math.log(math.exp(2) / (math.exp(2) + 1))   # logits 2 on the diagonal, 0 beside it
    assert clip_loss(eye, eye, temperature=0.5).item() == pytest.approx(expected, abs=1e-6)
    same = torch.ones(4, 1)
    assert clip_loss(same, same, temperature=0.1).item() == pytest.approx(math.log(4), abs=1e-6)   # nothing to tell apart


def test_the_loss_at_temperature_one_and_batch_128_cannot_fall_below_3_86():
    eye = torch.eye(128)
    assert clip_loss(eye, eye, 1.0).item() == pytest.approx(3.86, abs=0.01)
    assert clip_loss(eye, eye, 0.07).item() < 0.01


def test_the_loss_is_symmetric_and_falls_when_pairs_move_together():
    a, b = (torch.nn.functional.normalize(torch.randn(6, 4, generator=GENERATOR().manual_seed(s)), dim=1) for s in (0, 1))
    assert clip_loss(a, b, 0.3).item() == pytest.approx(clip_loss(b, a, 0.3).item(), abs=1e-6)
    closer = torch.nn.functional.normalize(a + b, dim=1)
    assert clip_loss(closer, b, 0.3) < clip_loss(a, b, 0.3)


def test_spots_of_other_samples_are_no_candidates_when_told_so():
    a, b = (torch.nn.functional.normalize(torch.randn(6, 4, generator=GENERATOR().manual_seed(s)), dim=1) for s in (0, 1))
    samples = torch.tensor([0, 1, 0, 1, 1, 0])
    each = [clip_loss(a[samples == sample], b[samples == sample], 0.3) for sample in (0, 1)]
    assert clip_loss(a, b, 0.3, samples).item() == pytest.approx(float(sum(each)) / 2, abs=1e-6)
    assert clip_loss(a, b, 0.3, torch.zeros(6, dtype=torch.int64)) == clip_loss(a, b, 0.3)


def test_the_mmd_of_samples_equals_its_value_summed_by_hand():
    rows = torch.randn(7, 3, generator=GENERATOR().manual_seed(0))
    samples = torch.tensor([2, 0, 2, 0, 0, 2, 5])   # of sample 5 there is one spot: no distance within it, so it takes no part
    squared = torch.cdist(rows, rows).square()
    kernel = torch.exp(-squared / squared[~torch.eye(7, dtype=torch.bool)].median())
    x, y = [1, 3, 4], [0, 2, 5]
    within = [sum(kernel[i, j] for i in part for j in part if i != j) / 6 for part in (x, y)]
    expected = within[0] + within[1] - 2 * sum(kernel[i, j] for i in x for j in y) / 9
    assert sample_mmd(rows, samples).item() == pytest.approx(float(expected), abs=1e-5)


def test_the_mmd_is_about_zero_where_samples_are_alike_and_pulls_others_together():
    rows = torch.randn(400, 3, generator=GENERATOR().manual_seed(0))
    samples = torch.arange(400) % 2
    shifted = (rows + 2.0 * samples[:, None]).requires_grad_()
    assert abs(sample_mmd(rows, samples).item()) < 0.01 < 0.2 < sample_mmd(shifted, samples).item()
    sample_mmd(shifted, samples).backward()
    assert (shifted.grad[samples == 1].mean(0) > 0).all() and (shifted.grad[samples == 0].mean(0) < 0).all()   # downhill is closer
    assert sample_mmd(rows[:1], samples[:1]) == 0 and sample_mmd(rows, torch.zeros(400, dtype=torch.int64)) == 0


def test_plain_views_change_nothing_but_the_range(patches):
    assert torch.allclose(apply_views(patches, plain_views(5)), patches / 127.5 - 1, atol=1e-6)


def test_the_eight_turned_views_are_all_different_and_keep_every_pixel(patches):
    views = apply_views(patches[:1].expand(8, -1, -1, -1), turned_views())
    assert len({tuple(view.flatten().tolist()) for view in views}) == 8
    assert all(torch.allclose(view.flatten(1).sort().values, views[0].flatten(1).sort().values) for view in views)


def test_views_are_drawn_from_their_generator_and_stay_in_range(patches):
    config = AugmentConfig(rotate=True)
    first, again, other = (draw_views(5, config, GENERATOR().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    images = apply_views(patches, draw_views(5, config, GENERATOR().manual_seed(3)))
    assert images.min() >= -1 - 1e-5 and images.max() <= 1 + 1e-5
    assert not torch.allclose(images.mean((2, 3)), apply_views(patches, plain_views(5)).mean((2, 3)), atol=1e-3)


def test_a_row_is_augmented_the_same_alone_as_in_a_batch(patches):
    views = draw_views(5, AugmentConfig(rotate=True), GENERATOR().manual_seed(1))
    assert torch.allclose(apply_views(patches, views)[3:4], apply_views(patches[3:4], views[3:4]), atol=1e-6)


def test_grey_has_no_hue_to_turn():
    grey = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    views = plain_views(1)
    views[:, 6] = 0.2
    assert torch.allclose(apply_views(grey, views), grey / 127.5 - 1, atol=1e-3)


def test_cached_features_equal_the_online_path_for_the_same_views(patches, tmp_path):
    tower = build_encoder("random_tiny")
    views = view_table(5, 10, AugmentConfig(rotate=True), seed=3)
    cached = cached_features(patches, views, tower, tower_key="t", cache_dir=tmp_path, progress=False)
    for row in range(5):
        online = tower(apply_views(patches[row:row + 1].expand(10, -1, -1, -1), views[row]))
        assert torch.allclose(cached[row], online, atol=1e-5)
    assert torch.equal(views[:, 0], plain_views(5))


def test_the_cache_is_read_back_and_not_mixed_up(patches, tmp_path):
    tower, views = build_encoder("random_tiny"), plain_views(5)[:, None]
    first = cached_features(patches, views, tower, tower_key="t", cache_dir=tmp_path, progress=False)

    def broken(images):
        raise AssertionError("computed again")

    for same in (patches, PatchRows(patches)):   # patches of a packed cache are the same patches
        assert torch.equal(cached_features(same, views, broken, tower_key="t", cache_dir=tmp_path, progress=False), first)
    other = cached_features(255 - patches, views, tower, tower_key="t", cache_dir=tmp_path, progress=False)
    assert torch.equal(other, compute_features(255 - patches, views, tower, progress=False)) and not torch.equal(other, first)


def test_batches_are_whole_shuffled_and_a_function_of_the_step():
    step = 0
    batches = StepBatches(10, 4, seed=1, step=lambda: step)
    epoch = list(batches)
    assert len(epoch) == len(batches) == 2 and len({row for batch in epoch for _, row in batch}) == 8
    step = 1
    assert list(batches) == epoch[1:]
    step = 2
    assert list(batches) != epoch and list(batches)[0][0][0] == 2


def test_ranks_share_one_global_batch():
    whole = list(StepBatches(10, 4, 1, lambda: 0))
    ranks = [list(StepBatches(10, 4, 1, lambda: 0, rank, 2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert sorted(batch) == sorted(first + second) and len(first) == len(second) == 2


def test_a_spots_view_depends_on_step_and_row_and_not_on_its_batch(patches):
    expression = sp.csr_matrix(np.eye(5, dtype=np.float32))
    pairs = Pairs(expression, np.arange(5).astype(str), np.array(list("ABABA")), patches, np.array([0, 1, 0, 1, 0]),
                  augment=AugmentConfig(rotate=True), seed=4)
    together, rows, samples, _ = pairs.__getitems__([(7, 3), (7, 1)])
    alone, *_ = pairs.__getitems__([(7, 1)])
    later, *_ = pairs.__getitems__([(8, 1)])
    assert torch.allclose(together[1], alone[0], atol=1e-6) and not torch.allclose(later[0], alone[0])
    assert rows.argmax(1).tolist() == [3, 1] and samples.tolist() == [1, 1] and pairs.__getitems__([(0, 4)]).samples.tolist() == [0]


def test_the_published_values_are_the_defaults():
    config = clip_config({})
    optimizer, model = config.optimizer, config.model
    assert (config.trainer.batch_size, optimizer.name, optimizer.lr, optimizer.weight_decay) == (128, "adamw", 5e-6, 0.01)
    assert (config.trainer.max_epochs, config.data.max_size, config.seed, config.trainer.val_every_steps) == (1000, 10000, 71, 10)
    assert (config.trainer.limit_val_batches, config.trainer.save_top, config.data.patch_px) == (50, 5, 128)
    assert (model.gene_encoder, model.projection, model.dropout, model.temperature) == ("linear_block", 512, 0.8, 1.0)
    assert (config.model.residual, config.model.layer_norm, config.model.image_encoder) == (True, False, "uni")
    augment = config.image.augment
    assert augment.flip and (augment.brightness, augment.contrast, augment.saturation, augment.hue) == (0.2, 0.2, 0.2, 0.2)


@pytest.mark.parametrize("loaded, said", [
    ({"modle": {}}, "modle"), ({"optimizer": {"learning_rate": 1}}, "learning_rate"), ({"optimizer": {"lr": "fast"}}, "optimizer.lr"),
    ({"optimizer": {"name": "lion"}}, "adamw, adam, sgd, rmsprop"),
    ({"trainer": {"batch_size": 1}}, "trainer.batch_size: expected at least 2"),
    ({"model": {"_target_": "os.system"}}, "_target_"), ({"logger": "papers"}, "csv, tensorboard, wandb"),
    ({"trainer": {"precision": "foo"}}, "trainer.precision: expected one of 32-true, 16-mixed"),
    ({"data": {"target_sum": "mean"}}, "data.target_sum"), ({"ckpt_path": "last"}, "run_dir"),
], ids=str)
def test_what_does_not_fit_the_configuration_is_one_line(loaded, said):
    with pytest.raises(OptionError, match=said) as error:
        clip_config(OmegaConf.create(loaded))
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_a_logger_that_is_not_installed_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("training.clip_config.find_spec", lambda name: None)
    with pytest.raises(OptionError, match=r"logger=wandb: .*pip install wandb"):
        clip_config({"logger": "csv,wandb"})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("asked, said", [({"accelerator": "gpu"}, "gpu"), ({"devices": 0}, "auto, 0"), ({"devices": "foo"}, "auto, foo")],
                         ids=str)
def test_devices_that_are_not_there_are_one_line(asked, said):
    with pytest.raises(OptionError, match=f"expected devices of this machine; found {said}") as error:
        find_devices(TrainerConfig(**asked))
    assert "\n" not in str(error.value) and error.value.exit_code == 2


def test_a_learned_temperature_starts_at_a_value_that_learns_and_a_fixed_one_is_the_published():
    published = OmegaConf.load(Path(__file__).resolve().parents[2] / "assets" / "clip_config.yaml")
    model = dict(published.model)
    assert ClipModelConfig(**model).temperature == ClipModelConfig().temperature == 1.0
    learned = ClipModelConfig(**{**model, "learn_temperature": True, "image_encoder": "random_tiny"})
    assert learned.temperature == 0.07 and ClipModelConfig(learn_temperature=True, temperature=0.2).temperature == 0.2
    clip = CLIP(ClipModelConfig(gene_encoder="identity", projection=4, learn_temperature=True), ["a", "b"], feature_width=3)
    assert float(clip.temperature) == pytest.approx(0.07) and clip.log_temperature.requires_grad


def test_lists_and_comma_lists_of_samples_are_the_same():
    as_list = clip_config({"data": {"train_gex": ["a.h5ad", "b.h5ad"]}})
    assert as_list.data.train_gex == clip_config({"data": {"train_gex": "a.h5ad,b.h5ad"}}).data.train_gex


def test_relative_paths_start_in_the_launch_folder(tmp_path):
    assert from_launch_folder("a/b", tmp_path) == tmp_path / "a" / "b"
    assert from_launch_folder("/a/b", tmp_path).as_posix() == "/a/b"


def test_a_config_asks_for_no_more_threads_than_the_environment_gives(monkeypatch):
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for most in (None, 1, 2, 16):
        limit_threads(most)
    assert given == [1, 2, 2]
