"""The whole walk - simulate, preprocess, CLIP, GAN, diffusion, patches, scores - killed at random moments, or on a disk that is full.

Whoever repeats the very command that was stopped ends with what an undisturbed walk leaves: every dataset, pixel, table and weight (one
thread on a CPU), no half file, no second run folder, no row twice. `make test` disturbs it a few times, FAULT_ROUNDS=full thirty times
by kills and ten times a command by a full disk. Example, in full: FAULT_ROUNDS=full pytest tests/faults/test_disturbed_walk.py -s
"""
import itertools
import random
import shutil
import time

import pytest
from fault_rounds import FULL, rounds
from fault_runs import CommandServer
from output_contents import differences, leftovers
from small_disk import MIB, SmallDisk, small_disk
from walk import LONGEST_S, WALK, start, succeeds, walk, walk_contents, was_killed

KILLS, FULL_DISKS = rounds(4, 30), rounds(1, 10)
SEED = 8
WRITES = {"simulate": "SIM", "clip": "clip", "embeddings": "embeddings", "gan": "gan", "gen_images": "generated", "diffusion": "diffusion",
          "generate_img": "drawn", "metrics": "scores"}      # those of preprocessing: test_disk_full.py


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    script = {"script": "walk_server.py"}
    running = small_disk(tmp_path_factory.mktemp("disk"), size=1024 * MIB, **script) or CommandServer(**script)
    yield running
    running.close()


@pytest.fixture(scope="module")
def undisturbed(commands, tmp_path_factory):
    """Its contents, and the seconds that each command took."""
    folder = tmp_path_factory.mktemp("undisturbed") / "walk"
    return folder, dict(walk(commands, folder))


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
        kill_often(commands, name, folder, seconds[name], times, moments, tried)
    print("killed: " + ", ".join(f"{name} {times} times" for name, times in kills.items()), flush=True)
    assert sum(kills.values()) == KILLS
    same_walk(folder, whole)


@pytest.mark.skipif(not FULL, reason="FAULT_ROUNDS=full only: the walk above kills each of them")
@pytest.mark.parametrize("name", WRITES)
def test_a_command_killed_twenty_times_leaves_what_an_undisturbed_one_leaves(commands, undisturbed, name, tmp_path, tried):
    (whole, seconds), folder = undisturbed, tmp_path / "walk"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / WRITES[name])
    kill_often(commands, name, folder, seconds[name], 20, random.Random(name), tried)
    same_walk(folder, whole)


@pytest.mark.skipif(not FULL, reason="FAULT_ROUNDS=full only: a third walk")
def test_every_command_of_the_walk_given_twice_leaves_what_it_left(commands, undisturbed, tmp_path):
    """Killed after its last file was written, before it could say so."""
    (whole, _), folder = undisturbed, tmp_path / "walk"
    shutil.copytree(whole, folder)
    for name in WALK:
        succeeds(start(commands, name, folder))
    same_walk(folder, whole)


@pytest.mark.slow
@pytest.mark.fault("full or read-only disk")
@pytest.mark.parametrize("name", WRITES)
def test_a_command_on_a_full_disk_is_one_line_and_goes_on_with_room(commands, undisturbed, name, tried):
    """A little more room each time, up to what the command leaves."""
    if not isinstance(commands, SmallDisk):
        pytest.skip("a small disk cannot be mounted here")
    commands.make_empty()
    whole, folder = undisturbed[0], commands.mount / "walk"
    assert commands.call("cp", "-r", whole, folder) == 0 and commands.call("rm", "-r", folder / WRITES[name]) == 0
    before, needed = commands.used(), sum(path.stat().st_blocks * 512 for path in (whole / WRITES[name]).rglob("*"))
    n_full, shares = 0, itertools.cycle((number + 0.5) / FULL_DISKS for number in range(FULL_DISKS))
    while n_full < FULL_DISKS:
        commands.leave_free(max(0, before + int(needed * next(shares)) - commands.used()))
        run = start(commands, name, folder)
        if run.wait(LONGEST_S) == 0:                          # what it had left before was enough to end with: from the start again
            assert commands.call("rm", "-r", folder / WRITES[name]) == 0
            continue
        assert run.code == 4 and len(run.errors) == 1, (n_full, run.code, run.said[-3000:])
        assert "No space left on device" in run.errors[0] or " are free" in run.errors[0], run.errors
        assert str(commands.mount) in run.errors[0], "the file is named"
        n_full += 1
        tried()
    commands.leave_free(600 * MIB)
    succeeds(start(commands, name, folder))
    same_walk(commands.path(folder), whole)
