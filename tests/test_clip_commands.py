"""train_clip.py and clip_embeddings.py from paired files to weights and embeddings, on tiny samples on the CPU."""
import json
import logging
import math
import os
import signal
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner
from clip_runs import GENES, ROOT, config, write_sample, write_samples

import train_clip
from clip_embeddings import main as clip_embeddings
from evaluation.retrieval import retrieval_metrics
from networks.clip import CLIP
from networks.layers import images_to_float
from networks.sample_scaling import patches_for_mean
from networks.weights import read_plain_file
from preprocessing.errors import DivergedError, InputError, OptionError, WeightsError
from preprocessing.patches import read_patch, read_patch_folder
from train_clip import train
from training.clip_checkpoints import Stopped, SummedCheckpoints
from training.clip_config import clip_config
from training.clip_module import ClipModule
from training.composed_config import quote_paths


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def run(samples):
    return train(config(run_dir="run", logger="csv,tensorboard", trainer={"max_epochs": 4}), samples)


def test_a_run_ends_with_weights_logs_checkpoints_and_its_configuration(run, samples):
    assert run == samples / "run"   # relative to the launch folder
    metrics = pd.read_csv(run / "csv" / "metrics.csv")
    assert {"train/loss", "val/loss", "val/gene_to_image_r1", "val/gene_to_image_r5", "val/gene_to_image_r10",
            "val/gene_to_image_median_rank", "val/image_to_gene_r10"} <= set(metrics.columns)
    assert list((run / "tensorboard").glob("events.*"))
    assert len(list((run / "checkpoints").glob("step*.ckpt"))) == 5 and (run / "checkpoints" / "last.ckpt").is_file()
    assert json.loads((run / "config.json").read_text())["optimizer"]["lr"] == 1e-2
    retrieval = json.loads((run / "retrieval.json").read_text())
    assert retrieval["n_spots"] == retrieval["samples"]["C"]["n_spots"] == 32
    card = (run / "clip" / "README.md").read_text()
    assert "64 spots of 2 samples: A, B" in card and "among 32 validation spots of C" in card and str(samples) not in card
    assert retrieval["gene_to_image_r10"] == retrieval["joint"]["gene_to_image"]["r10"]


def test_the_weights_are_those_of_the_best_validation_loss(run):
    metrics = pd.read_csv(run / "csv" / "metrics.csv").dropna(subset="val/loss")
    best = metrics.loc[metrics["val/loss"].idxmin()]
    chosen = CLIP.from_pretrained(run / "clip").training_record["chosen"]
    assert chosen == f"best val/loss at step {int(best['step']) + 1}"


def test_checkpoints_hold_no_frozen_tower_and_convert_to_one_plain_file(run, tmp_path):
    ckpt = run / "checkpoints" / "last.ckpt"
    assert not any("image_encoder" in name for name in read_plain_file(ckpt)["state_dict"])
    model = CLIP.from_pretrained(CLIP.convert_ckpt_to_dict(ckpt, None, tmp_path / "mymodel.pt"))
    assert model.gene_names == GENES and model.training_record["samples"] == ["A", "B"]


def test_genes_that_are_the_colour_find_their_patch(samples):
    run = train(config(run_dir="learns", trainer={"max_epochs": 60, "val_every_steps": 60, "select": "last"},
                       image={"cache_features": 2}), samples)
    metrics = json.loads((run / "retrieval.json").read_text())
    assert metrics["gene_to_image_r10"] > 0.55 and metrics["image_to_gene_r10"] > 0.55   # chance 0.31


