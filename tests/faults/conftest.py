"""What the fault tests share: a server of commands and a tiny Visium HD sample."""
from pathlib import Path

import pytest
from fault_runs import CommandServer
from tiny_samples import tiny_sample

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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Every test of this folder counts in the table of `make faults`; without a marker its kind is the name of its file."""
    for item in items:
        if item.path.parent == HERE and item.get_closest_marker("fault") is None:
            item.add_marker(pytest.mark.fault(item.path.stem.removeprefix("test_").replace("_", " ")))
