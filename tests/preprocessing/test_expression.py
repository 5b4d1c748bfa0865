"""Expression files: what is accepted, how it is normalised, how genes are chosen."""
import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp

from preprocessing.done_manifests import strings_sha256
from preprocessing.errors import InputError
from preprocessing.expression import (
    as_csr,
    check_counts,
    morphology_record,
    normalise_expression,
    read_expression,
    read_gene_map,
    read_vocabulary,
    row_blocks,
    spot_positions,
    write_expression,
    write_vocabulary,
)
from preprocessing.gene_selection import choose_genes
from preprocessing.stain import read_stain_file
from training.sample_sheet import read_sample_sheet

GENES = ["Actb", "Gapdh", "Umod", "Nphs1", "Aqp2"]
COUNTS = np.array([[4, 0, 1, 0, 3], [0, 0, 0, 0, 0], [9, 5, 0, 2, 0]])


def anndata(counts=COUNTS, genes=GENES, barcodes=("A-1", "B-1", "C-1")):
    adata = ad.AnnData(sp.csr_matrix(counts) if isinstance(counts, np.ndarray) else counts)
    adata.obs_names, adata.var_names = list(barcodes), list(genes)
    adata.obs["sample_id"] = "S1"
    adata.obsm["spatial"] = np.arange(6.0).reshape(3, 2)
    return adata


def selected_of(adata, vocabulary, **options):
    """The expression that a selection makes of data in memory."""
    selection = choose_genes(adata.var_names, vocabulary, **options)
    selected = selection.about(adata)
    selected.X = selection.counts(as_csr(adata.X))
    return selected


def saved(tmp_path, adata):
    adata.write_h5ad(tmp_path / "gex.h5ad")
    return tmp_path / "gex.h5ad"


# ---- checks ----

@pytest.mark.parametrize("value, message", [
    (np.nan, "gex.h5ad: X: expected raw UMI counts; found 1 NaN or infinite values"),
    (np.inf, "found 1 NaN or infinite values"),
    (-1.0, "found 1 negative values"),
    (1.386, "whole numbers; found values like 1.386, normalised or logged already. Raw counts are needed: they may lie in layers"),
], ids=["NaN", "infinite", "negative", "logged"])
@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix], ids=["dense", "csr", "csc"])
@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
def test_what_are_not_raw_counts_is_refused(tmp_path, value, message, layout, backed):
    counts = COUNTS.astype(np.float32)
    counts[2, 1] = value
    with pytest.raises(InputError, match=message):
        adata = read_expression(saved(tmp_path, anndata(layout(counts))), backed=backed)
        list(row_blocks(adata, "gex.h5ad") if backed else ())        # on disk: refused when it is read


def test_the_hint_about_values_that_are_no_counts_is_the_callers(tmp_path):
    with pytest.raises(InputError, match="logged already. Say --so$"):
        read_expression(saved(tmp_path, anndata(normalise_expression(sp.csr_matrix(COUNTS)))), hint="Say --so")


@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
def test_an_h5ad_without_x_is_refused_naming_its_layers(tmp_path, backed):
    adata = anndata(COUNTS)
    adata.layers["counts"], adata.X = adata.X.copy(), None
    with pytest.raises(InputError, match=r"gex.h5ad: X: expected counts .*; found no X \(layers: counts\)"):
        read_expression(saved(tmp_path, adata), backed=backed)


def test_positions_that_are_no_numbers_are_refused():
    adata = anndata(COUNTS)
    assert (spot_positions(adata, "gex.h5ad") == np.arange(6.0).reshape(3, 2)).all()
    adata.obsm["spatial"] = np.array([["a", "b"]] * 3)
    with pytest.raises(InputError, match=r"gex.h5ad: obsm\['spatial'\]: expected numbers"):
        spot_positions(adata, "gex.h5ad")


@pytest.mark.parametrize("read", [read_vocabulary, read_gene_map, read_stain_file, read_sample_sheet], ids=lambda read: read.__name__)
@pytest.mark.parametrize("what, found", [("binary", "found other bytes"), ("folder", "found a folder"), ("nothing", "found nothing there")])
def test_a_text_file_that_is_none_is_refused_by_name(tmp_path, read, what, found):
    path = tmp_path / "given"
    path.mkdir() if what == "folder" else path.write_bytes(b"\xff\xfe\x00\x81") if what == "binary" else None
    with pytest.raises(InputError, match=f"given: file: expected .*; {found}"):
        read(path)


