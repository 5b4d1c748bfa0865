"""Fine-tunes that are killed while they save, and runs of two processes of which one fails, is silent, slow or asked to stop."""
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time

import numpy as np
import pytest
import torch
from diffusion_world import PX, config, differing, run, weights, write_world
from fault_rounds import rounds

from diffusion_utils.finetune import open_run
from training.checkpoints import latest_checkpoint

KILLS = rounds(3, 20)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("faults"))


def forkserver():
    """Children that start at once, as their imports are done."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["torch", "accelerate", "diffusers.models.unets.unet_2d_condition", "diffusers", "diffusion_world",
                                   "diffusion_utils.finetune", "diffusion_utils.train_diffusion"])
    return server


@pytest.fixture
def one_thread():
    """Sums of as many parts as in the children, so that bits can be compared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- killed ---------------------------------------------------------------------------------------------------------

def save_every_step(world, folder, step) -> None:
    """What a child does until it is killed: go on from the newest checkpoint, save after every step, say which it is at."""
    torch.set_num_threads(1)
    made = open_run(config(world, folder, max_train_steps=10_000, checkpointing_steps=1, resume_from_checkpoint="latest"))
    for _ in made.train():
        step.value = made.standing.step


def unfinished(folder) -> list:
    return list(folder.glob("checkpoint-*.tmp.*"))


@pytest.mark.fault("killed")
def test_a_run_killed_while_it_saves_loses_at_most_the_step_it_was_in(world, tmp_path, one_thread, tried):
    server, moments, folder, last, in_a_save = forkserver(), random.Random(0), tmp_path / "killed", 0, 0
    for _ in range(KILLS):
        step = server.Value("q", 0, lock=False)
        child = server.Process(target=save_every_step, args=(world, folder, step), daemon=True)
        child.start()
        deadline = time.monotonic() + 120
        while step.value < last + 2 and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.002)
        assert step.value > last, "the child went on from where the last one was"
        while not unfinished(folder) and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(moments.uniform(0, 0.01))
        tried()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        at, last = step.value, latest_checkpoint(folder).state["step"]
        assert last in (at - 1, at)
        assert len(unfinished(folder)) <= 1          # of this kill alone: a save clears up what older ones left
        in_a_save += len(unfinished(folder))
    assert in_a_save >= 1
    resumed = run(world, folder, max_train_steps=last + 1, resume_from_checkpoint="latest")
    straight = run(world, tmp_path / "straight", max_train_steps=last + 1)
    assert differing(weights(resumed), weights(straight)) == []
    assert not unfinished(folder) and (folder / "pipeline" / "model_index.json").is_file()


# ---- two processes --------------------------------------------------------------------------------------------------

