"""`calculate_image_quality_metrics.py --report` with expression and training patches: faithfulness and memorisation on the page."""
import csv
import json
import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from clip_runs import GENES, write_sample
from PIL import Image

import calculate_image_quality_metrics as command
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder

N = 30


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sample A to judge by, B that was trained on. faithful/: patches of the spots' own colours, with noise; copies/: B's patches."""
    folder, rng = tmp_path_factory.mktemp("report"), np.random.default_rng(0)
    for seed, name in enumerate("AB"):
        write_sample(folder, name, N, seed)
    for name, of in (("faithful", "A"), ("copies", "B")):
        (folder / name).mkdir()
        rows = []
        for i, path in enumerate(sorted((folder / of / "patches").glob("*.png"))):
            patch = np.asarray(Image.open(path)).astype(int)
            noisy = np.clip(patch + (rng.normal(0, 6, patch.shape) if name == "faithful" else 0), 0, 255).astype(np.uint8)
            Image.fromarray(np.rot90(noisy, i % 4)).save(folder / name / f"p{i}.png")
            rows.append({"file": f"p{i}.png", "prompt": i, "barcode": f"A__A{i:03d}-1", "cluster": "", "seed": 0})
        with open(folder / name / "samples.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=8, gene_width=8, projection=8, image_encoder="random_tiny")
    CLIP(config, GENES, image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / "judge")
    return folder


def run(world, out, generated, *extra):
    return CliRunner().invoke(command.main, ["--experiment", "x", "--ref-img-path", str(world / "A" / "patches"), "--gen-img-path",
                                             str(world / generated), "--out-dir", str(out), "--features", "random_tiny", "--device", "cpu",
                                             "--splits", "2", *map(str, extra)], catch_exceptions=False)


def test_the_report_says_whether_patches_follow_their_genes_and_whether_they_are_copies(world, tmp_path):
    answer = run(world, tmp_path, "faithful", "--report", tmp_path / "index.html", "--gex", world / "A" / "gex_filt.h5ad", "--judge",
                 world / "judge", "--null-img-path", world / "copies", "--train-img-path", world / "B" / "patches")
    assert answer.exit_code == 0, answer.output
    record = json.loads((tmp_path / "index.json").read_text())
    readout = record["faithfulness"]["readout"]
    assert readout["generated"]["score"] > readout["shuffled"]["score"] + 0.1 and readout["share_of_ceiling"] > 0.5
    assert abs(readout["null"]["score"]) < readout["generated"]["score"]
    assert record["faithfulness"]["n_prompts"] == N and record["faithfulness"]["judge_sha256"]
    assert set(record["memorisation"]["encoders"]) == {"random_tiny", "pixels"} and record["memorisation"]["copies"] == 0
    assert record["memorisation"]["n_training"] == N
    page = (tmp_path / "index.html").read_text()
    for heading in ("Do they follow their genes?", "Are they copies?", "retrieval (R@10)"):
        assert heading in page
    assert page.count("data:image/png;base64,") == 4            # contact sheet, nuclei, tissue, nearest pairs
    assert "readout: generated" in answer.output and "memorisation: 0 of 30" in answer.output


def test_the_report_compares_cluster_by_cluster_where_spots_have_clusters(world, tmp_path):
    import anndata as ad
    genes = ad.read_h5ad(world / "A" / "gex_filt.h5ad")
    genes.obs["cluster"] = np.where(genes.X.toarray()[:, 0] > np.median(genes.X.toarray()[:, 0]), "red", "other")
    genes.write_h5ad(tmp_path / "gex.h5ad")
    answer = run(world, tmp_path, "faithful", "--report", tmp_path / "index.html", "--gex", tmp_path / "gex.h5ad")
    assert answer.exit_code == 0, answer.output
    (row,) = json.loads((tmp_path / "index.json").read_text())["rows"]
    assert [part["cluster"] for part in row["by_cluster"]] == ["other", "red"]
    assert all(part["FID_generated"]["mean"] < part["FID_others"]["mean"] for part in row["by_cluster"])
    page = (tmp_path / "index.html").read_text()
    assert "By cluster" in page and "made for others" in page and "FID at infinite n" in page


def test_copies_are_counted(world, tmp_path):
    answer = run(world, tmp_path, "copies", "--report", tmp_path / "index.html", "--train-img-path", world / "B" / "patches")
    assert answer.exit_code == 0 and "memorisation: 30 of 30 generated patches are copies (0 of 30 held-out ones)" in answer.output
    assert "faithfulness" not in json.loads((tmp_path / "index.json").read_text())


def test_without_these_options_the_report_is_as_before(world, tmp_path):
    assert run(world, tmp_path, "faithful", "--report", tmp_path / "index.html").exit_code == 0
    assert set(json.loads((tmp_path / "index.json").read_text())) == {"rows", "settings", "versions"}


@pytest.mark.parametrize(("extra", "message"), [
    (["--gex", "A/gex_filt.h5ad"], "expected --report"),
    (["--report", "r.html", "--judge", "judge"], "--judge: expected --gex beside it"),
    (["--report", "r.html", "--gex", "A/gex_filt.h5ad", "--patch-um", "0"], "--patch-um: expected more than 0"),
    (["--report", "r.html", "--patch-um", "0"], "--patch-um: expected --gex beside it"),
    (["--report", "r.html", "--gex", "A/gex_filt.h5ad", "--judge-encoder-weights", "w.pt"], "expected --judge beside it"),
    (["--report", "r.json"], "--report: expected the .html page; its numbers go into the .json of that name; found r.json"),
], ids=["no report", "judge without expression", "no side", "side without expression", "tower of no judge", "json as page"])
def test_options_that_need_others_say_so(world, tmp_path, extra, message):
    answer = run(world, tmp_path, "faithful", *extra)
    assert answer.exit_code == 2 and message in answer.output and not (tmp_path / "image_quality_metrics.csv").exists()


def test_a_generated_folder_without_samples_csv_cannot_be_paired(world, tmp_path):
    shutil.copytree(world / "faithful", tmp_path / "bare")
    (tmp_path / "bare" / "samples.csv").unlink()
    answer = CliRunner().invoke(command.main, ["--experiment", "x", "--ref-img-path", str(world / "A" / "patches"), "--gen-img-path",
                                               str(tmp_path / "bare"), "--out-dir", str(tmp_path / "out"), "--features", "random_tiny",
                                               "--device", "cpu", "--report", str(tmp_path / "out" / "r.html"),
                                               "--gex", str(world / "A" / "gex_filt.h5ad")])
    assert answer.exit_code == 3 and "samples.csv: file: expected the list that gen_images.py writes" in answer.output


@pytest.mark.parametrize(("extra", "code", "message"), [
    (["--gex", "A/gex_filt.h5ad", "--judge", "nowhere"], 3, "nowhere: folder: expected a weights folder"),
    (["--gex", "nowhere.h5ad"], 3, "nowhere.h5ad: file: expected an .h5ad file"),
    (["--gex", "B/gex_filt.h5ad"], 3, "found no patch for 30"),
    (["--train-img-path", "nowhere"], 3, "nowhere: folder: expected a folder of images"),
    (["--gex", "A/gex_filt.h5ad", "--null-img-path", "nowhere"], 3, "nowhere: folder: expected a folder of images"),
], ids=["no judge", "no expression", "expression of others", "no training patches", "no null patches"])
def test_what_the_report_cannot_use_is_said_before_the_work_and_leaves_no_row(world, tmp_path, extra, code, message):
    answer = run(world, tmp_path, "faithful", "--report", tmp_path / "r.html",
                 *(part if part.startswith("--") else world / part for part in extra))
    assert answer.exit_code == code and message in answer.output and "image/s" not in answer.output
    assert not list(tmp_path.iterdir())


def test_training_patches_are_no_held_out_reference(world, tmp_path):
    answer = run(world, tmp_path, "faithful", "--report", tmp_path / "r.html", "--train-img-path", world / "A" / "patches")
    assert answer.exit_code == 2 and "--train-img-path: expected other folders than --ref-img-path" in answer.output
    shutil.copytree(world / "A" / "patches", tmp_path / "renamed")
    answer = run(world, tmp_path / "out", "faithful", "--report", tmp_path / "r.html", "--train-img-path", tmp_path / "renamed")
    assert answer.exit_code == 3 and "reference: expected held-out patches, which the generator was not trained on" in answer.output
    assert "found the same files as in --train-img-path: 30" in answer.output
    assert not (tmp_path / "out" / "image_quality_metrics.csv").exists()
