"""`interpretability.py`: a table of attributions, its record, and one line where labels or pictures are wrong."""
import json

import numpy as np
import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from clip_runs import GENES, write_sample
from PIL import Image

import interpretability
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from training.data import expression_only

N = 32


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Sample A of 32 spots, labels of two clusters (red spots and others), an untrained CLIP of its genes, and one that scales samples."""
    folder = tmp_path_factory.mktemp("interpretability")
    write_sample(folder, "A", N, 0)
    expression = expression_only(folder / "A" / "gex_filt.h5ad").expression.toarray()
    labels = np.where(expression[:, 0] > np.median(expression[:, 0]), "red", "other")
    np.save(folder / "labels.npy", labels)
    pd.DataFrame({"spot": range(N), "label": labels}).to_csv(folder / "labels.csv", index=False)
    for name, changes in (("clip", {}), ("scaled", {"gene_sample_scaling": "centre", "feature_sample_scaling": "centre"})):
        torch.manual_seed(0)
        config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=16, gene_width=16, projection=8, image_encoder="random_tiny",
                                 **changes)
        CLIP(config, GENES, image_encoder=build_encoder("random_tiny")).eval().save_pretrained(folder / name)
    return folder


def run(world, out, *extra, labels="labels.npy", network="clip"):
    labels = str(world / labels) if "." in labels else labels
    return CliRunner().invoke(interpretability.main, ["--network", str(world / network), "--gex", str(world / "A" / "gex_filt.h5ad"),
                                                      "--cluster-labs", labels, "--out-file", str(out / "genes.csv"),
                                                      "--device", "cpu", *map(str, extra)])


def table(out):
    return pd.read_csv(out / "genes.csv", index_col="gene")


@pytest.mark.parametrize("network", ["clip", "scaled"])
def test_every_ordered_pair_of_clusters_has_a_column_under_the_clusters_own_names(world, tmp_path, network):
    answer = run(world, tmp_path, network=network)
    assert answer.exit_code == 0, answer.output
    genes = table(tmp_path)
    assert genes.index.tolist() == GENES and genes.columns.tolist() == ["other vs. red", "red vs. other"]
    assert (genes >= 0).all().all() and (genes > 0).any().all()
    assert ((genes["other vs. red"] > 0) & (genes["red vs. other"] > 0)).sum() == 0      # a gene is higher in one of the two
    record = json.loads((tmp_path / "genes.json").read_text())
    clip = CLIP.from_pretrained(world / network, image_encoder=False)
    expression = expression_only(world / "A" / "gex_filt.h5ad", target_sum=clip.target_sum).expression.toarray()
    labels = np.load(world / "labels.npy")
    rows = torch.from_numpy(expression - (expression.mean(axis=0) if network == "scaled" else 0)).float()
    with torch.no_grad():
        red, other = (clip.encode_genes(rows[torch.from_numpy(labels == name)].mean(0)[None]) for name in ("red", "other"))
    for pair in record["pairs"].values():
        assert pair["distance_change"] == pytest.approx((red - other).square().sum().item(), rel=1e-3)
        assert pair["sum"] == pytest.approx(pair["distance_change"], rel=0.01) and pair["convergence_delta"] < 0.01
    assert "convergence delta: largest" in answer.output and f"wrote {tmp_path / 'genes.csv'}" in answer.output


def test_labels_come_alike_from_npy_csv_and_an_obs_column(world, tmp_path):
    import anndata as ad
    genes = ad.read_h5ad(world / "A" / "gex_filt.h5ad")
    genes.obs["kind"] = np.load(world / "labels.npy")
    genes.write_h5ad(tmp_path / "with_kind.h5ad")
    tables = []
    for labels, extra in (("labels.npy", []), ("labels.csv", []), ("kind", ["--gex", tmp_path / "with_kind.h5ad"])):
        assert run(world, tmp_path, *extra, labels=labels).exit_code == 0
        tables.append(table(tmp_path))
    assert tables[0].equals(tables[1]) and tables[0].equals(tables[2])


@pytest.mark.parametrize("network", ["clip", "scaled"])
def test_a_target_of_pictures_is_one_picture_a_folder_by_cluster_or_embeddings(world, tmp_path, network):
    patches = sorted((world / "A" / "patches").glob("*.png"))
    clip = CLIP.from_pretrained(world / network)
    image = torch.from_numpy(np.array(Image.open(patches[3]))).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.inference_mode():
        np.save(tmp_path / "one.npy", clip.encode_images(image).numpy())
    for images, columns in ((patches[3], [patches[3].stem]), (tmp_path / "one.npy", ["one"]),
                            (world / "A" / "patches", ["images of other", "images of red"])):
        answer = run(world, tmp_path, "--target", "image", "--images", images, network=network)
        assert answer.exit_code == 0, answer.output
        assert table(tmp_path).columns.tolist() == [f"{name} vs. {column}" for name in ("other", "red") for column in columns]
        for pair in json.loads((tmp_path / "genes.json").read_text())["pairs"].values():
            assert pair["sum"] == pytest.approx(pair["distance_change"], rel=0.01)
        if images == patches[3]:
            single = table(tmp_path)
        elif columns == ["one"]:
            assert np.allclose(single, table(tmp_path), atol=1e-5)       # the picture and its embedding are one target


def test_labels_of_a_csv_with_barcodes_are_joined_by_these_whatever_the_order(world, tmp_path):
    import anndata as ad
    barcodes = ad.read_h5ad(world / "A" / "gex_filt.h5ad").obs_names
    labels = pd.DataFrame({"Barcode": barcodes, "Cluster": np.load(world / "labels.npy")})
    assert run(world, tmp_path).exit_code == 0
    expected = table(tmp_path)
    more = pd.DataFrame({"Barcode": ["ELSEWHERE-1"], "Cluster": ["red"]})             # a spot that was filtered out since
    pd.concat([labels.sample(frac=1, random_state=3), more]).to_csv(tmp_path / "shuffled.csv", index=False)
    assert run(world, tmp_path, "--cluster-labs", tmp_path / "shuffled.csv").exit_code == 0
    assert table(tmp_path).equals(expected)
    labels[3:].to_csv(tmp_path / "short.csv", index=False)
    answer = run(world, tmp_path, "--cluster-labs", tmp_path / "short.csv")
    assert answer.exit_code == 3 and f"no line for 3 (A__{barcodes[0]}" in answer.output
    pd.concat([labels, labels[:1]]).to_csv(tmp_path / "twice.csv", index=False)
    answer = run(world, tmp_path, "--cluster-labs", tmp_path / "twice.csv")
    assert answer.exit_code == 3 and f"Barcode: expected no value twice; found repeated 1 ({barcodes[0]})" in answer.output


def test_smooth_gradients_repeat(world, tmp_path):
    first, again = (run(world, tmp_path, "--method", "sg") and table(tmp_path) for _ in range(2))
    assert first.equals(again) and (first > 0).any().all()
    assert json.loads((tmp_path / "genes.json").read_text())["pairs"]["red vs. other"]["convergence_delta"] is None


@pytest.mark.parametrize(("labels", "message"), [
    (["a"] * N, "expected at least two clusters; found one: a"),
    (["a", "b"] * (N // 2 - 1), "expected one for each of the 32 spots; found (30,)"),
    ([1.0, float("nan")] * (N // 2), "expected no gaps; found 16 missing"),
], ids=["one cluster", "wrong length", "NaN"])
def test_labels_that_cannot_be_used_are_refused(world, tmp_path, labels, message):
    np.save(tmp_path / "wrong.npy", np.array(labels))
    answer = run(world, tmp_path, "--cluster-labs", tmp_path / "wrong.npy")
    assert answer.exit_code == 3 and message in answer.output
    assert not (tmp_path / "genes.csv").exists()


@pytest.mark.parametrize(("extra", "code", "message"), [
    (["--target", "image"], 2, "--images: expected pictures or embeddings, together with --target image; found nothing"),
    (["--images", "there.png"], 2, "found there.png"),
    (["--target", "image", "--images", "nowhere"], 3, "nowhere: --images: expected a picture"),
    (["--out-file", "genes.json"], 2, "expected a .csv"),
], ids=["no pictures", "pictures without target", "no such folder", "json as table"])
def test_options_that_do_not_go_together_are_refused(world, tmp_path, extra, code, message):
    answer = run(world, tmp_path, *extra)
    assert answer.exit_code == code and message in answer.output
