"""Held-out section scores: features are kept apart where encoders differ."""
import numpy as np
import pytest
import torch

from evaluation.sections import FeatureBank, score_diversity
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder


def test_one_weight_file_at_two_sides_gives_two_sets_of_features(rng):
    images = rng.integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    bank = FeatureBank(progress=False)
    own, small = (bank.features("same name", images, build_encoder("efficientnet_lite0", input_px=px)) for px in (None, 64))
    assert not np.allclose(own, small, atol=1e-2)
    assert bank.features("same name", images, build_encoder("efficientnet_lite0")) is own


def test_diversity_by_z_alone_is_told_apart_from_diversity_with_noise(rng):
    class Patches:
        def __init__(self, images):
            self.images, self.px = images, images.shape[2]

    class Section:
        images, clusters = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8), None

    noisy = Patches(rng.integers(100, 120, (4, 3, 8, 8, 3), dtype=np.uint8))
    collapsed = Patches(np.repeat(noisy.images[:, :1], 3, axis=1))
    scores = score_diversity(Section(), noisy, collapsed)
    assert scores["generated_z"] == 0 < scores["generated"] < scores["real"]
    assert "generated_z" not in score_diversity(Section(), noisy, None)


@pytest.mark.parametrize("views", [1, 8])
def test_real_and_generated_patches_of_a_section_are_centred_alike(rng, views):
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=8, image_encoder="random_tiny",
                             image_views=views, feature_sample_scaling="centre")
    clip = CLIP(config, ["A", "B"], image_encoder=build_encoder("random_tiny")).eval()
    images, bank = rng.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8), FeatureBank(progress=False)
    centre = bank.sample_centre("real", images, clip)
    with torch.inference_mode():
        seen = clip.view_features(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1)
        assert torch.allclose(centre, seen.mean((0, 1)), atol=1e-5)
        assert np.allclose(bank.embeddings("real", images, clip, centre), clip.project_views(seen, centre), atol=1e-5)
    plain = CLIP(ClipModelConfig(image_encoder="random_tiny"), ["A", "B"], image_encoder=build_encoder("random_tiny"))
    assert bank.sample_centre("real", images, plain) is None
