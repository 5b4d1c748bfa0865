"""Every file we write, with one bit changed, cut short or gone: read to the same contents, made anew, or refused in one line.

Where a checksum or a manifest stands beside it no damage may pass as other contents; without one it may, but never as a traceback,
a crash or a hang.
"""
import json
import shutil

import anndata as ad
import numpy as np
import pytest
import torch
from clip_runs import write_sample
from damaged_reading import damages_of, digest, outcomes
from diffusion_world import PX, WIDTH, run, tiny_vae, write_world
from fault_rounds import rounds
from sampling_world import make_world

from diffusion_utils.latents import cached_latents
from diffusion_utils.pairs import read_pairs
from diffusion_utils.pipeline import load_pipeline
from evaluation.features import cached_features
from networks.clip import CLIP
from networks.histo_models import build_encoder
from networks.snapshot import load_snapshot
from preprocessing.done_manifests import file_sha256, is_done, strings_sha256
from preprocessing.expression import read_expression, read_vocabulary, write_expression, write_vocabulary
from preprocessing.npy_file import RECORD
from preprocessing.patch_file import read_patch_file
from preprocessing.patches import pair, read_patch, read_patch_folder
from training.clip_checkpoints import PARTS, SummedCheckpoints, require_checkpoint, sums_path
from training.patch_cache import PatchRows, cache_key, map_patches, packed_patches
from training.prompts import read_rows
from training.run_folder import latest_checkpoint, read_checkpoint, save_checkpoint

FLIPS, CUTS = rounds(10, 150), rounds(3, 20)


# ---- what is written, and how it is read: make(folder) -> (the files to damage, read, those whose damage is always noticed) ---------

def expression(folder):
    write_sample(folder, "S", 12, seed=0)
    path = folder / "S" / "gex_filt.h5ad"
    data = read_expression(path)
    (folder / "in").write_text("input")
    write_expression(path, data, config={"a": 1}, inputs={"in": folder / "in"})

    def read():
        found = read_expression(path)
        assert np.isfinite(found.X.data).all()
        return found.X.toarray(), found.obs_names.tolist(), found.var_names.tolist(), np.asarray(found.obsm["spatial"])

    return [path], read, []


def manifest(folder):
    """A step is skipped only where the file is as its manifest says: what is read here is whether it would be."""
    paths, _, _ = expression(folder)
    return [paths[0], paths[0].with_name("gex_filt.h5ad.done.json")], lambda: (
        is_done(paths[0], config={"a": 1}, inputs={"in": folder / "in"}) and (file_sha256(paths[0]),) or _refuse()), paths


def _refuse():
    from preprocessing.errors import InputError
    raise InputError("gex_filt.h5ad", "manifest", "as it was", "not: the step is done again")


def patch_file(folder):
    make_world(folder)

    def read():
        with read_patch_file(folder / "imgs.h5") as file:
            return file.images(slice(0, len(file))), file.barcodes, file.centre_xy_px

    return [folder / "imgs.h5"], read, []


def patch_folder(folder):
    write_sample(folder, "S", 12, seed=0)
    patches, gex = folder / "S" / "patches", ad.read_h5ad(folder / "S" / "gex_filt.h5ad")
    names, xy = gex.obs_names.tolist(), np.asarray(gex.obsm["spatial"])

    def read():
        paths = pair(read_patch_folder(patches), names, folder / "S" / "gex_filt.h5ad", strings_sha256(names), xy)
        return [read_patch(path) for path in paths]

    files = [patches / "metadata.jsonl", patches / "stain.json", sorted(patches.glob("*.png"))[3]]
    return files, read, files


def vocabulary(folder):
    write_vocabulary(folder / "vocab.txt", [f"Gene{i}" for i in range(40)])
    return [folder / "vocab.txt"], lambda: read_vocabulary(folder / "vocab.txt"), []


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
    return [path, sums_path(path)], lambda: SummedCheckpoints().load_checkpoint(require_checkpoint(path)), [path]


def pipeline(folder):
    world = write_world(folder / "world")
    made = run(world, folder / "run", max_train_steps=1).config.output_dir / "pipeline"
    files = sorted(path for path in made.rglob("*") if path.is_file())

    def read():
        found = load_pipeline(made)
        return found.denoiser.state_dict(), found.prompts.state_dict(), found.scheduler, found.resolution

    return files, read, files


