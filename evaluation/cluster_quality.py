"""Distances cluster by cluster: are the patches made for a cluster like real patches of that cluster, or only like tissue?

Reads which spot a patch belongs to (metadata.jsonl, samples.csv) and which cluster a spot (samples.csv, or the expression file).
A conditional distance sees what the joint one cannot: patches of the right kind at the wrong spots.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evaluation.distances import distances_to_halves, frechet_distance, full_kernel_distance, half_size, mean_and_interval
from evaluation.features import read_samples_csv
from preprocessing.expression import read_expression
from preprocessing.patches import read_patch_folder

LEAST_PATCHES = 8          # of a cluster, on either side: halves of four


@dataclass(frozen=True)
class ClusterRows:
    """Rows of the two sides that belong to one cluster."""

    name: str
    real: np.ndarray           # int (n,)
    generated: np.ndarray      # int (m,)


def cluster_rows(reference: tuple[Sequence[Path], Sequence[Path]], generated: tuple[Sequence[Path], Sequence[Path]],
                 gex: Path | None = None) -> list[ClusterRows]:
    """Clusters with enough patches on both sides, by name. A side is (folders, its images in order); `gex`: an .h5ad with a `cluster`.

    Empty where nothing says which spot is of which cluster. Where samples.csv names clusters, these are used and `gex` is not."""
    clusters_of_spots: dict[str, str] = {}                       # by barcode, and by SAMPLE__BARCODE: Visium slides share barcodes
    samples = set()
    made: dict[Path, tuple[str, str]] = {}                       # (barcode, cluster) of a generated patch
    for folder in generated[0]:
        if not (folder / "samples.csv").is_file():
            return []
        for row in read_samples_csv(folder):
            sample, _, barcode = (row.get("barcode") or "").rpartition("__")
            made[folder / row["file"]] = barcode, row.get("cluster") or ""
            samples.add(sample)
            if barcode and row.get("cluster"):
                clusters_of_spots |= {barcode: row["cluster"], f"{sample}__{barcode}": row["cluster"]}
    if not clusters_of_spots and gex is not None:
        clusters_of_spots, samples = _clusters_of_expression(gex), set()
    real: dict[Path, str] = {}                                   # key of its spot among `clusters_of_spots`
    for folder in reference[0]:
        if (folder / "metadata.jsonl").is_file():
            listed = read_patch_folder(folder)
            of_sample = listed.sample_ids or [""] * len(listed.paths)
            real |= {path: f"{sample}__{barcode}" if sample and sample in samples else barcode
                     for path, sample, barcode in zip(listed.paths, of_sample, listed.barcodes or of_sample, strict=True)}
    real_names = np.array([clusters_of_spots.get(real.get(path, ""), "") for path in reference[1]])
    made_names = np.array([cluster or clusters_of_spots.get(barcode, "") for barcode, cluster in (made.get(path, ("", ""))
                                                                                                for path in generated[1])])
    found = [ClusterRows(str(name), np.flatnonzero(real_names == name), np.flatnonzero(made_names == name))
             for name in np.unique(real_names[real_names != ""])]
    return [rows for rows in found if min(len(rows.real), len(rows.generated)) >= LEAST_PATCHES]


def _clusters_of_expression(gex: Path) -> dict[str, str]:
    """Cluster by barcode, of the spots that have one; empty without such a column."""
    adata = read_expression(gex, backed=True)
    try:
        if "cluster" not in adata.obs:
            return {}
        known = adata.obs["cluster"].dropna().astype(str)
    finally:
        adata.file.close()
    return dict(zip(known.index, known, strict=True))


def cluster_columns(real: np.ndarray, fake: np.ndarray, clusters: Sequence[ClusterRows], seed: int = 0,
                    n_splits: int = 20) -> list[dict[str, object]]:
    """Of features (N, D) and (M, D), for each cluster at equal n over random halves of its real patches: the distance of the patches made
    for it (`..._generated`), of as many made for other clusters (`..._others`), and the floor (`..._real`), each with `mean` and `ci95`.

    Generated below others: patches are of their cluster. A cluster that holds all generated patches has no others."""
    rows: list[dict[str, object]] = []
    for number, cluster in enumerate(clusters):
        own = real[cluster.real]
        others = np.setdiff1d(np.concatenate([other.generated for other in clusters]), cluster.generated)
        sets = {"generated": fake[cluster.generated]} | ({"others": fake[others]} if len(others) >= LEAST_PATCHES else {})
        row: dict[str, object] = {"cluster": cluster.name, "n_reference": len(own), "n_generated": len(cluster.generated),
                                  "n_floor": half_size(len(own), [len(features) for features in sets.values()])}
        for name, distance in (("FID", frechet_distance), ("KID", full_kernel_distance)):
            values = distances_to_halves(own, sets, distance, rng=np.random.default_rng([seed, 4, number]), n_splits=n_splits)
            row |= {f"{name}_{'real' if key == 'real_vs_real' else key}": mean_and_interval(column) for key, column in values.items()}
        rows.append(row)
    return rows
