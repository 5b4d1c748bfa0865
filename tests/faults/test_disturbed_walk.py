"""The whole walk - simulate, preprocess, CLIP, GAN, diffusion, patches, scores - killed at random moments and always given again.

Whoever repeats the very command that was killed ends with what an undisturbed walk leaves: every dataset, pixel, table and weight (one
thread on a CPU), no half file, no second run folder, no row twice. `make test` kills a few times, FAULT_ROUNDS=full thirty times.
Example, in full: FAULT_ROUNDS=full pytest tests/faults/test_killed_walk.py -s
"""
import random
import time

import pytest
from fault_rounds import FULL, rounds
from fault_runs import CommandServer
from output_contents import differences, leftovers
from walk import WALK, start, succeeds, walk, walk_contents, was_killed

KILLS = rounds(4, 30)
SEED = 8


@pytest.fixture(scope="module")
def commands():
    running = CommandServer(script="walk_server.py")
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


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_walk_killed_at_random_moments_ends_with_the_contents_of_an_undisturbed_one(commands, undisturbed, tmp_path):
    whole, seconds = undisturbed
    moments, folder, killed = random.Random(SEED), tmp_path / "walk", []
    folder.mkdir()
    for name, n_kills in plan(seconds, moments).items():
        within, began = seconds[name], time.monotonic()
        while n_kills:
            if was_killed(start(commands, name, folder), moments.uniform(0.02, 0.98) * within):
                n_kills -= 1
                killed.append(name)
            else:
                within *= 0.7                 # it had ended, as the kills before had left it less to do: come earlier
                assert time.monotonic() - began < 600, f"{name} always ends before it is killed"
        succeeds(start(commands, name, folder))
        print(f"{name}: killed {killed.count(name)} times", flush=True)
    assert len(killed) == KILLS
    assert differences(walk_contents(folder), walk_contents(whole)) == []
    assert leftovers(folder) == leftovers(whole) == []


@pytest.mark.skipif(not FULL, reason="FAULT_ROUNDS=full only: a third walk")
def test_every_command_of_the_walk_given_twice_leaves_what_it_left(commands, undisturbed):
    """Killed after its last file was written, before it could say so."""
    folder, _ = undisturbed
    before = walk_contents(folder)
    for name in WALK:
        succeeds(start(commands, name, folder))
    assert differences(walk_contents(folder), before) == [] and leftovers(folder) == []