def one_of_two(world, folder, rank: int, port: int, fault: str) -> None:
    """A process of a run of two, as a launcher starts it; what it says goes to a file."""
    sys.stdout = sys.stderr = open(folder / f"said{rank}.txt", "w", buffering=1)
    os.environ.update({"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)})
    from diffusion_utils import finetune, finetune_processes
    from diffusion_utils.train_diffusion import main
    torch.set_num_threads(1)
    finetune_processes.GRACE_S = 0.5
    sound, calls = finetune.losses_of, []

    def losses_of(*arguments):
        calls.append(1)
        losses = sound(*arguments)
        return FAULTS[fault](rank, losses) if len(calls) == 3 else losses
    finetune.losses_of = losses_of
    os.chdir(folder)
    main(["--train_data_dir", str(world / "patches"), "--dataset_embs", str(world / "emb.npy"), "--output_dir", str(folder / "run"),
          "--from-scratch", "small", "--pixel-space", "--resolution", str(PX), "--train_batch_size", "2", "--max_train_steps", "4",
          "--report_to", "none", "--n-tokens", "3", "--no-progress", "--mixed_precision", "no", "--dataloader_num_workers", "1",
          "--checkpointing_steps", "1", "--validation_steps", "4", "--metrics", "fd_random_tiny@5", "--timeout-minutes",
          "0.4" if fault == "is stuck" else "5"])


def fails(of: int):
    def fault(rank, losses):
        if rank == of:
            raise OSError(28, "No space left on device", "spots")
        return losses
    return fault


def hangs(rank, losses):
    if rank == 1:
        time.sleep(1000)
    return losses


def slow_and_nan(rank, losses):
    if rank == 1:
        time.sleep(1.5)
        return losses * float("nan")
    return losses


def receives(number: int):
    def fault(rank, losses):
        if rank == 1:
            os.kill(os.getpid(), number)
        return losses
    return fault


FAULTS = {"0 fails": fails(0), "1 fails": fails(1), "is stuck": hangs, "is slow, with NaN": slow_and_nan,
          "is killed": receives(signal.SIGKILL), "SIGTERM": receives(signal.SIGTERM), "Ctrl-C": receives(signal.SIGINT)}
LOST = "another process of this run ended or did not answer"


def two(world, folder, fault):
    """(exit codes, what was said as errors by each) of a run of two processes with a fault in the third step."""
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [forkserver().Process(target=one_of_two, args=(world, folder, rank, port, fault), daemon=True) for rank in (0, 1)]
    for child in children:
        child.start()
    children[0].join(300)
    assert children[0].exitcode is not None, "the run hangs"
    if fault == "is stuck":
        children[1].kill()           # what a launcher does
    children[1].join(120)
    said = [(folder / f"said{rank}.txt").read_text() for rank in (0, 1)]
    assert not any("Traceback" in text for text in said), said
    return [child.exitcode for child in children], [[line for line in text.splitlines() if line.startswith("error: ")] for text in said]


@pytest.mark.fault("rank that fails or hangs")
@pytest.mark.parametrize("fault, codes, said", [
    ("0 fails", [4, 4], ["spots: No space left", f"process 1: {LOST}"]),
    ("1 fails", [4, 4], [f"process 0: {LOST}", "spots: No space left"]),
    ("is killed", [4, -9], [f"process 0: {LOST}", None]), ("is stuck", [4, -9], [f"process 0: {LOST}", None])])
def test_a_process_that_fails_ends_the_run_and_the_last_checkpoint_stays(world, tmp_path, fault, codes, said):
    found, errors = two(world, tmp_path, fault)
    assert found == codes
    for lines, expected in zip(errors, said, strict=True):
        assert len(lines) == (expected is not None) and all(expected in line for line in lines)
    assert latest_checkpoint(tmp_path / "run").state["step"] == 2 and not (tmp_path / "run" / "pipeline").exists()


def test_a_slow_process_is_waited_for_and_its_nan_skips_the_step_of_all(world, tmp_path):
    found, errors = two(world, tmp_path, "is slow, with NaN")
    assert found == [0, 0] and errors == [[], []]
    lines = [json.loads(line) for line in (tmp_path / "run" / "stats.jsonl").read_text().splitlines()]
    told, measured = ([line for line in lines if name in line] for name in ("loss", "metrics/fd_random_tiny@5"))
    assert [line["step"] for line in told] == [1, 2, 4] and told[-1]["bad_steps"] == 1
    assert all(np.isfinite(line["loss"]) for line in told)
    assert [line["step"] for line in measured] == [4] and measured[0]["metrics/fd_random_tiny@5"] > 0     # 5 patches, shared 3 and 2


@pytest.mark.parametrize("fault, code", [("SIGTERM", 143), ("Ctrl-C", 130)])
def test_a_signal_to_one_process_saves_and_ends_all(world, tmp_path, fault, code):
    found, errors = two(world, tmp_path, fault)
    assert found == [code, code] and errors == [[], []]
    assert latest_checkpoint(tmp_path / "run").state["step"] == 3 and not (tmp_path / "run" / "pipeline").exists()
