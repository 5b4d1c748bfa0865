"""Run folders are numbered, checkpoints are whole or not there, statistics can be taken back."""
import errno
import json
import logging

import pytest
import torch

from preprocessing.errors import InputError, WeightsError
from preprocessing.outputs import only_writer
from training.checkpoints import latest_checkpoint, read_checkpoint, save_checkpoint
from training.run_folder import StatsLog, begun_run, latest_run, next_run_folder


def save(folder, step, value=1.0, **kwargs):
    return save_checkpoint(folder, step, state={"kimg": step / 10}, tensors={"model": {"w": torch.full((3,), value)}},
                           optimisers={"adam": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}}, **kwargs)


def test_run_folders_count_on_from_the_highest(tmp_path):
    assert next_run_folder(tmp_path, "a").name == "00000-a"
    (tmp_path / "00007-old").mkdir()
    (tmp_path / "notes").mkdir()
    assert next_run_folder(tmp_path, "b").name == "00008-b"


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path):
    save(tmp_path, 20, value=2.5)
    checkpoint = latest_checkpoint(tmp_path)
    assert checkpoint.state == {"kimg": 2.0, "step": 20, "on_signal": False}
    assert checkpoint.tensors["model"]["w"].tolist() == [2.5] * 3
    assert checkpoint.optimisers["adam"]["param_groups"] == [{"lr": 0.1}]


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (1, 2, 100):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000002", "checkpoint-00000100"]


@pytest.mark.parametrize("keep, kept", [(1, [9]), (2, [6, 9]), (3, [3, 6, 9])])
def test_a_checkpoint_on_a_signal_takes_the_place_of_no_regular_one(tmp_path, keep, kept):
    for step in (3, 4, 6, 7, 8, 9):
        before = {path.name for path in tmp_path.iterdir()}
        newest = save(tmp_path, step, keep=keep, on_signal=step % 3 > 0)
        assert latest_checkpoint(tmp_path).state["step"] == step
        regular = {name for name in before if int(name[-8:]) % 3 == 0}
        assert step % 3 == 0 or {path.name for path in tmp_path.iterdir()} == {*regular, newest.name}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step:08d}" for step in kept]


