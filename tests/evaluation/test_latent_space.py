"""Joint embedding spaces: what planted clusters and samples score, ways of genes and images, files that do not belong together."""
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from evaluation import latent_space as space
from evaluation.spot_embedding import as_spots, pca_embedding, read_samples, read_scgpt, variable_genes, write_for_scgpt, write_prompts
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.expression import write_expression
from preprocessing.outputs import write_json

N = 40


def planted(rng, by: str) -> space.Spots:
    """Two samples of two clusters each; the embedding knows the cluster, the sample, or nothing."""
    samples, clusters = np.repeat(["A", "B"], N), np.tile(["x", "y"], N)
    centre = {"cluster": clusters == "y", "sample": samples == "B", "nothing": np.zeros(2 * N, bool)}[by]
    rows = rng.normal(size=(2 * N, 6)) * 0.2 + np.where(centre[:, None], [3, 0, 0, 0, 0, 0], [0, 3, 0, 0, 0, 0])
    return space.Spots(samples, np.array([f"b{i}" for i in range(2 * N)]), clusters, {"gene": rows})


@pytest.mark.parametrize(("by", "with_clusters", "with_samples"), [("cluster", 1, 0), ("sample", 0, 1)])
def test_communities_agree_with_what_the_space_was_made_of(rng, by, with_clusters, with_samples):
    row = space.space_table(planted(rng, by), resolution=0.1).loc["gene"]
    assert row["ARI with clusters"] == pytest.approx(with_clusters, abs=0.1) and row["communities"] == 2
    assert row["ARI with samples"] == pytest.approx(with_samples, abs=0.1)
    strong, weak = ("clusters", "samples") if by == "cluster" else ("samples", "clusters")
    assert row[f"silhouette of {strong}"] > 0.8 > 0.1 > abs(row[f"silhouette of {weak}"])


def test_clusters_numbered_apart_by_two_samples_agree_all_the_same(rng):
    spots = planted(rng, "cluster")
    renamed = np.where(spots.sample_ids == "B", np.where(spots.clusters == "x", "y", "x"), spots.clusters)
    swapped = space.Spots(spots.sample_ids, spots.barcodes, renamed, spots.embeddings)
    assert space.agreement(spots.clusters, swapped)["ARI with clusters"] == 1


def test_spots_without_a_cluster_and_single_groups_are_left_out(rng):
    spots = planted(rng, "cluster")
    nobody = space.Spots(np.full(2 * N, "A"), spots.barcodes, np.full(2 * N, space.NOBODY), spots.embeddings)
    assert np.isnan([*space.silhouettes(spots.embeddings["gene"], nobody).values()]).all()
    assert np.isnan(space.agreement(spots.clusters, nobody)["ARI with clusters"])


def test_images_that_move_as_genes_do_agree_and_shuffled_ones_do_not(rng):
    along = np.linspace(-1, 1, 120)[rng.permutation(120)]
    genes = np.stack([np.ones(120), along, 0.05 * rng.normal(size=120)], axis=1)
    images = np.stack([0.05 * rng.normal(size=120), along, np.ones(120)], axis=1)
    way = space.trajectory(genes, images, n_steps=6)
    assert way.agreement > 0.95 and (np.bincount(way.steps) == 20).all() and way.genes.shape == way.images.shape == (6, 3)
    assert (np.diff(way.genes[:, 1]) > 0).all() or (np.diff(way.genes[:, 1]) < 0).all()
    assert abs(space.trajectory(genes, images[rng.permutation(120)]).agreement) < 0.3


def test_the_nearest_images_come_first_and_the_own_one_has_its_place():
    genes, images = np.eye(3), np.array([[0.9, 0.1, 0], [1.0, 0, 0], [0, 0, 1]])
    nearest, place = space.nearest_images(genes, images, 0, count=2)
    assert nearest.tolist() == [1, 0] and place == 2


# ---- files ------------------------------------------------------------------------------------------------------------

def write_sample(folder, name, rng, genes=30, shift=0.0):
    """20 spots of two clusters, marked by the first five genes; `shift` is what the slide does to the last ten."""
    level = np.full((20, genes), 12.0)
    level[::2, :5] *= 8
    level[:, -10:] *= np.exp(shift)
    adata = ad.AnnData(sp.csr_matrix(rng.poisson(level).astype(np.float32)), var=pd.DataFrame(index=[f"g{i}" for i in range(genes)]),
                       obs=pd.DataFrame({"cluster": ["x", "y"] * 10}, index=[f"{name}{i:02d}-1" for i in range(20)]))
    (folder / name).mkdir()
    write_expression(folder / name / "gex.h5ad", adata)
    return folder / name / "gex.h5ad"


