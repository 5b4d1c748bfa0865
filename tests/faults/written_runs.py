"""Formats of weights, runs and tables of results, each as make(folder) -> (files to damage, read, those whose damage is noticed).

Not a test file: `test_damaged_files.py` damages them.
"""
import json

import numpy as np
import torch
from diffusion_world import run, write_world
from sampling_world import call, make_world

import gen_images
import interpolate_prompts
import interpretability
from diffusion_utils.generation import GenerateConfig, generate_images
from diffusion_utils.pipeline import load_pipeline
from diffusion_utils.power_ema import PowerEma, average_of_length
from evaluate_sections import read_steps
from evaluation.features import list_images, read_samples_csv
from evaluation.gene_lists import read_attributions
from evaluation.image_quality import COLUMNS, append_rows, read_rows
from evaluation.sections import read_generated
from networks.clip import CLIP
from networks.histo_models import build_encoder
from networks.snapshot import load_snapshot
from networks.weights import read_state_dict
from preprocessing.errors import InputError
from preprocessing.outputs import write_json
from training.augment import AugmentConfig
from training.checkpoints import read_checkpoint, save_checkpoint
from training.clip_checkpoints import PARTS, SummedCheckpoints, require_checkpoint, sums_path
from training.clip_features import cached_features, view_table
from training.generated_pngs import carries_mark, encode_marked
from training.run_folder import StatsLog, begun_run


def clip_folder(folder):
    make_world(folder)
    files = [folder / "clip" / name for name in ("model.safetensors", "config.json", "SHA256SUMS")]
    return files, lambda: CLIP.from_pretrained(folder / "clip", image_encoder=False).state_dict(), files


def snapshot(folder):
    make_world(folder)
    files = [folder / "snapshot" / name for name in ("model.safetensors", "config.json", "SHA256SUMS")]
    files += [folder / "clip" / "model.safetensors"]

    def read():
        found = load_snapshot(folder / "snapshot")
        return found.generator.state_dict(), found.gene_encoder.state_dict()

    return files, read, files


def checkpoint(folder):
    layer = torch.nn.Linear(8, 8)
    optimiser = torch.optim.Adam(layer.parameters())
    layer(torch.ones(1, 8)).sum().backward()
    optimiser.step()
    made = save_checkpoint(folder, 5, state={"kimg": 1.5}, tensors={"generator": layer.state_dict(), "ema": layer.state_dict()},
                           optimisers={"generator": optimiser.state_dict()})
    files = sorted(made.iterdir())
    return files, lambda: {**vars(read_checkpoint(made))}, files


def clip_checkpoint(folder):
    path = folder / "step1.ckpt"
    content = {**dict.fromkeys(PARTS, {}), "state_dict": {"a": torch.arange(60.0)}, "global_step": 3}
    SummedCheckpoints().save_checkpoint(content, path)
    return [path, sums_path(path)], lambda: SummedCheckpoints().load_checkpoint(require_checkpoint(path).path), [path]


def pipeline(folder):
    world = write_world(folder / "world")
    made = run(world, folder / "run", max_train_steps=1).config.output_dir / "pipeline"
    files = sorted(path for path in made.rglob("*") if path.is_file())

    def read():
        found = load_pipeline(made)
        return found.denoiser.state_dict(), found.prompts.state_dict(), found.scheduler, found.resolution

    return files, read, files


def plain_weights(folder):
    """A checkpoint of a CLIP as one file, and tensors alone. No sum stands beside them."""
    make_world(folder)
    clip = CLIP.from_pretrained(folder / "clip", image_encoder=False)
    torch.save({"clip": json.dumps(clip.description()), "state_dict": {f"clip.{name}": tensor for name, tensor in clip.weights().items()}},
               folder / "last.ckpt")
    CLIP.convert_ckpt_to_dict(folder / "last.ckpt", None, folder / "clip.pt")
    return [folder / "clip.pt", folder / "clip" / "model.safetensors"], lambda: (
        CLIP.from_pretrained(folder / "clip.pt", image_encoder=False).state_dict(),
        read_state_dict(folder / "clip" / "model.safetensors")), []


def clip_features(folder):
    """The frozen tower's features of the training patches, kept between runs."""
    images = torch.arange(3 * 3 * 32 * 32).remainder(251).to(torch.uint8).reshape(3, 3, 32, 32)
    tower, views = build_encoder("random_tiny"), view_table(3, 2, AugmentConfig(), seed=0)
    read = lambda: cached_features(images, views, tower, tower_key="t", cache_dir=folder / "cache", progress=False)   # noqa: E731
    read()
    files = [path for path in sorted((folder / "cache").rglob("*")) if path.is_file()]
    return files, read, files