def test_normalised_expression_is_read_when_it_is_meant(tmp_path):
    logged = normalise_expression(sp.csr_matrix(COUNTS))
    adata = read_expression(saved(tmp_path, anndata(logged)), already_normalised=True)
    assert np.allclose(adata.X.toarray(), logged.toarray())
    with pytest.raises(InputError, match="negative"):
        check_counts("gex.h5ad", -logged, already_normalised=True)


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_repeated_barcodes_are_refused_naming_them(tmp_path):
    path = saved(tmp_path, anndata(barcodes=("A-1", "A-1", "C-1")))
    with pytest.raises(InputError, match=r"obs_names: expected unique barcodes; found repeated 1 \(A-1\)"):
        read_expression(path)


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_repeated_symbols_are_made_unique_by_anndatas_rule(tmp_path):
    path = saved(tmp_path, anndata(genes=["Actb", "Actb", "Umod", "Nphs1", "Aqp2"]))
    assert read_expression(path).var_names.tolist()[:2] == ["Actb", "Actb-1"]


@pytest.mark.parametrize("content", [b"", b"not an h5ad"], ids=["empty", "text"])
def test_what_is_no_h5ad_is_refused(tmp_path, content):
    (tmp_path / "gex.h5ad").write_bytes(content)
    with pytest.raises(InputError, match="gex.h5ad: file: expected an .h5ad file"):
        read_expression(tmp_path / "gex.h5ad")
    with pytest.raises(InputError, match="nothing.h5ad: file: expected an .h5ad file; found nothing there"):
        read_expression(tmp_path / "nothing.h5ad")


# ---- normalising ----

@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix], ids=["dense", "csr", "csc"])
@pytest.mark.parametrize("backed", [False, True], ids=["in memory", "backed"])
@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint16])
def test_every_layout_gives_the_same_numbers(tmp_path, layout, backed, dtype):
    adata = read_expression(saved(tmp_path, anndata(layout(COUNTS.astype(dtype)))), backed=backed)
    [rows] = row_blocks(adata, "gex.h5ad")
    assert (rows.toarray() == COUNTS).all()
    selected = selected_of(adata, ["Aqp2", "Actb"])
    assert sp.issparse(selected.X) and (selected.X.toarray() == COUNTS[:, [4, 0]]).all()
    expected = np.log1p([[3 / 7 * 8, 4 / 7 * 8], [0, 0], [0, 9 / 9 * 8]])          # median of 7 and 9 is 8
    assert np.allclose(normalise_expression(selected.X).toarray(), expected, atol=1e-6)


def test_library_sizes_reach_the_target_and_zero_spots_stay_zero():
    counts = sp.csr_matrix(COUNTS)
    back = np.expm1(normalise_expression(counts, 1e4).toarray()).sum(axis=1)
    assert np.allclose(back, [1e4, 0, 1e4], rtol=1e-5) and (counts.toarray() == COUNTS).all()


def test_the_median_is_that_of_spots_with_counts():
    back = np.expm1(normalise_expression(sp.csr_matrix(COUNTS), "median").toarray()).sum(axis=1)
    assert np.allclose(back, [12, 0, 12], rtol=1e-5)                                # library sizes 8, 0, 16


# ---- vocabularies ----

@pytest.mark.parametrize("text", ["Umod\nActb\n", "Umod\r\nActb\r\n", "\n Umod \n\n\nActb", "\ufeffUmod\nActb\n"],
                         ids=["plain", "CRLF", "blank lines and spaces", "byte order mark"])
def test_a_vocabulary_reads_the_same_however_it_was_saved(tmp_path, text):
    (tmp_path / "vocab.txt").write_bytes(text.encode())
    assert read_vocabulary(tmp_path / "vocab.txt") == ["Umod", "Actb"]


