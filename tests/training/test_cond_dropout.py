"""Prompts embedded through the gene encoder with its dropout on, as the published generator gets them in training."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from networks.clip import CLIP, ClipModelConfig
from training.cond_dropout import CondDropout, dropout_mask

GENES = 32


def expression(n=24):
    return sp.csr_matrix(np.random.default_rng(0).random((n, GENES), dtype=np.float32))


def gene_encoder():
    torch.manual_seed(0)
    config = ClipModelConfig(gene_width=16, projection=6, image_encoder="random_tiny")
    return CLIP(config, [f"gene{i}" for i in range(GENES)], feature_width=4).eval()


def test_condition_dropout_drops_at_its_rate_and_each_sample_has_masks_of_its_own():
    dropout = CondDropout(gene_encoder(), expression(), 0.8, seed=0)
    mask = dropout_mask([np.random.default_rng(0)], 100_000, 0.8)
    assert (mask == 0).float().mean() == pytest.approx(0.8, abs=0.01) and mask.max() == pytest.approx(5)
    rows = np.arange(16)
    whole = dropout.prompts(rows, 3, 0, 0, "cpu")
    assert torch.allclose(whole[8:], dropout.prompts(rows[8:], 3, 0, 8, "cpu"), atol=1e-6)
    assert not torch.allclose(whole, dropout.prompts(rows, 4, 0, 0, "cpu"))
    assert not torch.allclose(*dropout.prompts(np.array([0, 0]), 3, 0, 0, "cpu"))


def test_condition_dropout_near_zero_gives_the_plain_embeddings():
    clip, rows = gene_encoder(), expression()
    found = CondDropout(clip, rows, 1e-9, seed=0).prompts(np.arange(24), 0, 0, 0, "cpu")
    assert torch.allclose(found, clip.embed_expression(rows), atol=1e-5)
