"""Several ranks of one GAN run give what one gives, write once, and end together."""
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from gan_runs import make_run, tiny_data

from preprocessing.errors import OptionError
from training.checkpoints import latest_checkpoint
from training.ranks import joined_ranks, waiting_time

JOB = Path(__file__).with_name("gan_rank_job.py")
ROOT = Path(__file__).parents[2]


def start(folder, n_ranks, preset="best", fault="none"):
    folder.mkdir()
    launcher = [] if n_ranks == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(n_ranks), "--rdzv-backend",
                                        "c10d", "--rdzv-endpoint", "localhost:0"]
    return subprocess.run([sys.executable, *launcher, str(JOB), str(folder), preset, fault], text=True, capture_output=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("preset", ["best", "reference"])
def test_two_ranks_equal_one_at_the_same_global_batch_and_write_once(tmp_path, preset):
    ends = []
    for n_ranks in (1, 2):
        done = start(tmp_path / str(n_ranks), n_ranks, preset)
        assert done.returncode == 0, done.stderr[-3000:]
        ends.append(torch.load(tmp_path / str(n_ranks) / "end.pt", weights_only=True))
    one, two = ends
    assert len(one["losses"]) == len(two["losses"]) == 4
    for key in ("weights", "average"):
        assert all(torch.allclose(one[key][name].float(), two[key][name].float(), atol=2e-5) for name in one[key])
    for a, b in zip(one["losses"], two["losses"], strict=True):
        assert a.keys() == b.keys() and all(abs(a[name] - b[name]) < 1e-4 for name in a)
    lines = [(tmp_path / n / "stats.jsonl").read_text().splitlines() for n in "12"]
    assert len(lines[0]) == len(lines[1]) and all("metrics/fd_random_tiny" in text[0] for text in lines)
    assert sorted(p.name for p in (tmp_path / "1").iterdir()) == sorted(p.name for p in (tmp_path / "2").iterdir())


@pytest.mark.fault("rank that fails or hangs")
def test_a_rank_that_ends_early_ends_the_job(tmp_path):
    done = start(tmp_path / "run", 2, fault="raise")
    assert done.returncode != 0 and not (tmp_path / "run" / "end.pt").exists()


@pytest.mark.fault("rank that fails or hangs")
def test_a_rank_that_hangs_ends_the_job_within_the_timeout_and_one_speaks(tmp_path):
    done = start(tmp_path / "run", 2, fault="hang")          # it would hang for ten minutes: `start` allows five
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(said) == 1 and "another process of this run ended or did not answer" in said[0]
    assert "exitcode  : 4" in done.stderr and not (tmp_path / "run" / "end.pt").exists()


def free_port() -> str:
    with socket.socket() as any_port:
        any_port.bind(("localhost", 0))
        return str(any_port.getsockname()[1])


def rank_environment(rank, size, port):
    return {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": port}


def wait_for(path, process, seconds=240):
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None and time.monotonic() < end, "the run did not come that far"
        time.sleep(0.1)


@pytest.mark.parametrize(("number", "to", "code"), [(signal.SIGTERM, (0, 1), 143), (signal.SIGINT, (1,), 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_all_ranks_or_one_saves_one_checkpoint_from_which_the_run_goes_on(tmp_path, number, to, code):
    folder, port = tmp_path / "run", free_port()
    folder.mkdir()
    ranks = [subprocess.Popen([sys.executable, str(JOB), str(folder), "best", "stop"], env=rank_environment(rank, 2, port),
                              stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        wait_for(folder / "stepped", ranks[0])               # the end is far
        for rank in to:
            ranks[rank].send_signal(number)
        errors = [rank.communicate(timeout=120)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [code, code] and "Traceback" not in "".join(errors), errors
    assert len(list(folder.glob("checkpoint-*"))) == 1
    saved = latest_checkpoint(folder)
    step = saved.state["step"]
    run = make_run(folder, "best", tiny_data(n=40, validation=True), batch=16, kimg=(step + 2) * 0.016)
    run.load(saved)
    assert step > 0 and len(list(run.train())) == 2 and run.progress.step == step + 2
    assert latest_checkpoint(folder).state["step"] == step + 2


def test_a_rank_that_nobody_joins_gives_up_after_timeout_minutes(tmp_path):
    options = ["--outdir", tmp_path / "runs", "--img-resolution", 16, "--batch", 16, "--data", tmp_path, "--device", "cpu"]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "train_gan.py", *map(str, options), "--timeout-minutes", "0.03"], cwd=ROOT, text=True,
                          capture_output=True, env=rank_environment(0, 2, free_port()), timeout=200)
    assert done.returncode == 4 and "rank 0: the processes of this run do not find each other" in done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - began < 150         # the default is half an hour


@pytest.mark.parametrize(("environment", "says"), [
    ({"WORLD_SIZE": "abc"}, "'abc'"), ({"WORLD_SIZE": "2"}, "no RANK"), ({"WORLD_SIZE": "2", "RANK": "2"}, "rank 2 of 2"),
    ({"WORLD_SIZE": "0", "RANK": "0"}, "rank 0 of 0"), ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "1"}, "1 of 1 on this machine"), ({"RANK": "foo"}, "'foo'"),
    ({"RANK": "1"}, "rank 1 of 1"), ({"LOCAL_RANK": "1"}, "1 of 1 on this machine")], ids=str)
def test_an_environment_that_torchrun_did_not_set_is_refused(monkeypatch, environment, says):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match="RANK, WORLD_SIZE, MASTER_ADDR, ...: expected as torchrun sets them") as refused, \
            joined_ranks("cpu"):
        pass
    assert says in str(refused.value)


@pytest.mark.parametrize(("asked", "n_ranks", "says"), [("cuda:0", 2, "--device: expected cpu or cuda"),
                                                        ("cuda", 3, "--nproc-per-node: expected at most the 2 GPUs")])
def test_ranks_never_share_a_gpu(monkeypatch, asked, n_ranks, says):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for name, value in rank_environment(0, n_ranks, "1").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=says), joined_ranks(asked):
        pass


@pytest.mark.parametrize("minutes", [float("nan"), -1.0, 0.0, float("inf"), 1e300], ids=str)
def test_a_timeout_that_is_none_is_refused_also_for_one_process(monkeypatch, minutes):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(OptionError, match="--timeout-minutes: expected more than 0"), joined_ranks("cpu", minutes):
        pass


def test_a_timeout_is_in_minutes():
    assert waiting_time(0.5).total_seconds() == 30
