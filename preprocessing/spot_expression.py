"""Turn a Sample and the Spots kept of it into the AnnData of `gex.h5ad`: raw counts, one row a patch.

Touches no files but the slide, for its fingerprint. `uns['spatial']` is what scanpy and squidpy draw;
`uns['morphology']` says how rows and patches were made.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from preprocessing.expression import morphology_record
from preprocessing.outputs import fingerprint
from preprocessing.pseudo_spots import sum_members
from preprocessing.sample import Sample, Spots


def spot_expression(sample: Sample, spots: Spots, *, patch_px: int, slide_path: Path | str, settings: Mapping,
                    stride_bins: int | None = None) -> ad.AnnData:
    """Raw counts summed over each spot's members, with everything `formats.md` asks of a `gex.h5ad`."""
    obs = pd.DataFrame({"in_tissue": np.ones(len(spots), np.int8), "array_row": spots.array_row.astype(np.int64),
                        "array_col": spots.array_col.astype(np.int64), "sample_id": pd.Categorical([sample.sample_id] * len(spots)),
                        "n_members": spots.n_members.astype(np.int64)}, index=pd.Index(spots.barcodes.astype(object)))
    if (labels := cluster_labels(sample, spots)) is not None:
        obs["cluster"] = pd.Categorical(labels)
    genes = pd.DataFrame(index=pd.Index(sample.gene_names.astype(object)))
    if sample.gene_ids is not None:
        genes["gene_ids"] = sample.gene_ids.astype(object)
    expression = ad.AnnData(sum_members(spots, sample.counts), obs=obs, var=genes)
    expression.obsm["spatial"] = spots.centre_xy_px.astype(np.float64)
    expression.uns["spatial"] = {sample.sample_id: {
        "images": dict(sample.images), "scalefactors": dict(sample.scalefactors),
        "metadata": {"platform": sample.platform, "mpp_source": str(sample.metadata.get("mpp_source", ""))}}}
    expression.uns["morphology"] = morphology_record(
        barcodes=spots.barcodes, mpp=sample.mpp, patch_um=spots.patch_um, patch_px=patch_px, slide=fingerprint(slide_path),
        settings=settings, stride_bins=stride_bins, bin_um=sample.bin_um)
    return expression


def cluster_labels(sample: Sample, spots: Spots) -> np.ndarray | None:
    """(P,) label of each spot's centre member, None in gaps; None where the sample came without clusters."""
    labels = sample.metadata.get("cluster")
    if labels is None:
        return None
    row_of_barcode = pd.Index(sample.barcodes).get_indexer(spots.barcodes)      # a pseudo-spot carries its centre bin's barcode
    return np.array([str(label) if label else None for label in np.asarray(labels)[row_of_barcode]], dtype=object)
