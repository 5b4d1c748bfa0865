"""Training from packed patches ends in the same bits as training from images, and all its subsets share one cache."""
from pathlib import Path

import pytest
import torch
from paired_samples import GENES, two_samples

from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from train_clip import train
from training.gan_config import resolve
from training.gan_data import load_gan_data
from training.gan_loop import GanRun
from training.gan_sources import GanSources
from training.spot_choice import SpotChoice


def arrays(cache):
    return list(cache.glob("*.npy"))


def clip_run(samples, folder, cache_dir, **data):
    config = {"data": {"train_gex": ",".join(str(sample.gex) for sample in samples), "patch_px": 32, "val_fraction": 0.3,
                       "train_image_dir": ",".join(str(sample.images) for sample in samples), "val_buffer_px": 0,
                       "cache_dir": cache_dir} | data,
              "model": {"gene_encoder": "bottleneck", "gene_hidden": 8, "gene_width": 8, "projection": 8, "image_encoder": "random_tiny"},
              "run_dir": str(folder), "logger": "csv", "seed": 5,
              "trainer": {"max_epochs": 3, "batch_size": 4, "accelerator": "cpu", "progress_bar": False, "log_every_steps": 1}}
    run = train(config, folder.parent)
    losses = [line for line in next(run.rglob("metrics.csv")).read_text().splitlines() if line]
    return run, losses, (run / "clip" / "model.safetensors").read_bytes()


def test_clip_trains_to_the_same_bits_with_and_without_the_cache_which_all_sizes_and_splits_share(tmp_path):
    samples, cache = two_samples(tmp_path), tmp_path / "cache"
    for number, data in enumerate(({}, {"max_size": 15}, {"val_fraction": 0.2})):
        (_, losses, weights), (_, losses_2, weights_2) = (clip_run(samples, tmp_path / f"{name}{number}", place, **data)
                                                          for name, place in (("plain", "None"), ("cached", str(cache))))
        assert len(arrays(cache)) == 1 and len(losses) > 6 and losses == losses_2 and weights == weights_2
    assert not Path("None").exists() and not (tmp_path / "None").exists()


def test_clip_trains_to_the_same_bits_whoever_draws_its_batches(tmp_path):
    samples = two_samples(tmp_path)
    (_, losses, weights), (_, losses_2, weights_2) = (clip_run(samples, tmp_path / str(threads), None, loader_threads=threads)
                                                      for threads in (0, 2))
    assert len(losses) > 6 and losses == losses_2 and weights == weights_2


@pytest.mark.parametrize("max_size", [None, 12])
def test_the_gan_trains_to_the_same_bits_with_and_without_the_cache(tmp_path, max_size):
    samples, cache, runs = two_samples(tmp_path), tmp_path / "cache", []
    clip = CLIP(ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=8, image_encoder="random_tiny"),
                GENES, image_encoder=build_encoder("random_tiny")).eval()
    clip.save_pretrained(tmp_path / "clip")
    sources = GanSources("clip", tmp_path / "clip", tuple(samples))
    config = resolve("best", "custom", img_resolution=16, batch=8, cbase=128, cmax=8, res_blocks=1, norm_groups=4, backbone="random_tiny")
    for name, place in (("plain", None), ("cached", cache)):
        load_gan_data(sources, 16, progress=False, cache_dir=place, choice=SpotChoice(n_train=9), seed=3)     # another subset first
        data = load_gan_data(sources, 16, progress=False, cache_dir=place, choice=SpotChoice(n_train=max_size))
        (tmp_path / name).mkdir()
        run = GanRun(config, data, build_encoder("random_tiny"), tmp_path / name, tensorboard=False)
        for _ in range(3):
            run.one_step()
        runs.append((data.sha256, [*run.gan.generator.state_dict().values(), *run.gan.discriminator.trainable_state().values()]))
    (plain, weights), (cached, weights_2) = runs
    assert len(arrays(cache)) == 1 and plain == cached
    assert all(torch.equal(one, other) for one, other in zip(weights, weights_2, strict=True))
