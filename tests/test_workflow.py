"""A cohort through the workflow: one bad slide is reported and stops nobody; what is finished is left alone; what is mended joins."""
import csv
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from preprocessing.cohort import (
    CohortConfig,
    extract_arguments,
    forget_unfinished,
    input_files,
    is_as_finished,
    missing_files,
    read_cohort_config,
    read_cohort_sheet,
)
from preprocessing.done_manifests import write_done
from preprocessing.errors import InputError, OptionError
from preprocessing.png_folder import patch_folder_sha256
from preprocessing.simulate_sample import SimulateConfig, simulate_sample

ROOT = Path(__file__).resolve().parent.parent
HEADER = "sample_id,space_ranger_dir,wsi_file"


# ---- the sample sheet and the settings ------------------------------------------------------------------------------

@pytest.mark.parametrize(("text", "message"), [
    ("", "columns: expected sample_id"), (f"{HEADER}\n", "rows: expected one a sample; found none"),
    ("sample_id,wsi_file\nA,a.tif\n", "found no space_ranger_dir or gex_file"), ("sample_id,gex_file\nA,a.h5ad\n", "found no wsi_file"),
    (f"{HEADER},stian_file\nA,a,a.tif,s\n", "found unknown 'stian_file'"), (f"{HEADER},mpp,mpp\nA,a,a.tif,1,2\n", "repeated 1 (mpp)"),
    (f"{HEADER}\nA,a,a.tif\nA,b,b.tif\n", "sample_id: expected no value twice; found repeated 1 (A on lines 2 and 3)"),
    (f"{HEADER}\nB,b,b.tif\nA,a,a.tif\n,,\na,b,b.tif\n", "repeated 1 (a on lines 3 and 5)"),
    (f"{HEADER}\n,,\n , ,\n", "rows: expected one a sample; found none"),
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


def test_lines_of_nothing_but_commas_are_passed_over(tmp_path):
    (tmp_path / "sheet.csv").write_text(f"{HEADER}\n,,\nA,a,a.tif\n , ,\nB,b,b.tif\n,,\n")
    assert [(sample.sample_id, sample.line) for sample in read_cohort_sheet(tmp_path / "sheet.csv")] == [("A", 3), ("B", 5)]


def test_an_mpp_of_the_sheet_goes_before_that_of_the_slides_metadata(tmp_path):
    (tmp_path / "sheet.csv").write_text("sample_id,wsi_file,gex_file,mpp\nA,a.tif,a.h5ad,0.5\nB,b.tif,b.h5ad,\n")
    config = CohortConfig(samples=tmp_path / "sheet.csv", out_dir=tmp_path, use_wsi_res=True)
    own, found = (extract_arguments(config, sample) for sample in read_cohort_sheet(tmp_path / "sheet.csv"))
    assert "--mpp" in own and "--use-wsi-res" not in own and "--mpp" not in found and "--use-wsi-res" in found


def test_a_stain_file_of_the_sheet_goes_before_that_of_the_cohort_and_is_watched(tmp_path):
    for name in ("own.json", "all.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "sheet.csv").write_text(f"{HEADER},stain_file\nA,a,a.tif,own.json\nB,b,b.tif,\n")
    config = CohortConfig(samples=tmp_path / "sheet.csv", out_dir=tmp_path, stain_file=tmp_path / "all.json")
    for sample, name in zip(read_cohort_sheet(tmp_path / "sheet.csv"), ("own.json", "all.json"), strict=True):
        arguments = extract_arguments(config, sample)
        assert arguments[arguments.index("--stain-file") + 1] == str(tmp_path / name)
        assert input_files(config, sample) == [str(tmp_path / name)]
        plain = extract_arguments(CohortConfig(samples=tmp_path / "sheet.csv", out_dir=tmp_path, normalize=False), sample)
        assert "--stain-file" not in plain and "--no-normalize" in plain


# ---- what is finished -----------------------------------------------------------------------------------------------

@pytest.fixture
def finished(tmp_path):
    """A cohort of one sample, finished; returns (config, its samples, its folder)."""
    folder = tmp_path / "out" / "A"
    (folder / "patches").mkdir(parents=True)
    (folder / "patches" / "metadata.jsonl").write_text('{"file_name": "patch_0.png"}\n')
    (folder / "patches" / "patch_0.png").write_bytes(b"pixels")
    for name in ("gex.h5ad", "imgs.h5", "gex_filt.h5ad"):
        (folder / name).write_bytes(name.encode() * 9)
        write_done(folder / name, config={}, inputs={})
    write_done(folder / "patches", config={}, inputs={}, content_sha256=patch_folder_sha256(folder / "patches"))
    (folder / "steps").mkdir()
    for step in ("extract", "extracted", "genes"):
        (folder / "steps" / f"{step}.txt").write_text("finished\n")
    (tmp_path / "sheet.csv").write_text(f"{HEADER}\nA,a,a.tif\n")
    return CohortConfig(samples=tmp_path / "sheet.csv", out_dir=tmp_path / "out"), read_cohort_sheet(tmp_path / "sheet.csv"), folder


def truncate(path):
    """As a disk does that lost the end of a file: its time of change is of before."""
    about = path.stat()
    path.write_bytes(path.read_bytes()[:-1])
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def overwrite(path):
    path.write_bytes(b"x" * path.stat().st_size)


@pytest.mark.parametrize(("name", "damage", "left"), [
    ("gex_filt.h5ad", truncate, ["extract", "extracted"]), ("gex_filt.h5ad", overwrite, ["extract", "extracted"]),
    ("gex.h5ad", truncate, ["genes"]), ("imgs.h5", overwrite, ["genes"]), ("imgs.h5", Path.unlink, ["genes"]),
    ("patches/metadata.jsonl", overwrite, ["genes"]), ("patches/metadata.jsonl", Path.unlink, ["genes"]),
    ("patches/patch_0.png", truncate, ["genes"]), ("patches/patch_0.png", Path.unlink, ["genes"]),
    ("steps/genes.txt", lambda path: path.write_text("failed 3\n"), ["extract", "extracted"]),
    ("gex.h5ad", lambda path: path.touch(), ["extract", "extracted", "genes"]),
], ids=lambda value: value if isinstance(value, str) else None)
def test_a_step_whose_product_is_damaged_or_gone_is_due_again_and_no_other(finished, name, damage, left):
    config, samples, folder = finished
    damage(folder / name)
    forget_unfinished(config, samples)
    assert sorted(path.stem for path in (folder / "steps").iterdir()) == left


def test_without_an_hdf5_file_of_patches_none_is_asked_for(finished):
    config, samples, folder = finished
    (folder / "imgs.h5").unlink()
    config = replace(config, keep_hdf5=False)
    forget_unfinished(config, samples)
    assert (folder / "steps" / "extract.txt").is_file() and "--no-h5" in extract_arguments(config, samples[0])


def test_a_product_that_is_as_it_was_is_not_read(finished, monkeypatch):
    folder = finished[2]
    monkeypatch.setattr("preprocessing.cohort.file_sha256", lambda path: pytest.fail(f"read {path}"))
    assert is_as_finished(folder / "gex.h5ad") and not is_as_finished(folder / "absent.h5ad")


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


@pytest.mark.parametrize(("said", "meant"), [(True, True), (False, False), ("true", True), ("false", False), ("False", False)])
def test_yes_and_no_may_come_from_a_file_or_the_command_line(said, meant):
    assert read_cohort_config({"samples": "s", "out_dir": "o", "keep_hdf5": said}).keep_hdf5 is meant


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

    damaged, content = tmp_path / "out" / "VIS" / "gex_filt.h5ad", (tmp_path / "out" / "VIS" / "gex_filt.h5ad").read_bytes()
    truncate(damaged)
    before = times(tmp_path)
    code, said = snakemake(tmp_path, "--cores", 2, "--dry-run", **settings)
    assert code == 0 and times(tmp_path) == before, said                # a dry run changes nothing
    code, said = snakemake(tmp_path, "--cores", 2, **settings)
    assert code == 0 and said.count("rule genes:") == 1 and "rule extract:" not in said and len(damaged.read_bytes()) == len(content)


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
