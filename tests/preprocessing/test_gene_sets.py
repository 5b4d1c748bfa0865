"""Gene sets of a GMT file, reduced to the genes that the expression has."""
import pytest

from preprocessing.errors import InputError
from preprocessing.gene_sets import gene_sets_within, read_gene_sets

GMT = "apoptosis\thttp://x\tBax\tTp53\tBax\n\ncell cycle\t\tCdk1,1.0\tTp53\t\nplants\tnone of ours\tRbcL\r\n"


@pytest.fixture
def gmt(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text(GMT, newline="")
    return path


def test_sets_are_read_by_name_and_a_gene_counts_once(gmt):
    assert read_gene_sets(gmt) == {"apoptosis": ["Bax", "Tp53"], "cell cycle": ["Cdk1", "Tp53"], "plants": ["RbcL"]}


def test_unknown_genes_are_left_out_counted_and_said(gmt):
    kept, said = gene_sets_within(gmt, ["Tp53", "Actb", "Bax"])
    assert kept == {"apoptosis": ["Bax", "Tp53"], "cell cycle": ["Tp53"]}
    assert said == f"{gmt}: 2 of 3 gene sets with 2 of 3 genes; unknown genes left out: 2 (Cdk1, RbcL)"


def test_sets_without_any_gene_of_the_vocabulary_are_refused(gmt):
    with pytest.raises(InputError, match=r"expected some of the 1 genes of the expression files; found none, but 4 \(Bax, Cdk1"):
        gene_sets_within(gmt, ["Gapdh"])


@pytest.mark.parametrize("text, said", [("", "one gene set a line"), ("name only\n", "line 1: expected tab-separated name"),
                                        ("a\tb\tG\na\tb\tH\n", "no value twice"), ("a\tb\t\t\n", "line 1")],
                         ids=["empty", "no genes", "a name twice", "blank genes"])
def test_what_is_no_gene_set_file_is_refused(tmp_path, text, said):
    path = tmp_path / "sets.gmt"
    path.write_text(text)
    with pytest.raises(InputError, match=said):
        read_gene_sets(path)
