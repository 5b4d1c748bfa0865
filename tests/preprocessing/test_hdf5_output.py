"""A disk that takes no more and Ctrl-C end as one error and their exit code, never as a crash of the interpreter."""
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))\n"
PATCHES = """
import numpy as np
from preprocessing.errors import one_line_errors
from preprocessing.patch_file import write_patch_file
noise = np.random.default_rng(0).integers(0, 255, (500, 64, 64, 3), dtype=np.uint8)
with one_line_errors():
    write_patch_file("out.h5", noise, count=500, patch_px=64, coords=np.zeros((500, 2), int), barcodes=None, patch_size_src=64,
                     pixel_size=0.5, name="S")
"""
EXPRESSION = """
import anndata, numpy as np, scipy.sparse as sp
from preprocessing.errors import one_line_errors
from preprocessing.expression import write_expression
counts = np.random.default_rng(0).integers(0, 60000, (1500, 1500))
with one_line_errors():
    write_expression("out.h5", anndata.AnnData(sp.csr_matrix(counts)))
"""


@pytest.mark.parametrize("program", [PATCHES, EXPRESSION], ids=["patches", "expression"])
def test_a_full_disk_is_exit_code_4_and_the_old_file_stays(tmp_path, program):
    (tmp_path / "out.h5").write_text("old")
    done = subprocess.run([sys.executable, "-c", LIMITED + program], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "out.h5").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


INTERRUPTED = """
import io, os, signal, sys
from preprocessing import hdf5_output

class Interrupted(io.FileIO):
    n_writes = 0
    def write(self, data):
        Interrupted.n_writes += 1
        if Interrupted.n_writes == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGINT)
        return super().write(data)

hdf5_output.open = lambda path, mode, buffering: Interrupted(path, mode)
"""


@pytest.mark.parametrize("number", [1, 100, 503, 505], ids=["at the first write", "among the patches", "at closing", "at the last write"])
def test_ctrl_c_within_a_write_is_exit_code_130_and_the_old_file_stays(tmp_path, number):
    (tmp_path / "out.h5").write_text("old")
    program = INTERRUPTED + PATCHES + "print(Interrupted.n_writes)"
    done = subprocess.run([sys.executable, "-c", program, str(number)], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 130, (done.returncode, done.stdout, done.stderr)
    assert done.stderr == "error: interrupted; what was finished is kept, run the same command again\n"
    assert (tmp_path / "out.h5").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_ctrl_c_within_a_write_ends_the_command_then_and_not_after_the_last_patch(tmp_path):
    patches = PATCHES.replace('"out.h5", noise', '"out.h5", (time.sleep(0.1) or noise[i] for i in range(500))')      # 50 s
    done = subprocess.run([sys.executable, "-c", "import time" + INTERRUPTED + patches, "40"], cwd=tmp_path, capture_output=True, text=True,
                          env={"PYTHONPATH": str(ROOT)}, timeout=40)
    assert done.returncode == 130, (done.returncode, done.stderr)
    assert done.stderr == "error: interrupted; what was finished is kept, run the same command again\n" and not list(tmp_path.iterdir())
