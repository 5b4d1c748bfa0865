"""A CLIP run that is stopped keeps its steps; a checkpoint that is not what was written is not resumed."""
import os
import random
import re
import shutil
import signal
import time

import pytest
import torch
from clip_runs import ROOT, config, finish, start, write_samples
from omegaconf import OmegaConf
from processes import press_twice

from networks.clip import CLIP
from networks.weights import read_plain_file
from preprocessing.done_manifests import file_sha256
from preprocessing.errors import OptionError, WeightsError
from preprocessing.outputs import only_writer
from train_clip import train
from training.clip_checkpoints import Stopped, SummedCheckpoints, require_checkpoint
from training.clip_module import ClipModule

RUN = {"trainer": {"max_epochs": 3, "select": "last"}, "optimizer": {"schedule": "one_cycle"}}   # four steps an epoch


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def straight(samples):
    return train(config(run_dir="straight", **RUN), samples)


def send_at(monkeypatch, step, *numbers):
    sound = ClipModule.training_step

    def training_step(self, batch, place):
        if self.global_step == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return sound(self, batch, place)
    monkeypatch.setattr(ClipModule, "training_step", training_step)


@pytest.mark.parametrize("step", [0, 4, 7, 11], ids=["first step", "middle of an epoch", "last step of an epoch", "last step of the run"])
@pytest.mark.parametrize("number, code, val", [(signal.SIGTERM, 143, "C"), (signal.SIGINT, 130, None)],
                         ids=["SIGTERM", "Ctrl-C, without validation"])
