"""`perturb.py` with a diffusion pipeline: the same noise before and after, the CLIP of its training or one line."""
import csv
import json

import diffusion_world
import numpy as np
import pytest
import torch
from clip_runs import GENES, write_sample
from PIL import Image
from sampling_world import call

import clip_embeddings
import perturb
from networks.clip import CLIP, ClipModelConfig, clip_weights_sha256
from networks.histo_models import build_encoder

PX, WIDTH = 16, 6


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A sample, an untrained CLIP, another of the same width and a wider one, and a pipeline of two steps on the first one's embeddings."""
    folder = tmp_path_factory.mktemp("perturb_pipeline")
    write_sample(folder, "A", 16, 0)
    for seed, (name, width) in enumerate((("clip", WIDTH), ("other", WIDTH), ("wide", 8))):
        torch.manual_seed(seed)
        config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=width, image_encoder="random_tiny")
        CLIP(config, GENES, image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / name)
    assert call(clip_embeddings, network=folder / "clip", gex=folder / "A" / "gex_filt.h5ad", out_dir=folder / "emb").exit_code == 0
    diffusion_world.run(folder / "A", folder / "run", dataset_embs=str(folder / "emb" / "gene_clip_emb.npy"), resolution=PX,
                        max_train_steps=2)
    return folder


def run(world, outdir, **options):
    return call(perturb, **{"network": world / "run", "clip": world / "clip", "gex": world / "A" / "gex_filt.h5ad", "genes": "g0:+3,g4:0",
                            "seeds": "0-1", "spots": "A003-1,5", "controls": 0, "steps": 2, "device": "cpu", "outdir": outdir, **options})


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pairs_effects_and_a_page_are_written_and_no_picture_depends_on_the_batch(world, tmp_path):
    for name, batch in (("one", 3), ("two", 16)):
        answer = run(world, tmp_path / name, batch_sz=batch)
        assert answer.exit_code == 0, answer.output
    rows = list(csv.DictReader((tmp_path / "one" / "perturbation.csv").open()))
    assert [(row["spot"], row["seed"]) for row in rows] == [("3", "0"), ("3", "1"), ("5", "0"), ("5", "1")]
    names = [f"spot{spot:05d}_seed{seed:04d}_{what}.png" for spot in (3, 5) for seed in (0, 1) for what in ("before", "after")]
    one, two = ([read(tmp_path / folder / name) for name in names] for folder in ("one", "two"))
    assert max(np.abs(a - b).max() for a, b in zip(one, two, strict=True)) <= 1 and one[0].shape == (PX, PX, 3)
    assert any((before != after).any() for before, after in zip(one[::2], one[1::2], strict=True))
    settings = json.loads((tmp_path / "one" / "perturbation.json").read_text())["settings"]
    assert settings["CLIP (SHA-256)"] == clip_weights_sha256(world / "clip") and settings["steps"] == 2
    assert settings["guidance scale"] == 3.0 and "truncation" not in settings
    assert "dpm++" in (tmp_path / "one" / "index.html").read_text()


def test_a_change_that_changes_nothing_leaves_every_pixel(world, tmp_path):
    assert run(world, tmp_path, genes="g4:+0", guidance_scale=1).exit_code == 0
    for spot in (3, 5):
        assert (read(tmp_path / f"spot{spot:05d}_seed0000_before.png") == read(tmp_path / f"spot{spot:05d}_seed0000_after.png")).all()


def test_patches_before_are_those_of_generate_img_for_the_same_prompt_and_seed(world, tmp_path):
    from diffusion_utils.generation import GenerateConfig, generate_images
    assert run(world, tmp_path / "pairs").exit_code == 0
    generate_images(GenerateConfig(model_checkpoint=world / "run", prompt_file=world / "emb" / "gene_clip_emb.npy", steps=2, seeds="1",
                                   gen_img_path=tmp_path / "made", device="cpu", progress=False))
    for spot in (3, 5):
        made = read(tmp_path / "made" / f"prompt{spot:05d}_seed0001.png")
        assert np.abs(made - read(tmp_path / "pairs" / f"spot{spot:05d}_seed0001_before.png")).max() <= 1


@pytest.mark.parametrize(("options", "code", "message"), [
    ({"clip": "other"}, 5, "which made the embeddings of"), ({"clip": "wide"}, 3, f"width of an embedding: expected {WIDTH}, as"),
    ({"truncation": 0.5}, 2, "--truncation: expected a GAN snapshot as --network; found a diffusion pipeline"),
    ({"steps": 0}, 2, "--steps: expected 1 to 1000"),
], ids=["another CLIP", "a wider CLIP", "truncation", "no steps"])
def test_what_cannot_be_drawn_is_said_in_one_line(world, tmp_path, options, code, message):
    if "clip" in options:
        options = {"clip": world / options["clip"]}
    answer = run(world, tmp_path / "out", **options)
    assert answer.exit_code == code and message in answer.output and not (tmp_path / "out").exists()


def test_a_pipeline_without_clip_asks_for_it_and_a_snapshot_has_no_steps(world, tmp_path):
    common = {"gex": world / "A" / "gex_filt.h5ad", "genes": "g0:+1", "outdir": tmp_path / "out"}
    answer = call(perturb, network=world / "run", **common)
    assert answer.exit_code == 2 and "--clip: expected the CLIP weights that made the embeddings" in answer.output
    answer = call(perturb, network=world / "clip", steps=3, **common)
    assert answer.exit_code == 2 and "--steps: expected a diffusion pipeline as --network; found a GAN snapshot" in answer.output
