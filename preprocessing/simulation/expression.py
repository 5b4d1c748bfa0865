"""Give a simulated section its genes: programmes shared by a cohort, and negative-binomial counts of one slide.

Touches no files. A component is a cell type, a continuous programme of the morphology, or the ambient background; every
component has a profile over the genes. A spot's expected counts are its component weights times the profiles.
Letters: N spots or bins, C components, G genes.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from scipy.spatial import cKDTree

from preprocessing.simulation.tissue import CELL_NAMES, CELL_TYPES, TUBULAR, Cells, Layout

PROGRAMMES = ("dilation", "fibrosis", "inflammation")     # fields of Layout, 0..1
COMPONENTS = (*CELL_NAMES, *PROGRAMMES, "ambient")
MORPHOLOGY = {                                            # what a gene of each programme goes with in the picture
    "proximal": "tubules of dense eosinophilic cytoplasm with a small ragged lumen",
    "distal": "tubules of paler cytoplasm with a wide clear lumen",
    "collecting_duct": "long pale ducts with crowded nuclei",
    "glomerular": "tufts of crowded nuclei inside Bowman's space",
    "fibroblast": "spindle nuclei along collagen",
    "smooth_muscle": "rings of spindle nuclei about a vessel",
    "lymphocyte": "small round dark nuclei",
    "macrophage": "large pale nuclei among lymphocytes",
    "erythrocyte": "eosinophilic discs without nucleus in vessels",
    "dilation": "width of the lumina of tubules",
    "fibrosis": "matrix between tubules, density of collagen",
    "inflammation": "lymphocytes among tubules and collagen",
    "housekeeping": "none",
}
SPOT_RADIUS_UM = 27.5
CELL_REACH_UM = 7.0        # Visium HD: how far from its centre a cell's RNA is found
SPOT_DISPERSION = 6.0      # r of the negative binomial, var = m + m**2 / r
BIN_DISPERSION = 1.5
AMBIENT_SHARE = 0.12       # RNA that has diffused in from anywhere
CLUSTERED_GENES = 2000     # at most: bounds what clustering holds in memory


@dataclass(frozen=True)
class Genes:
    """The genes of a cohort: the same for every sample of one biology seed."""

    names: np.ndarray       # (G,) str
    ids: np.ndarray         # (G,) str
    programme: np.ndarray   # (G,) str, component whose marker the gene is, or "housekeeping"
    profiles: np.ndarray    # (C, G) float64, rows sum to 1


def gene_programmes(genes: int, biology_seed: int) -> Genes:
    """Markers for every cell type and programme (6 % of the genes each, at least 2), the rest housekeeping."""
    rng = np.random.default_rng([biology_seed, 0x6E5])
    sets = COMPONENTS[:-1]
    each = max(2, int(0.06 * genes))
    programme = np.array(["housekeeping"] * genes, dtype=object)
    order = rng.permutation(genes)
    for k, name in enumerate(sets):
        programme[order[k * each:(k + 1) * each]] = name
    abundance = np.exp(rng.normal(0, 1.1, genes))
    abundance[programme != "housekeeping"] *= 0.35
    profiles = abundance * np.exp(rng.normal(0, 0.25, (len(COMPONENTS), genes)))
    for c, name in enumerate(sets):
        profiles[c, programme == name] *= np.exp(rng.normal(3.0, 0.3, int((programme == name).sum())))
    for c, name in enumerate(COMPONENTS):
        if name in PROGRAMMES:                                  # a programme adds its own genes and nothing else
            profiles[c, programme != name] *= 0.02
    present = [c for c, name in enumerate(CELL_NAMES) if name != "erythrocyte"]
    profiles[-1] = profiles[present].mean(axis=0)
    profiles /= profiles.sum(axis=1, keepdims=True)
    names = np.array([f"Sim{k + 1:05d}" for k in range(genes)])
    ids = np.array([f"ENSSIMG{k + 1:011d}" for k in range(genes)])
    return Genes(names, ids, programme.astype(str), profiles)


def slide_profiles(genes: Genes, slide_effect: float, seed: int) -> np.ndarray:
    """(C, G) profiles as this slide sees them: every gene shifted by a log-normal batch effect of that deviation."""
    shift = np.exp(np.random.default_rng([seed, 0xBA7C]).normal(0, slide_effect, len(genes.names)))
    shifted = genes.profiles * shift
    return shifted / shifted.sum(axis=1, keepdims=True)


def spot_weights(cells: Cells, layout: Layout, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    """(N, C) component weights of Visium spots: the cells whose centre lies under the spot, by RNA content."""
    cell_xy, spot_xy = np.stack([cells.x_um, cells.y_um], axis=1), np.stack([x_um, y_um], axis=1)
    under = cKDTree(spot_xy).sparse_distance_matrix(cKDTree(cell_xy), SPOT_RADIUS_UM, output_type="coo_matrix")
    kind = cells.cell_type[under.col]
    rna = np.array([cell.rna for cell in CELL_TYPES])[kind]
    weights = sp.coo_matrix((rna, (under.row, kind)), shape=(len(x_um), len(CELL_TYPES))).toarray()
    return _with_programmes(weights / 23.0, layout)            # 23: about one spot's worth of average cells


def bin_weights(cells: Cells, layout: Layout, tree: cKDTree, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    """(N, C) component weights of 2 µm bins: the nearest cell, fading with its distance. `tree` holds the cells' centres."""
    distance, nearest = tree.query(np.stack([x_um, y_um], axis=1), distance_upper_bound=3 * CELL_REACH_UM)
    found = np.isfinite(distance)
    weights = np.zeros((len(x_um), len(CELL_TYPES)))
    kind = cells.cell_type[nearest[found]]
    rna = np.array([cell.rna for cell in CELL_TYPES])[kind]
    weights[np.flatnonzero(found), kind] = rna * np.exp(-(distance[found] / CELL_REACH_UM) ** 2)
    return _with_programmes(weights, layout)