@pytest.mark.parametrize("cached", [0, 3])
def test_a_run_resumed_in_the_middle_of_an_epoch_equals_one_that_never_stopped(samples, tmp_path, cached):
    options = {"image": {"cache_features": cached}, "trainer": {"max_epochs": 3, "select": "last"}, "optimizer": {"schedule": "one_cycle"}}
    straight = train(config(run_dir=str(tmp_path / "straight"), **options), samples)
    middle = next((straight / "checkpoints").glob("step000003*.ckpt"))
    assert read_plain_file(middle)["global_step"] == 3   # four steps an epoch
    resumed = train(config(run_dir=str(tmp_path / "resumed"), ckpt_path=str(middle), **options), samples)
    first, second = (CLIP.from_pretrained(folder / "clip").weights() for folder in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


GENE_SETS = "colour\tof the patch\tg0\tg1\tg2\nothers\t\tg4\tg7\tunheard of\n"
STRUCTURED = {"gene tokens": {"gene_encoder": "gene_tokens", "gene_tokens": 6, "gene_token_width": 8, "gene_token_heads": 2},
              "pathways": {"gene_encoder": "pathways", "pathways_file": "sets.gmt"}}


@pytest.mark.parametrize("name", STRUCTURED)
def test_an_encoder_with_structure_trains_resumes_and_embeds(samples, tmp_path, name, capsys):
    (samples / "sets.gmt").write_text(GENE_SETS)
    options = {"model": STRUCTURED[name], "trainer": {"select": "last"}, "image": {"cache_features": 2}}
    straight = train(config(run_dir=str(tmp_path / "straight"), **options), samples)
    middle = next((straight / "checkpoints").glob("step000003*.ckpt"))
    resumed = train(config(run_dir=str(tmp_path / "resumed"), ckpt_path=str(middle), **options), samples)
    first, second = (CLIP.from_pretrained(folder / "clip").weights() for folder in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    said = "sets.gmt: 2 of 2 gene sets with 5 of 12 genes; unknown genes left out: 1 (unheard of)"
    assert (said in capsys.readouterr().out) == (name == "pathways")
    (samples / "sets.gmt").write_text("")   # the weights do not need it
    done = embed("--network", straight / "clip", "--gex", samples / "C" / "gex_filt.h5ad", "--out-dir", tmp_path, "--null")
    assert done.exit_code == 0, done.output
    assert np.isfinite(np.load(tmp_path / "gene_clip_emb.npy")).all() and np.isfinite(np.load(tmp_path / "null_clip_emb.npy")).all()


def test_training_and_embedding_scale_a_sample_alike(samples, tmp_path):
    run = train(config(run_dir=str(tmp_path / "run"), model={"gene_sample_scaling": "standardise", "gene_scaling": "centre"}), samples)
    done = embed("--network", run / "clip", "--gex", samples / "C" / "gex_filt.h5ad", "--images", samples / "C" / "patches",
                 "--out-dir", tmp_path, "--null")
    assert done.exit_code == 0, done.output
    embedded, trained = (json.loads((folder / "retrieval.json").read_text())["joint"] for folder in (tmp_path, run))
    assert embedded == trained
    clip = CLIP.from_pretrained(run / "clip", image_encoder=False)
    assert np.allclose(np.load(tmp_path / "null_clip_emb.npy"), clip.encode_genes(torch.zeros(1, 12)).detach(), atol=1e-6)


@pytest.mark.parametrize("cached", [0, 8])
def test_training_and_embedding_centre_the_patches_of_a_sample_alike(samples, tmp_path, cached):
    run = train(config(run_dir=str(tmp_path / "run"), model={"feature_sample_scaling": "centre", "image_views": 8},
                       image={"cache_features": cached}), samples)
    done = embed("--network", run / "clip", "--gex", samples / "C" / "gex_filt.h5ad", "--images", samples / "C" / "patches",
                 "--out-dir", tmp_path)
    assert done.exit_code == 0, done.output
    trained, embedded = (json.loads((folder / "retrieval.json").read_text())["joint"] for folder in (run, tmp_path))
    assert embedded == trained
    together = np.load(tmp_path / "image_clip_emb.npy")
    done = embed("--network", run / "clip", "--images", samples / "C" / "patches", "--out-dir", tmp_path)   # patches alone: one sample
    assert done.exit_code == 0 and np.allclose(np.load(tmp_path / "image_clip_emb.npy"), together, atol=1e-5)


def test_a_large_sample_is_centred_on_some_of_its_patches_and_streamed(samples, tmp_path, monkeypatch):
    run = train(config(run_dir=str(tmp_path / "run"), model={"feature_sample_scaling": "centre"}), samples)
    monkeypatch.setattr("networks.sample_scaling.MEAN_PATCHES", 20)   # of 32
    done = embed("--network", run / "clip", "--images", samples / "C" / "patches", "--out-dir", tmp_path, "--batch-size", 7)
    assert done.exit_code == 0, done.output
    clip, folder = CLIP.from_pretrained(run / "clip"), read_patch_folder(samples / "C" / "patches")
    images = images_to_float(torch.stack([torch.from_numpy(read_patch(path)).permute(2, 0, 1) for path in folder.paths]))
    with torch.no_grad():
        centre = clip.image_features(images[patches_for_mean(np.zeros(32, int), 0)]).mean(0)
        expected = clip.encode_images(images, centre)
    assert np.allclose(np.load(tmp_path / "image_clip_emb.npy"), expected, atol=1e-5)
    assert not np.allclose(expected, clip.encode_images(images, clip.image_features(images).mean(0)).detach(), atol=1e-5)


@pytest.fixture
def broken_loss(monkeypatch):
    """Make the training loss of chosen steps infinite or not a number."""
    def break_at(steps: dict[int, float]) -> None:
        sound = ClipModule.training_step
        monkeypatch.setattr(ClipModule, "training_step", lambda self, batch, place:
                            sound(self, batch, place) * steps.get(self.global_step, 1.0))
    return break_at


def state_at(run, step):
    return read_plain_file(next((run / "checkpoints").glob(f"step{step:06d}*.ckpt")))


def test_a_step_without_a_finite_loss_changes_nothing_and_is_counted(samples, tmp_path, broken_loss, capsys, monkeypatch):
    broken_loss({2: math.nan, 5: math.inf})
    stood = {}

    def look(module, batch, place):
        weights = [parameter.detach().clone() for parameter in module.clip.parameters() if parameter.requires_grad]
        averages = [state["exp_avg"].clone() for state in module.trainer.optimizers[0].state.values()]
        stood[module.global_step] = weights, averages
        torch.manual_seed(module.seed * 1_000_003 + module.global_step * 1009)
    monkeypatch.setattr(ClipModule, "on_train_batch_start", look)
    trainer = {"val_every_steps": 1, "save_top": 20, "log_every_steps": 1}
    run = train(config(run_dir=str(tmp_path / "run"), logger="csv", trainer=trainer), samples)
    same = {step: [all(map(torch.equal, *pair)) for pair in zip(stood[step], stood[step + 1], strict=True)] for step in range(1, 7)}
    assert same == {1: [False] * 2, 2: [True] * 2, 3: [False] * 2, 4: [False] * 2, 5: [True] * 2, 6: [False] * 2}
    kept = sorted(path.name for path in (run / "checkpoints").glob("step*.ckpt"))
    assert kept == [f"step{step:06d}.ckpt" for step in (1, 2, 4, 5, 7, 8)], "none after a skipped step"
    assert pd.read_csv(run / "csv" / "metrics.csv")["train/skipped_steps"].max() == 2
    said = capsys.readouterr().out
    assert "step      2   gradient not finite: step skipped, 1 in all" in said and "step skipped, 2 in all" in said


def test_a_loss_that_stays_broken_ends_the_run_and_the_last_good_checkpoint_stays(samples, tmp_path, broken_loss, monkeypatch):
    monkeypatch.setattr("training.clip_module.MAX_SKIPPED_IN_A_ROW", 3)
    broken_loss(dict.fromkeys(range(4, 100), math.nan))
    with pytest.raises(InputError, match="gradient at step 6: expected finite numbers; found none for 3 steps") as error:
        train(config(run_dir=str(tmp_path / "run"), trainer={"val_every_steps": 1}), samples)
    assert error.value.exit_code == 1 and not (tmp_path / "run" / "clip").exists()
    kept = read_plain_file(tmp_path / "run" / "checkpoints" / "last.ckpt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    assert all(torch.equal(kept[name], tensor) for name, tensor in state_at(tmp_path / "run", 4)["state_dict"].items())
    assert len(list((tmp_path / "run" / "checkpoints").glob("step*.ckpt"))) == 4, "none since the first skipped step"


@pytest.mark.parametrize("val", ["C", None])
def test_a_checkpoint_due_while_steps_are_skipped_is_written_after_the_next_good_one(samples, tmp_path, broken_loss, monkeypatch, val):
    broken_loss({2: math.nan, 3: math.nan})                   # the last two of the first epoch, where one is due
    written, sound = [], SummedCheckpoints.save_checkpoint

    def look(self, checkpoint, path, **more):
        written.append((checkpoint["global_step"], os.path.basename(path)))
        return sound(self, checkpoint, path, **more)
    monkeypatch.setattr(SummedCheckpoints, "save_checkpoint", look)
    train(config(val=val, run_dir=str(tmp_path / "run"), trainer={"val_every_steps": 4}, data={"val_fraction": 0.0}), samples)
    assert written == [(5, "last.ckpt"), (8, "step000008.ckpt"), (8, "last.ckpt")]


def test_a_signal_while_steps_are_skipped_leaves_the_checkpoint_before_them(samples, tmp_path, broken_loss, monkeypatch):
    broken_loss({4: math.nan, 5: math.nan})
    sound = ClipModule.training_step
    monkeypatch.setattr(ClipModule, "training_step", lambda self, batch, place:
                        (self.global_step == 5 and os.kill(os.getpid(), signal.SIGTERM)) or sound(self, batch, place))
    with pytest.raises(Stopped, match="143") as error:
        train(config(run_dir=str(tmp_path / "run"), trainer={"val_every_steps": 1}), samples)
    assert "after step 6, which was skipped: the checkpoint before stays; go on with ckpt_path=auto" in error.value.message
    assert read_plain_file(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 4


def test_a_clip_run_that_ends_while_steps_are_skipped_diverged_and_has_no_weights(samples, tmp_path, broken_loss):
    broken_loss({6: math.nan, 7: math.nan})                   # of eight
    with pytest.raises(DivergedError, match="found none for 2 steps, no checkpoint was written since") as error:
        train(config(run_dir=str(tmp_path / "run"), trainer={"val_every_steps": 1}), samples)
    assert error.value.exit_code == 1 and not (tmp_path / "run" / "clip").exists()
    assert read_plain_file(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 6


@pytest.mark.parametrize("val", ["C", None])
def test_one_skipped_step_at_the_end_is_no_divergence(samples, tmp_path, broken_loss, val):
    broken_loss({7: math.nan})
    run = train(config(val=val, run_dir=str(tmp_path / "run"), data={"val_fraction": 0.0}), samples)
    assert (run / "clip").is_dir() and read_plain_file(run / "checkpoints" / "last.ckpt")["global_step"] == 8


@pytest.mark.parametrize("step, kept", [(5, 5), (7, 7)], ids=["at a checkpoint", "at the end"])
def test_clip_weights_that_are_not_finite_are_never_saved(samples, tmp_path, monkeypatch, step, kept):
    sound = ClipModule.on_before_optimizer_step

    def ruined(self, optimizer):
        sound(self, optimizer)
        if self.global_step == step:
            next(parameter for parameter in self.clip.parameters() if parameter.grad is not None).data.view(-1)[0] = math.inf
    monkeypatch.setattr(ClipModule, "on_before_optimizer_step", ruined)
    monkeypatch.setattr(ClipModule, "on_validation_epoch_end",          # as if every checkpoint were better than those before
                        lambda self: self._val_embeds.clear() or self.log("val/loss", -float(self.global_step)))
    with pytest.raises(DivergedError, match="weights: expected finite numbers; found NaN or infinite ones, not saved") as error:
        train(config(run_dir=str(tmp_path / "run"), trainer={"val_every_steps": 1}), samples)
    assert error.value.exit_code == 1 and not (tmp_path / "run" / "clip").exists()
    assert read_plain_file(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == kept


def test_a_last_step_that_ruins_the_weights_leaves_no_weights_folder(samples, tmp_path, monkeypatch):
    def ruined(self):
        next(self.clip.gene_encoder.parameters()).data.view(-1)[0] = math.nan
    monkeypatch.setattr(ClipModule, "on_train_end", ruined)   # after the last checkpoint
    with pytest.raises(DivergedError, match="not saved"):
        train(config(run_dir=str(tmp_path / "run"), trainer={"select": "last"}), samples)
    assert not (tmp_path / "run" / "clip").exists()


@pytest.mark.parametrize("optimizer", [{"lr": math.inf}, {"lr": math.nan}, {"lr": 1e30}, {"weight_decay": math.nan},
                                       {"weight_decay": -1.0}, {"weight_decay": 1e300}], ids=str)
def test_rates_without_sense_are_refused(samples, tmp_path, optimizer):
    with pytest.raises(OptionError, match=f"optimizer.{next(iter(optimizer))}: expected"):
        train(config(run_dir=str(tmp_path / "run"), optimizer=optimizer), samples)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("schedule", ["constant", "one_cycle"])
def test_rates_given_anew_hold_from_where_a_run_goes_on(samples, tmp_path, monkeypatch, capsys, schedule):
    used = []
    sound = ClipModule.on_before_optimizer_step

    def look(self, optimizer):
        sound(self, optimizer)
        used.append((self.global_step, [group["lr"] for group in optimizer.param_groups], optimizer.param_groups[0]["weight_decay"]))
    monkeypatch.setattr(ClipModule, "on_before_optimizer_step", look)
    options = {"optimizer": {"schedule": schedule, "lr": 1e-2}, "model": {"learn_temperature": True}, "trainer": {"select": "last"}}
    run = train(config(run_dir=str(tmp_path / "run"), **options), samples)
    middle, whole = next((run / "checkpoints").glob("step000003*.ckpt")), used.copy()
    used.clear()
    lower = {**options, "optimizer": {"schedule": schedule, "lr": 1e-4, "weight_decay": 0.5}}
    again = train(config(run_dir=str(tmp_path / "again"), ckpt_path=str(middle), **lower), samples)
    assert [step for step, _, _ in used] == [3, 4, 5, 6, 7] and {decay for _, _, decay in used} == {0.5}
    for (_, rates, _), (_, before, _) in zip(used, whole[3:], strict=True):
        assert rates == pytest.approx([rate / 100 for rate in before], rel=1e-9)
    said = capsys.readouterr().out
    assert said.count("from here on optimizer.lr is 0.0001; it was 0.01") == 1
    assert said.count("from here on optimizer.weight_decay is 0.5; it was 0.01") == 1
    train(config(run_dir=str(again), ckpt_path="last", **{**lower, "trainer": {"select": "last"}}), samples)
    assert "from here on" not in capsys.readouterr().out, "the checkpoint holds them now"


def test_without_a_validation_sample_a_spatial_block_is_held_out_and_saved(samples, tmp_path):
    run = train(config(val=None, data={"val_fraction": 0.2, "val_buffer_px": 120.0}, run_dir=str(tmp_path / "run")), samples)
    split = json.loads((run / "split.json").read_text())
    assert not set(split["train"]) & set(split["val"]) and {name.split("__")[0] for name in split["val"]} == {"A", "B"}
    assert len(split["train"]) + len(split["val"]) < 64   # the buffer belongs to neither


def test_another_model_cannot_continue_a_checkpoint(run, samples, tmp_path):
    with pytest.raises(WeightsError, match="another model"):
        train(config(run_dir=str(tmp_path / "x"), ckpt_path=str(run / "checkpoints" / "last.ckpt"), model={"projection": 9}), samples)


@pytest.mark.parametrize("options, error, said", [
    ({"trainer": {"batch_size": 65}}, OptionError, "trainer.batch_size: expected at most the 64 training spots"),
    ({"data": {"train_gex": None}}, OptionError, "data.train_gex and data.train_image_dir"),
    ({"data": {"train_gex": "A/gex_filt.h5ad", "train_image_dir": "A/patches"}, "trainer": {"batch_mmd": 1.0}}, OptionError,
     "trainer.batch_mmd: expected several training samples.*found A"),
    ({"data": {"val_gex": None}}, OptionError, "both data.val_gex and data.val_image_dir"),
    ({"data": {"train_gex": "A/gex_filt.h5ad"}}, OptionError, "two comma-separated lists of equal length"),
    ({"data": {"train_gex": "A/gex_filt.h5ad,no/gex_filt.h5ad"}}, InputError, "nothing there"),
    ({"model": {"image_encoder": "uni"}}, InputError, "MahmoodLab/UNI"),
    ({"ckpt_path": "absent.ckpt"}, InputError, "a file to resume from"),
], ids=["N < batch", "no data", "one sample", "half a validation sample", "unequal lists", "missing file", "gated weights",
        "no checkpoint"])
def test_what_cannot_be_trained_on_is_refused_before_training(samples, tmp_path, monkeypatch, options, error, said):
    monkeypatch.delenv("UNI_STATE_DICT_PATH", raising=False)
    with pytest.raises(error, match=said):
        train(config(run_dir=str(tmp_path / "run"), **options), samples)
    assert not (tmp_path / "run" / "clip").exists()


@pytest.mark.parametrize(("options", "said"), [
    *(({"data": {"target_sum": value}}, "data.target_sum: expected median or a number above 0") for value in ("nan", "inf", 0, -1)),
    ({"data": {"val_buffer_px": -5}}, "data.val_buffer_px: expected 0 or more"),
    ({"seed": -1}, "seed: expected 0 to 4294967295"), ({"seed": 99999999999}, "seed: expected 0 to 4294967295"),
    ({"trainer": {"num_threads": -1}}, "trainer.num_threads: expected 1 to"),
    ({"trainer": {"accelerator": "tpu"}}, "trainer.accelerator: expected one of auto, cpu, gpu, cuda"),
    ({"trainer": {"precision": "64"}}, "trainer.precision: expected one of"),
    ({"trainer": {"timeout_minutes": float("inf")}}, "trainer.timeout_minutes: expected above 0"),
    ({"trainer": {"max_epochs": 10 ** 20}}, "trainer.max_epochs: expected at most 2,147,483,647"),
], ids=str)
def test_a_number_without_sense_in_the_configuration_is_refused_by_its_key(options, said):
    with pytest.raises(OptionError, match=said):
        clip_config(options)


@pytest.mark.parametrize("n_spots", [1])
def test_one_spot_is_not_enough(tmp_path, n_spots):
    write_sample(tmp_path, "A", n_spots, 0)
    with pytest.raises(OptionError, match="at most the 1 training spots"):
        train(config("A", val=None, data={"val_fraction": 0.0}, run_dir="run"), tmp_path)


def test_a_validation_sample_of_one_spot_is_refused(samples, tmp_path):
    one = write_sample(tmp_path, "D", 1, 5)
    with pytest.raises(InputError, match="validation: spots: expected at least 2; found 1"):
        val = {"val_gex": str(tmp_path / one["gex"]), "val_image_dir": str(tmp_path / one["images"])}
        train(config(run_dir=str(tmp_path / "run"), data=val), samples)


def test_bare_paths_and_comma_lists_are_quoted_for_hydra():
    assert quote_paths(["data.cache_dir=my disk"]) == ['data.cache_dir="my disk"']
    assert quote_paths(["data.train_gex=a,b", "++data.val_gex=c d", "optimizer.lr=1,2", "data.train_gex=[a,b]", 'data.samples="x"']) == [
        'data.train_gex="a,b"', '++data.val_gex="c d"', "optimizer.lr=1,2", "data.train_gex=[a,b]", 'data.samples="x"']


def hydra(samples, *arguments):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "WANDB_MODE": "online"}
    command = [sys.executable, str(ROOT / "train_clip.py"), *arguments]
    return subprocess.run(command, cwd=samples, env=environment, capture_output=True, text=True)


def test_the_command_line_of_the_readme_runs_offline(samples):
    result = hydra(samples, "--config-name", "clip_small", "++data.train_gex=A/gex_filt.h5ad,B/gex_filt.h5ad",
                   "data.train_image_dir=A/patches,B/patches", "data.val_gex=C/gex_filt.h5ad", "data.val_image_dir=C/patches",
                   "model.image_encoder=random_tiny", "trainer.max_epochs=2", "trainer.batch_size=16", "trainer.progress_bar=false",
                   "out_dir=my runs")
    assert result.returncode == 0, result.stderr
    assert (samples / "my runs" / "00000-clip" / "clip" / "model.safetensors").is_file()
    assert "A, B: 64 training spots, 32 validation spots, 12 genes" in result.stdout and "wrote " in result.stdout.splitlines()[-1]
    assert not (samples / "wandb").exists() and not (samples / "outputs").exists()


@pytest.mark.parametrize("arguments, code, said", [
    (["modle.dropout=0.1"], 2, "modle"), (["data.train_gex=no.h5ad", "data.train_image_dir=no"], 3, "no")])
def test_a_wrong_command_line_is_one_line_and_its_exit_code(samples, arguments, code, said):
    result = hydra(samples, "--config-name", "clip_small", *arguments)
    assert result.returncode == code, result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "Traceback" not in result.stderr
    debug = hydra(samples, "--config-name", "clip_small", "--debug", *arguments)
    assert debug.returncode == code and debug.stderr.count("\nerror: ") == 1, debug.stderr
    assert "Traceback (most recent call last):\n" in debug.stderr and debug.stderr.endswith(f"\n{errors[0]}\n")


@pytest.mark.parametrize("argument", ["=3", "hydra=3", "hydra/launcher=3", "@=3", "hydra/job_logging=[1]", "+hydra.callbacks.x=1",
                                      "hydra.run.dir=there", "~hydra.verbose", "data=[1",
                                      "--config-name=nowhere"])
def test_whatever_hydra_does_not_understand_is_a_usage_error(argument):
    result = CliRunner().invoke(train_clip.main, [argument])
    errors = result.stderr.splitlines()
    assert result.exit_code == 2 and errors[0].startswith("error: command line: ") and len(errors) == 1, errors


@pytest.mark.parametrize("arguments", [["--multirun"], ["--cfg", "hydra"], ["--config-dir", "nowhere"]])
def test_what_click_does_not_know_is_a_usage_error(arguments):
    assert CliRunner().invoke(train_clip.main, arguments).exit_code == 2


def test_an_error_in_the_task_is_no_usage_error(monkeypatch):
    def broken(*_):
        raise ValueError("a fault of ours")

    monkeypatch.setattr(train_clip, "train", broken)
    result = CliRunner().invoke(train_clip.main, ["--config-name", "clip_small"])
    assert str(result.exception) == "a fault of ours"


def test_what_our_own_modules_warn_of_is_said_in_training(caplog, monkeypatch):
    log = logging.getLogger("training.run_folder")         # made before the command begins
    monkeypatch.setattr(train_clip, "train", lambda *_: log.warning("an unreadable line is dropped"))
    assert CliRunner().invoke(train_clip.main, ["--config-name", "clip_small"]).exit_code == 0
    assert "an unreadable line is dropped" in caplog.text


@pytest.mark.parametrize("name", ["mine", "mine.yaml", "mine.v2"])
def test_a_configuration_of_ones_own_builds_on_those_that_are_shipped(tmp_path, name):
    folder = tmp_path / "my, 'own' configs"
    folder.mkdir()
    (folder / f"{name.removesuffix('.yaml')}.yaml").write_text("defaults: [clip_small, _self_]\nseed: 5\n")
    result = CliRunner().invoke(train_clip.main, ["--config-dir", folder, "--config-name", name, "--cfg", "job", "optimizer.lr=0.5"])
    shown = yaml.safe_load(result.stdout)
    assert (shown["seed"], shown["optimizer"]["lr"], shown["model"]["gene_components"]) == (5, 0.5, 50) and "hydra" not in shown


def test_help_shows_the_manual_without_loading_torch(samples):
    result = hydra(samples, "--help")
    assert result.returncode == 0 and "--config-name clip_small" in result.stdout and "ckpt_path=last" in result.stdout


def embed(*arguments):
    return CliRunner().invoke(clip_embeddings, [str(argument) for argument in arguments])


def test_embeddings_are_unit_rows_in_h5ad_order(run, samples, tmp_path):
    gex = tmp_path / "gex_filt.h5ad"
    adata = ad.read_h5ad(samples / "C" / "gex_filt.h5ad")[::-1].copy()   # re-sorted
    adata.write_h5ad(gex)
    result = embed("--network", run / "clip", "--gex", gex, "--images", samples / "C" / "patches", "--out-dir", tmp_path, "--null",
                   "--add-to-h5ad", "--batch-size", 5, "--device", "cpu")
    assert result.exit_code == 0, result.output
    genes, images = np.load(tmp_path / "gene_clip_emb.npy"), np.load(tmp_path / "image_clip_emb.npy")
    assert genes.dtype == np.float32 and np.allclose(np.linalg.norm(genes, axis=1), 1, atol=1e-5)
    assert np.load(tmp_path / "null_clip_emb.npy").shape == (1, 8)
    found = json.loads((tmp_path / "retrieval.json").read_text())
    assert found["joint"]["gene_to_image"] == found["samples"]["C"]["gene_to_image"] == retrieval_metrics(genes, images)
    assert f"gene to image R@10 {found['joint']['gene_to_image']['r10']:.3f}" in result.output and "retrieval.json" in result.output
    straight = tmp_path / "straight"
    assert embed("--network", run / "clip", "--gex", samples / "C" / "gex_filt.h5ad", "--out-dir", straight).exit_code == 0
    assert not (straight / "retrieval.json").exists()
    assert np.allclose(np.load(straight / "gene_clip_emb.npy"), genes[::-1], atol=1e-5) and not (straight / "image_clip_emb.npy").exists()
    alone = tmp_path / "alone"
    assert embed("--network", run / "clip", "--images", samples / "C" / "patches", "--out-dir", alone).exit_code == 0
    assert np.allclose(np.load(alone / "image_clip_emb.npy"), images[::-1], atol=1e-5)
    written = ad.read_h5ad(gex)
    assert np.array_equal(written.obsm["X_clip_gene"], genes) and np.array_equal(written.obsm["X_clip_image"], images)
    assert (written.X != adata.X).nnz == 0


def test_expression_with_other_genes_is_refused_with_exit_5(run, tmp_path):
    write_sample(tmp_path, "E", 4, 0, genes=["x", *GENES[1:]])
    result = embed("--network", run / "clip", "--gex", tmp_path / "E" / "gex_filt.h5ad", "--out-dir", tmp_path / "out")
    assert result.exit_code == 5 and "first difference at gene 1: g0 expected, x found" in result.output
    assert not (tmp_path / "out" / "gene_clip_emb.npy").exists()


def test_nothing_to_embed_is_a_usage_error(run):
    result = embed("--network", run / "clip")
    assert result.exit_code == 2 and "--gex / --images / --null" in result.output
