"""The whole walk - simulate, preprocess, CLIP, GAN, diffusion, patches, scores - and the commands beside it, stopped at random moments.

Whoever repeats the very command that was stopped ends with what an undisturbed walk leaves: every dataset, pixel, table and weight (one
thread on a CPU), no half file, no second run folder, no row twice. `make test` kills it a few times, FAULT_ROUNDS=full thirty times, and
twenty times each command. Example, in full: FAULT_ROUNDS=full pytest tests/faults/test_disturbed_walk.py -s
"""
import os
import random
import re
import shutil
import signal
import time

import pytest
from fault_rounds import FULL, rounds
from further_inputs import write_further_inputs
from output_contents import differences, leftovers
from walk import BESIDE, COMMANDS, FURTHER, WRITES, remove_output, start, succeeds, walk_contents, was_killed

from preprocessing.interrupts import INTERRUPTED

KILLS, PRESSES = rounds(5, 30), rounds(1, 10)
SEED = 8
STOPPED = re.compile(rf"^(?:{re.escape(INTERRUPTED)}|stopped by Ctrl-C .+)$", re.MULTILINE)      # the second: a training, which has saved


def plan(seconds: dict[str, float], moments: random.Random) -> dict[str, int]:
    """How often each command is killed: those that take longer more often; none less than once if there are kills enough."""
    names = list(seconds)
    chosen = names * (KILLS // len(names) > 0)
    chosen += moments.choices(names, weights=[seconds[name] for name in names], k=KILLS - len(chosen))
    return {name: chosen.count(name) for name in names}


def kill_often(commands, name, folder, seconds, times, moments, tried) -> None:
    """Start a command, which takes about so many seconds, and kill it, `times` times; then let it end."""
    began, n_killed = time.monotonic(), 0
    while n_killed < times:
        if was_killed(start(commands, name, folder), moments.uniform(0.02, 0.98) * seconds):
            n_killed += 1
            tried()
        else:
            seconds *= 0.7                    # it had ended, as the kills before had left it less to do: come earlier
            assert time.monotonic() - began < 900, f"{name} always ends before it is killed"
    succeeds(start(commands, name, folder))


def same_walk(folder, whole) -> None:
    assert differences(walk_contents(folder), walk_contents(whole)) == []
    assert leftovers(folder) == leftovers(whole) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_walk_killed_at_random_moments_ends_with_the_contents_of_an_undisturbed_one(commands, undisturbed, tmp_path, tried):
    (whole, seconds), moments, folder = undisturbed, random.Random(SEED), tmp_path / "walk"
    folder.mkdir()
    kills = plan(seconds, moments)
    for name, times in kills.items():
        if name == next(iter(FURTHER)):
            write_further_inputs(folder)
        kill_often(commands, name, folder, seconds[name], times, moments, tried)
    print("killed: " + ", ".join(f"{name} {times} times" for name, times in kills.items()), flush=True)
    assert sum(kills.values()) == KILLS
    same_walk(folder, whole)


@pytest.mark.skipif(not FULL, reason="FAULT_ROUNDS=full only: the walk above kills each of them")
@pytest.mark.parametrize("name", [*WRITES, *BESIDE])
def test_a_command_killed_twenty_times_leaves_what_an_undisturbed_one_leaves(commands, undisturbed, name, tmp_path, tried):
    (whole, seconds), folder = undisturbed, tmp_path / "walk"
    shutil.copytree(whole, folder)
    remove_output(name, folder)
    kill_often(commands, name, folder, seconds[name], 20, random.Random(name), tried)
    same_walk(folder, whole)


@pytest.mark.slow
@pytest.mark.fault("Ctrl-C")
@pytest.mark.parametrize("name", [*WRITES, *BESIDE] if FULL else ("clip", "gan", "diffusion", "perturb", "cohort_report"))
def test_ctrl_c_at_any_moment_of_a_command_is_one_line_and_it_goes_on_afterwards(commands, undisturbed, name, tmp_path, tried):
    (whole, seconds), folder, moments, n_pressed = undisturbed, tmp_path / "walk", random.Random(name), 0
    shutil.copytree(whole, folder)
    remove_output(name, folder)
    while n_pressed < PRESSES:
        run = start(commands, name, folder)
        time.sleep(moments.uniform(0.02, 0.98) * seconds[name])
        press_ctrl_c(run)
        if run.wait() == 0:                                   # it ended first: from the start again
            remove_output(name, folder)
            continue
        n_pressed += 1
        tried()
        if run.code == -signal.SIGINT:                        # before the command began, or when Python, all done, was on its way out
            assert run.errors in ([], [INTERRUPTED]), run.said[-3000:]
        else:
            assert run.code == 130 and len(STOPPED.findall(run.said)) == 1, (run.code, run.said[-3000:])
            assert [line for line in run.errors if line != INTERRUPTED] == [], run.said[-3000:]
        assert not [path.name for path in folder.rglob("*") if ".tmp." in path.name or ".old." in path.name]
    succeeds(start(commands, name, folder))
    same_walk(folder, whole)


def press_ctrl_c(run) -> None:
    """As a terminal does: to the command and all that it started."""
    try:
        os.killpg(run.child, signal.SIGINT)
    except ProcessLookupError:                                # it has no group yet, or is gone
        run.signal(signal.SIGINT)


@pytest.mark.skipif(not FULL, reason="FAULT_ROUNDS=full only: a third walk")
def test_every_command_given_twice_leaves_what_it_left(commands, undisturbed, tmp_path):
    """Killed after its last file was written, before it could say so."""
    (whole, _), folder = undisturbed, tmp_path / "walk"
    shutil.copytree(whole, folder)
    for name in COMMANDS:
        succeeds(start(commands, name, folder))
    same_walk(folder, whole)