@pytest.mark.parametrize("state, kept", [("[", [1, 3]), ("[]", [1, 3]), ("{}", [2, 3]), ('{"on_signal": false}', [2, 3])])
def test_a_checkpoint_without_a_readable_record_takes_the_place_of_none_an_older_one_counts(tmp_path, state, kept):
    save(tmp_path, 1)
    (save(tmp_path, 2, on_signal=True) / "state.json").write_text(state)
    save(tmp_path, 3, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{step:08d}" for step in kept]


def test_saving_removes_what_killed_runs_left_and_nothing_that_is_only_named_like_it(tmp_path):
    own = {"checkpoint-00000001.tmp.mine", "checkpoint-best.tmp.7", "snapshot-000016.old.keep", "snapshot-000016.tmp.2024-bak"}
    for name in (*own, "checkpoint-00000001.tmp.7", "snapshot-000016.tmp.8"):
        (tmp_path / name).mkdir()
    saved = save(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == own | {saved.name}


def test_damaged_checkpoints_alone_are_no_reason_to_begin_anew(tmp_path):
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(WeightsError, match="damaged ones alone, 2 .checkpoint-00000002, checkpoint-00000001.. Remove them to start anew"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("harm", ["truncated", "flipped byte", "missing file", "no COMMIT"])
def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning_and_refused_by_name(tmp_path, caplog, harm):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    weights = newest / "model.safetensors"
    if harm == "truncated":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif harm == "flipped byte":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    else:
        (weights if harm == "missing file" else newest / "COMMIT").unlink()
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path).state["step"] == 1
    assert "damaged checkpoint" in caplog.text and "checkpoint-00000002" in caplog.text
    with pytest.raises(WeightsError) as refused:
        read_checkpoint(newest)
    assert refused.value.exit_code == 5


def test_a_pickle_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    from preprocessing.done_manifests import file_sha256
    folder = save(tmp_path, 1)
    canary = tmp_path / "canary"
    (folder / "adam.pt").write_bytes(f"cos\nsystem\n(S'touch {canary}'\ntR.".encode())
    sums = folder / "SHA256SUMS"
    kept = [line for line in sums.read_text().splitlines() if "adam.pt" not in line]
    sums.write_text("\n".join([*kept, f"{file_sha256(folder / 'adam.pt')}  adam.pt"]) + "\n")
    with pytest.raises(WeightsError, match="without running code"):
        read_checkpoint(folder)
    assert not canary.exists()


def test_a_missing_checkpoint_is_bad_input(tmp_path):
    with pytest.raises(InputError, match="nothing there"):
        read_checkpoint(tmp_path / "checkpoint-00000009")
    assert latest_checkpoint(tmp_path) is None


def test_the_latest_run_is_the_newest_of_its_name_with_a_checkpoint(tmp_path):
    first, other, empty = (next_run_folder(tmp_path, name) for name in ("a", "b", "a"))
    save(first, 1)
    save(other, 1)
    grown = next_run_folder(tmp_path, "a@64-lite-gpus1-b8")
    save(grown, 1)
    assert latest_run(tmp_path, "a@64-lite-gpus4-b8") == grown     # on more GPUs it is the same run
    grown.rename(tmp_path / "away")
    assert latest_run(tmp_path, "a") == first and latest_run(tmp_path) == other and latest_run(tmp_path, "c") is None
    assert empty.exists()


def test_a_run_killed_before_its_first_checkpoint_begins_again_in_its_folder_but_no_other_does(tmp_path):
    record = {"config": {"batch": 8}, "started_from": None, "where": tmp_path}
    assert begun_run(tmp_path, "a", record) is None
    first = next_run_folder(tmp_path, "a")
    (first / ".run.lock").touch()
    (first / "config.json.tmp.12").write_text("{")
    assert begun_run(tmp_path, "a", record) == first and begun_run(tmp_path, "b", record) is None     # nothing in it yet
    (first / "notes.txt").touch()
    assert begun_run(tmp_path, "a", record) is None                                                   # that is somebody else's
    (first / "config.json").write_text(json.dumps({**record, "where": str(tmp_path)}))
    assert begun_run(tmp_path, "a", record) == first
    assert begun_run(tmp_path, "a", {**record, "config": {"batch": 16}}) is None
    second = next_run_folder(tmp_path, "a")
    assert begun_run(tmp_path, "a", record) == second
    save(second, 1)
    assert begun_run(tmp_path, "a", record) is None                                                   # that one can be resumed


def test_a_run_folder_is_held_by_one_process_and_cleared_of_what_killed_ones_left(tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "clip.old.7").mkdir()                          # killed between its two renames
    (tmp_path / "clip.old.7" / "config.json").touch()
    (tmp_path / "pipeline.old.7").mkdir()
    for name in ("config.json", "config.json.tmp.7", "pipeline", "samples/a.png.tmp.7", "notes.tmp.txt"):
        (tmp_path / name).touch()
    with only_writer(tmp_path, parts=["samples"]):
        assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("[!.]*")} == {
            "clip", "clip/config.json", "config.json", "pipeline", "samples", "notes.tmp.txt"}
        (tmp_path / "stats.tmp.8").touch()
        with pytest.raises(OSError, match="another process is at work in this folder") as error, only_writer(tmp_path):
            pass
        assert error.value.errno == errno.EAGAIN and (tmp_path / "stats.tmp.8").exists()


def test_statistics_after_a_checkpoint_are_forgotten_when_it_is_resumed(tmp_path):
    stats = StatsLog(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        stats.write(step, {"loss": step / 2}, f"step {step}")
    StatsLog(tmp_path, 2, tensorboard=False)
    assert [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]
    assert (tmp_path / "log.txt").read_text().splitlines()[-1] == "step 3"


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', "", "[1]", "\x00\x00", '{"loss": 1}'])
def test_torn_lines_of_statistics_are_dropped_with_a_notice_and_the_run_goes_on(tmp_path, caplog, torn):
    stats = StatsLog(tmp_path, tensorboard=False)
    stats.write(1, {"loss": 0.5}, "step 1")
    with open(tmp_path / "stats.jsonl", "a") as stream:
        stream.write(torn + "\n" * (torn == ""))
    with caplog.at_level(logging.WARNING):
        stats = StatsLog(tmp_path, 5, tensorboard=False)
    assert "dropping 1 unreadable line" in caplog.text and "stats.jsonl" in caplog.text
    stats.write(2, {"loss": 0.25}, "step 2")
    assert [json.loads(line)["step"] for line in (tmp_path / "stats.jsonl").read_text().splitlines()] == [1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.txt", "stats.jsonl"]


def test_tensorboard_mirrors_the_statistics(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    stats = StatsLog(tmp_path)
    stats.write(3, {"loss/D": 1.25}, "line")
    stats.write(4, {"loss/D": 1.5}, "line")
    stats.close()
    resumed = StatsLog(tmp_path, 3)          # killed after step 4, resumed from a checkpoint of step 3
    resumed.write(4, {"loss/D": 1.75}, "line")
    resumed.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/D")] == [(3, 1.25), (4, 1.75)]