def _with_programmes(weights: np.ndarray, layout: Layout) -> np.ndarray:
    """Append what the programmes and the background add to (N, cell types) weights."""
    total = weights.sum(axis=1)
    tubular, stromal = np.isin(layout.site, TUBULAR), layout.site == 5
    dilation = total * 0.30 * layout.dilation * tubular
    fibrosis = total * 0.30 * layout.fibrosis * (tubular | stromal)
    inflammation = total * 0.25 * layout.inflammation * (tubular | stromal)
    ambient = AMBIENT_SHARE * (total + 0.25)
    return np.column_stack([weights, dilation, fibrosis, inflammation, ambient])


def sample_spot_counts(weights: np.ndarray, profiles: np.ndarray, umis: float, rng: np.random.Generator) -> sp.csr_matrix:
    """(N, G) int32: every gene of every spot negative-binomial about weights @ profiles, library sizes log-normal.

    Dense in memory: for a few thousand spots; call it in blocks.
    """
    library = umis * np.exp(rng.normal(-0.045, 0.3, len(weights)))
    mean = (weights * library[:, None]) @ profiles
    rate = rng.gamma(SPOT_DISPERSION, mean / SPOT_DISPERSION)
    return sp.csr_matrix(rng.poisson(rate).astype(np.int32))


def sample_bin_counts(weights: np.ndarray, profiles: np.ndarray, umis: float, rng: np.random.Generator) -> sp.csr_matrix:
    """(N, G) int32, sparse throughout: UMIs are drawn one by one, negative-binomial with the bin's gamma rate."""
    rate = umis * rng.gamma(BIN_DISPERSION, 1 / BIN_DISPERSION, len(weights))
    drawn = rng.poisson(weights * rate[:, None])                # (N, C) UMIs of each component
    rows, genes = [], []
    for component in range(weights.shape[1]):
        rows.append(np.repeat(np.arange(len(weights)), drawn[:, component]))
        ladder = np.cumsum(profiles[component])
        genes.append(np.searchsorted(ladder, rng.random(len(rows[-1])) * ladder[-1], side="right"))
    row, gene = np.concatenate(rows), np.concatenate(genes)
    counts = sp.csr_matrix((np.ones(len(row), np.int32), (row, gene)), shape=(len(weights), profiles.shape[1]))
    counts.sum_duplicates()
    return counts


def telling_genes(genes: Genes) -> np.ndarray:
    """Columns of the genes to cluster by: those that differ most between components, all of them if there are few."""
    profiles = genes.profiles
    spread = (profiles.max(axis=0) - profiles.min(axis=0)) / np.sqrt(profiles.mean(axis=0))
    return np.sort(np.argsort(-spread, kind="stable")[:CLUSTERED_GENES])


def cluster_by_expression(counts: sp.csr_matrix, clusters: int, seed: int) -> np.ndarray:
    """(N,) int, 1 = largest: k-means on ten principal directions of log-normalised counts, as a stand-in for graph clustering."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import TruncatedSVD

    library = np.asarray(counts.sum(axis=1)).ravel()
    scale = np.divide(np.median(library[library > 0]), library, out=np.zeros(len(library)), where=library > 0)
    expression = sp.diags(scale) @ counts.astype(np.float64)
    expression.data = np.log1p(expression.data)
    width = min(10, min(expression.shape) - 1)
    scores = TruncatedSVD(width, random_state=seed).fit_transform(expression)
    trust = np.minimum(library / np.median(library[library > 0]), 1)     # nearly empty spots do not make a cluster of their own
    label = KMeans(min(clusters, int((library > 0).sum())), n_init=4, random_state=seed).fit(scores, sample_weight=trust).labels_
    return np.argsort(np.argsort(-np.bincount(label), kind="stable"), kind="stable")[label] + 1
