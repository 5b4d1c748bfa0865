"""A cohort through the workflow: one bad slide is reported and stops nobody; what is finished is left alone; what is mended joins."""
import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from preprocessing.cohort import CohortConfig, missing_files, patches_arguments, read_cohort_config, read_cohort_sheet
from preprocessing.errors import InputError, OptionError
from preprocessing.simulate_sample import SimulateConfig, simulate_sample

ROOT = Path(__file__).resolve().parent.parent
HEADER = "sample_id,space_ranger_dir,wsi_file"


# ---- the sample sheet and the settings ------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "message"), [
    ("", "columns: expected sample_id"), (f"{HEADER}\n", "rows: expected one a sample; found none"),
    ("sample_id,wsi_file\nA,a.tif\n", "found no space_ranger_dir or gex_file"), ("sample_id,gex_file\nA,a.h5ad\n", "found no wsi_file"),
    (f"{HEADER},stian_file\nA,a,a.tif,s\n", "found unknown 'stian_file'"), (f"{HEADER},mpp,mpp\nA,a,a.tif,1,2\n", "repeated 1 (mpp)"),
    (f"{HEADER}\nA,a,a.tif\nA,b,b.tif\n", "sample_id: expected no value twice; found repeated 1 (A on line 3)"),
    (f"{HEADER}\nA,a,a.tif\na,b,b.tif\n", "repeated 1 (a on line 3)"),
    (f"{HEADER}\n\nA,a,\n", "line 3: expected wsi_file filled; found an empty cell"),
    (f"{HEADER}\nA,,a.tif\n", "line 2: expected either space_ranger_dir or gex_file filled; found neither"),
    (f"{HEADER},gex_file\nA,a,a.tif,a.h5ad\n", "found both"),
    (f"{HEADER}\nA,a,a.tif,b\n", "line 2: expected one cell a column; found more: 'b'"),
    (f"{HEADER}\nA/B,a,a.tif\n", "found 'A/B'"), (f"{HEADER}\n../A,a,a.tif\n", "found '../A'"),
    (f"{HEADER}\nlogs,a,a.tif\n", "found 'logs'"),
    (f"{HEADER},mpp\nA,a,a.tif,half\n", "line 2: expected mpp: a positive number; found 'half'"),
    (f"{HEADER},mpp\nA,a,a.tif,-1\n", "found '-1'"), (f"{HEADER},spot_um\nA,a,a.tif,55\n", "spot_um only beside gex_file"),
])
def test_a_wrong_sheet_is_refused_by_file_and_line(tmp_path, text, message):
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(text)
    with pytest.raises(InputError) as error:
        read_cohort_sheet(sheet)
    assert str(sheet) in str(error.value) and message in str(error.value)


def test_every_column_of_the_sheet_reaches_its_sample_and_paths_are_beside_the_sheet_first(tmp_path):
    for name in ("a.tif", "a.h5ad"):
        (tmp_path / name).write_text("")
    (tmp_path / "sheet.csv").write_text("sample_id,wsi_file,gex_file,mpp,spot_um,stain_file\n A , a.tif ,a.h5ad,0.5,100,gone.json\n")
    [sample] = read_cohort_sheet(tmp_path / "sheet.csv")
    assert (sample.sample_id, sample.wsi_file, sample.gex_file) == ("A", tmp_path / "a.tif", tmp_path / "a.h5ad")
    assert (sample.mpp, sample.spot_um, sample.stain_file) == (0.5, 100.0, Path("gone.json"))
    assert list(missing_files("s.csv", [sample])) == ["s.csv: line 2: stain_file: expected a file; found no gone.json"]


def test_a_stain_file_of_the_sheet_goes_before_that_of_the_cohort(tmp_path):
    (tmp_path / "sheet.csv").write_text(f"{HEADER},stain_file\nA,a,a.tif,own.json\nB,b,b.tif,\n")
    own, other = read_cohort_sheet(tmp_path / "sheet.csv")
    config = CohortConfig(samples=tmp_path / "sheet.csv", out_dir=tmp_path, stain_file=Path("all.json"))
    assert patches_arguments(config, own)[-1] == "own.json" and patches_arguments(config, other)[-1] == "all.json"


