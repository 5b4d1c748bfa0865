"""Shared fixtures: the real data beside the repository, and one tiny simulated sample a platform.

A simulated sample is `preprocessing.simulate_sample.SimulatedSample`: `.folder`, `.space_ranger_dir`, `.slide`,
`.tissue_geojson`, `.truth`, `.sample_id`, `.mpp`. The folders are shared by the whole session: read them, never write
into them (`shutil.copytree` to a `tmp_path` first).
"""
from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import pytest
from fault_table import pytest_runtest_makereport, pytest_terminal_summary, tried  # noqa: F401  hooks and a fixture for all tests
from tiny_samples import tiny_sample
from tqdm import tqdm

# Tests kill forked children. One that dies while it draws its progress bar would keep tqdm's own lock, which all processes share.
tqdm.set_lock(threading.RLock())

@pytest.fixture(autouse=True)
def threads_of_torch():
    """A command called in this process may have said how many threads compute, on which the last bits of later tests would depend."""
    yield
    torch, threads = sys.modules.get("torch"), os.environ.get("OMP_NUM_THREADS")
    if torch is not None and threads is not None and torch.get_num_threads() != int(threads):
        torch.set_num_threads(int(threads))


LONGEST_FIRST = ("test_walks.py", "test_workflow.py")


def pytest_collection_modifyitems(items):
    """The longest files first, then those with slow tests: one that began last would leave the other cores idle."""
    slow = {item.path.name for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path.name not in LONGEST_FIRST, item.path.name not in slow))


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public samples beside the repository (`../shared/data`)."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real data not found at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def sim_v1(tmp_path_factory):
    """Visium, Space Ranger 1.x layout, 800 x 700 µm at 0.5 mpp, 120 genes."""
    return tiny_sample(tmp_path_factory.mktemp("sim_v1"), "visium-v1")


@pytest.fixture(scope="session")
def sim_v2(tmp_path_factory):
    """The same tissue, slide and counts as `sim_v1` in the Space Ranger 2.x layout."""
    return tiny_sample(tmp_path_factory.mktemp("sim_v2"), "visium-v2")


@pytest.fixture(scope="session")
def sim_hd(tmp_path_factory):
    """Visium HD, 2 µm bins, 600 x 500 µm at 0.5 mpp, 120 genes."""
    return tiny_sample(tmp_path_factory.mktemp("sim_hd"), "visium-hd", width_um=600, height_um=500)