def averages(folder):
    """Those that a diffusion run with --power-ema keeps, for another length after the training."""
    model = torch.nn.Linear(5, 4)
    ema = PowerEma(model)
    for _ in range(3):
        ema.update(model)
    files = sorted(path for path in ema.keep(folder).iterdir())
    return files, lambda: average_of_length(folder, 0.1), files


def stats(folder):
    """Read when a run goes on: what it will show again is dropped."""
    path = folder / "stats.jsonl"
    path.write_text("".join(json.dumps({"step": step, "kimg": step / 8, "loss": 0.5}) + "\n" for step in range(1, 8)))

    def read():
        StatsLog(folder, 5, tensorboard=False)
        return path.read_text() if path.is_file() else ""

    return [path], read, []


def run_config(folder):
    """config.json of a GAN run: read to see whether a run that was killed at its start was this one."""
    record = {"preset": "small", "config": {"batch": 8, "seed": 0}, "started_from": None}
    write_json(folder / "00000-run" / "config.json", record)
    return [folder / "00000-run" / "config.json"], lambda: begun_run(folder, "run", record), []


def generated_folder(folder):
    """What gen_images.py writes: the list, and patches that say themselves whether they must be made again."""
    make_world(folder)
    picture = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)
    answer = call(gen_images, network=folder / "snapshot", gex=folder / "gex.h5ad", seeds="0", outdir=folder / "made")
    assert answer.exit_code == 0, answer.output
    marked = folder / "marked.png"
    marked.write_bytes(encode_marked(picture, "mark"))
    barcodes = [f"AAAC{i:04d}-1" for i in range(16)]

    def read():
        if not carries_mark(marked, "mark"):
            raise InputError(marked, "mark", "the patch that is asked for", "another: it is made again")
        return list_images(folder / "made").paths, read_generated(folder / "made", "S", barcodes)

    return [folder / "made" / "samples.csv", marked, folder / "made" / "prompt00003_seed0000.png"], read, \
        [marked, folder / "made" / "prompt00003_seed0000.png"]


def walk_of_patches(folder):
    """samples.csv of interpolate_prompts.py."""
    make_world(folder)
    answer = call(interpolate_prompts, network=folder / "snapshot", prompt1=f"{folder / 'gex.h5ad'}:0", prompt2=f"{folder / 'gex.h5ad'}:1",
                  n_steps=4, seeds="0", outdir=folder / "walk")
    assert answer.exit_code == 0, answer.output
    return [folder / "walk" / "samples.csv"], lambda: (list_images(folder / "walk").paths, read_samples_csv(folder / "walk")), []


def diffusion_images(folder):
    """samples.csv of generate_img."""
    world = write_world(folder / "world")
    made = run(world, folder / "run", max_train_steps=1).config.output_dir
    generate_images(GenerateConfig(model_checkpoint=made, prompt_file=world / "emb.npy", gen_img_path=folder / "made", seeds="0",
                                   n_prompts=3, steps=2, progress=False))
    return [folder / "made" / "samples.csv"], lambda: (list_images(folder / "made").paths, read_samples_csv(folder / "made")), []


def quality_rows(folder):
    """The table that every call of calculate_image_quality_metrics.py adds its rows to."""
    path, row = folder / "image_quality_metrics.csv", {name: 0.5 for name in COLUMNS}
    append_rows(path, [{**row, "experiment": "earlier"}, {**row, "experiment": "ours"}])

    def read():
        append_rows(path, [{**row, "experiment": "ours"}])
        return read_rows(path).to_dict("list")

    return [path], read, []


def attributions(folder):
    make_world(folder)
    answer = call(interpretability, network=folder / "clip", gex=folder / "gex.h5ad", cluster_labs="cluster", out_file=folder / "genes.csv")
    assert answer.exit_code == 0, answer.output
    return [folder / "genes.csv"], lambda: read_attributions(folder / "genes.csv").to_dict(), []


def step_times(folder):
    """What assets/steps.sh writes."""
    path = folder / "steps.jsonl"
    path.write_text("".join(f'{{"step": "{name}", "seconds": {seconds}}}\n' for name, seconds in (("extract A", 3.5), ("clip", 40.1))))
    return [path], lambda: read_steps(path), []


RUN_FORMATS = (clip_folder, snapshot, checkpoint, clip_checkpoint, pipeline, plain_weights, clip_features, averages, stats, run_config,
               generated_folder, walk_of_patches, diffusion_images, quality_rows, attributions, step_times)
