"""Embed spots of several samples without a CLIP: principal components of variable genes, or what scGPT made elsewhere.

scGPT pins an environment of its own, so it reads an .h5ad written here and hands back an .h5ad or .npy. Either way an .npy in
the order of each expression file comes out, as prompts for `diffusion_utils.train_diffusion`. Loads no torch.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp

from evaluation.latent_space import Spots, cluster_labels
from evaluation.retrieval import unit_rows
from preprocessing.done_manifests import file_sha256, program_versions, strings_sha256
from preprocessing.errors import InputError, OptionError, first_few
from preprocessing.expression import normalise_expression, open_h5ad, read_expression
from preprocessing.inputs import require_file
from preprocessing.npy_file import RECORD, load_array
from preprocessing.outputs import finished_file, write_json

SCGPT_KEY = "X_scGPT"      # where scGPT's embed_data leaves its embeddings
TARGET_SUM = 1e4


@dataclass(frozen=True)
class SampleCounts:
    """Raw counts of one sample's spots."""

    sample_id: str
    gex: Path
    adata: ad.AnnData          # raw counts, whole sample
    clusters: np.ndarray       # (N,) str


def read_samples(gex: Mapping[str, Path | str], clusters: str = "cluster") -> list[SampleCounts]:
    """Expression files by sample; all must have the same genes in the same order."""
    samples = []
    for name, path in gex.items():
        adata = read_expression(path)
        samples.append(SampleCounts(name, Path(path), adata, cluster_labels(adata.obs, clusters, path)))
    if not samples:
        raise OptionError("samples", "at least one", "none")
    genes = samples[0].adata.var_names
    for sample in samples[1:]:
        if not sample.adata.var_names.equals(genes):
            differing = sample.adata.var_names.symmetric_difference(genes).tolist()
            raise InputError(sample.gex, "var_names", f"the {len(genes):,} genes of {samples[0].gex}",
                             f"others: {first_few(differing)}" if differing else "another order", "Filter all by one vocabulary")
    return samples


def variable_genes(samples: Sequence[SampleCounts], count: int = 1800) -> np.ndarray:
    """int (T,) ascending: genes whose normalised expression varies most inside samples (the mean of their ranks over the samples)."""
    ranks = [np.argsort(np.argsort(-_dispersion(_normalised(sample)), kind="stable")) for sample in samples]
    mean = np.mean(ranks, axis=0)
    return np.sort(np.argsort(mean, kind="stable")[:min(count, len(mean))])


def _normalised(sample: SampleCounts) -> sp.csr_matrix:
    return normalise_expression(sp.csr_matrix(sample.adata.X), TARGET_SUM)


def _dispersion(expression: sp.csr_matrix) -> np.ndarray:
    """(G,) variance over spots of log-normalised expression."""
    mean = np.asarray(expression.mean(axis=0)).ravel()
    return np.asarray(expression.multiply(expression).mean(axis=0)).ravel() - mean ** 2


def write_for_scgpt(samples: Sequence[SampleCounts], genes: np.ndarray, path: Path | str) -> Path:
    """One .h5ad of raw counts of the chosen genes, all samples: obs `sample_id` and `barcode`, var `gene_name`. Returns the path."""
    parts = []
    for sample in samples:
        counts = sp.csr_matrix(sample.adata.X)[:, genes]
        barcodes = sample.adata.obs_names.to_numpy(str)
        obs = pd.DataFrame({"sample_id": sample.sample_id, "barcode": barcodes}, index=[f"{sample.sample_id}__{name}" for name in barcodes])
        parts.append(ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=sample.adata.var_names[genes])))
    joined = ad.concat(parts)
    joined.var["gene_name"] = joined.var_names
    with finished_file(path) as temporary:
        joined.write_h5ad(temporary)
    return Path(path)


def read_scgpt(path: Path | str, samples: Sequence[SampleCounts], key: str = SCGPT_KEY) -> np.ndarray:
    """(N, D) unit rows in the order of the samples: of an .h5ad by name of the spot (obsm `key`), of an .npy row by row."""
    names = [f"{sample.sample_id}__{barcode}" for sample in samples for barcode in sample.adata.obs_names]
    require_file(path, "the .h5ad or .npy that scGPT's environment wrote")
    if Path(path).suffix == ".npy":
        rows = load_array(path, "an array of numbers")
    else:
        adata = open_h5ad(path)
        if key not in adata.obsm:
            raise InputError(path, "obsm", key, ", ".join(adata.obsm) or "none")
        place = {name: row for row, name in enumerate(adata.obs_names)}
        missing = [name for name in names if name not in place]
        if missing:
            raise InputError(path, "obs_names", f"the {len(names):,} spots of the samples", f"missing {first_few(missing)}")
        rows = np.asarray(adata.obsm[key])[[place[name] for name in names]]
    if rows.ndim != 2 or len(rows) != len(names) or rows.dtype.kind not in "iuf" or not np.isfinite(rows).all():
        raise InputError(path, "embeddings", f"({len(names):,}, D), finite numbers", f"{rows.dtype} {rows.shape}, or NaN")
    return unit_rows(rows).astype(np.float32)


def pca_embedding(samples: Sequence[SampleCounts], genes: np.ndarray, width: int = 50, seed: int = 0) -> np.ndarray:
    """(N, D) unit rows: principal components of the genes' log-normalised expression, every sample about its own mean."""
    from sklearn.decomposition import PCA

    blocks = [_normalised(sample)[:, genes].toarray() for sample in samples]
    centred = np.concatenate([block - block.mean(axis=0) for block in blocks])
    width = min(width, *(size - 1 for size in centred.shape))
    if width < 1:
        raise InputError(samples[0].gex, "spots and genes", "at least 2 of each", str(centred.shape))
    return unit_rows(PCA(width, random_state=seed).fit_transform(centred)).astype(np.float32)


def as_spots(samples: Sequence[SampleCounts], embeddings: dict[str, np.ndarray]) -> Spots:
    """For `evaluation.latent_space`: all spots, and embeddings (N, D) in the order of the samples."""
    return Spots(np.concatenate([np.full(sample.adata.n_obs, sample.sample_id) for sample in samples]),
                 np.concatenate([sample.adata.obs_names.to_numpy(str) for sample in samples]),
                 np.concatenate([sample.clusters for sample in samples]), embeddings)


def write_prompts(samples: Sequence[SampleCounts], embedding: np.ndarray, name: str, out_dir: Path | str) -> list[Path]:
    """OUT/SAMPLE/NAME_emb.npy and embeddings.json for each sample, as `train_diffusion --dataset-embs` pairs them by barcode."""
    written, start = [], 0
    for sample in samples:
        barcodes = sample.adata.obs_names.tolist()
        rows, start = embedding[start:start + len(barcodes)], start + len(barcodes)
        path = Path(out_dir) / sample.sample_id / f"{name}_emb.npy"
        with finished_file(path) as temporary, open(temporary, "wb") as stream:
            np.save(stream, rows.astype(np.float32), allow_pickle=False)
        write_json(path.with_name(RECORD), {"embedding": name, "n_rows": len(rows), "barcode_sha256": strings_sha256(barcodes),
                                            "gex": str(sample.gex), "files": [path.name],
                                            "sha256": {path.name: file_sha256(path)}, "versions": program_versions()})
        written.append(path)
    return written
