"""Look at an embedding space of several samples: its plane, its clusters, what they agree with, and how far samples stand apart.

Reads embeddings beside the expression they were made of (clip_embeddings.py, or `evaluation.spot_embedding`). Loads no torch.
Letters: N spots of all samples together, D width of an embedding.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from evaluation.retrieval import unit_rows
from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError, OptionError
from preprocessing.expression import read_expression
from preprocessing.inputs import read_json, require_file
from preprocessing.npy_file import RECORD, load_array, require_as_recorded

LEAST_SPOTS = 5            # of all samples: fewer have no neighbours to speak of
NOBODY = ""                # cluster of a spot that has none


@dataclass(frozen=True)
class Spots:
    """Spots of one or more samples in the order of their files, and their embeddings by name, (N, D) each."""

    sample_ids: np.ndarray             # (N,) str
    barcodes: np.ndarray               # (N,) str
    clusters: np.ndarray               # (N,) str, of the sample's own clustering; `NOBODY` where it has none
    embeddings: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.barcodes)

    @property
    def own_clusters(self) -> np.ndarray:
        """(N,) str: "SAMPLE: CLUSTER", as two samples number theirs apart; `NOBODY` stays."""
        return np.array([f"{sample}: {label}" if label != NOBODY else NOBODY
                         for sample, label in zip(self.sample_ids, self.clusters, strict=True)])


def read_embedded(gex: Mapping[str, Path | str], folders: Mapping[str, Path | str], names: Sequence[str] = ("gene", "image"),
                  clusters: str = "cluster") -> Spots:
    """Join samples: `gex` and `folders` by sample, NAME_clip_emb.npy and embeddings.json in each folder. The recorded barcodes must be
    those of the expression file, in its order; `clusters` is a column of obs."""
    if set(gex) != set(folders) or not gex:
        raise OptionError("samples", "one expression file and one folder of embeddings each",
                          f"{', '.join(gex) or 'none'} and {', '.join(folders) or 'none'}")
    parts = [_read_sample(name, Path(gex[name]), Path(folders[name]), names, clusters) for name in gex]
    return Spots(*(np.concatenate([getattr(part, field) for part in parts]) for field in ("sample_ids", "barcodes", "clusters")),
                 {name: np.concatenate([part.embeddings[name] for part in parts]) for name in names})


def _read_sample(sample_id: str, gex: Path, folder: Path, names: Sequence[str], clusters: str) -> Spots:
    adata = read_expression(gex, backed=True)
    try:
        barcodes, obs = adata.obs_names.to_numpy(str), adata.obs.copy()
    finally:
        adata.file.close()
    record = read_json(folder / RECORD, "what clip_embeddings.py writes beside its embeddings")
    if not isinstance(record, dict) or record.get("barcode_sha256") != strings_sha256(barcodes.tolist()):
        raise InputError(folder / RECORD, "barcode_sha256", f"embeddings of the {len(barcodes):,} spots of {gex}",
                         "those of other spots", "Run clip_embeddings.py again")
    return Spots(np.full(len(barcodes), sample_id), barcodes, cluster_labels(obs, clusters, gex),
                 {name: _read_rows(folder / f"{name}_clip_emb.npy", len(barcodes)) for name in names})


def cluster_labels(obs: pd.DataFrame, column: str, path: Path | str) -> np.ndarray:
    """(N,) str of an obs column, `NOBODY` where a spot has none."""
    if column not in obs:
        raise InputError(path, "obs", f"a column {column}", ", ".join(map(str, obs.columns)) or "none")
    labels = obs[column].astype(object)
    return np.where(labels.isna(), NOBODY, labels.astype(str)).astype(str)


def _read_rows(path: Path, n: int) -> np.ndarray:
    require_file(path, "embeddings as clip_embeddings.py writes them, of genes and of images")
    require_as_recorded(path)
    rows = load_array(path, "an array of numbers")
    if rows.ndim != 2 or len(rows) != n or rows.dtype.kind not in "iuf" or not np.isfinite(rows).all():
        raise InputError(path, "shape", f"({n}, D), finite numbers", f"{rows.dtype} {rows.shape}"
                         + (" with NaN or infinity" if rows.shape[:1] == (n,) and rows.dtype.kind == "f" else ""))
    return rows


# ---- the space ---------------------------------------------------------------------------------------------------------

def neighbour_graph(embedding: np.ndarray, n_neighbours: int = 15, seed: int = 0):
    """An AnnData of (N, D) with the graph of nearest neighbours that `plane` and `leiden_clusters` walk."""
    import anndata as ad
    import scanpy as sc

    if len(embedding) < LEAST_SPOTS:
        raise InputError("embeddings", "spots", f"at least {LEAST_SPOTS}", str(len(embedding)))
    graph = ad.AnnData(np.ascontiguousarray(embedding, dtype=np.float32))
    sc.pp.neighbors(graph, n_neighbors=min(n_neighbours, len(embedding) - 1), use_rep="X", random_state=seed)
    return graph


def plane(graph, seed: int = 0) -> np.ndarray:
    """(N, 2): UMAP. Near is alike; distances between far groups, and their sizes, say nothing."""
    import scanpy as sc
    return sc.tl.umap(graph, random_state=seed, copy=True).obsm["X_umap"]


def leiden_clusters(graph, resolution: float = 1.0, seed: int = 0) -> np.ndarray:
    """(N,) str: communities of the graph, "0" the largest."""
    import scanpy as sc
    found = sc.tl.leiden(graph, resolution=resolution, random_state=seed, flavor="igraph", n_iterations=2, directed=False, copy=True)
    return found.obs["leiden"].to_numpy(str)


def agreement(found: np.ndarray, spots: Spots) -> dict[str, float]:
    """Adjusted Rand index of a joint clustering (N,): with the clusters of each sample, the mean over samples, and with the sample index.

    1 is the same partition, about 0 chance. Wanted: high with clusters (what the tissue is), low with samples (where it came from).
    Clusters are compared inside a sample, as two samples number theirs apart."""
    from sklearn.metrics import adjusted_rand_score
    within = []
    for sample in np.unique(spots.sample_ids):
        rows = (spots.sample_ids == sample) & (spots.clusters != NOBODY)
        if len(np.unique(spots.clusters[rows])) > 1:
            within.append(adjusted_rand_score(spots.clusters[rows], found[rows]))
    return {"ARI with clusters": float(np.mean(within)) if within else float("nan"),
            "ARI with samples": float(adjusted_rand_score(spots.sample_ids, found))}


def silhouettes(embedding: np.ndarray, spots: Spots) -> dict[str, float]:
    """Mean silhouette by cosine, -1 to 1: of the clusters inside samples, and of the samples (near 0: mixed). NaN where all are one."""
    from sklearn.metrics import silhouette_score

    def of(rows: np.ndarray, labels: np.ndarray) -> float:
        n_groups = len(np.unique(labels[rows]))
        return float(silhouette_score(embedding[rows], labels[rows], metric="cosine")) if 1 < n_groups < len(rows) else float("nan")

    within = [of(np.flatnonzero((spots.sample_ids == sample) & (spots.clusters != NOBODY)), spots.clusters)
              for sample in np.unique(spots.sample_ids)]
    known = [value for value in within if np.isfinite(value)]
    return {"silhouette of clusters": float(np.mean(known)) if known else float("nan"),
            "silhouette of samples": of(np.arange(len(spots)), spots.sample_ids)}


def space_table(spots: Spots, resolution: float = 1.0, n_neighbours: int = 15, seed: int = 0) -> pd.DataFrame:
    """One row an embedding: spots, width, communities, `agreement`, `silhouettes`."""
    rows = {}
    for name, embedding in spots.embeddings.items():
        found = leiden_clusters(neighbour_graph(embedding, n_neighbours, seed), resolution, seed)
        rows[name] = {"spots": len(spots), "width": embedding.shape[1], "communities": len(np.unique(found)), **agreement(found, spots),
                      **silhouettes(embedding, spots)}
    return pd.DataFrame.from_dict(rows, orient="index")


# ---- genes beside images -------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Trajectory:
    """The way of genes and images along one direction of the gene space."""

    steps: np.ndarray          # (N,) int, part of the way each spot lies in
    genes: np.ndarray          # (S, D) mean embedding of every part
    images: np.ndarray         # (S, D)
    agreement: float           # Spearman of the places of genes and images along the direction, over spots


def trajectory(genes: np.ndarray, images: np.ndarray, n_steps: int = 10) -> Trajectory:
    """Order spots by the first principal direction of their gene embeddings (N, D), cut the order into equal parts, follow both sides.

    Do images move as genes do? `agreement` is near 1 if they do, near 0 if images do not know the direction."""
    from scipy.stats import spearmanr

    genes, images = unit_rows(genes), unit_rows(images)
    centre = genes.mean(axis=0)
    direction = np.linalg.svd(genes - centre, full_matrices=False)[2][0]
    along, beside = (genes - centre) @ direction, (images - images.mean(axis=0)) @ direction
    steps = np.argsort(np.argsort(along, kind="stable")) * min(n_steps, len(genes)) // len(genes)
    means = [np.stack([rows[steps == step].mean(axis=0) for step in range(steps.max() + 1)]) for rows in (genes, images)]
    return Trajectory(steps, *means, float(spearmanr(along, beside).statistic))


def nearest_images(genes: np.ndarray, images: np.ndarray, query: int, count: int = 6) -> tuple[np.ndarray, int]:
    """(rows of the `count` images (N, D) nearest to the genes of spot `query`, the place of its own image, 1 = first)."""
    similarity = unit_rows(images) @ unit_rows(genes[query:query + 1])[0]
    order = np.argsort(-similarity, kind="stable")
    return order[:count], int(np.flatnonzero(order == query)[0]) + 1
