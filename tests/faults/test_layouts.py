"""Row 11: however the matrix of an `.h5ad` is stored, and with a spot that counted nothing, the commands write the same numbers."""
import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import tifffile
from click.testing import CliRunner

from preprocessing import extract_patches, gex_preprocessing
from preprocessing.expression import normalise_expression, write_vocabulary

pytestmark = pytest.mark.fault("layout of a matrix")
LAYOUTS = {
    "CSR": sp.csr_matrix, "CSC": sp.csc_matrix, "dense": np.asarray,
    "CSR of floats": lambda counts: sp.csr_matrix(counts.astype(np.float32)), "dense of 16 bits": lambda counts: counts.astype(np.uint16),
    "CSC of 64 bits": lambda counts: sp.csc_matrix(counts.astype(np.int64)),
    "CSR in disorder": lambda counts: in_disorder(sp.csr_matrix(counts)), "CSR with zeros stored": lambda counts: with_zeros(counts),
}
EMPTY_SPOT, P, G = 4, 12, 9


def in_disorder(counts: sp.csr_matrix) -> sp.csr_matrix:
    """The same matrix, every row's columns backwards."""
    order = np.concatenate([np.arange(stop - 1, start - 1, -1) for start, stop in zip(counts.indptr, counts.indptr[1:], strict=False)])
    return sp.csr_matrix((counts.data[order], counts.indices[order], counts.indptr), shape=counts.shape)


def with_zeros(counts: np.ndarray) -> sp.csr_matrix:
    """The same matrix with every zero stored."""
    return sp.csr_matrix((counts.ravel(), np.tile(np.arange(G), P), np.arange(P + 1) * G), shape=(P, G))


@pytest.fixture(scope="module")
def section(tmp_path_factory):
    """Counts (P, G) with one empty spot and one gene never seen, positions, and a slide."""
    folder = tmp_path_factory.mktemp("section")
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.8, (P, G))
    counts[EMPTY_SPOT], counts[:, 2] = 0, 0
    tifffile.imwrite(folder / "slide.tif", rng.integers(0, 255, (400, 500, 3), dtype=np.uint8), tile=(64, 64), photometric="rgb")
    spots = np.stack([60 + 100 * (np.arange(P) % 4), 60 + 110 * (np.arange(P) // 4)], axis=1).astype(float)
    return counts, spots, folder / "slide.tif"


def stored(path, section, layout):
    counts, spots, _ = section
    data = ad.AnnData(LAYOUTS[layout](counts), obs=pd.DataFrame(index=[f"SPOT{row:02d}" for row in range(P)]),
                      var=pd.DataFrame(index=[f"G{column}" for column in range(G)]), obsm={"spatial": spots})
    data.write_h5ad(path)
    return path


def run(command, *arguments) -> None:
    result = CliRunner().invoke(command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_extraction_writes_the_same_counts_from_every_layout(section, tmp_path, layout):
    counts, spots, slide = section
    run(extract_patches.main, "--gex-file", stored(tmp_path / "in.h5ad", section, layout), "--wsi-file", slide, "--mpp", 1, "--out-dir",
        tmp_path / "out", "--patch-sz-px", 16)
    written = ad.read_h5ad(tmp_path / "out" / "gex.h5ad")
    assert written.obs_names.tolist() == [f"SPOT{row:02d}" for row in range(P)] and np.array_equal(written.obsm["spatial"], spots)
    assert np.array_equal(written.X.toarray(), counts) and written.X.dtype == np.int32
    assert written.X.has_canonical_format and written.X.nnz == np.count_nonzero(counts)


@pytest.mark.parametrize("rows_at_once", [5, 2048], ids=["in blocks", "in one"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gene_filter_writes_the_same_counts_from_every_layout(section, tmp_path, monkeypatch, layout, rows_at_once):
    monkeypatch.setattr("preprocessing.expression.ROWS_AT_ONCE", rows_at_once)
    write_vocabulary(tmp_path / "vocab.txt", ["G7", "G2", "G0", "G3"])
    run(gex_preprocessing.main, "--raw-file", stored(tmp_path / "in.h5ad", section, layout), "--vocab-file", tmp_path / "vocab.txt",
        "--out-file", tmp_path / "out.h5ad")
    written = ad.read_h5ad(tmp_path / "out.h5ad")
    chosen = section[0][:, [7, 2, 0, 3]]
    assert written.var_names.tolist() == ["G7", "G2", "G0", "G3"] and np.array_equal(written.X.toarray(), chosen)
    assert written.X.has_canonical_format and written.X.nnz == np.count_nonzero(chosen) and written.X.dtype == np.int32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_normalised_expression_is_the_formula_and_a_spot_that_counted_nothing_stays_zero(section, layout):
    counts = section[0]
    sizes = counts.sum(axis=1)
    expected = np.log1p(counts / np.where(sizes > 0, sizes, 1)[:, None] * np.median(sizes[sizes > 0]))
    found = normalise_expression(LAYOUTS[layout](counts)).toarray()
    assert np.allclose(found, expected, rtol=1e-6) and not found[EMPTY_SPOT].any()
