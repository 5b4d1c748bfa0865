"""The vocabulary of several samples, and the expression that follows it: the two commands."""
import anndata as ad
import numpy as np
import pytest
import scipy.sparse as sp
from click.testing import CliRunner

from preprocessing.dump_patches import main as dump_patches
from preprocessing.expression import read_expression, read_vocabulary
from preprocessing.gene_vocab import main as gene_vocab
from preprocessing.gene_vocab import make_vocabulary
from preprocessing.gex_preprocessing import main as gex_preprocessing


def write_sample(path, genes, counts):
    adata = ad.AnnData(sp.csr_matrix(np.array(counts)))
    adata.var_names, adata.obs_names = genes, [f"A{i}-1" for i in range(adata.n_obs)]
    adata.write_h5ad(path)
    return str(path)


@pytest.fixture
def samples(tmp_path):
    return [write_sample(tmp_path / "a.h5ad", ["Umod", "Actb", "Xkr4", "Aqp2"], [[1, 5, 0, 2], [2, 5, 0, 0]]),
            write_sample(tmp_path / "b.h5ad", ["Aqp2", "Umod", "Actb", "Gapdh"], [[1, 0, 7, 9]])]


def run(command, *arguments):
    return CliRunner().invoke(command, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", [gene_vocab, gex_preprocessing, dump_patches], ids=["gene_vocab", "gex_preprocessing", "dump_patches"])
def test_help_is_a_manual_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "Example: python preprocessing/" in result.output
    assert all(option.help for option in command.params)


def test_the_vocabulary_is_the_intersection_in_the_order_of_the_first_sample(samples):
    assert make_vocabulary(samples) == ["Umod", "Actb", "Aqp2"]
    assert make_vocabulary(samples[::-1]) == ["Aqp2", "Umod", "Actb"]


def test_only_genes_with_enough_counts_over_all_samples_are_kept(samples):
    assert make_vocabulary(samples, min_counts=4) == ["Actb"]
    assert make_vocabulary(samples, min_counts=3) == ["Umod", "Actb", "Aqp2"]


def test_the_command_writes_one_symbol_a_line(samples, tmp_path):
    result = run(gene_vocab, "--gex", ",".join(samples), "--out", tmp_path / "vocab.txt")
    assert result.exit_code == 0 and "wrote 3 genes to" in result.output
    assert (tmp_path / "vocab.txt").read_bytes() == b"Umod\nActb\nAqp2\n"


def test_no_common_gene_is_refused(samples, tmp_path):
    result = run(gene_vocab, "--gex", ",".join(samples), "--out", tmp_path / "vocab.txt", "--min-counts", 1000)
    assert result.exit_code == 3 and "common genes with at least 1000 counts" in result.output
    assert not (tmp_path / "vocab.txt").exists()


def test_genes_are_renamed_before_samples_are_compared(samples, tmp_path):
    human = write_sample(tmp_path / "h.h5ad", ["UMOD", "ACTB"], [[1, 1]])
    (tmp_path / "map.tsv").write_text("UMOD\tUmod\nACTB\tActb\n")
    assert make_vocabulary([samples[0], human], gene_map=tmp_path / "map.tsv") == ["Umod", "Actb"]


def test_the_filter_writes_exactly_the_vocabulary_beside_the_raw_file(samples, tmp_path):
    (tmp_path / "vocab.txt").write_bytes(b"Aqp2\r\n\r\nUmod\r\n")
    result = run(gex_preprocessing, "--raw-file", samples[0], "--vocab-file", tmp_path / "vocab.txt")
    assert result.exit_code == 0 and "2 spots, 2 genes of the vocabulary (from 4)" in result.output
    adata = read_expression(tmp_path / "gex_filt.h5ad")
    assert adata.var_names.tolist() == read_vocabulary(tmp_path / "vocab.txt") == ["Aqp2", "Umod"]
    assert (adata.X.toarray() == [[2, 1], [0, 2]]).all()


def test_missing_genes_end_in_one_line_and_no_file_or_in_zeros(samples, tmp_path):
    (tmp_path / "vocab.txt").write_text("Umod\nNope\n")
    arguments = ["--raw-file", samples[0], "--vocab-file", tmp_path / "vocab.txt", "--out-file", tmp_path / "out.h5ad"]
    refused = run(gex_preprocessing, *arguments)
    assert refused.exit_code == 3 and "missing 1 (Nope)" in refused.output and "Traceback" not in refused.output
    assert not (tmp_path / "out.h5ad").exists()
    filled = run(gex_preprocessing, *arguments, "--missing-genes", "zero")
    assert filled.exit_code == 0 and "1 of them missing and filled with zeros" in filled.output
    assert (read_expression(tmp_path / "out.h5ad").X.toarray() == [[1, 0], [2, 0]]).all()


def test_a_filter_finished_from_these_inputs_is_kept_and_any_other_is_redone(samples, tmp_path):
    (tmp_path / "vocab.txt").write_text("Umod\n")
    arguments = ["--raw-file", samples[0], "--vocab-file", tmp_path / "vocab.txt"]
    first = run(gex_preprocessing, *arguments).output
    written = (tmp_path / "gex_filt.h5ad").stat().st_mtime_ns
    again = run(gex_preprocessing, *arguments).output
    assert "wrote" in first and "2 spots, 1 genes of the vocabulary (from 4); finished before" in again and "kept" in again
    assert (tmp_path / "gex_filt.h5ad").stat().st_mtime_ns == written
    (tmp_path / "vocab.txt").write_text("Actb\n")
    assert "wrote" in run(gex_preprocessing, *arguments).output
    assert read_expression(tmp_path / "gex_filt.h5ad").var_names.tolist() == ["Actb"]


@pytest.mark.parametrize("which", ["raw-file", "vocab-file"])
def test_an_input_is_never_the_output(samples, tmp_path, which):
    (tmp_path / "vocab.txt").write_text("Umod\n")
    inputs = {"raw-file": tmp_path / "a.h5ad", "vocab-file": tmp_path / "vocab.txt"}
    before = inputs[which].read_bytes()
    (tmp_path / "sub").mkdir()
    result = run(gex_preprocessing, *[part for name, path in inputs.items() for part in (f"--{name}", path)],
                 "--out-file", tmp_path / "sub" / ".." / inputs[which].name)
    assert result.exit_code == 2 and f"--out-file: expected another file than --{which}" in result.output
    assert inputs[which].read_bytes() == before


@pytest.mark.parametrize("option", ["raw-file", "vocab-file", "gene-map"])
def test_a_folder_in_place_of_a_file_is_bad_input(samples, tmp_path, option):
    (tmp_path / "vocab.txt").write_text("Umod\n")
    (tmp_path / "folder").mkdir()
    given = {"raw-file": samples[0], "vocab-file": tmp_path / "vocab.txt"} | {option: tmp_path / "folder"}
    result = run(gex_preprocessing, *[part for name, path in given.items() for part in (f"--{name}", path)])
    assert result.exit_code == 3 and "folder: file: expected" in result.output and "found a folder" in result.output


def test_her2st_genes_reach_the_published_mouse_vocabulary_through_orthologs(tmp_path, shared_data):
    pairs = (shared_data / "genes" / "her2st_human_to_vocab.tsv").read_text().splitlines()[1:]
    human = [line.split("\t")[0] for line in pairs]
    path = write_sample(tmp_path / "gex.h5ad", human, np.ones((1, len(human)), int))
    result = run(gex_preprocessing, "--raw-file", path, "--vocab-file", shared_data / "genes" / "gene_vocab.txt",
                 "--gene-map", shared_data / "genes" / "her2st_human_to_vocab.tsv", "--missing-genes", "zero")
    assert result.exit_code == 0, result.output
    adata = read_expression(tmp_path / "gex_filt.h5ad")
    assert adata.n_vars == 18_248 and adata.X.nnz == 14_193 and adata.X.sum() == 14_203
