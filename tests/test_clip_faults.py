"""train_clip.py under faults: nothing runs from a config file, checkpoints change nothing, no secret reaches an output, offline runs."""
import os
import sys
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

import pytest
import torch
from clip_runs import config, finish, start, write_sample, write_samples

from networks.weights import load_weights_folder
from preprocessing.errors import InputError
from train_clip import train

SECRETS = {"HF_TOKEN": "hf_canary0123456789", "WANDB_API_KEY": "canary9876543210", "HUGGING_FACE_HUB_TOKEN": "hf_canary0123456789"}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples"))


CALLBACK = "defaults: [clip_config, _self_]\nhydra:\n  callbacks:\n    evil: {_target_: os.mkdir, path: canary}\nnonsense: 1\n"
HANDLER = ("defaults: [clip_config, _self_]\nhydra:\n  job_logging:\n    version: 1\n    handlers:\n"
           "      evil: {'()': os.mkdir, path: canary}\n    root: {handlers: [evil]}\nnonsense: 1\n")


@pytest.mark.parametrize("text", [
    "seed: !!python/object/apply:os.mkdir [canary]\n", "model:\n  _target_: os.mkdir\n  path: canary\n", "seed: [1\n", CALLBACK, HANDLER,
    HANDLER.replace("job_logging", "hydra_logging")],
    ids=["python tag", "_target_", "no YAML", "callback", "log handler", "Hydra's log handler"])
def test_a_config_file_runs_nothing_and_is_refused_in_one_line(samples, tmp_path, text):
    (tmp_path / "evil.yaml").write_text(text)
    before = sorted(samples.iterdir())
    process = start(samples, f"run_dir={tmp_path / 'run'}", "--config-dir", str(tmp_path), "--config-name", "evil")
    out, err = finish(process)
    assert process.returncode == 2 and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    assert sorted(samples.iterdir()) == before and not (tmp_path / "run").exists()


def test_weights_do_not_depend_on_how_often_checkpoints_are_saved(samples, tmp_path):
    runs = {}
    for name, trainer in (("every step", {"val_every_steps": 1, "save_top": 20}), ("never", {"val_every_steps": 1000, "save_top": 0})):
        run = train(config(run_dir=str(tmp_path / name), trainer={**trainer, "select": "last", "max_epochs": 3}), samples)
        runs[name] = (load_weights_folder(run / "clip")[0], len(list((run / "checkpoints").glob("step*.ckpt"))))
    (first, saved), (second, few) = runs.values()
    assert saved == 12 and few < 12
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_an_offline_run_without_logins_works_and_no_secret_reaches_an_output(samples, tmp_path):
    process = start(samples, f"run_dir={tmp_path / 'run'}", HF_HUB_OFFLINE="1", WANDB_MODE="online", **SECRETS)
    told = "".join(finish(process))
    assert process.returncode == 0, told
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 6
    for secret in SECRETS.values():
        assert secret not in told and not any(secret.encode() in path.read_bytes() for path in written)


def test_a_clip_run_goes_on_where_weights_and_biases_has_no_login(samples, tmp_path, monkeypatch, caplog):
    service = MagicMock(__spec__=ModuleSpec("wandb", None), run=None)
    service.init.side_effect = RuntimeError("api_key not configured (no-tty)\ncall wandb.login")
    for name in ("wandb", "wandb.sdk", "wandb.sdk.lib", "wandb.wandb_run"):
        monkeypatch.setitem(sys.modules, name, service)
    monkeypatch.setattr("pytorch_lightning.loggers.wandb._WANDB_AVAILABLE", True)
    run = train(config(run_dir=str(tmp_path / "run"), logger="csv,wandb", trainer={"max_epochs": 1}), samples)
    assert "logger=wandb: going on without it: api_key not configured (no-tty) call wandb.login" in caplog.text
    assert (run / "csv" / "metrics.csv").is_file() and (run / "clip" / "model.safetensors").is_file()


def test_a_secret_given_as_an_option_is_refused_without_being_repeated(samples, tmp_path):
    process = start(samples, f"run_dir={tmp_path / 'run'}", "+token=hf_canary0123456789")
    told = "".join(finish(process))
    assert process.returncode == 2 and "token" in told and "hf_canary0123456789" not in told, told
    assert not (tmp_path / "run").exists()


def test_a_config_file_takes_no_secret_from_the_environment(samples, tmp_path):
    (tmp_path / "curious.yaml").write_text("defaults: [clip_config, _self_]\nout_dir: ${oc.env:HF_TOKEN}\n")
    process = start(samples, f"run_dir={tmp_path / 'run'}", "--config-dir", str(tmp_path), "--config-name", "curious", **SECRETS)
    told = "".join(finish(process))
    assert process.returncode == 2 and "error: out_dir: " in told and "hf_canary0123456789" not in told, told
    assert not (tmp_path / "run").exists()


def test_gated_weights_without_a_login_say_in_one_line_how_to_get_them(samples, tmp_path):
    environment = {name: "" for name in (*SECRETS, "UNI_STATE_DICT_PATH")}
    process = start(samples, f"run_dir={tmp_path / 'run'}", "model.image_encoder=uni", HF_HOME=str(tmp_path / "home"), **environment)
    out, err = finish(process)
    assert process.returncode == 3 and len(err.strip().splitlines()) == 1
    assert "https://huggingface.co/MahmoodLab/UNI (gated: ask for access there" in err and "UNI_STATE_DICT_PATH" in err
    assert not (tmp_path / "run").exists() and os.listdir(tmp_path) == []


def test_a_validation_file_without_rows_is_refused_before_training(samples, tmp_path):
    write_sample(tmp_path, "empty", 0, seed=9)
    files = {"val_gex": str(tmp_path / "empty" / "gex_filt.h5ad"), "val_image_dir": str(tmp_path / "empty" / "patches")}
    with pytest.raises(InputError, match="empty"):
        train(config(run_dir=str(tmp_path / "run"), data=files), samples)
    assert not (tmp_path / "run").exists()