def embeddings(folder):
    world = write_world(folder / "w")
    record = json.loads((world / RECORD).read_text())
    (world / RECORD).write_text(json.dumps({**record, "sha256": {"emb.npy": file_sha256(world / "emb.npy")}}))

    def read():
        pairs = read_pairs(str(world / "patches"), str(world / "emb.npy"))
        return read_rows(world / "emb.npy", WIDTH, encoded=True), pairs.patches.load_images(progress=False)

    return [world / "emb.npy", world / RECORD], read, [world / "emb.npy"]


def latents(folder):
    images, vae = PatchRows(torch.arange(5 * 3 * PX * PX, dtype=torch.uint8).reshape(5, 3, PX, PX)), tiny_vae()
    read = lambda: np.array(cached_latents(images, vae, folder / "cache", progress=False).posteriors)   # noqa: E731
    read()
    return sorted(path for path in (folder / "cache").iterdir() if "lock" not in path.name), read, ["always the same"]


def features(folder):
    write_sample(folder, "S", 4, seed=0)
    paths, encoder = sorted((folder / "S" / "patches").glob("*.png")), build_encoder("random_tiny")
    read = lambda: np.array(cached_features(paths, encoder, folder / "cache", progress=False)[0])       # noqa: E731
    read()
    return sorted((folder / "cache").iterdir()), read, ["always the same"]


def packed(folder):
    write_sample(folder, "S", 4, seed=0)
    paths = sorted((folder / "S" / "patches").glob("*.png"))
    key = cache_key(paths, [-1] * 4, 32, {"resize": "box"}, folder, program="Pillow")

    def read():
        made = packed_patches(key, folder / "cache", lambda start, stop: np.stack([
            np.ascontiguousarray(read_patch(path).transpose(2, 0, 1)) for path in paths[start:stop]]), must=True, progress=False)
        return map_patches(made).numpy().copy()

    read()
    return sorted(path for path in (folder / "cache").iterdir() if "lock" not in path.name), read, ["always the same"]


FORMATS = {make.__name__: make for make in (expression, manifest, patch_file, patch_folder, vocabulary, clip_folder, snapshot, checkpoint,
                                            clip_checkpoint, pipeline, embeddings, latents, features, packed)}
HARMLESS = ("COMMIT", "stain.json")          # that it is there counts; how patches were stained, which pairs without it


@pytest.mark.fault("flipped bit or cut file")
@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_file_is_read_as_it_was_or_refused_in_one_line(name, tmp_path, tried, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    files, read, guarded = FORMATS[name](tmp_path)
    whole = digest(read())
    assert digest(read()) == whole, "the contents are the same whenever they are read"
    for number, path in enumerate(files):
        content = path.read_bytes()
        damages = damages_of(path, content, FLIPS, CUTS, seed=number)
        tried(len(damages))
        found = list(outcomes(read, damages, whole))
        path.write_bytes(content)
        assert len(found) == len(damages)
        wrong = [said for said in found if said.startswith("crash") or said == "hang"]
        if guarded == ["always the same"]:
            wrong += [said for said in found if said != "same"]
        elif path in guarded:
            wrong += [said for said in found if said == "other" and path.name not in HARMLESS]
        assert wrong == [], (path.name, len(wrong), wrong[0])
        if guarded == ["always the same"]:
            read()


@pytest.mark.fault("damaged newest checkpoint")
@pytest.mark.parametrize("name", ["state.json", "generator.safetensors", "generator.pt", "SHA256SUMS", "COMMIT"])
def test_of_a_damaged_newest_checkpoint_the_one_before_is_used_with_a_warning(name, tmp_path, tried, caplog):
    tensors = {"generator": {"a": torch.arange(40.0)}}
    for step in (1, 2):
        save_checkpoint(tmp_path, step, state={}, tensors=tensors, optimisers={"generator": {"lr": 0.1}})
    path = tmp_path / "checkpoint-00000002" / name
    content = path.read_bytes()
    for damage in damages_of(path, content, rounds(8, 60), 3, seed=0):
        tried()
        damage()
        found = latest_checkpoint(tmp_path)
        step = found.state["step"]
        assert step == 1 and "skipping a damaged checkpoint" in caplog.text or step == 2 and digest(found.tensors) == digest(tensors)
        path.write_bytes(content)
    shutil.rmtree(tmp_path / "checkpoint-00000002")
    assert latest_checkpoint(tmp_path).state["step"] == 1
