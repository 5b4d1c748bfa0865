"""train_clip.py on several devices: the weights of one device, one run folder, one message when a rank fails, no hang."""
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import torch
from clip_runs import ROOT, finish, start, write_samples

from networks.weights import load_weights_folder
from preprocessing.errors import OptionError
from training.clip_config import TrainerConfig
from training.clip_ranks import find_devices
from training.ranks import gather_rows, own_rows


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Two samples of 41 spots: 5 whole batches of 16 and 2 spots over; validation batches of 16, 16 and 9."""
    return write_samples(tmp_path_factory.mktemp("ranks"), 41)


def weights_of(samples, name):
    return load_weights_folder(samples / name / "clip")[0]


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    apart = {name: float((first[name].float() - second[name].float()).abs().max()) for name in first}
    assert max(apart.values()) < 1e-5, apart


def test_one_process_holds_every_row():
    rows = torch.arange(6.0).view(3, 2)
    assert gather_rows(rows) is rows and own_rows(3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("n_rows", [1, 2, 5, 6])
def test_the_shares_of_all_ranks_are_equally_long_and_together_whole_and_in_order(monkeypatch, n_rows):
    shares = []
    for rank in range(3):
        monkeypatch.setattr("training.ranks.rank_and_size", lambda rank=rank: (rank, 3))
        shares.append(own_rows(n_rows).tolist())
    assert len({len(share) for share in shares}) == 1 and sum(shares, [])[:n_rows] == list(range(n_rows))


@pytest.mark.parametrize("batch_size, said", [(15, "such as 12 or 16; found 15"), (2, "such as 4; found 2")])
def test_a_batch_that_the_devices_cannot_share_is_refused_naming_the_nearest(batch_size, said):
    with pytest.raises(OptionError, match=said):
        find_devices(TrainerConfig(accelerator="cpu", devices=2, num_nodes=2, batch_size=batch_size))
    assert find_devices(TrainerConfig(accelerator="cpu", devices=2, num_nodes=2, batch_size=16)).world_size == 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_a_usage_error():
    with pytest.raises(OptionError, match="expected devices of this machine; found gpu, 1, 1"):
        find_devices(TrainerConfig(accelerator="gpu"))


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["image.cache_features=3", "model.gene_scaling=centre", "model.feature_components=4",
                                          "model.learn_temperature=true", "model.image_views=8",
                                          "model.feature_sample_scaling=centre", "model.gene_sample_scaling=centre"],
                                     ["image.cache_features=2", "model.gene_encoder=gene_tokens", "model.gene_tokens=6",
                                      "model.gene_token_width=8", "trainer.contrast=within_sample", "trainer.batch_mmd=0.5"]],
                         ids=["online", "cached features", "gene tokens, samples told apart"])
def test_two_ranks_train_the_weights_of_one_at_the_same_global_batch(samples, tmp_path, options):
    runs = {"one": ["trainer.devices=1"], "two": ["trainer.devices=2", f"image.cache_dir={tmp_path / 'cache'}"]}
    told = {}
    for name, devices in runs.items():
        process = start(samples, f"out_dir={tmp_path / name}", "image.augment.rotate=true", *devices, *options)
        told[name], errors = finish(process)
        assert process.returncode == 0, errors
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["00000-clip"]
    one, two = (tmp_path / name / "00000-clip" for name in runs)
    assert_same_weights(weights_of(tmp_path, "one/00000-clip"), weights_of(tmp_path, "two/00000-clip"))
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()} and not list(two.glob("*.tmp.*"))
    status = [[line for line in text.splitlines() if line.startswith("step ")] for text in told.values()]
    assert status[0] == status[1] and len(status[1]) == 3   # validation said once, with the same numbers
    assert told["two"].count("training spots") == told["two"].count("wrote ") == 1


@pytest.mark.slow
def test_two_nodes_started_by_hand_are_one_run(samples, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    nodes = [start(samples, f"out_dir={tmp_path / 'nodes'}", "trainer.num_nodes=2", NODE_RANK=str(rank), MASTER_ADDR="127.0.0.1",
                   MASTER_PORT=port) for rank in (0, 1)]
    told = [finish(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], told
    assert "wrote " in told[0][0] and told[1][0] == ""
    assert [path.name for path in (tmp_path / "nodes").iterdir()] == ["00000-clip"]
    straight = start(samples, f"out_dir={tmp_path / 'one'}")
    finish(straight)
    assert_same_weights(weights_of(tmp_path, "one/00000-clip"), weights_of(tmp_path, "nodes/00000-clip"))


FAULTY = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
import train_clip
from preprocessing.errors import InputError
import training.clip_module as clip_module
sound = clip_module.ClipModule.training_step
def training_step(self, batch, place):
    if self.global_step == 4 and self.global_rank in {ranks}:
        {fault}
    return sound(self, batch, place)
clip_module.ClipModule.training_step = training_step
train_clip.main()
"""
RAISE = "raise InputError('spots', 'expression', 'numbers', 'rain')"
RAINED = "spots: expression: expected numbers; found rain"


@pytest.mark.slow
@pytest.mark.fault("rank that fails or hangs")
@pytest.mark.parametrize("ranks, fault, code, said", [
    ((0,), RAISE, 3, RAINED), ((1,), RAISE, 3, RAINED), ((0, 1), RAISE, 3, RAINED),
    ((1,), "os.kill(os.getpid(), signal.SIGKILL)", 4, "of this run: ended by signal 9"),
    ((1,), "time.sleep(1000)", 4, "rank 0: another process of this run ended or did not answer"),
], ids=["rank 0 fails", "rank 1 fails", "both fail", "rank 1 is killed", "rank 1 is stuck"])
def test_a_failing_rank_ends_all_with_one_message_and_its_exit_code(samples, tmp_path, ranks, fault, code, said):
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(root=str(ROOT), ranks=ranks, fault=fault))
    minutes = 0.7 if "sleep" in fault else 30   # the first must suffice for the start of rank 1
    process = start(samples, f"run_dir={tmp_path / 'run'}", "trainer.devices=2", f"trainer.timeout_minutes={minutes}", script=script)
    _, errors = finish(process)
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert process.returncode == code, errors
    assert len(lines) == 1 and said in lines[0] and "Traceback" not in errors
    assert torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert not (tmp_path / "run" / "clip").exists() and not alive(script)


def alive(script: Path) -> list[str]:
    """Processes of this machine that run `script`."""
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listed.splitlines() if str(script) in line]


@pytest.mark.slow
def test_ctrl_c_ends_every_rank_with_130(samples, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text(FAULTY.format(root=str(ROOT), ranks=(0, 1), fault="print('here', flush=True); time.sleep(3)"))
    process = start(samples, f"run_dir={tmp_path / 'run'}", "trainer.devices=2", script=script)
    while "here" not in (line := process.stdout.readline()):
        assert line, process.stderr.read()
    process.send_signal(signal.SIGINT)
    told, errors = finish(process)
    lines = [line for line in (told + errors).splitlines() if "stopped by" in line]
    assert process.returncode == 130 and len(lines) == 1 and "stopped by Ctrl-C after step" in lines[0], errors
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    assert not alive(script)
