"""`perturb.py` end to end on an untrained snapshot: files, the same noise as gen_images.py, refusals."""
import csv
import errno
import json
import os

import numpy as np
import pytest
from output_contents import contents, differences, leftovers
from PIL import Image
from sampling_world import PX, N, call, make_world

import gen_images
import perturb


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("perturb"))


def run(world, outdir, **options):
    return call(perturb, **{"network": world / "snapshot", "gex": world / "gex.h5ad", "genes": "gene0:+3,gene4:0", "seeds": "0-1",
                            "spots": "AAAC0003-1,5", "controls": 0, "outdir": outdir, **options})


def read(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pairs_a_table_effects_and_a_page_are_written(world, tmp_path):
    answer = run(world, tmp_path, controls=19)
    assert answer.exit_code == 0, answer.output
    names = {f"spot{spot:05d}_seed{seed:04d}_{name}.png" for spot in (3, 5) for seed in (0, 1)
             for name in ("before", "after", "difference")}
    assert {path.name for path in tmp_path.glob("*.png")} == names
    assert (read(tmp_path / "spot00003_seed0000_before.png") != read(tmp_path / "spot00003_seed0000_after.png")).any()
    rows = list(csv.DictReader((tmp_path / "perturbation.csv").open()))
    assert [(row["spot"], row["barcode"], row["seed"]) for row in rows] == [
        (spot, barcode, seed) for spot, barcode in (("3", "AAAC0003-1"), ("5", "AAAC0005-1")) for seed in ("0", "1")]
    record = json.loads((tmp_path / "perturbation.json").read_text())
    change = np.mean([float(row["haematoxylin_after"]) - float(row["haematoxylin_before"]) for row in rows])
    assert record["effects"]["haematoxylin"]["change"] == pytest.approx(change, abs=1e-5)
    assert record["effects"]["haematoxylin"]["n_random_sets"] == 19 and record["changes"] == "gene0 +3, gene4 = 0"
    page = (tmp_path / "index.html").read_text()
    assert "gene0 +3, gene4 = 0" in page and page.count("data:image/png;base64,") == 2 and "http" not in page.replace("http-equiv", "")
    assert f"wrote {tmp_path / 'perturbation.csv'}" in answer.output


def test_patches_before_are_those_of_gen_images_for_the_same_spot_and_seed(world, tmp_path):
    assert run(world, tmp_path / "pairs").exit_code == 0
    assert call(gen_images, network=world / "snapshot", gex=world / "gex.h5ad", seeds="0-1", outdir=tmp_path / "made").exit_code == 0
    for spot in (3, 5):
        before, made = (read(tmp_path / name) for name in (f"pairs/spot{spot:05d}_seed0001_before.png",
                                                           f"made/prompt{spot:05d}_seed0001.png"))
        assert before.shape == (PX, PX, 3) and np.abs(before - made).max() <= 1


def test_the_same_call_gives_the_same_files(world, tmp_path):
    for name in ("one", "two"):
        assert run(world, tmp_path / name, controls=19, batch_sz=3 if name == "one" else 16).exit_code == 0
    one, two = (json.loads((tmp_path / name / "perturbation.json").read_text())["effects"] for name in ("one", "two"))
    assert one["eosin"]["random_sets_95"] == pytest.approx(two["eosin"]["random_sets_95"], abs=2e-3)


def test_spots_of_a_cluster_are_drawn(world, tmp_path):
    import anndata as ad
    stroma = set(np.flatnonzero(ad.read_h5ad(world / "gex.h5ad").obs["cluster"] == "stroma"))
    answer = call(perturb, network=world / "snapshot", gex=world / "gex.h5ad", genes="gene0:+1", cluster="stroma", n_spots=3, seeds="4",
                  controls=0, outdir=tmp_path)
    assert answer.exit_code == 0, answer.output
    spots = {int(row["spot"]) for row in csv.DictReader((tmp_path / "perturbation.csv").open())}
    assert len(spots) == 3 and spots <= stroma


def test_a_second_call_leaves_no_pictures_of_the_first(world, tmp_path):
    assert run(world, tmp_path).exit_code == 0
    (tmp_path / "spot_of_mine.png").write_bytes(b"mine")
    assert run(world, tmp_path, genes="gene1:0", spots="7", seeds="4").exit_code == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"spot_of_mine.png", *(f"spot00007_seed0004_{name}.png" for name in (
        "before", "after", "difference"))}


def test_a_second_call_on_a_full_disk_leaves_all_of_the_first(world, tmp_path, monkeypatch):
    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    assert run(world, tmp_path).exit_code == 0
    before = contents(tmp_path)
    monkeypatch.setattr("training.perturbation.write_perturbation_page", full)          # the last that is written
    answer = run(world, tmp_path, genes="gene1:0", seeds="0-2")
    assert answer.exit_code == 4 and str(tmp_path / "index.html") in answer.output, answer.output
    assert differences(contents(tmp_path), before) == [] and leftovers(tmp_path) == []


def test_one_seed_has_no_interval_and_says_so(world, tmp_path):
    answer = run(world, tmp_path, seeds="3")
    page = (tmp_path / "index.html").read_text()
    assert answer.exit_code == 0 and "no interval: it takes two seeds or more" in answer.output and "nan to" not in answer.output
    assert "One seed cannot say how sure a change is" in page and "(- to -)" not in page and "beyond what seeds do" not in page


@pytest.mark.parametrize(("options", "code", "message"), [
    ({"genes": "nobody:+1"}, 3, "expected some of the 12 genes of the model, or sets of --gene-sets; found others: 1 (nobody)"),
    ({"spots": "nowhere"}, 3, f"--spots: expected barcodes, or rows 0 to {N - 1}, each once; found 1 (nowhere)"),
    ({"cluster": "stroma"}, 2, "--spots: expected these, or --cluster, not both"),
    ({"controls": 5}, 2, "--controls: expected 0, or at least 19"),
    ({"patch_um": -1}, 2, "--patch-um: expected more than 0"),
], ids=["unknown gene", "unknown spot", "spots and cluster", "few controls", "negative side"])
def test_what_cannot_be_done_is_said_in_one_line(world, tmp_path, options, code, message):
    answer = run(world, tmp_path / "out", **options)
    assert answer.exit_code == code and message in answer.output and not (tmp_path / "out").exists()