@pytest.fixture
def samples(tmp_path, rng):
    return read_samples({"A": write_sample(tmp_path, "A", rng), "B": write_sample(tmp_path, "B", rng, shift=1.5)})


def test_embeddings_are_read_with_their_expression_or_refused(tmp_path, rng):
    gex = write_sample(tmp_path, "A", rng)
    barcodes = ad.read_h5ad(gex).obs_names.tolist()
    np.save(tmp_path / "A" / "gene_clip_emb.npy", rng.normal(size=(20, 4)))
    write_json(tmp_path / "A" / "embeddings.json", {"barcode_sha256": strings_sha256(barcodes)})
    spots = space.read_embedded({"A": gex}, {"A": tmp_path / "A"}, names=["gene"])
    assert spots.barcodes.tolist() == barcodes and spots.embeddings["gene"].shape == (20, 4) and spots.clusters[:2].tolist() == ["x", "y"]
    with pytest.raises(InputError, match="image_clip_emb.npy: file: expected embeddings as clip_embeddings.py writes them"):
        space.read_embedded({"A": gex}, {"A": tmp_path / "A"})
    with pytest.raises(InputError, match="obs: expected a column kind; found .*cluster"):
        space.read_embedded({"A": gex}, {"A": tmp_path / "A"}, names=["gene"], clusters="kind")
    write_json(tmp_path / "A" / "embeddings.json", {"barcode_sha256": strings_sha256(barcodes[::-1])})
    with pytest.raises(InputError, match="barcode_sha256: expected embeddings of the 20 spots"):
        space.read_embedded({"A": gex}, {"A": tmp_path / "A"}, names=["gene"])
    with pytest.raises(OptionError, match="one folder of embeddings each"):
        space.read_embedded({"A": gex}, {"B": tmp_path / "A"})


def test_principal_components_keep_clusters_and_forget_the_slide(samples):
    embedding = pca_embedding(samples, np.arange(30), width=4)
    assert np.allclose(np.linalg.norm(embedding, axis=1), 1, atol=1e-5)
    found = space.silhouettes(embedding, as_spots(samples, {}))
    assert found["silhouette of clusters"] > 0.4 and abs(found["silhouette of samples"]) < 0.1


def test_variable_genes_are_the_planted_ones(samples):
    assert set(variable_genes(samples, 5)) == set(range(5)) and len(variable_genes(samples, 1800)) == 30


def test_scgpt_gets_raw_counts_and_its_rows_are_found_by_barcode(samples, tmp_path, rng):
    path = write_for_scgpt(samples, np.arange(12), tmp_path / "for_scgpt.h5ad")
    handed = ad.read_h5ad(path)
    assert handed.shape == (40, 12) and (handed.X.toarray() == np.concatenate([s.adata.X[:, :12].toarray() for s in samples])).all()
    assert handed.var["gene_name"].tolist() == [f"g{i}" for i in range(12)] and handed.obs_names[0] == "A__A00-1"
    order = rng.permutation(40)
    back = handed[order].copy()
    back.obsm["X_scGPT"] = np.eye(40)[order] * 3
    back.write_h5ad(tmp_path / "from_scgpt.h5ad")
    assert np.allclose(read_scgpt(tmp_path / "from_scgpt.h5ad", samples), np.eye(40))
    back[:30].copy().write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(InputError, match="obs_names: expected the 40 spots of the samples; found missing 10 "):
        read_scgpt(tmp_path / "few.h5ad", samples)
    np.save(tmp_path / "wrong.npy", np.ones((3, 2)))
    with pytest.raises(InputError, match=r"expected \(40, D\), finite numbers; found float64 \(3, 2\)"):
        read_scgpt(tmp_path / "wrong.npy", samples)


def test_prompts_are_written_by_sample_with_the_barcodes_they_belong_to(samples, tmp_path):
    from preprocessing.inputs import read_json
    embedding = np.arange(40.0)[:, None]
    paths = write_prompts(samples, embedding, "PCA", tmp_path / "out")
    assert [path.relative_to(tmp_path).as_posix() for path in paths] == ["out/A/PCA_emb.npy", "out/B/PCA_emb.npy"]
    assert np.load(paths[1])[:, 0].tolist() == list(range(20, 40))
    record = read_json(paths[1].with_name("embeddings.json"), "the record")
    assert record["barcode_sha256"] == strings_sha256(samples[1].adata.obs_names.tolist()) and record["embedding"] == "PCA"


def test_samples_of_other_genes_are_refused(tmp_path, rng):
    with pytest.raises(InputError, match=r"var_names: expected the 30 genes of .*; found others: 1 \(g30\)"):
        read_samples({"A": write_sample(tmp_path, "A", rng), "B": write_sample(tmp_path, "B", rng, genes=31)})
