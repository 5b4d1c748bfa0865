"""Tiny GAN runs for the tests of training: red patches and blue ones, and prompts that tell which."""
import numpy as np
import scipy.sparse as sp
import torch

from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from training.gan_config import resolve
from training.gan_data import gan_data
from training.gan_loop import GanRun
from training.gan_parts import TrainingData

TINY = {"img_resolution": 16, "batch": 8, "cbase": 128, "cmax": 8, "res_blocks": 1, "norm_groups": 4, "backbone": "random_tiny",
        "blur_init": 2.0, "kimg": 0.08}
GENES = 32


def tiny_data(n=24, width=6, validation=False):
    """Two kinds of spots: red patches and blue ones, with prompts to match."""
    order = torch.Generator().manual_seed(0)
    kind = torch.arange(n) % 2
    images = torch.randint(0, 60, (n, 3, 16, 16), generator=order, dtype=torch.uint8)
    images[kind == 0, 0] += 180
    images[kind == 1, 2] += 180
    prompts = torch.nn.functional.one_hot(kind, width) + torch.randn(n, width, generator=order) * 0.1
    expression = sp.csr_matrix(torch.rand(n, GENES, generator=order).numpy())
    training = TrainingData(images, torch.nn.functional.normalize(prompts, dim=1), expression=expression)
    held_out = TrainingData(images[:4], training.prompts[:4]) if validation else None
    return gan_data("TINY", training, np.array([f"s__{i}" for i in range(n)]), clusters=kind.numpy().astype(str), validation=held_out,
                    validation_barcodes=np.array(["v"] * 4) if validation else None)


def make_run(folder, preset="best", data=None, watched=(), **said):
    folder.mkdir(exist_ok=True)
    config = resolve(preset, "custom", **{**TINY, **said})
    clip = gene_encoder() if config.cond_dropout or config.clip_weight else None
    return GanRun(config, data or tiny_data(), build_encoder("random_tiny"), folder, clip=clip, tensorboard=False, watched=watched)


def gene_encoder(width=6, **options):
    """CLIP weights with a tiny image tower, of which runs take either side."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ClipModelConfig(gene_width=16, projection=width, image_encoder="random_tiny", **options)
        return CLIP(config, [f"gene{i}" for i in range(GENES)], image_encoder=build_encoder("random_tiny")).eval()


def weights(run):
    averages = [average.state_dict() for average in run.averages.models.values()]
    parts = (run.gan.generator.state_dict(), run.gan.discriminator.trainable_state(), *averages)
    return [tensor for part in parts for tensor in part.values()]


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(weights(first), weights(second), strict=True))