@pytest.mark.parametrize(("settings", "message"), [
    ({"strdie": 5}, "config: strdie: expected one of samples"),
    ({"stride": "five"}, "config: stride: expected a whole number; found 'five'"),
    ({"stride": True}, "config: stride"), ({"normalize": "no"}, "config: normalize: expected true or false"), ({"stride": 0}, "--stride"),
    ({"edge": "crop"}, "edge: expected one of drop, pad"), ({"memory_gb": 0}, "memory_gb: expected at least 1"),
    ({"samples": None}, "config: samples: expected a path"), ({"normalize": False, "stain_file": "s.json"}, "stain_file: expected nothing"),
])
def test_a_wrong_setting_is_refused_by_name(settings, message):
    with pytest.raises(OptionError, match=message.replace("(", r"\(")):
        read_cohort_config({"samples": "sheet.csv", "out_dir": "out", **settings})


def test_the_config_file_lists_every_setting_with_its_default():
    listed = yaml.safe_load((ROOT / "workflow" / "config.yaml").read_text())
    assert read_cohort_config(listed | {"samples": "s", "out_dir": "o"}) == CohortConfig(samples=Path("s"), out_dir=Path("o"))
    assert set(listed) == set(CohortConfig.__dataclass_fields__)


# ---- the workflow ---------------------------------------------------------------------------------------------------

