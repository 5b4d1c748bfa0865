"""What the fault tests share: a server of commands and a tiny Visium HD sample."""
import pytest
from fault_runs import CommandServer
from tiny_samples import tiny_sample


@pytest.fixture(scope="module")
def server():
    running = CommandServer()
    yield running
    running.close()


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """Visium HD, 420 x 380 µm, 60 genes: an extraction of seconds. Read it, never write into it."""
    return tiny_sample(tmp_path_factory.mktemp("faults"), "visium-hd", width_um=420, height_um=380, genes=60)
