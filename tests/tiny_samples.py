"""Simulate tiny samples for tests: the real formats, in a second or two."""
from __future__ import annotations

from pathlib import Path


def tiny_sample(folder: Path, platform: str, **options):
    """Simulate a tiny sample of one platform into `folder`; `options` override the fields of `SimulateConfig`."""
    from preprocessing.simulate_sample import SimulateConfig, simulate_sample

    fields = {"sample_id": "TINY", "width_um": 800, "height_um": 700, "mpp": 0.5, "genes": 120, "seed": 1, "region_um": 150, **options}
    return simulate_sample(SimulateConfig(out_dir=folder / "sample", platform=platform, **fields))
