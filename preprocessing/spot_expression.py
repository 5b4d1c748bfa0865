"""Turn a Sample and the Spots kept of it into the AnnData of `gex.h5ad`: raw counts, one row a patch.

Touches no files. `uns['spatial']` is what scanpy and squidpy draw;
`uns['morphology']` says how rows and patches were made.
"""
from __future__ import annotations

from collections.abc import Mapping

import anndata as ad
import numpy as np
import pandas as pd

from preprocessing.expression import morphology_record
from preprocessing.sample import Sample, Spots
from preprocessing.spot_sums import sum_spots


def spot_expression(sample: Sample, spots: Spots, **details) -> ad.AnnData:
    """Raw counts summed over each spot's members, for a sample that fits in memory; `details` as of `about_spots`."""
    expression = about_spots(sample, spots, **details)
    expression.X = sum_spots(sample, spots)
    return expression


def about_spots(sample: Sample, spots: Spots, *, patch_px: int, slide: Mapping, settings: Mapping,
                stride_bins: int | None = None) -> ad.AnnData:
    """obs, var, obsm and uns of the spots: everything `formats.md` asks of a `gex.h5ad` but X.

    `slide` is its `outputs.fingerprint`. Of rows that were pseudo-spots already when they were read, what they were made of is kept."""
    made = sample.metadata
    n_members = made["n_members"][spots.sample_rows] if "n_members" in made else np.full(len(spots), spots.n_members, np.int64)
    obs = pd.DataFrame({"in_tissue": np.ones(len(spots), np.int8), "array_row": spots.array_row.astype(np.int64),
                        "array_col": spots.array_col.astype(np.int64), "sample_id": pd.Categorical([sample.sample_id] * len(spots)),
                        "n_members": n_members}, index=pd.Index(spots.barcodes.astype(object)))
    if (labels := cluster_labels(sample, spots)) is not None:
        obs["cluster"] = pd.Categorical(labels)
    genes = pd.DataFrame(index=pd.Index(sample.gene_names.astype(object)))
    if sample.gene_ids is not None:
        genes["gene_ids"] = sample.gene_ids.astype(object)
    about = ad.AnnData(obs=obs, var=genes)
    about.obsm["spatial"] = spots.centre_xy_px.astype(np.float64)
    about.uns["spatial"] = {sample.sample_id: {
        "images": dict(sample.images), "scalefactors": dict(sample.scalefactors),
        "metadata": {"platform": sample.platform, "mpp_source": str(sample.metadata.get("mpp_source", ""))}}}
    about.uns["morphology"] = morphology_record(
        barcodes=spots.barcodes, mpp=sample.mpp, patch_um=spots.patch_um, patch_px=patch_px, slide=slide,
        settings=settings, stride_bins=stride_bins or made.get("stride_bins"), bin_um=sample.bin_um or made.get("bin_um"))
    return about


def cluster_labels(sample: Sample, spots: Spots) -> np.ndarray | None:
    """(P,) label of each spot's centre member, None in gaps; None where the sample came without clusters."""
    labels = sample.metadata.get("cluster")
    if labels is None:
        return None
    return np.array([str(label) if label else None for label in np.asarray(labels)[spots.sample_rows]], dtype=object)