def snakemake(folder, *arguments, profile="local", **config):
    """Run the workflow in `folder`; returns (exit code, what it said)."""
    pytest.importorskip("snakemake", reason="the optional extra requirements-cohort.txt is not installed (Snakemake 9 needs Python 3.11)")
    settings = [f"{name}={value}" for name, value in config.items()]
    workflow = ROOT / "workflow"
    command = [sys.executable, "-m", "snakemake", "-s", workflow / "Snakefile", "--profile", workflow / "profiles" / profile, *arguments,
               "--config", *settings]
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=280,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def cohort(tmp_path, sim_v2, sim_hd):
    """Three samples, the slide of the third cut off; returns (settings, its slide, the whole slide)."""
    broken = simulate_sample(SimulateConfig(out_dir=tmp_path / "broken", platform="visium-v1", sample_id="BROKEN", width_um=600,
                                            height_um=600, genes=120, seed=5, region_um=150))
    whole = tmp_path / "whole.tif"
    shutil.copy(broken.slide, whole)
    broken.slide.write_bytes(whole.read_bytes()[:whole.stat().st_size // 3])
    samples = {"VIS": sim_v2, "HD": sim_hd, "BROKEN": broken}
    lines = [f"{name},{sample.space_ranger_dir},{sample.slide}" for name, sample in samples.items()]
    (tmp_path / "sheet.csv").write_text("\n".join([HEADER, *lines]) + "\n")
    return {"samples": "sheet.csv", "out_dir": "out", "stride": 13, "vocab_min_counts": 0}, broken.slide, whole


def table(folder):
    with open(folder / "out" / "cohort.csv", newline="") as stream:
        return {row["sample_id"]: row for row in csv.DictReader(stream)}


def times(folder):
    """Time of last change of everything of the two whole samples but logs."""
    return {path: path.stat().st_mtime_ns for name in ("VIS", "HD") for path in sorted((folder / "out" / name).rglob("*"))
            if path.is_file() and not path.name.endswith(".lock")}


def test_one_bad_slide_stops_nobody_and_joins_once_mended(tmp_path, cohort):
    settings, slide, whole = cohort

    code, said = snakemake(tmp_path, "--cores", 2, **settings)
    assert code != 0, said
    rows, page = table(tmp_path), (tmp_path / "out" / "cohort.html").read_text()
    assert [rows[name]["status"] for name in ("VIS", "HD", "BROKEN")] == ["finished", "finished", "failed"], said
    assert "truncated" in rows["BROKEN"]["reason"] and "truncated" in page and str(slide) in page
    assert int(rows["HD"]["spots_kept"]) > 0 and float(rows["VIS"]["median_umis"]) > 0 and rows["HD"]["eosin_g"]
    assert int(rows["HD"]["spots_dropped"]) > 0                      # windows with a bin outside tissue
    genes = (tmp_path / "out" / "vocab.txt").read_text()
    assert len(genes.splitlines()) == 120                            # of the two that ended well
    for name in ("VIS", "HD"):
        assert (tmp_path / "out" / name / "gex_filt.h5ad").is_file() and (tmp_path / "out" / name / "patches" / "metadata.jsonl").is_file()
    vocab = tmp_path / "vocab.txt"
    vocab.write_text(genes)

    # with a vocabulary at hand, nothing of a finished sample is looked at again
    settings["vocab_file"] = vocab
    snakemake(tmp_path, "--cores", 2, **settings)
    before = times(tmp_path)
    code, said = snakemake(tmp_path, "--cores", 2, **settings)
    assert code != 0 and "truncated" in table(tmp_path)["BROKEN"]["reason"]
    assert times(tmp_path) == before
    assert said.count("rule extract:") == 1 and "sample=VIS" not in said and "sample=BROKEN" in said

    shutil.copy(whole, slide)
    code, said = snakemake(tmp_path, "--cores", 2, **settings)
    assert code == 0, said
    assert {row["status"] for row in table(tmp_path).values()} == {"finished"}
    assert "truncated" not in (tmp_path / "out" / "cohort.html").read_text()
    assert times(tmp_path) == before
    code, said = snakemake(tmp_path, "--cores", 2, **settings)
    assert code == 0 and "Nothing to be done" in said


def test_a_slide_that_is_not_there_is_named_with_its_line_before_anything_runs(tmp_path):
    (tmp_path / "sheet.csv").write_text(f"{HEADER}\nA,nowhere,a.tif\n")
    code, said = snakemake(tmp_path, "--dry-run", samples="sheet.csv", out_dir="out")
    assert code == 0, said
    assert "warning: sheet.csv: line 2: wsi_file: expected a file; found no a.tif: this sample will fail" in said


@pytest.mark.parametrize(("settings", "message"), [
    ({"samples": "sheet.csv"}, "config: out_dir: expected a path"),
    ({"samples": "none.csv", "out_dir": "out"}, "none.csv: file: expected a sample"),
    ({"samples": "sheet.csv", "out_dir": "out", "vocab_file": "v.txt"}, "v.txt: file: expected a gene vocabulary; found nothing there"),
    ({"samples": "sheet.csv", "out_dir": "out", "strdie": 3}, "config: strdie"),
], ids=["no folder", "no sheet", "no vocabulary", "unknown setting"])
def test_wrong_settings_end_the_workflow_in_a_line(tmp_path, settings, message):
    (tmp_path / "sheet.csv").write_text(f"{HEADER}\nA,nowhere,a.tif\n")
    code, said = snakemake(tmp_path, "--dry-run", **settings)
    assert code != 0 and message in said and "Traceback" not in said


def test_the_slurm_profile_plans_the_same_jobs(tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="the optional extra requirements-cohort.txt is not installed")
    (tmp_path / "sheet.csv").write_text(f"{HEADER}\nA,nowhere,a.tif\nB,nowhere,b.tif\n")
    code, said = snakemake(tmp_path, "--dry-run", profile="slurm", samples="sheet.csv", out_dir="out", memory_gb=12, threads=4)
    assert code == 0, said
    assert said.count("rule extract:") == 2 and "mem_mb=12000" in said and "cpus_per_task=4" in said and "runtime=240" in said