def test_a_signal_finishes_the_step_and_the_resumed_run_ends_bit_equal(samples, straight, tmp_path, monkeypatch, step, number, code, val):
    options = dict(RUN) if val else {**RUN, "data": {"val_fraction": 0.0}}
    if not val:
        straight = train(config(val=None, run_dir=str(tmp_path / "straight"), **options), samples)
    stopped, before = config(val=val, run_dir=str(tmp_path / "run"), **options), signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        send_at(patch, step, number)
        with pytest.raises(Stopped, match=str(code)) as error:
            train(stopped, samples)
    assert f"after step {step + 1}; go on with ckpt_path=last run_dir={tmp_path / 'run'}" in error.value.message
    assert read_plain_file(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == step + 1
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "run" / "clip").exists()
    resumed = train(config(val=val, run_dir=str(tmp_path / "run"), ckpt_path="last", **options), samples)
    first, second = (CLIP.from_pretrained(folder / "clip").weights() for folder in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("cached", [0, 2])
def test_a_run_stopped_at_a_random_step_ends_bit_equal_with_and_without_cached_features(samples, tmp_path, monkeypatch, cached):
    step = random.SystemRandom().randrange(12)   # of twelve; a failing one is in the message
    options = {**RUN, "image": {"cache_features": cached}, "model": {"feature_sample_scaling": "centre"}}
    whole = train(config(run_dir=str(tmp_path / "whole"), **options), samples)
    with monkeypatch.context() as patch:
        send_at(patch, step, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config(run_dir=str(tmp_path / "run"), **options), samples)
    resumed = train(config(run_dir=str(tmp_path / "run"), ckpt_path="last", **options), samples)
    first, second = (CLIP.from_pretrained(folder / "clip").weights() for folder in (whole, resumed))
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"stopped after step {step + 1}"


def test_a_run_stopped_between_two_validations_validates_at_the_steps_of_one_never_stopped(samples, tmp_path, monkeypatch):
    options = {**RUN, "trainer": {**RUN["trainer"], "val_every_steps": 2, "save_top": 9}}
    whole = train(config(run_dir=str(tmp_path / "whole"), **options), samples)
    for number, step in enumerate((0, 2)):                   # of the call, the second goes on after the first step
        with monkeypatch.context() as patch:
            send_at(patch, step, signal.SIGTERM)
            with pytest.raises(Stopped):
                train(config(run_dir=str(tmp_path / "run"), **({"ckpt_path": "last"} if number else {}), **options), samples)
    resumed = train(config(run_dir=str(tmp_path / "run"), ckpt_path="last", **options), samples)
    kept = [sorted(path.name for path in (folder / "checkpoints").glob("step*.ckpt")) for folder in (whole, resumed)]
    assert kept[0] == kept[1] == [f"step{step:06d}.ckpt" for step in (2, 4, 6, 8, 10, 12)]


def test_a_batch_system_that_signals_twice_still_gets_its_checkpoint(samples, tmp_path, monkeypatch):
    send_at(monkeypatch, 0, signal.SIGTERM, signal.SIGTERM)
    with pytest.raises(Stopped, match="143"):
        train(config(run_dir=str(tmp_path / "run"), **RUN), samples)
    assert read_plain_file(tmp_path / "run" / "checkpoints" / "last.ckpt")["global_step"] == 1


SLOW = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import train_clip
from processes import slow_places
from training.clip_module import ClipModule
ClipModule.training_step = slow_places(ClipModule.training_step, {where!r}, after=4)
train_clip.main()
"""


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C")
@pytest.mark.parametrize("where", ["step", "save"])
def test_a_second_ctrl_c_kills_a_clip_run_and_the_same_command_goes_on_from_the_checkpoint_before(samples, tmp_path, where):
    script, last = tmp_path / "slow.py", tmp_path / "run" / "checkpoints" / "last.ckpt"
    script.write_text(SLOW.format(root=str(ROOT), where=where))
    command = [samples, f"run_dir={tmp_path / 'run'}", "ckpt_path=auto"]
    code, errors = press_twice(start(*command, script=script), where)
    assert code == -signal.SIGINT and errors == ""
    assert read_plain_file(require_checkpoint(last).path)["global_step"] == 3
    process = start(*command)
    _, errors = finish(process)
    assert process.returncode == 0 and (tmp_path / "run" / "clip").is_dir(), errors
    assert read_plain_file(last)["global_step"] == 6 and not list((tmp_path / "run").rglob("*.tmp.*"))


SIGNALLED = """
import sys, time
sys.path.insert(0, {root!r})
import train_clip

def interrupted(*_):
    try:
        print("begins", flush=True)
        time.sleep(600)
    finally:
        print("cleaning up", flush=True)
        time.sleep(600)

train_clip.train = interrupted
train_clip.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_outside_of_training_ends_the_cleaning_up_at_once(samples, tmp_path, number):
    script = tmp_path / "waits.py"
    script.write_text(SIGNALLED.format(root=str(ROOT)))
    process = start(samples, script=script)
    for said in ("begins", "cleaning up"):
        assert process.stdout.readline() == f"{said}\n"
        process.send_signal(number)
    _, errors = finish(process)
    assert process.returncode == -number and errors.count("\n") == 1 and "outside training" in errors


def test_sigterm_to_the_command_is_exit_143_and_one_line(samples):
    process = start(samples, "run_dir=killed", "trainer.max_epochs=100000")
    while not (samples / "killed" / "checkpoints" / "last.ckpt").is_file() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = finish(process)
    assert process.returncode == 143, err
    step = re.fullmatch(r"stopped by SIGTERM after step (\d+); go on with ckpt_path=last run_dir=\S+killed", err.strip())
    assert step, err
    assert read_plain_file(samples / "killed" / "checkpoints" / "last.ckpt")["global_step"] == int(step[1])
    assert not any(word in out + err for word in ("litlogger", "eval mode", "LeafSpec", "GPU available"))


def test_a_resumed_run_keeps_what_was_logged_before(samples, tmp_path):
    options = {**RUN, "logger": "csv"}
    run = train(config(run_dir=str(tmp_path / "run"), **options), samples)
    before = (run / "csv" / "metrics.csv").read_text()
    train(config(run_dir=str(run), ckpt_path=str(next((run / "checkpoints").glob("step000006*.ckpt"))), **options), samples)
    assert (run / "csv" / "metrics.csv").read_text() == before
    assert (run / "csv-2" / "metrics.csv").is_file()


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_every_checkpoint_has_its_sum_beside_it_and_none_is_left_over(straight):
    checkpoints = sorted((straight / "checkpoints").glob("*.ckpt"))
    assert sorted((straight / "checkpoints").iterdir()) == sorted([*checkpoints, *(p.with_name(f"{p.name}.sha256") for p in checkpoints)])
    assert all(p.with_name(f"{p.name}.sha256").read_text() == f"{file_sha256(p)}  {p.name}\n" for p in checkpoints)


def test_a_flipped_byte_is_refused_naming_the_newest_whole_checkpoint(samples, tmp_path):
    options = {**RUN, "trainer": {**RUN["trainer"], "val_every_steps": 2, "save_top": 10}}
    run = train(config(run_dir=str(tmp_path / "run"), **options), samples)
    checkpoints = run / "checkpoints"
    damage(checkpoints / "last.ckpt")
    damage(next(checkpoints.glob("step000012*.ckpt")))
    with pytest.raises(WeightsError, match=r"last.ckpt: .*the file is damaged.*ckpt_path=\S+step000010.ckpt") as error:
        train(config(run_dir=str(run), ckpt_path="last", **options), samples)
    assert error.value.exit_code == 5 and "\n" not in str(error.value)


def test_auto_begins_a_run_goes_on_with_it_and_skips_a_damaged_checkpoint_aloud(samples, straight, tmp_path, monkeypatch, capsys):
    same = config(run_dir=str(tmp_path / "run"), ckpt_path="auto", **RUN)
    with monkeypatch.context() as patch:
        send_at(patch, 7, signal.SIGTERM)
        with pytest.raises(Stopped):                       # there was nothing to go on from
            train(same, samples)
    damage(tmp_path / "run" / "checkpoints" / "last.ckpt")
    whole = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step*.ckpt"))
    (tmp_path / "run" / "checkpoints" / "last.ckpt.tmp.1").write_text("half")
    resumed = train(same, samples)
    assert "skipping a damaged checkpoint" in capsys.readouterr().out and whole
    first, second = (CLIP.from_pretrained(folder / "clip").weights() for folder in (straight, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not list(resumed.rglob("*.tmp.*"))


def test_a_run_folder_in_which_another_process_trains_is_refused_at_once(samples, tmp_path):
    with only_writer(tmp_path / "run"), pytest.raises(OSError, match="another process is at work in this folder"):
        train(config(run_dir=str(tmp_path / "run"), **RUN), samples)


def test_a_checkpoint_killed_between_its_two_files_is_still_whole(tmp_path, monkeypatch):
    path, sums = tmp_path / "last.ckpt", tmp_path / "last.ckpt.sha256"
    SummedCheckpoints().save_checkpoint({"step": 1}, path)
    before = path.read_bytes()
    written = []
    monkeypatch.setattr("training.clip_checkpoints._write_sums", lambda *told: written.append(told))
    SummedCheckpoints().save_checkpoint({"step": 2}, path)
    known = written[0][2]   # what stands in the sums while the new file takes the old one's place
    assert file_sha256(path) in known and sums.read_text().split()[0] in known and path.read_bytes() != before
    assert written[1][2] == [file_sha256(path)]


class Payload:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_a_pickle_as_checkpoint_is_refused_in_one_plain_line(samples, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Payload()}, tmp_path / "evil.ckpt")
    with pytest.raises(WeightsError, match="holds more than tensors") as error:
        train(config(run_dir=str(tmp_path / "run"), ckpt_path=str(tmp_path / "evil.ckpt"), **RUN), samples)
    assert error.value.exit_code == 5 and "\n" not in str(error.value) and not (tmp_path / "canary").exists()


@pytest.mark.parametrize("options, said", [
    ({"trainer": {"max_epochs": 5, "select": "last"}}, "one_cycle over 12 steps, as the checkpoint began; found one_cycle over 20"),
    ({"optimizer": {"schedule": "constant"}}, "found no one_cycle schedule"),
    ({"optimizer": {"schedule": "one_cycle", "name": "sgd"}}, "optimizer.name: expected adamw"),
], ids=["other max_epochs", "other schedule", "other optimiser"])
def test_a_run_that_cannot_go_on_as_it_began_says_so_in_one_line(samples, straight, tmp_path, options, said):
    with pytest.raises(OptionError, match=said) as error:
        ckpt = str(straight / "checkpoints" / "last.ckpt")
        train(config(run_dir=str(tmp_path / "run"), ckpt_path=ckpt, **{**RUN, **options}), samples)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("options, said", [
    ({"seed": 5}, "options: expected those it was started with; found seed 71 -> 5"),
    ({"trainer": {**RUN["trainer"], "batch_size": 17}}, "trainer.batch_size 16 -> 17"),       # as many steps an epoch
    ({"image": {"augment": {"hue": 0.05}}}, "image.augment.hue 0.0 -> 0.05"),
    ({"data": {"train_gex": "A/gex_filt.h5ad,B/shuffled.h5ad"}}, "data: expected the patches, expression and split .* found others"),
    ({"data": {"val_gex": "B/gex_filt.h5ad", "val_image_dir": "B/patches", "train_gex": "A/gex_filt.h5ad,C/gex_filt.h5ad",
               "train_image_dir": "A/patches,C/patches"}}, "data: expected the patches"),
], ids=["other seed", "other batches", "other colours", "other expression", "other split"])
def test_a_run_that_goes_on_as_another_is_refused_and_its_records_stay(samples, tmp_path, monkeypatch, options, said):
    import anndata as ad
    shuffled = ad.read_h5ad(samples / "B" / "gex_filt.h5ad")
    shuffled.X = shuffled.X[::-1]
    shuffled.write_h5ad(samples / "B" / "shuffled.h5ad")
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        send_at(patch, 5, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config(run_dir=str(run), ckpt_path="auto", **RUN), samples)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(WeightsError, match=f"last.ckpt: .*{said}") as error:
        train(OmegaConf.merge(config(run_dir=str(run), ckpt_path="auto", **RUN), options), samples)
    assert error.value.exit_code == 5 and "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("leaves_one", [False, True], ids=["moved", "copied, and the first goes on"])
def test_a_run_whose_folder_was_moved_ends_as_one_that_stayed(samples, tmp_path, monkeypatch, leaves_one):
    options = {**RUN, "optimizer": {"lr": 0.3}, "trainer": {"max_epochs": 3, "val_every_steps": 1, "save_top": 3, "select": "best"}}
    whole = train(config(run_dir=str(tmp_path / "whole"), **options), samples)
    with monkeypatch.context() as patch:
        send_at(patch, 8, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config(run_dir=str(tmp_path / "old"), **options), samples)
    if leaves_one:
        shutil.copytree(tmp_path / "old", tmp_path / "new")
        train(config(run_dir=str(tmp_path / "old"), ckpt_path="last", **options), samples)
        before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    else:
        (tmp_path / "old").rename(tmp_path / "new")
    for _ in range(2):                                     # the second time it is finished
        moved = train(config(run_dir=str(tmp_path / "new"), ckpt_path="last", **options), samples)
        first, second = (CLIP.from_pretrained(folder / "clip") for folder in (whole, moved))
        assert all(torch.equal(tensor, second.weights()[name]) for name, tensor in first.weights().items())
        assert first.training_record["chosen"] == second.training_record["chosen"]
        kept, found = ({path.name for path in (folder / "checkpoints").glob("*.ckpt")} for folder in (whole, moved))
        assert kept == found
    assert not leaves_one or {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()} == before


def test_the_checkpoint_a_run_went_on_from_goes_when_better_ones_take_its_place(samples, tmp_path, monkeypatch):
    options = {**RUN, "trainer": {**RUN["trainer"], "val_every_steps": 2, "save_top": 2}}
    whole = train(config(run_dir=str(tmp_path / "whole"), **options), samples)
    with monkeypatch.context() as patch:
        send_at(patch, 4, signal.SIGTERM)
        with pytest.raises(Stopped):
            train(config(run_dir=str(tmp_path / "run"), **options), samples)
    damage(tmp_path / "run" / "checkpoints" / "last.ckpt")
    gone_on_from = max((tmp_path / "run" / "checkpoints").glob("step*.ckpt"))
    train(config(run_dir=str(tmp_path / "run"), ckpt_path="auto", **options), samples)
    kept, found = ({path.name for path in (folder / "checkpoints").glob("*.ckpt")} for folder in (whole, tmp_path / "run"))
    assert found == kept and gone_on_from.name not in kept


def test_damaged_checkpoints_alone_are_no_reason_to_begin_anew(samples, tmp_path):
    run = train(config(run_dir=str(tmp_path / "run"), **RUN), samples)
    for path in (run / "checkpoints").glob("*.ckpt"):
        damage(path)
    with pytest.raises(WeightsError, match="one that is whole; found damaged ones alone, .*Remove them to start anew"):
        train(config(run_dir=str(run), ckpt_path="auto", **RUN), samples)


def test_a_checkpoint_of_another_run_is_not_mixed_with_those_of_this(samples, straight, tmp_path):
    run = train(config(run_dir=str(tmp_path / "run"), **RUN), samples)
    with pytest.raises(OptionError, match="run_dir: expected a folder without checkpoints"):
        train(config(run_dir=str(run), ckpt_path=str(straight / "checkpoints" / "last.ckpt"), **RUN), samples)
