"""Does our sampling reach the pictures of the published one? Kernel distances to real patches of both, from the same weights.

Pictures of either way lie in a folder of their own and are kept: a stopped measurement goes on with the way that is missing.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np

from diffusion_utils.generation import SAMPLES, GenerateConfig, generate_images
from diffusion_utils.pipeline import load_pipeline
from evaluation.distances import half_sample_interval, squared_mmd
from evaluation.features import build_features, feature_specs, image_features, list_images

Interval = tuple[float, float, float]      # value, and its 95 % interval


def draw_way(folder: Path, model: Path, prompts: Path, n: int, guidance: float, sampler: str, steps: int, interval: str) -> Path:
    """One picture for each of `n` prompts, made or found there."""
    if not (folder / SAMPLES).is_file():
        generate_images(GenerateConfig(model_checkpoint=model, prompt_file=prompts, gen_img_path=folder, num_imgs=1, n_prompts=n,
                                       guidance_scale=guidance, sampler=sampler, steps=steps, guidance_interval=interval, batch_size=32))
    return folder


def distances_to_real(folders: dict[str, Path], real: Path, model: Path, features: str) -> dict[str, Interval]:
    """Kernel distance of each folder's pictures to the real patches, both at the side the model learned, delete-half intervals.

    (A plain bootstrap repeats pictures, which by itself raises the distance.)
    """
    [spec] = feature_specs(features)
    encoder, px = build_features(spec), load_pipeline(model).resolution
    seen = image_features(list_images(real).paths, encoder, match_px=px)
    found = {}
    for way, folder in folders.items():
        made = image_features(list_images(folder).paths, encoder, match_px=px)
        value = squared_mmd(made, seen)
        found[way] = (value, *half_sample_interval(made, seen, squared_mmd, value, rng=np.random.default_rng(0), n_splits=50))
    return found