@pytest.mark.parametrize("content, message", [
    (b"Umod\nActb\nUmod\n", r"genes: expected every symbol once; found repeated 1 \(Umod\)"),
    (b"\n\n", "found no symbol"),
    (b"ENSMUSG1\tUmod\n", "found several columns"),
    (b"\xff\xfeU\0m\0", "one gene symbol a line, in UTF-8; found other bytes"),
], ids=["repeated", "empty", "two columns", "UTF-16"])
def test_a_wrong_vocabulary_is_refused(tmp_path, content, message):
    (tmp_path / "vocab.txt").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_vocabulary(tmp_path / "vocab.txt")


def test_vocabulary_round_trip_and_its_hash_depends_on_order(tmp_path):
    write_vocabulary(tmp_path / "vocab.txt", GENES)
    assert read_vocabulary(tmp_path / "vocab.txt") == GENES
    assert strings_sha256(GENES) != strings_sha256(GENES[::-1])


def test_the_published_vocabulary_is_read_whole(shared_data):
    genes = read_vocabulary(shared_data / "genes" / "gene_vocab.txt")
    assert len(genes) == 18_248 and not any(gene != gene.strip() for gene in genes)


# ---- selecting ----

def test_selected_genes_stand_in_the_vocabularys_order_with_their_annotation():
    adata = anndata()
    adata.var["gene_ids"] = [f"ENS{gene}" for gene in GENES]
    selected = selected_of(adata, ["Nphs1", "Actb"])
    assert selected.var_names.tolist() == ["Nphs1", "Actb"] and selected.var["gene_ids"].tolist() == ["ENSNphs1", "ENSActb"]
    assert (selected.X.toarray() == COUNTS[:, [3, 0]]).all() and selected.uns["vocab_sha256"] == strings_sha256(["Nphs1", "Actb"])
    assert selected.obs["sample_id"].tolist() == ["S1"] * 3 and (selected.obsm["spatial"] == adata.obsm["spatial"]).all()


def test_missing_genes_are_counted_and_the_first_five_named():
    absent = [f"Gone{i}" for i in range(7)]
    with pytest.raises(InputError, match=r"gex.h5ad: var_names: expected the 8 genes of the vocabulary; found 1 of them; "
                                         r"missing 7 \(Gone0, Gone1, Gone2, Gone3, Gone4, ...\)"):
        choose_genes(GENES, ["Actb", *absent], path="gex.h5ad")


def test_missing_genes_can_be_zero_columns_that_say_so(tmp_path):
    selected = selected_of(anndata(), ["Gone", "Umod"], missing="zero")
    assert (selected.X.toarray() == np.stack([np.zeros(3), COUNTS[:, 2]], axis=1)).all()
    assert selected.var["zero_filled"].tolist() == [True, False]
    write_expression(tmp_path / "gex_filt.h5ad", selected)


def test_a_vocabulary_of_another_species_is_refused_even_with_zeros():
    with pytest.raises(InputError, match="found 0 of them; .* --gene-map"):
        choose_genes(GENES, ["ACTB", "GAPDH"], missing="zero")


def test_a_gene_map_renames_before_selecting_and_sums_genes_that_meet(tmp_path):
    (tmp_path / "map.tsv").write_text("human_symbol\tvocab_symbol\thow\nACTB\tActb\tone2one\nACTB2\tActb\tmany\nNONE\t\tnone\n")
    gene_map = read_gene_map(tmp_path / "map.tsv")
    adata = anndata(genes=["ACTB", "ACTB2", "Umod", "NONE", "X"])
    selected = selected_of(adata, ["Umod", "Actb", "NONE"], gene_map=gene_map)
    assert (selected.X.toarray() == np.stack([COUNTS[:, 2], COUNTS[:, 0] + COUNTS[:, 1], COUNTS[:, 3]], axis=1)).all()


def test_rows_after_a_gene_that_is_left_out_start_from_nothing():
    selected = selected_of(anndata(genes=["A", "B", "C", "D", "E"]), ["E", "B"])
    assert (selected.X.toarray() == COUNTS[:, [4, 1]]).all() and selected.X.has_canonical_format


