"""Held-out section scores: features are kept apart where encoders differ."""
import numpy as np

from evaluation.sections import FeatureBank, score_diversity
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
