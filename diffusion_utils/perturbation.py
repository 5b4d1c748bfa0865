"""Let `perturb.py` draw from a diffusion pipeline: embeddings by a CLIP, patches by the pipeline, the same noise before and after.

A pipeline knows prompt embeddings alone; the CLIP weights that made those of its training are named by --clip. Writes nothing.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from diffusion_utils.pairs import RECORD
from diffusion_utils.pipeline import TRAINING, GenePipeline, find_pipeline, load_pipeline
from diffusion_utils.sampling import Solver
from networks.clip import CLIP, clip_weights_sha256
from preprocessing.errors import InputError, OptionError, WeightsError
from preprocessing.inputs import path_list, read_json
from preprocessing.progress import ProgressBar
from training.gan_grids import as_pictures
from training.perturbation import PerturbConfig, Source, require_expression_file


def pipeline_source(config: PerturbConfig, device: str, _workers: int, progress: bool, *, solver: Solver) -> Source:
    """The pipeline in `config.network` behind the gene encoder `config.clip`."""
    require_expression_file(config)
    if config.clip is None:
        raise OptionError("--clip", "the CLIP weights that made the embeddings the pipeline was trained on", "none")
    pipeline = load_pipeline(config.network, device)
    pipeline.noise_shape()                             # refuses a resolution that the layers cannot halve
    clip = open_clip(config.clip, config.network, pipeline).to(device)

    def make(prompts: Tensor, keys: Sequence[tuple[int, int]], what: str) -> Iterator[np.ndarray]:
        with ProgressBar(total=len(keys), desc=f"patches {what}", unit="patch", disable=not progress) as bar:
            for start in range(0, len(keys), config.batch_sz):
                part = slice(start, start + config.batch_sz)
                pictures = as_pictures(pipeline.generate(prompts[part], list(keys[part]), solver).cpu())
                bar.update(len(pictures))
                yield from pictures

    return Source(clip, make, pipeline.resolution,
                  {"weights (SHA-256)": pipeline.weights_sha256, "CLIP": str(config.clip),
                   "CLIP (SHA-256)": clip_weights_sha256(config.clip), "sampler": solver.sampler, "steps": solver.steps,
                   "guidance scale": solver.guidance_scale})


def open_clip(path: Path, network: Path, pipeline: GenePipeline) -> CLIP:
    """The CLIP's gene encoder, refused if its embeddings cannot be those that the pipeline was trained on."""
    clip = CLIP.from_pretrained(path, image_encoder=False).eval().requires_grad_(False)
    width = pipeline.prompts.embedding_width
    if clip.config.projection != width:
        raise InputError(path, "width of an embedding", f"{width}, as {network} was trained with", str(clip.config.projection))
    found = clip_weights_sha256(path)
    record = read_json(find_pipeline(network) / TRAINING, "how the pipeline was trained")
    for file in path_list(str((record.get("config") or {}).get("dataset_embs") or "")):
        beside = file.with_name(RECORD)
        if not beside.is_file():     # the embeddings lie elsewhere now: their width is all there is to go by
            continue
        content = read_json(beside, "which weights made the embeddings")
        expected = content.get("model_sha256") if isinstance(content, dict) else None
        if expected not in (None, found):
            raise WeightsError(path, "SHA-256", f"{str(expected)[:64]}, which made the embeddings of {network}, as {beside} says", found)
    return clip
