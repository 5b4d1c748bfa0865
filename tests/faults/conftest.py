"""What the fault tests share: a server of commands and a tiny Visium HD sample."""
import time
from pathlib import Path

import pytest
from fault_runs import CommandServer
from further_inputs import write_further_inputs
from small_disk import MIB, small_disk
from tiny_samples import tiny_sample
from walk import FURTHER, start, succeeds, walk

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def server():
    running = CommandServer()
    yield running
    running.close()


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Visium HD, 420 x 380 µm, 60 genes: an extraction of seconds. Read it, never write into it."""
    return tiny_sample(tmp_path_factory.mktemp("faults"), "visium-hd", width_um=420, height_um=380, genes=60)


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    """A server of all commands, which sees a small disk of its own where one can be mounted."""
    how = {"script": "walk_server.py"}
    running = small_disk(tmp_path_factory.mktemp("disk"), size=1024 * MIB, **how) or CommandServer(**how)
    yield running
    running.close()


@pytest.fixture(scope="session")
def undisturbed(commands, tmp_path_factory):
    """The folder of a walk and of the commands beside it, and the seconds that each of them took. Read it, never write into it."""
    folder = tmp_path_factory.mktemp("undisturbed") / "walk"
    seconds = dict(walk(commands, folder))
    write_further_inputs(folder)
    for name in FURTHER:
        began = time.monotonic()
        succeeds(start(commands, name, folder))
        seconds[name] = time.monotonic() - began
    return folder, seconds


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Every test of this folder counts in the table of `make faults`; without a marker its kind is the name of its file."""
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("fault") is None:
            item.add_marker(pytest.mark.fault(item.path.stem.removeprefix("test_").replace("_", " ")))
