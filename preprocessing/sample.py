"""The two types every platform is read into; after them nothing asks which platform it was.

Positions are (x, y) in level-0 pixels of the slide, float64. Touches no files.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

INT32_MAX = int(np.iinfo(np.int32).max)     # counts and array positions are int32

if TYPE_CHECKING:
    from preprocessing.tenx_matrix import StoredCounts


@dataclass(frozen=True)
class Sample:
    """One tissue section: raw UMI counts and where each spot (Visium, ST) or bin (Visium HD) lies.

    Row i of every array is one barcode; P rows, G genes.
    """

    sample_id: str
    platform: str                  # as told to the user: "Visium (Space Ranger 1.x)", "Visium HD", ...
    counts: sp.csr_matrix | StoredCounts   # raw UMIs, whole numbers, of the first rows (Visium HD: left on disk); rows beyond are zero
    barcodes: np.ndarray           # (P,) str, unique; Visium HD's stay ASCII bytes, a quarter of the size
    gene_names: np.ndarray         # (G,) str symbols, unique
    gene_ids: np.ndarray | None    # (G,) str, where known
    in_tissue: np.ndarray          # (P,) bool
    array_row: np.ndarray          # (P,) int
    array_col: np.ndarray          # (P,) int
    centre_xy_px: np.ndarray       # (P, 2) float64
    mpp: float                     # µm per level-0 pixel: decided in the reader and nowhere else
    bin_um: float | None = None    # side of a bin, µm; None where a row is a spot
    images: dict[str, np.ndarray] = field(default_factory=dict)   # "hires", "lowres": uint8 (H, W, 3)
    scalefactors: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()  # valid but suspicious: "12 positions have no counts"

    def summary(self) -> str:
        """One line for the methods section."""
        unit = f"{self.bin_um:g} µm bins" if self.bin_um else "spots"
        return (f"{self.sample_id}: {self.platform}, {self.mpp:.4g} mpp, "
                f"{int(self.in_tissue.sum()):,} {unit} in tissue, {len(self.gene_names):,} genes")


@dataclass(frozen=True)
class Spots:
    """The rows of the pairing: one patch each. For Visium HD a row is a pseudo-spot, carried by its centre bin."""

    barcodes: np.ndarray           # (P,) str; a pseudo-spot has its centre bin's
    centre_xy_px: np.ndarray       # (P, 2) float64
    array_row: np.ndarray          # (P,) int
    array_col: np.ndarray          # (P,) int
    sample_rows: np.ndarray        # (P,) int64 row of the Sample: of the spot, or of the centre bin
    patch_um: float                # side of the square of tissue this row stands for, µm
    bins_per_side: int = 1         # its members are this many bins squared about the centre bin; 1: a spot, its own only member
    dropped: dict[str, int] = field(default_factory=dict)   # reason -> number of candidates not kept

    def __len__(self) -> int:
        return len(self.barcodes)

    @property
    def n_members(self) -> int:
        """Bins per pseudo-spot, or 1."""
        return self.bins_per_side ** 2
