"""Distances by cluster: patches at the wrong spots are seen, though all together they look right."""
import csv

import numpy as np
import pytest
from clip_runs import write_sample

from evaluation.cluster_quality import LEAST_PATCHES, ClusterRows, cluster_columns, cluster_rows
from evaluation.features import list_images


def groups(n=40):
    rows = np.arange(n), np.arange(n, 2 * n)
    return [ClusterRows(name, part, part) for name, part in zip("xy", rows, strict=True)]


def test_patches_of_their_cluster_lie_at_the_floor_and_those_of_another_far_from_it(rng):
    def draw():
        return rng.normal(size=(80, 4)) + np.where(np.arange(80)[:, None] < 40, 0, 3)
    right, real = draw(), draw()
    wrong = np.roll(right, 40, axis=0)                                   # the same patches, at the other cluster's spots
    for row in cluster_columns(real, right, groups()):
        assert row["FID_generated"]["mean"] < row["FID_real"]["ci95"][1] and row["n_floor"] == 20
        assert row["FID_others"]["ci95"][0] > row["FID_generated"]["ci95"][1]
        assert row["KID_others"]["mean"] > 10 * abs(row["KID_generated"]["mean"])
    for row in cluster_columns(real, wrong, groups()):
        assert row["FID_generated"]["ci95"][0] > row["FID_others"]["ci95"][1]


def test_one_cluster_alone_has_no_others(rng):
    (row,) = cluster_columns(rng.normal(size=(20, 3)), rng.normal(size=(16, 3)), [ClusterRows("x", np.arange(20), np.arange(16))])
    assert "FID_others" not in row and row["n_reference"] == 20 and row["n_generated"] == 16 and row["n_floor"] == 10


@pytest.fixture
def folders(tmp_path):
    """Patches of 24 spots, and a generated folder of two seeds a spot whose samples.csv may name clusters."""
    write_sample(tmp_path, "A", 24, 0)
    real = list_images(tmp_path / "A" / "patches").paths
    (tmp_path / "made").mkdir()

    def generated(clusters):
        rows = []
        for number, path in enumerate(real):
            for seed in (0, 1):
                (tmp_path / "made" / f"p{number}_{seed}.png").write_bytes(path.read_bytes())
                rows.append({"file": f"p{number}_{seed}.png", "prompt": number, "barcode": f"A__A{number:03d}-1", "seed": seed,
                             "cluster": "xyz"[number % 2 if number < 22 else 2] if clusters else ""})
        with open(tmp_path / "made" / "samples.csv", "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        return ([tmp_path / "A" / "patches"], real), ([tmp_path / "made"], list_images(tmp_path / "made").paths)
    return generated


def test_clusters_come_from_samples_csv_and_real_patches_join_by_barcode(folders):
    reference, generated = folders(True)
    x, y = cluster_rows(reference, generated)                            # z has 2 real patches: too few
    assert (x.name, y.name) == ("x", "y") and x.real.tolist() == list(range(0, 22, 2)) and len(x.generated) == 22 and LEAST_PATCHES == 8
    assert {generated[1][row].name for row in y.generated} == {f"p{n}_{s}.png" for n in range(1, 22, 2) for s in (0, 1)}


def test_clusters_come_from_the_expression_where_samples_csv_has_none(folders, tmp_path):
    import anndata as ad
    reference, generated = folders(False)
    assert cluster_rows(reference, generated) == [] == cluster_rows(reference, generated, tmp_path / "A" / "gex_filt.h5ad")
    genes = ad.read_h5ad(tmp_path / "A" / "gex_filt.h5ad")
    genes.obs["cluster"] = ["low"] * 12 + ["high"] * 12
    genes.write_h5ad(tmp_path / "with_clusters.h5ad")
    high, low = cluster_rows(reference, generated, tmp_path / "with_clusters.h5ad")
    assert high.name == "high" and high.real.tolist() == list(range(12, 24)) and len(low.generated) == 24


def test_folders_that_say_nothing_of_spots_have_no_clusters(folders, tmp_path):
    reference, generated = folders(True)
    (tmp_path / "made" / "samples.csv").unlink()
    assert cluster_rows(reference, generated) == []


def test_slides_that_share_barcodes_keep_their_own_clusters_and_pictures(tmp_path):
    import json

    from evaluation.image_quality_page import patches_by_barcode
    for name, cluster in (("A", "x"), ("B", "y")):
        write_sample(tmp_path, name, 10, 0)
        listed = tmp_path / name / "patches" / "metadata.jsonl"
        lines = [json.loads(line) for line in listed.read_text().splitlines()]
        lines = [line | {"sample_id": name, "barcode": f"SAME{i}-1"} for i, line in enumerate(lines)]
        listed.write_text("\n".join(map(json.dumps, lines)) + "\n")
        (tmp_path / f"made{name}").mkdir()
        rows = [f"p{i}.png,{name}__SAME{i}-1,{cluster}" for i in range(10)]
        for i in range(10):
            (tmp_path / f"made{name}" / f"p{i}.png").write_bytes(b"")
        (tmp_path / f"made{name}" / "samples.csv").write_text("\n".join(["file,barcode,cluster", *rows]) + "\n")
    sides = [([*folders], [path for folder in folders for path in list_images(folder).paths])
             for folders in ([tmp_path / "A" / "patches", tmp_path / "B" / "patches"], [tmp_path / "madeA", tmp_path / "madeB"])]
    x, y = cluster_rows(*sides)
    assert (x.name, y.name) == ("x", "y") and x.real.tolist() == x.generated.tolist() == list(range(10))
    assert y.real.tolist() == y.generated.tolist() == list(range(10, 20))
    assert patches_by_barcode(tmp_path / "B" / "patches")["B__SAME3-1"].parent.parent.name == "B"
