"""train_gan.py and gen_images.py from files on disk to patches on disk, as a user calls them."""
import csv
import json
import resource
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from click.testing import CliRunner
from PIL import Image

import gen_images
import train_gan

ROOT = Path(__file__).resolve().parent.parent
GENES, N, PX = 12, 16, 16


def call(command, **options):
    arguments = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        arguments += [flag] if value is True else [flag, str(value)]
    return CliRunner().invoke(command.main, arguments, catch_exceptions=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One sample of 16 spots in two clusters, CLIP weights, and a trained run."""
    import torch

    from networks.clip import CLIP, ClipModelConfig
    from networks.histo_models import build_encoder
    from preprocessing.expression import write_expression
    from preprocessing.patch_file import write_patch_file

    folder, order = tmp_path_factory.mktemp("gan"), np.random.default_rng(0)
    barcodes = [f"AAAC{i:04d}-1" for i in range(N)]
    obs = pd.DataFrame({"sample_id": "S", "cluster": pd.Categorical(["stroma", "tumour/a"] * (N // 2))}, index=barcodes)
    genes = ad.AnnData(sp.csr_matrix(order.poisson(3, (N, GENES)).astype(np.float32)), obs=obs,
                       var=pd.DataFrame(index=[f"gene{i}" for i in range(GENES)]))
    genes.obsm["spatial"] = order.random((N, 2)) * 1000
    write_expression(folder / "gex.h5ad", genes)
    patches = order.integers(0, 256, (N, PX, PX, 3), dtype=np.uint8)
    corners = (genes.obsm["spatial"] - PX / 2).astype(np.int64)
    write_patch_file(folder / "imgs.h5", patches, count=N, patch_px=PX, coords=corners, barcodes=barcodes,
                     patch_size_src=PX, pixel_size=0.5, name="S")
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=8, image_encoder="random_tiny")
    CLIP(config, genes.var_names.tolist(), image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / "clip")
    result = call(train_gan, **train_options(folder), tensorboard=True)
    assert result.exit_code == 0, result.output
    return folder


def train_options(folder, **changes):
    return {"outdir": folder / "runs", "data": folder / "imgs.h5", "gex": folder / "gex.h5ad", "network": folder / "clip",
            "img_resolution": PX, "batch": 8, "cfg": "custom", "cbase": 128, "cmax": 8, "res_blocks": 1, "backbone": "random_tiny",
            "kimg": 0.048, **changes}


def run_folder(world):
    return next((world / "runs").glob("00000-*"))


def generate(world, name, **options):
    outdir = world / name
    result = call(gen_images, **{"network": run_folder(world), "gex": world / "gex.h5ad", "outdir": outdir, **options})
    return result, outdir


def pictures(folder):
    return {path.relative_to(folder).as_posix(): np.asarray(Image.open(path)).astype(int)
            for path in sorted(folder.rglob("prompt*.png"))}


@pytest.mark.parametrize("command", ["train_gan.py", "gen_images.py", "interpolate_prompts.py"])
def test_help_answers_quickly_with_an_example(command):
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    shown = subprocess.run([sys.executable, command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    end = resource.getrusage(resource.RUSAGE_CHILDREN)                  # processor time: other work on the machine does not count
    assert f"python {command}" in shown and end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 3
    loaded = subprocess.run([sys.executable, "-c", f"import sys, {command[:-3]}; print('torch' in sys.modules)"], cwd=ROOT,
                            capture_output=True, text=True, check=True).stdout
    assert loaded.strip() == "False"


def test_the_command_offers_the_presets_and_sizes_there_are():
    from training.gan_config import PRESETS, SIZES
    assert set(train_gan.PRESETS) == set(PRESETS) and set(train_gan.SIZES) == {*SIZES, "custom"}


def test_the_command_offers_the_guidance_there_is():
    from typing import get_args

    from training.gan_losses import GuidanceKind
    assert train_gan.GUIDANCE == get_args(GuidanceKind)


def test_resume_auto_begins_again_where_a_run_was_killed_before_its_first_checkpoint_and_waits_for_no_live_one(world, tmp_path):
    from preprocessing.outputs import only_writer
    options = {**train_options(world, outdir=tmp_path / "runs", resume="auto"), "no-tensorboard": True}
    assert call(train_gan, **options).exit_code == 0
    (folder,) = (tmp_path / "runs").iterdir()
    whole = {path.parent.name: path.read_bytes() for path in folder.rglob("model.safetensors")}
    for checkpoint in folder.glob("checkpoint-*"):                 # as one killed in its second snapshot leaves it
        shutil.rmtree(checkpoint)
    (folder / "snapshot-000048.tmp.9").mkdir()
    with only_writer(folder):
        result = call(train_gan, **options)
        assert result.exit_code == 4 and f"{folder}: another process is at work in this folder" in result.output
    assert call(train_gan, **options).exit_code == 0
    assert list((tmp_path / "runs").iterdir()) == [folder] and not list(folder.glob("*.tmp.*"))
    assert {path.parent.name: path.read_bytes() for path in folder.rglob("model.safetensors")} == whole
    steps = [json.loads(line)["step"] for line in (folder / "stats.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps.count(0) == 1
    assert call(train_gan, **{**options, "seed": 1}).exit_code == 5             # there are checkpoints again, of another run
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert call(train_gan, **{**options, "seed": 1}).exit_code == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2                        # another run does not take its folder


def test_training_leaves_config_statistics_snapshots_and_a_checkpoint(world):
    folder = run_folder(world)
    assert folder.name == "00000-S@16-custom-gpus1-b8"
    told = json.loads((folder / "config.json").read_text())
    assert told["config"]["img_resolution"] == PX and (told["preset"], told["cfg"]) == ("best", "custom")
    assert told["samples"] == [{"sample_id": "S", "images": str(world / "imgs.h5"), "gex": str(world / "gex.h5ad"), "split": "train"}]
    assert told["data"]["sample_ids"] == ["S"] and len(told["data"]["images_sha256"]) == 64
    assert (folder / "snapshot-000000" / "model.safetensors").exists() and len(list(folder.glob("snapshot-*"))) >= 6
    assert list(folder.glob("checkpoint-*/COMMIT")) and list(folder.glob("events.out.tfevents*"))


def test_resume_auto_goes_on_in_the_same_folder_and_by_path_too(world):
    options = train_options(world, outdir=world / "resumed", tensorboard=True)
    assert call(train_gan, **options, resume="auto").exit_code == 0         # nothing there yet: a new run
    folder = next((world / "resumed").iterdir())
    begun = folder / "config.json"
    record = json.loads(begun.read_text())
    for kimg, how in ((0.064, "auto"), (0.08, folder)):
        result = call(train_gan, **{**options, "kimg": kimg}, resume=how)
        assert result.exit_code == 0 and "resuming at kimg" in result.output
        assert json.loads(begun.read_text()) == {**record, "config": {**record["config"], "kimg": kimg}}
        begun.write_text("{" if kimg == 0.064 else begun.read_text())
    assert [path.name for path in (world / "resumed").iterdir()] == [folder.name]
    assert json.loads((folder / "stats.jsonl").read_text().splitlines()[-1])["kimg"] == 0.08


def test_a_dry_run_reads_and_checks_but_writes_nothing(world):
    result = call(train_gan, **train_options(world, outdir=world / "dry", cache_dir="NONE"), dry_run=True)
    assert result.exit_code == 0 and "16 patches at 16 px" in result.output and not (world / "dry").exists()
    assert not Path("NONE").exists()                # it means no cache, in any case
    for options, code, told in (({"batch": 64}, 3, "at least one batch of 64; found 16"), ({"resume": "nowhere"}, 3, "nowhere: --resume"),
                                ({"resume": "auto"}, 0, "nothing was trained"), ({"resume_kimg": 0.0}, 2, "--resume-kimg"),
                                ({"metrics": "fd_nosuch"}, 2, "found nosuch"), ({"suffix": "a/b"}, 2, "--suffix"),
                                ({"suffix": "a\n\x1b[2J"}, 2, "--suffix"),
                                ({"n_train": 0}, 2, "--n-train")):
        result = call(train_gan, **{**train_options(world, outdir=world / "dry"), **options}, dry_run=True)
        assert result.exit_code == code and told in result.output and not (world / "dry").exists(), result.output


def test_a_sample_sheet_splits_training_from_validation(world):
    from preprocessing.expression import write_expression
    from preprocessing.patch_file import read_patch_file, write_patch_file
    held_out = ad.read_h5ad(world / "gex.h5ad")
    held_out.obs["sample_id"] = "V"
    write_expression(world / "val.h5ad", held_out)
    with read_patch_file(world / "imgs.h5") as file:
        write_patch_file(world / "val.h5", file.images(slice(None)), count=N, patch_px=PX, coords=file.coords,
                         barcodes=held_out.obs_names.tolist(), patch_size_src=PX, pixel_size=0.5, name="V")
    (world / "sheet.csv").write_text("sample_id,images,gex,split\nS,imgs.h5,gex.h5ad,train\nV,val.h5,val.h5ad,val\n")
    options = {name: value for name, value in train_options(world, outdir=world / "sheet_runs", kimg=0.016).items()
               if name not in ("data", "gex")}
    result = call(train_gan, **options, samples=world / "sheet.csv")
    assert result.exit_code == 0 and "S: 16 patches" in result.output, result.output
    assert call(train_gan, **train_options(world), samples=world / "sheet.csv").exit_code == 2    # both ways at once


@pytest.mark.parametrize(("changes", "code", "says"), [
    ({"batch": 12}, 2, "--batch: expected a multiple of --batch-gpu 8; found 12"),
    ({"img_resolution": 24}, 2, "a power of two"),
    ({"batch": 24}, 3, "at least one batch of 24; found 16"),
    ({"data": "nowhere.h5"}, 3, "nowhere.h5"),
    ({"network": "nowhere"}, 3, "nowhere"),
    ({"resume": "nowhere"}, 3, "--resume"),
    ({"backbone": "nothing"}, 2, "image encoder"),
    ({"backbone_px": 4}, 2, "--backbone"),
    ({"seed": -1}, 2, "--seed: expected 0 up to"),
    ({"blur_init": -5}, 2, "--blur-init: expected 0 or more"),
    ({"clip_weight": "nan"}, 2, "--clip-weight: expected a finite number; found nan"),
    ({"g_lr": 1e300}, 2, "--g-lr: expected "), ({"res_blocks": 2 ** 32}, 2, "--res-blocks"),
    ({"device": "foo"}, 2, "--device"),
    ({"emas": "0.5,2"}, 2, "--emas: expected numbers above 0 with commas between, 1 among them"),
    ({"clip_loss": "infonce"}, 2, "--clip-loss: expected a --clip-weight above 0"),
    ({"val_data": "x.h5"}, 2, "--val-data and --val-gex"),
], ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_bad_input_is_refused_in_one_line_and_leaves_no_run(world, changes, code, says):
    result = call(train_gan, **{**train_options(world, outdir=world / "refused"), **changes})
    assert result.exit_code == code and says in result.output and "Traceback" not in result.output
    assert not (world / "refused").exists()


def test_guidance_and_schedules_run_from_the_command(world):
    result = call(train_gan, **train_options(world, outdir=world / "guided", kimg=0.016), clip_weight=0.2, clip_schedule="linear",
                  g_lr_schedule="step", rec_weight=0.1, n_train=12, suffix="mine")
    assert result.exit_code == 0, result.output
    folder = next((world / "guided").iterdir())
    assert folder.name.endswith("-mine") and "loss/clip" in (folder / "stats.jsonl").read_text()


def test_what_may_better_the_published_method_runs_from_the_command(world):
    result = call(train_gan, **train_options(world, outdir=world / "bettered", kimg=0.016), clip_weight=0.2, clip_loss="infonce",
                  mismatch_weight=0.5, augment_target=0.6, augment_kimg=0.1, r1_weight=1, r1_interval=2, emas="0.5,1",
                  val_data=world / "imgs.h5", val_gex=world / "gex.h5ad")
    assert result.exit_code == 0, result.output
    folder = next((world / "bettered").iterdir())
    told = json.loads((folder / "config.json").read_text())["config"]
    assert (told["clip_loss"], told["mismatch_weight"], told["augment_target"], told["augment_kimg"]) == ("infonce", 0.5, 0.6, 0.1)
    assert (told["r1_weight"], told["r1_interval"], told["emas"]) == (1, 2, "0.5,1")
    shown = set().union(*map(json.loads, (folder / "stats.jsonl").read_text().splitlines()))
    assert {"loss/clip", "loss/mismatch", "loss/r1", "augment/p", "logits/val", "logits/gap", "diversity/generated/ema-1.25"} <= shown
    result, outdir = generate(world, "other_average", network=folder / "snapshot-000016" / "ema-1.25", n_samples=1)
    assert result.exit_code == 0 and len(pictures(outdir)) == 1, result.output


def test_the_published_preset_embeds_prompts_anew_at_every_step(world):
    result = call(train_gan, **train_options(world, outdir=world / "published", kimg=0.016), preset="reference")
    assert result.exit_code == 0, result.output
    told = json.loads((next((world / "published").iterdir()) / "config.json").read_text())
    assert told["preset"] == "reference" and told["config"]["cond_dropout"] == 0.8 and told["config"]["blur_fade_kimg"] == 1000


def test_patches_are_named_by_prompt_and_seed_and_listed(world):
    result, outdir = generate(world, "listed", seeds="0,2-3", n_samples=2, clusters="cluster", images=world / "imgs.h5")
    assert result.exit_code == 0, result.output
    rows = list(csv.DictReader(open(outdir / "samples.csv")))
    assert sorted(row["file"] for row in rows) == sorted(pictures(outdir))
    assert len(rows) == 2 * 2 * 3 and {row["cluster"] for row in rows} == {"stroma", "tumour/a"}
    assert {Path(row["file"]).parts[0] for row in rows} == {"cluster_stroma", "cluster_tumour_a"}
    assert rows[0]["barcode"].startswith("S__AAAC") and {row["seed"] for row in rows} == {"0", "2", "3"}
    real = np.random.default_rng(0)
    real.poisson(3, (N, GENES))
    real.random((N, 2))
    first = real.integers(0, 256, (N, PX, PX, 3), dtype=np.uint8)[int(rows[0]["prompt"])]
    grid = np.asarray(Image.open(outdir / "grid.png"))
    windows = np.lib.stride_tricks.sliding_window_view(grid, (PX, PX, 3))[:, :, 0]
    assert (windows == first).all(axis=(2, 3, 4)).any()      # the real patch is in the sheet


@pytest.mark.parametrize(("options", "told"), [
    ({}, "precision='fp32', compile='off', workers=3"),
    ({"bf16": True, "compile": "max", "workers": 1}, "precision='bf16', compile='max', workers=1"),
    ({"fp32": True, "nobench": True}, "precision='fp32'")])
def test_how_a_run_computes_is_said_and_told_to_the_libraries(world, options, told, monkeypatch):
    monkeypatch.setattr("training.compiler_probe.require_compiler", lambda *asked: None)     # a machine for tests may have none
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        result = call(train_gan, **train_options(world, outdir=world / "how"), dry_run=True, **options)
        assert result.exit_code == 0 and told in result.output, result.output
        assert torch.backends.cudnn.benchmark == ("nobench" not in options)
        assert torch.get_float32_matmul_precision() == ("high" if "bf16" in options else "highest")
    finally:
        torch.backends.cudnn.benchmark, precision, torch.backends.cudnn.allow_tf32 = before
        torch.set_float32_matmul_precision(precision)


def test_a_run_is_mirrored_to_weights_and_biases_under_one_id(world, monkeypatch):
    result = call(train_gan, **train_options(world, outdir=world / "mirrored"), wandb="morphology")
    assert result.exit_code == 2 and "--wandb: expected the package wandb (pip install wandb); found it is not installed" in result.output
    seen = {"init": [], "log": []}
    module = ModuleType("wandb")
    module.__spec__ = ModuleSpec("wandb", None)
    module.init = lambda **told: seen["init"].append(told) or SimpleNamespace(
        log=lambda values, step: seen["log"].append((step, values)), finish=lambda: seen["log"].append("finished"))
    monkeypatch.setitem(sys.modules, "wandb", module)
    for kimg in (0.016, 0.024):
        result = call(train_gan, **train_options(world, outdir=world / "mirrored", kimg=kimg), wandb="morphology", resume="auto")
        assert result.exit_code == 0, result.output
    first, second = seen["init"]
    assert [told.pop("config")["kimg"] for told in (first, second)] == [0.016, 0.024]
    assert first == second and first["project"] == "morphology" and first["resume"] == "allow"
    assert seen["log"].count("finished") == 2 and {"loss/G", "kimg"} <= seen["log"][1][1].keys()


def test_a_run_goes_on_where_weights_and_biases_has_no_login(world, monkeypatch, caplog):
    def init(**told):
        raise RuntimeError("api_key not configured (no-tty)\ncall wandb.login")
    module = ModuleType("wandb")
    module.__spec__, module.init = ModuleSpec("wandb", None), init
    monkeypatch.setitem(sys.modules, "wandb", module)
    result = call(train_gan, **train_options(world, outdir=world / "unknown_there"), wandb="morphology")
    assert result.exit_code == 0 and "going on without it: api_key not configured (no-tty)" in caplog.text


def test_a_snapshot_that_a_kill_left_half_written_is_no_snapshot_and_goes_at_the_next_save(world):
    options = train_options(world, outdir=world / "torn")
    assert call(train_gan, **options).exit_code == 0
    torn = next((world / "torn").iterdir()) / "snapshot-000016.tmp.123"
    torn.mkdir()
    result = call(train_gan, **{**options, "kimg": options["kimg"] + 0.016}, resume="auto")
    assert result.exit_code == 0 and "newest snapshot" in result.output and not torn.exists(), result.output


def test_the_same_seed_gives_the_same_picture_at_any_batch_size(world):
    one, eight = (pictures(generate(world, f"batch{size}", batch_sz=size, seeds="0-1")[1]) for size in (1, 8))
    assert len(one) == 2 * N and one.keys() == eight.keys()
    assert max(np.abs(one[name] - eight[name]).max() for name in one) <= 1


def test_every_option_changes_what_it_should(world):
    def made(name, **options):
        result, outdir = generate(world, name, n_samples=3, **options)
        assert result.exit_code == 0, result.output
        return pictures(outdir)

    plain = made("plain")
    for name, options in {"truncation": {"truncation": 0.2}, "const": {"noise_mode": "const"}, "none": {"noise_mode": "none"},
                          "translate": {"translate": "0.25,0"}, "rotate": {"rotate": 90}, "same": {"same_seed": True},
                          "old": {"network": run_folder(world) / "snapshot-000000"}}.items():
        other = made(name, **options)
        assert any((other[file] != plain[file]).any() for file in plain), name
    assert made("other_seed", seeds="5").keys() != plain.keys()
    assert (made("again")[next(iter(plain))] == plain[next(iter(plain))]).all()


def test_embeddings_and_expression_of_an_npy_are_prompts_row_by_row(world):
    from networks.snapshot import load_snapshot
    from training.prompts import read_prompts
    from training.sampling import newest_snapshot
    snapshot = load_snapshot(newest_snapshot(run_folder(world)))
    prompts = read_prompts(world / "gex.h5ad", snapshot)
    np.save(world / "embeddings.npy", prompts.embeddings.numpy())
    (_, from_genes), (result, from_rows) = generate(world, "genes"), generate(world, "rows", gex=world / "embeddings.npy", encoded=True)
    assert result.exit_code == 0, result.output
    a, b = pictures(from_genes), pictures(from_rows)
    assert a.keys() == b.keys() and max(np.abs(a[name] - b[name]).max() for name in a) <= 1
    np.save(world / "expression.npy", np.ones(GENES, np.float32))
    result, outdir = generate(world, "expression", gex=world / "expression.npy", n_samples=3)
    assert result.exit_code == 0 and list(pictures(outdir)) == [f"prompt00000_seed{seed:04d}.png" for seed in range(3)]


def write_bad(folder, kind):
    rows = np.zeros((4, 8), np.float32)
    if kind == "width":
        rows = rows[:, :5]
    if kind == "nan":
        rows[2, 1] = np.nan
    if kind == "pickle":
        rows = np.array([{"a": 1}], dtype=object)
    np.save(folder / f"{kind}.npy", rows, allow_pickle=kind == "pickle")
    return folder / f"{kind}.npy"


@pytest.mark.parametrize(("kind", "says"), [("width", "(prompts, 8)"), ("nan", "rows 1 (2)"), ("pickle", "no Python objects")])
def test_prompts_of_wrong_width_with_nan_or_pickled_are_refused(world, kind, says):
    result, outdir = generate(world, f"bad_{kind}", gex=write_bad(world, kind), encoded=True)
    assert result.exit_code == 3 and says in result.output and f"{kind}.npy" in result.output and not outdir.exists()


@pytest.mark.parametrize(("rows", "says"), [
    (np.full((2, GENES), -0.5), "no negative values"),
    (np.arange(2 * GENES).reshape(2, GENES), "whole numbers up to 23: raw counts"),
    (np.arange(2 * GENES).reshape(2, GENES).astype(float), "take log1p, or give raw counts as an .h5ad"),
], ids=["negative", "integers", "whole floats"])
def test_an_npy_that_is_not_normalised_expression_is_refused_saying_how(world, rows, says):
    np.save(world / "raw.npy", rows)
    result, outdir = generate(world, "raw", gex=world / "raw.npy")
    assert result.exit_code == 3 and says in result.output and not outdir.exists()


def test_the_refusal_of_a_pickle_does_not_say_how_to_run_it(world):
    (world / "code.npy").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for name in (write_bad(world, "pickle"), world / "code.npy"):
        result, _ = generate(world, "unsafe", gex=name, encoded=True)
        assert result.exit_code == 3 and "no Python objects" in result.output and "allow_pickle" not in result.output


def test_several_arrays_in_one_file_are_refused(world):
    with open(world / "several.npy", "wb") as stream:
        np.savez(stream, a=np.zeros((2, 8)), b=np.zeros(3))
    result, _ = generate(world, "several", gex=world / "several.npy", encoded=True)
    assert result.exit_code == 3 and "several arrays" in result.output


def test_empty_label_files_and_empty_labels_are_refused(world):
    (world / "empty.csv").write_text("")
    np.save(world / "blank.npy", np.array(["a"] * (N - 1) + [""]))
    for name, says in (("empty.csv", "a CSV with a header line"), ("blank.npy", "1 missing")):
        result, outdir = generate(world, "no_labels", clusters=world / name)
        assert result.exit_code == 3 and says in result.output and not outdir.exists()


def test_spots_that_clustering_left_out_are_nobodys_prompt(world, caplog):
    adata = ad.read_h5ad(world / "gex.h5ad")
    adata.obs["cluster"] = adata.obs["cluster"].astype(object)
    adata.obs.iloc[3, adata.obs.columns.get_loc("cluster")] = None
    adata.obs["cluster"] = adata.obs["cluster"].astype("category")
    adata.write_h5ad(world / "gaps.h5ad")
    result, outdir = generate(world, "gaps", gex=world / "gaps.h5ad", clusters="cluster")
    assert result.exit_code == 0, result.output
    made = pd.read_csv(outdir / "samples.csv")
    assert sorted(made["prompt"]) == [row for row in range(N) if row != 3] and "1 of 16 spots have no cluster" in caplog.text
    assert "16 spots are brought to their own median library size" in caplog.text


@pytest.mark.parametrize("labels", [N - 1, N + 1])
def test_labels_that_are_not_one_a_prompt_are_refused(world, labels):
    np.save(world / "labels.npy", np.zeros(labels, int))
    result, outdir = generate(world, "bad_labels", clusters=world / "labels.npy")
    assert result.exit_code == 3 and "one for each of the 16 prompts" in result.output and not outdir.exists()
    result, _ = generate(world, "bad_labels", clusters="no_such_column")
    assert result.exit_code == 3 and "sample_id, cluster" in result.output


def test_labels_may_come_from_npy_or_csv(world):
    np.save(world / "good.npy", np.arange(N) % 4)
    pd.DataFrame({"barcode": range(N), "label": np.arange(N) % 4}).to_csv(world / "good.csv", index=False)
    made = [generate(world, f"labels_{kind}", clusters=world / f"good.{kind}", n_samples=1)[1] for kind in ("npy", "csv")]
    assert pictures(made[0]).keys() == pictures(made[1]).keys() and len(pictures(made[0])) == 4


@pytest.mark.parametrize(("text", "seeds"), [("0,1,4-6", [0, 1, 4, 5, 6]), ("3", [3]), ("2-2,2", [2])])
def test_seeds_are_numbers_and_ranges(text, seeds):
    from training.prompts import parse_seeds
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("options", [{"seeds": "a"}, {"seeds": "4-2"}, {"n_samples": 0}, {"batch_sz": 0}, {"translate": "1"},
                                     {"seeds": "99999999999999999999"}, {"seeds": "\u00b2"}, {"seeds": "1-\u00b2"}, {"seeds": "-1"},
                                     {"seeds": "0-99999999999"}, {"truncation": "nan"}, {"truncation": "inf"}, {"rotate": "nan"},
                                     {"translate": "nan,0"}, {"device": "foo"}], ids=str)
def test_impossible_options_of_sampling_are_usage_errors(world, options):
    result, outdir = generate(world, "usage", **options)
    assert result.exit_code == 2 and not outdir.exists()


def test_a_snapshot_whose_gene_encoder_was_replaced_or_moved_is_refused_until_told_where(world, tmp_path):
    import shutil
    shutil.copytree(run_folder(world), tmp_path / "run")            # the relative path leads nowhere from here
    result, _ = generate(world, "moved", network=tmp_path / "run")
    assert result.exit_code == 3 and "--clip" in result.output
    assert generate(world, "told", network=tmp_path / "run", clip=world / "clip", n_samples=1)[0].exit_code == 0
