"""A checkpoint of something else is refused as damaged weights are, also where its checksums agree."""
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gan_runs import make_run

from preprocessing.done_manifests import file_sha256
from preprocessing.errors import WeightsError
from training.checkpoints import COMMIT, STATE_FILE, SUMS_FILE, latest_checkpoint, read_checkpoint
from training.warm_start import find_start


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    run = make_run(tmp_path_factory.mktemp("run"))
    run.one_step()
    return run, latest_checkpoint(run.save().parent)


def refused(saved, checkpoint, says):
    run, _ = saved
    with pytest.raises(WeightsError, match=says):
        make_run(run.folder).load(checkpoint)


def with_state(checkpoint, **changes):
    return replace(checkpoint, state={name: value for name, value in {**checkpoint.state, **changes}.items() if value is not ...})


def test_what_was_saved_loads_and_its_config_stands_there_once(saved):
    run, checkpoint = saved
    again = make_run(run.folder)
    again.load(checkpoint)
    assert again.progress == run.progress and "config_sha256" not in checkpoint.state


@pytest.mark.parametrize(("changes", "says"), [
    ({"data_sha256": ...}, "data_sha256: expected that of a GAN run; found nothing of that name"),
    ({"backbone": 5}, "backbone: expected that of a GAN run; found 5"), ({"config": [1]}, "config: expected that of a GAN run"),
    ({"step": "7"}, "step: expected a counter as 0; found '7'"), ({"step": -1}, "step"), ({"step": True}, "step"),
    ({"step": ...}, "step: expected the number of steps"), ({"elapsed_s": float("nan")}, "elapsed_s"), ({"elapsed_s": None}, "elapsed_s"),
    ({"last_tick": 3}, "last_tick"), ({"last_snap": [1, "2"]}, "last_snap"), ({"sigma": {}}, "sigma"),
], ids=str)
def test_a_state_that_is_not_a_runs_is_refused(saved, changes, says):
    refused(saved, with_state(saved[1], **changes), says)


@pytest.mark.parametrize("resume", [True, False], ids=["by the command", "by the run"])
def test_a_state_that_is_a_list_is_refused_though_its_checksum_agrees(saved, tmp_path, resume):
    run, checkpoint = saved
    folder = tmp_path / "checkpoint-00000001"
    folder.mkdir()
    for file in checkpoint.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / STATE_FILE).write_text(json.dumps([1, 2]))
    (folder / SUMS_FILE).write_text("".join(f"{file_sha256(file)}  {file.name}\n" for file in sorted(folder.iterdir())
                                            if file.name not in (COMMIT, SUMS_FILE)))
    with pytest.raises(WeightsError, match="a JSON object; found list"):
        if resume:
            find_start(Path(tmp_path), "name", str(folder), run.config)
        else:
            make_run(run.folder).load(read_checkpoint(folder))


def changed_optimiser(checkpoint, change):
    theirs = {**checkpoint.optimisers["g_optimiser"]}
    theirs["param_groups"] = [dict(group) for group in theirs["param_groups"]]
    theirs["state"] = {place: dict(state) for place, state in theirs["state"].items()}
    change(theirs)
    return replace(checkpoint, optimisers={**checkpoint.optimisers, "g_optimiser": theirs})


@pytest.mark.parametrize("change", [
    lambda theirs: theirs["param_groups"].append(dict(theirs["param_groups"][0])),
    lambda theirs: theirs["param_groups"][0]["params"].pop(),
    lambda theirs: theirs.pop("param_groups"),
    lambda theirs: theirs.update(state=[1]),
    lambda theirs: theirs["param_groups"][0].update(betas="none"),
    lambda theirs: theirs["state"][0].update(exp_avg=torch.zeros(1, 2, 3)),
    lambda theirs: theirs["state"][0].pop("exp_avg_sq"),
    lambda theirs: theirs["state"][0]["exp_avg"].mul_(float("nan")),
    lambda theirs: theirs["state"].update({99999: theirs["state"][0]}),
], ids=["a group more", "a parameter less", "no groups", "state of a list", "betas", "shape", "a part less", "NaN", "a state more"])
def test_an_optimiser_of_another_run_is_refused(saved, change):
    whole = read_checkpoint(saved[1].folder)     # a change may reach into its tensors
    refused(saved, changed_optimiser(whole, change), "g_optimiser.pt: optimiser: expected")


@pytest.mark.parametrize("name", ["g_optimiser", "d_optimiser"])
def test_a_checkpoint_without_an_optimiser_is_refused(saved, name):
    checkpoint = saved[1]
    others = {part: state for part, state in checkpoint.optimisers.items() if part != name}
    refused(saved, replace(checkpoint, optimisers=others), f"parts: expected g_optimiser, d_optimiser; found no {name}")
