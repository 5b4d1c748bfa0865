"""train_gan.py in its other modes, and gen_images.py with what they leave: as a user calls them."""
import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from click.testing import CliRunner
from PIL import Image

import gen_images
import train_gan

GENES, N, PX = 12, 24, 16


def call(command, **options):
    arguments = []
    for name, value in options.items():
        if value is not None:
            arguments += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}", str(value)]
    return CliRunner().invoke(command.main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One sample of 24 spots in three clusters, with patches, ready embeddings and CLIP weights."""
    import torch

    from networks.clip import CLIP, ClipModelConfig
    from networks.histo_models import build_encoder
    from preprocessing.expression import write_expression
    from preprocessing.patch_file import write_patch_file

    folder, order = tmp_path_factory.mktemp("modes") / "S", np.random.default_rng(0)
    folder.mkdir()
    barcodes = [f"AAAC{i:04d}-1" for i in range(N)]
    obs = pd.DataFrame({"sample_id": "S", "cluster": pd.Categorical(["a", "b", "c"] * (N // 3)), "good": [True] * 9 + [False] * (N - 9)},
                       index=barcodes)
    genes = ad.AnnData(sp.csr_matrix(order.poisson(3, (N, GENES)).astype(np.float32)), obs=obs,
                       var=pd.DataFrame(index=[f"gene{i}" for i in range(GENES)]))
    genes.obsm["spatial"] = order.random((N, 2)) * 1000
    write_expression(folder / "gex.h5ad", genes)
    write_patch_file(folder / "imgs.h5", order.integers(0, 256, (N, PX, PX, 3), dtype=np.uint8), count=N, patch_px=PX,
                     coords=(genes.obsm["spatial"] - PX / 2).astype(np.int64), barcodes=barcodes, patch_size_src=PX, pixel_size=0.5,
                     name="S")
    np.save(folder / "emb.npy", order.standard_normal((N, 5)).astype(np.float32))
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=8, image_encoder="random_tiny")
    CLIP(config, genes.var_names.tolist(), image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / "clip")
    return folder


def train(world, outdir, **changes):
    options = {"outdir": world / outdir, "data": world / "imgs.h5", "gex": world / "gex.h5ad", "img_resolution": PX, "batch": 8,
               "cfg": "custom", "cbase": 128, "cmax": 8, "res_blocks": 1, "backbone": "random_tiny", "kimg": 0.016, **changes}
    result = CliRunner().invoke(train_gan.main, [word for name, value in options.items() if value is not None
                                                 for word in (f"--{name.replace('_', '-')}", str(value))] + ["--no-tensorboard"],
                                catch_exceptions=False)
    return result, next((world / outdir).glob("*-S@*"), None) if (world / outdir).is_dir() else None


def told(folder):
    return json.loads((folder / "config.json").read_text())


def pictures(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).astype(int) for path in sorted(folder.rglob("prompt*.png"))}


def tensors(snapshot):
    from safetensors.torch import load_file
    return load_file(snapshot / "model.safetensors")


@pytest.fixture(scope="module")
def unconditional(world):
    result, folder = train(world, "unconditional", gex=None)
    assert result.exit_code == 0 and "no prompts" in result.output, result.output
    return folder


@pytest.fixture(scope="module")
def with_mlp(world):
    result, folder = train(world, "mlp", encoder="mlp")
    assert result.exit_code == 0 and "prompts 768 wide" in result.output, result.output
    return folder


def test_without_expression_patches_are_drawn_from_seeds_alone(world, unconditional, tmp_path):
    assert told(unconditional)["config"]["encoder"] == "none"
    assert told(unconditional)["samples"] == [{"images": str(world / "imgs.h5"), "split": "train"}]
    assert json.loads((unconditional / "snapshot-000016" / "config.json").read_text())["generator"]["c_dim"] == 0
    for name, options in (("three", {"seeds": "0-2"}), ("counted", {"seeds": "0", "n_samples": 3})):
        result = call(gen_images, network=unconditional, outdir=tmp_path / name, **options)
        assert result.exit_code == 0, result.output
        made = pictures(tmp_path / name)
        assert list(made) == [f"prompt00000_seed{seed:04d}.png" for seed in range(3)]
        first, second, third = made.values()
        assert (first != second).any() and (second != third).any()
    assert (tmp_path / "three" / "grid.png").exists()


@pytest.mark.parametrize("options", [{"gex": "gex.h5ad"}, {"encoded": True}, {"clusters": "cluster"}], ids=str)
def test_an_unconditional_snapshot_takes_no_prompts(world, unconditional, tmp_path, options):
    options = {name: world / value if name == "gex" else value for name, value in options.items()}
    result = call(gen_images, network=unconditional, outdir=tmp_path / "out", **options)
    assert result.exit_code == 2 and "--seeds alone" in result.output and not (tmp_path / "out").exists()


def test_a_conditional_snapshot_asks_for_prompts(with_mlp, tmp_path):
    result = call(gen_images, network=with_mlp, outdir=tmp_path / "out")
    assert result.exit_code == 2 and "--gex: expected prompts" in result.output and not (tmp_path / "out").exists()


def test_unconditional_runs_resume(world, unconditional):
    result, folder = train(world, "unconditional", gex=None, resume="auto", kimg=0.024)
    assert result.exit_code == 0 and "resuming at kimg 0.02" in result.output and folder == unconditional


def test_the_encoder_trained_along_embeds_prompts_of_its_genes_and_no_others(world, with_mlp, tmp_path):
    from preprocessing.expression import write_expression
    assert told(with_mlp)["gene_encoder"] is None and told(with_mlp)["config"]["cond_norm"] == "scaled"
    result = call(gen_images, network=with_mlp, gex=world / "gex.h5ad", outdir=tmp_path / "out", clusters="cluster", n_samples=1)
    assert result.exit_code == 0 and len(pictures(tmp_path / "out")) == 3, result.output
    np.save(tmp_path / "rows.npy", np.full((2, GENES), 0.5, np.float32))
    assert call(gen_images, network=with_mlp, gex=tmp_path / "rows.npy", outdir=tmp_path / "rows").exit_code == 0
    other = ad.read_h5ad(world / "gex.h5ad")
    other.var_names = [*other.var_names[:-1], "stranger"]
    write_expression(tmp_path / "other.h5ad", other)
    result = call(gen_images, network=with_mlp, gex=tmp_path / "other.h5ad", outdir=tmp_path / "refused")
    assert result.exit_code == 3 and "first difference at gene 12" in result.output and not (tmp_path / "refused").exists()


def test_the_encoder_alone_is_trained_on_from_a_snapshot(world, with_mlp):
    start = with_mlp / "snapshot-000016"
    result, folder = train(world, "encoder_alone", encoder="mlp", train_mode="text_encoder", resume=start)
    assert result.exit_code == 0 and "mlp: 10 of 10 tensors taken" in result.output, result.output
    assert told(folder)["started_from"] == str(start) and told(folder)["config"]["g_lr"] == 3e-6
    before, after = tensors(start), tensors(folder / "snapshot-000016")
    moved = {name for name in before if not (before[name] == after[name]).all()}
    assert moved and all(name.startswith("gene_encoder.") for name in moved)


def test_frozen_blocks_stay_as_the_snapshot_had_them(world, unconditional):
    start = unconditional / "snapshot-000016"
    result, folder = train(world, "frozen", gex=None, train_mode="freeze8", resume=start)
    assert result.exit_code == 0, result.output
    before, after = tensors(start), tensors(folder / "snapshot-000016")
    moved = {name for name in before if not (before[name] == after[name]).all()}
    assert any(".to_rgb." in name for name in moved) and all(name.startswith("blocks.1.") or ".to_rgb." in name for name in moved)
    result, _ = train(world, "frozen_new", gex=None, train_mode="freeze8")
    assert result.exit_code == 0 and "what it freezes was never trained" in result.output


def test_ready_embeddings_condition_without_weights_of_ours(world, tmp_path):
    result, folder = train(world, "ready", embeddings=world / "emb.npy")
    assert result.exit_code == 0 and "prompts 5 wide" in result.output, result.output
    result = call(gen_images, network=folder, gex=world / "emb.npy", encoded=True, outdir=tmp_path / "out")
    assert result.exit_code == 0 and len(pictures(tmp_path / "out")) == N
    result = call(gen_images, network=folder, gex=world / "gex.h5ad", outdir=tmp_path / "no_encoder")
    assert result.exit_code == 3 and "--encoded" in result.output


def test_ready_embeddings_are_guided_by_weights_of_their_width_alone(world):
    from networks.clip import CLIP
    from training.data import expression_only
    clip = CLIP.from_pretrained(world / "clip", image_encoder=False)
    np.save(world / "clip_emb.npy", clip.embed_expression(expression_only(world / "gex.h5ad").expression).numpy())
    result, folder = train(world, "guided", embeddings=world / "clip_emb.npy", network=world / "clip", clip_weight=0.2)
    assert result.exit_code == 0 and "loss/clip" in (folder / "stats.jsonl").read_text(), result.output
    result, folder = train(world, "misguided", embeddings=world / "emb.npy", network=world / "clip", clip_weight=0.2)
    assert result.exit_code == 3 and "width of an embedding: expected 5, as the prompts are; found 8" in result.output and folder is None


def test_a_mask_and_clusters_choose_what_is_trained_on_and_shown(world):
    shared = {"embeddings": world / "emb.npy", "val_data": world / "imgs.h5", "val_gex": world / "gex.h5ad",
              "val_embeddings": world / "emb.npy"}
    result, folder = train(world, "chosen", **shared, mask="good", val_clusters="b,c")
    assert result.exit_code == 0 and "S: 9 patches" in result.output, result.output
    assert told(folder)["data"]["n_spots"] == 9 and told(folder)["data"]["chosen"] == {"mask": "good", "val_clusters": "b,c"}
    result, folder = train(world, "clusters", **shared, train_clusters="a,c", n_train=12)
    assert result.exit_code == 0 and told(folder)["data"]["n_spots"] == 12


@pytest.fixture(scope="module")
def grown(world, unconditional):
    return train(world, "grown", gex=None, img_resolution=32, resume=unconditional)


def test_a_larger_run_grows_out_of_a_smaller_one_and_says_what_is_new(unconditional, grown):
    result, folder = grown
    assert result.exit_code == 0 and "starting at kimg 0 from the weights of" in result.output, result.output
    new = next(line for line in result.output.splitlines() if line.startswith("generator: new here: "))
    assert "blocks.2.convs.0.weight" in new and "blocks.1." not in new and new in (folder / "log.txt").read_text()
    assert folder.name.startswith("00000-S@32-") and (folder / "snapshot-000000").exists()
    assert Path(told(folder)["started_from"]).parent == unconditional


def test_the_clock_of_a_grown_run_may_start_later(world, unconditional):
    result, folder = train(world, "later", gex=None, img_resolution=32, resume=unconditional / "snapshot-000016", resume_kimg=0.008)
    assert result.exit_code == 0 and "starting at kimg 0.008" in result.output
    assert sorted(path.name for path in folder.glob("snapshot-*")) == ["snapshot-000008", "snapshot-000016"]


@pytest.mark.parametrize(("changes", "code", "says"), [
    ({}, 2, "--network: expected CLIP weights"),
    ({"encoder": "mlp", "network": "clip"}, 2, "--network: expected nothing"),
    ({"gex": None, "network": "clip"}, 2, "--network: expected --gex with it"),
    ({"gex": None, "cond_noise": 0.1}, 2, "--cond-noise: expected 0 without prompts"),
    ({"gex": None, "cond_norm": "scaled"}, 2, "--cond-norm: expected l2 (of nothing) without prompts"),
    ({"encoder": "mlp", "train_mode": "freeze16"}, 2, "to freeze less than the 16 px"),
    ({"encoder": "mlp", "train_mode": "freeze12"}, 2, "freeze12"),
    ({"gex": None, "train_mode": "text_encoder"}, 2, "text_encoder with --encoder mlp alone"),
    ({"encoder": "mlp", "train_clusters": "a,x"}, 3, "--train-clusters: expected names among a, b, c; found x"),
    ({"encoder": "mlp", "val_clusters": "a"}, 2, "--val-clusters: expected spots to show"),
    ({"encoder": "mlp", "mask": "nowhere"}, 3, "nowhere; columns: sample_id, cluster, good"),
    ({"encoder": "mlp", "mask": "emb.npy"}, 3, "booleans, or whole row numbers"),
    ({"encoder": "mlp", "mask": "good", "train_clusters": "a"}, 3, "at least one batch of 8; found 3"),
    ({"encoder": "mlp", "resume_kimg": 1}, 2, "--resume-kimg: expected with --resume"),
    ({"gex": None, "resume": "unconditional/checkpoint", "img_resolution": 8}, 2, "--img-resolution: expected at least the 16 px"),
    ({"gex": None, "resume": "unconditional/snapshot-000016", "resume_kimg": 1}, 2, "expected 0 up to less than --kimg 0.016"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_does_not_hold_together_is_refused_in_one_line_and_leaves_no_run(world, unconditional, changes, code, says):
    changes = dict(changes)
    if "resume" in changes:
        path = changes["resume"].removeprefix("unconditional/")
        changes["resume"] = max(unconditional.glob("checkpoint-*")) if path == "checkpoint" else unconditional / path
    for name in ("network", "mask"):
        if (world / str(changes.get(name))).exists():
            changes[name] = world / changes[name]
    result, folder = train(world, "refused", **changes)
    assert result.exit_code == code and says in result.output and "Traceback" not in result.output, result.output
    assert folder is None
