"""Prompts of a gene encoder that scales every sample by its own genes: whole samples, as in training."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from paired_samples import GENES, two_samples

from networks.clip import CLIP, ClipModelConfig
from networks.snapshot import Snapshot
from preprocessing.errors import InputError, OptionError
from training.cond_dropout import CondDropout
from training.data import ImageGeneDataset
from training.gan_data import load_gan_data
from training.gan_sources import GanSources
from training.prompts import read_prompts
from training.spot_choice import SpotChoice


@pytest.fixture
def clip():
    torch.manual_seed(0)
    return CLIP(ClipModelConfig(gene_encoder="bottleneck", gene_width=8, gene_hidden=8, projection=6, gene_sample_scaling="centre",
                                image_encoder="random_tiny"), GENES, feature_width=32).eval()


def test_the_gan_is_trained_and_asked_with_the_same_prompts(clip, tmp_path):
    samples = two_samples(tmp_path)
    clip.save_pretrained(tmp_path / "clip")
    sources = GanSources("clip", tmp_path / "clip", tuple(samples))
    trained = load_gan_data(sources, 16, progress=False).training.prompts
    snapshot = Snapshot(SimpleNamespace(config=SimpleNamespace(c_dim=6)), clip, {}, "")
    asked = [read_prompts(sample.gex, snapshot).embeddings for sample in samples]
    assert torch.allclose(torch.cat(asked), trained, atol=1e-6)
    some = load_gan_data(sources, 16, choice=SpotChoice(n_train=7), progress=False)      # a subset is scaled by the whole sample too
    places = {tuple(image): row for row, image in enumerate(load_gan_data(sources, 16, progress=False).training.images[:, 0, 0].tolist())}
    rows = [places[tuple(image)] for image in some.training.images[:, 0, 0].tolist()]
    assert len(rows) == 7 and torch.allclose(some.training.prompts, trained[rows], atol=1e-6)
    np.save(tmp_path / "rows.npy", np.full((2, 3), 0.5, np.float32))
    with pytest.raises(InputError, match="expected an .h5ad of a whole sample"):
        read_prompts(tmp_path / "rows.npy", snapshot)


def test_prompts_embedded_anew_at_every_step_are_refused(clip, tmp_path):
    rows = ImageGeneDataset(two_samples(tmp_path)).expression
    with pytest.raises(OptionError, match="--cond-dropout: expected 0 with a gene encoder that scales every sample"):
        CondDropout(clip, rows, 0.8, seed=0)