@pytest.mark.parametrize(("counts", "fits"), [([3_000_000_000, 0], False), ([2 ** 31 - 1, 2 ** 31 - 1], False), ([2 ** 62, 1], False),
                                              ([2 ** 31 - 2, 1], True)],
                         ids=["a count of three billion", "paralogs that overflow", "a count of exabytes", "the largest that fits"])
def test_a_count_beyond_int32_is_refused_and_never_wraps_to_a_negative_one(counts, fits):
    selection = choose_genes(["ACTB", "ACTB2"], ["Actb"], gene_map={"ACTB": "Actb", "ACTB2": "Actb"}, path="S1/gex.h5ad")
    counts = sp.csr_matrix(np.array([[0, 0], counts, [5, 6]]))
    if fits:
        assert selection.counts(counts).toarray().tolist() == [[0], [2 ** 31 - 1], [11]]
    else:
        with pytest.raises(InputError, match="S1/gex.h5ad: X: expected counts of a gene up to 2,147,483,647, .*; found a larger one"):
            selection.counts(counts)


def test_blocks_of_rows_are_the_rows_and_go_on_where_they_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr("preprocessing.expression.ROWS_AT_ONCE", 2)
    adata = read_expression(saved(tmp_path, anndata()), backed=True)
    assert [block.toarray().tolist() for block in row_blocks(adata, "gex.h5ad")] == [COUNTS[:2].tolist(), COUNTS[2:].tolist()]
    assert [block.toarray().tolist() for block in row_blocks(adata, "gex.h5ad", first=1)] == [COUNTS[2:].tolist()]



@pytest.mark.parametrize("text, message", [("ACTB\n", "two columns with a tab between; found lines 1"),
                                           ("ACTB\tActb\nACTB\tActg1\n", "ACTB: expected one target a symbol; found Actb and Actg1")])
def test_a_wrong_gene_map_is_refused(tmp_path, text, message):
    (tmp_path / "map.tsv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_gene_map(tmp_path / "map.tsv")


# ---- writing ----

def test_a_written_file_carries_the_record_of_its_patches_and_what_scanpy_draws(tmp_path):
    adata = anndata()
    hires = np.zeros((4, 4, 3), np.uint8)
    adata.uns["spatial"] = {"S1": {"images": {"hires": hires}, "scalefactors": {"tissue_hires_scalef": 0.1}, "metadata": {}}}
    slide = {"name": "slide.tif", "bytes": 9, "sha256": "ab"}
    adata.uns["morphology"] = morphology_record(barcodes=adata.obs_names, mpp=0.5, patch_um=55.0, patch_px=128, slide=slide,
                                                settings={"edge": "drop"}, bin_um=None)
    write_expression(tmp_path / "gex.h5ad", adata, config={"edge": "drop"}, inputs={})
    back = read_expression(tmp_path / "gex.h5ad")
    assert back.uns["morphology"]["barcode_sha256"] == strings_sha256(["A-1", "B-1", "C-1"])
    assert {"mpp", "patch_um", "patch_px", "slide", "settings", "version"} <= set(back.uns["morphology"])
    assert (back.uns["spatial"]["S1"]["images"]["hires"] == hires).all()
    assert isinstance(back.X, sp.csr_matrix) and (back.X.toarray() == COUNTS).all()
    assert (tmp_path / "gex.h5ad.done.json").is_file()


def test_nothing_normalised_goes_to_disk_and_the_old_file_stays(tmp_path):
    write_expression(tmp_path / "gex.h5ad", anndata())
    before = (tmp_path / "gex.h5ad").read_bytes()
    with pytest.raises(InputError, match="normalised or logged already"):
        write_expression(tmp_path / "gex.h5ad", anndata(normalise_expression(sp.csr_matrix(COUNTS))))
    assert (tmp_path / "gex.h5ad").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_came_out_short_is_not_finished(tmp_path, monkeypatch):
    whole = ad.io.write_elem
    monkeypatch.setattr(ad.io, "write_elem", lambda file, key, adata, **options: whole(file, key, adata[:2].copy(), **options))
    with pytest.raises(OSError, match="not what was meant"):
        write_expression(tmp_path / "gex.h5ad", anndata())
    assert list(tmp_path.iterdir()) == []
