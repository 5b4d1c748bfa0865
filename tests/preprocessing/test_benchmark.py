"""The benchmark of preprocessing: its naive way computes the same, and its table says what was measured."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.preprocessing import Bench, growth, main
from benchmarks.stages import preprocessing as stages
from preprocessing.spot_sums import sum_blocks

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def job(sim_hd, tmp_path) -> stages.Job:
    return stages.Job(sim_hd.folder, tmp_path, workers=1, spots=20)


def run(units: int, wall_s: float, peak_gib: float = 1.0) -> dict:
    """What a stage printed; it used two cores."""
    return {"units": units, "unit": "spots", "wall_s": wall_s, "cpu_s": 2 * wall_s, "peak_gib": peak_gib}


def test_the_naive_sums_are_those_of_the_same_spots(job):
    sample, spots = job.windows()
    ours = next(sum_blocks(sample, spots, [stages.middle(len(spots), 20)]))
    found = stages.naive_sums(job)
    assert found["units"] == ours.shape[0] == 20 and found["entries"] == ours.nnz > 0


def test_the_naive_windows_are_pseudo_spots(job):
    _, spots = job.windows()
    assert stages.naive_windows(job)["units"] >= 20
    few = stages.Job(job.sample, job.out, 1, spots=10**9)          # all from the middle row down
    below = (spots.array_row >= spots.array_row[len(spots) // 2]).sum()
    assert stages.naive_windows(few)["units"] == below


def test_the_naive_pngs_look_as_ours(job, monkeypatch):
    from PIL import Image

    from preprocessing.stain import normalise_stain

    monkeypatch.setattr(stages.shutil, "rmtree", lambda *_, **__: None)
    patches, stain = stages._stained_patches(job, 20)
    assert stages.naive_stain_png(job)["units"] == 20
    naive = np.stack([np.asarray(Image.open(path)) for path in sorted((job.out / "naive_pngs").iterdir())])
    assert np.abs(naive.astype(int) - normalise_stain(patches, stain)).max() <= 1


def test_a_stage_run_on_its_own_prints_its_units_time_and_memory(job):
    answer = subprocess.run([sys.executable, "-m", "benchmarks.stages.preprocessing", "naive_cutting", job.sample, job.out, "1", "5"],
                            cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(answer.stdout)
    assert found["units"] == 5 and found["wall_s"] > 0 and found["cpu_s"] > 0 and 0.05 < found["peak_gib"] < 4


def test_a_row_gives_medians_and_the_ratio_of_naive_to_ours_a_unit(tmp_path):
    bench = Bench(tmp_path / "1000000", tmp_path, 2, 200)
    bench.runs = {"sums": [run(1000, 2.0, 1.5), run(1000, 1.0), run(1000, 9.0)], "naive_sums": [run(100, 4.0), run(100, 6.0)]}
    assert bench.row("sums") == ("| 1,000,000 | sums of pseudo-spots | 1,000 spots | 2.0 | 4.0 | 500 | 1.50 | 2.000 | 50.00 | 25.0 "
                                 "| 25.0 | >= 15x, RSS < 3 GiB |")
    bench.runs |= {"naive_read": [run(1000, 5.0)], "naive_windows": [run(10, 0.1)], "naive_cutting": [run(10, 0.4)],
                   "naive_writing": [run(100, 0.5)], "extraction": [run(1000, 10.0)]}
    assert "| 110.00 | 11.0 | 11.0 | >= 8x" in bench.row("extraction")     # 5 + 10 + 50 + 40 + 5 ms against 10 ms
    bench.runs |= {"stain_png": [run(1000, 2.0)], "naive_stain_png": [{**run(10, 0.1), "cpu_s": 0.08}], "torchstain_png": [run(10, 0.2)]}
    assert "| 10.00, torchstain 20.00 | 5.0, torchstain 10.0 | 2.0, torchstain 10.0 | >= 4x |" in bench.row("stain_png")


def test_a_stage_that_fails_has_a_row_that_says_so(tmp_path, capsys):
    bench = Bench(tmp_path / "62500", tmp_path, 1, 1)
    assert "| failed |" in bench.compare("read", 1) and bench.compare("read", 1).count("|") == 13
    assert "read failed:" in capsys.readouterr().err


def test_a_benchmark_with_a_stage_that_failed_prints_its_table_and_exits_with_1(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.preprocessing.simulate", lambda size, work: work / str(size))          # there is no sample
    result = CliRunner().invoke(main, ["--sizes", "62500", "--stages", "read", "--work", str(tmp_path)])
    assert result.exit_code == 1 and "| failed |" in result.output


def test_growth_is_measured_from_the_smallest_sample(tmp_path):
    benches = [Bench(tmp_path / size, tmp_path, 1, 1, {"read": [run(1, wall, memory)]})
               for size, wall, memory in (("62500", 2.0, 0.5), ("250000", 6.0, 1.0))]
    assert growth(benches, ["read", "sums"]) == "- read sample: bins x4: time x3.0, memory x2.0"


@pytest.mark.parametrize(("option", "value", "message"), [
    ("--sizes", "1000", "squares from 62500 on"), ("--sizes", "70000", "found 70000"), ("--sizes", "many", "found many"),
    ("--stages", "sums,fast", "found sums,fast"),
])
def test_wrong_options_of_the_benchmark_are_refused(option, value, message):
    result = CliRunner().invoke(main, [option, value])
    assert result.exit_code == 2 and message in result.output


def test_scripts_beside_the_benchmark_still_find_the_package_it_is_named_after():
    code = "import sys; sys.path.insert(0, 'benchmarks'); import preprocessing.errors; print(preprocessing.errors.__file__)"
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert Path(answer.stdout.strip()) == ROOT / "preprocessing" / "errors.py"
