"""Killed at any moment, most of them inside a save, a GAN run goes on from its last whole checkpoint to the bits of an undisturbed one."""
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from gan_runs import make_run, same

from training.checkpoints import latest_checkpoint

KILLS, TENSORS = 20, {"cbase": 512, "cmax": 64, "res_blocks": 2}     # large enough that a save is most of a step


def save_every_step(folder, progress) -> None:
    """What a child does until it is killed: go on from the newest checkpoint, save after every step, say which."""
    torch.set_num_threads(1)
    run = make_run(folder, **TENSORS)
    if (checkpoint := latest_checkpoint(folder)) is not None:
        run.load(checkpoint)
    while True:
        run.one_step()
        run.save()
        progress.value = run.progress.step


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def unfinished(folder) -> list:
    return list(folder.glob("checkpoint-*.tmp.*"))


@pytest.mark.fault("killed")
def test_a_run_killed_twenty_times_while_it_saves_loses_at_most_the_step_it_was_in(tmp_path, threads, tried):
    server, moments = multiprocessing.get_context("forkserver"), random.Random(0)
    server.set_forkserver_preload(["torch", "gan_runs", "training.gan_loop"])       # each child starts at once
    folder, in_a_save, last = tmp_path / "killed", 0, 0
    folder.mkdir()
    for _ in range(KILLS):
        progress = server.Value("q", 0, lock=False)
        child = server.Process(target=save_every_step, args=(folder, progress), daemon=True)
        child.start()
        deadline = time.monotonic() + 120
        while not progress.value and child.is_alive() and time.monotonic() < deadline:
            time.sleep(0.005)
        assert progress.value > last, "the child went on from where the last one was"
        while not unfinished(folder) and time.monotonic() < deadline:               # of the next save
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.15))
        tried()
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        saved, last = progress.value, latest_checkpoint(folder).state["step"]
        assert last in (saved, saved + 1)            # + 1: killed between the save and the word of it
        assert len(unfinished(folder)) <= 1          # of this kill alone: a save clears up what older ones left
        in_a_save += len(unfinished(folder))
    assert in_a_save >= KILLS // 4
    assert len([path for path in folder.glob("checkpoint-*")]) <= 3

    torch.set_num_threads(1)                             # as the children: sums of several threads end in other bits
    straight, resumed = make_run(tmp_path / "straight", **TENSORS), make_run(folder, **TENSORS)
    resumed.load(latest_checkpoint(folder))
    for _ in range(last):
        straight.one_step()
    assert same(straight, resumed)
    for run in (straight, resumed):
        run.one_step()
    assert same(straight, resumed)
