"""Several ranks of one GAN run give what one gives, write once, and end together."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

JOB = Path(__file__).with_name("gan_rank_job.py")


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


def test_a_rank_that_ends_early_ends_the_job(tmp_path):
    done = start(tmp_path / "run", 2, fault="raise")
    assert done.returncode != 0 and not (tmp_path / "run" / "end.pt").exists()
