"""The two walks a newcomer types, run from end to end on a small budget."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parent.parent
RETRIEVAL_KEYS = {"r1", "r5", "r10", "median_rank", "r10_ci95", "chance_r10"}


def bash(command: str, **variables: str) -> str:
    """Run a walk with this interpreter's environment first in PATH; it must succeed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env={**os.environ, "VIRTUAL_ENV": str(Path(sys.executable).parents[1]),
                                                                  "PATH": path, **variables}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_ends_with_a_page_and_starts_nothing_twice(tmp_path):
    settings = {"DEMO_OUT": str(tmp_path / "demo"), "DEMO_UM": "700", "DEMO_MINUTES": "0.5"}
    bash("bash assets/demo.sh", **settings)
    page = (tmp_path / "demo" / "index.html").read_text()
    assert "data:image/png;base64," in page
    row = (tmp_path / "demo" / "image_quality_metrics.csv").read_text().splitlines()
    assert row[0].startswith("experiment,FID,KID_mean,KID_std,seed") and row[1].startswith("demo,")
    snapshots = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "gan").rglob("model.safetensors")}
    assert len(snapshots) >= 3      # five where the machine is not so busy that a step is a tenth of the run
    again = bash("bash assets/demo.sh", **settings)
    assert "[gan] finished before" in again and "[clip] finished before" in again
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo" / "gan").rglob("model.safetensors")} == snapshots


STEP = """
set -eu
OUT=$PWD source "$STEPS"
OUT=$PWD
step_once gan gan bash -c "$1"
"""
WRITES = "mkdir -p gan; echo made >> gan/made"


def run_step(folder: Path, command: str) -> subprocess.CompletedProcess:
    return subprocess.run(["bash", "-c", STEP, "step", command], cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "STEPS": str(ROOT / "assets" / "steps.sh")})


@pytest.mark.parametrize(("before", "aside"), [(None, True), (WRITES, False), (f"{WRITES}; echo other", True)],
                         ids=["somebody's own", "finished before", "of other settings"])
def test_a_step_sets_aside_what_it_did_not_make(tmp_path, before, aside):
    if before:
        assert run_step(tmp_path, before).returncode == 0
    else:
        (tmp_path / "gan").mkdir()
    done = run_step(tmp_path, WRITES)
    assert (done.returncode, (tmp_path / "gan" / "made").read_text()) == (0, "made\n")
    assert (tmp_path / "gan.before-1").is_dir() == aside == ("it stands as gan.before-1 now" in done.stderr)


def test_an_interrupted_step_goes_on_where_it_was(tmp_path):
    command = f"{WRITES}; [ -e room ]"
    assert run_step(tmp_path, command).returncode == 1
    (tmp_path / "room").touch()
    assert run_step(tmp_path, command).returncode == 0
    assert (tmp_path / "gan" / "made").read_text() == "made\n" * 2 and not (tmp_path / "gan.before-1").exists()


def fewer_spots(section: Path, folder: Path, every: int) -> None:
    """A section of which only every second, third, ... spot counts as tissue."""
    folder.mkdir(parents=True)
    for name in ("image.jpg", "counts.tsv.gz", "clusters.tsv.gz"):
        (folder / name).symlink_to(section / name)
    spots = pd.read_csv(section / "spots.tsv", sep="\t")
    spots["selected"] = (spots.index.to_numpy() % every == 0).astype(int)
    spots.to_csv(folder / "spots.tsv", sep="\t", index=False)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_real_tissue_walk_scores_a_held_out_section(tmp_path, shared_data):
    out, sections = tmp_path / "her2st", tmp_path / "sections"
    for name, every in (("C2", 2), ("C3", 2), ("C4", 4)):      # CLIP trains on batches of 128 spots
        fewer_spots(shared_data / "her2st" / name, sections / name, every)
    bash(f"bash assets/real_tissue.sh --data {sections} --train C2,C3 --val C4 --out {out} --budget-minutes 0.6")
    results = json.loads((out / "results.json").read_text())
    section = results["sections"]["C4"]
    assert 40 < section["n_spots"] < 50
    for scores in (section["retrieval"], section["baseline_linear"]):
        assert RETRIEVAL_KEYS <= set(scores["gene_to_image"]) and RETRIEVAL_KEYS <= set(scores["image_to_gene"])
    assert section["baseline_linear"]["gene_to_image"]["r10"] > section["baseline_linear"]["gene_to_image"]["chance_r10"]
    for distances in (section["frechet"], section["kid"]):
        assert "efficientnet_lite0" in distances
        for features in distances.values():
            assert {"generated", "real_vs_real", "untrained"} <= set(features)
            assert features["real_vs_real"]["mean"] < features["generated"]["mean"]
    assert results["wall_time_s"]["gan"] > 0
    assert (out / "index.html").exists()


@pytest.mark.parametrize(("arguments", "exit_code", "message"), [
    ("", 2, "are required"), ("--data D --train A --val A --out O", 2, "named by --train and by --val"),
    ("--data D --train A --val B --out O", 3, "D/A/image.jpg: section: expected"), ("--colour red", 2, "unknown option --colour"),
    ("--data D --train A --val", 2, "--val needs a value"),
], ids=["nothing", "overlap", "no such section", "unknown option", "no value"])
def test_a_mistake_in_the_real_tissue_command_is_one_line(arguments, exit_code, message, tmp_path):
    walk = ROOT / "assets" / "real_tissue.sh"
    done = subprocess.run(["bash", str(walk), *arguments.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == exit_code
    assert message in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
