"""Lists of genes out of a table of attributions: tops, what they share, rankings, planted gene sets."""
import numpy as np
import pandas as pd
import pytest

from evaluation import gene_lists as lists
from preprocessing.errors import InputError, OptionError

GENES = [f"g{i:02d}" for i in range(40)]


@pytest.fixture
def table(rng):
    """Clusters a, b, c; g00-g05 mark a against both others, g10-g15 mark b."""
    pairs = {f"{i} vs. {j}": np.zeros(40) for i in "abc" for j in "abc" if i != j}
    for pair, values in pairs.items():
        values[:] = rng.uniform(0, 0.1, 40) * (rng.random(40) < 0.5)
        if pair[0] in "ab":
            start = 0 if pair[0] == "a" else 10
            values[start:start + 6] = np.linspace(2, 1, 6)
    return pd.DataFrame(pairs, index=pd.Index(GENES, name="gene"))


def test_the_top_of_a_pair_is_sorted_and_zeros_do_not_count(table):
    table["a vs. b"] = [3, -5, 1, *[0] * 37]
    assert lists.top_genes(table, 10)["a vs. b"] == ["g01", "g00", "g02"]
    assert lists.top_table(table, 4)["a vs. b"].tolist() == ["g01", "g00", "g02", ""]


def test_union_counts_lists_and_intersection_needs_all():
    found = {"1": ["x", "y"], "2": ["y", "z"], "3": ["y", "x"]}
    assert lists.union_of(found) == ["y", "x", "z"] and lists.intersection_of(found) == ["y"] and lists.intersection_of({}) == []


def test_a_cluster_is_told_from_every_other_by_its_planted_genes(table):
    own = lists.query_lists(table, 6)
    assert own["a"] == GENES[:6] and own["b"] == GENES[10:16] and set(own) == {"a", "b", "c"}


def test_planted_sets_are_enriched_on_their_side_and_others_are_not_told(table):
    sets = {"marks of a": GENES[:6], "marks of b": GENES[10:16], "nobody's": GENES[20:26], "small": GENES[:2]}
    found = lists.enriched_sets(lists.signed_ranking(table, "a", "b"), sets, permutations=200, least_genes=5)
    assert set(found.index) == {"marks of a", "marks of b"} and found.loc["marks of a", "NES"] > 1 > -1 > found.loc["marks of b", "NES"]
    assert set(found.loc["marks of a", "lead"].split(";")) <= set(GENES[:6]) and (found["p"] < 0.02).all()
    again = lists.enriched_sets(lists.signed_ranking(table, "a", "b"), sets, permutations=200, least_genes=5)
    assert again.equals(found)


def test_nothing_to_rank_or_no_set_of_a_fitting_size_is_an_empty_table(table):
    assert len(lists.enriched_sets(lists.signed_ranking(table, "a", "b"), {"small": GENES[:2]})) == 0
    assert len(lists.enriched_sets(pd.Series(0.0, index=GENES), {"s": GENES[:10]})) == 0
    with pytest.raises(OptionError, match="two clusters of the table, as a vs. b; found a vs. x, x vs. a"):
        lists.signed_ranking(table, "a", "x")


def test_gene_sets_come_from_a_file_and_a_library_out_of_reach_says_so(tmp_path, monkeypatch):
    import gseapy
    (tmp_path / "sets.gmt").write_text("one\tx\tg00\tg01\tstranger\n")
    assert lists.load_gene_sets(tmp_path / "sets.gmt", GENES) == {"one": ["g00", "g01"]}
    with pytest.raises(InputError, match="nowhere.gmt: gene sets: expected a GMT file"):
        lists.load_gene_sets(tmp_path / "nowhere.gmt", GENES)

    def no_network(name, organism):
        raise ConnectionError("no route")
    monkeypatch.setattr(gseapy, "get_library", no_network)
    with pytest.raises(InputError, match=r"a network to fetch it; found no answer \(ConnectionError\). Fetch the library as GMT"):
        lists.load_gene_sets(lists.GO_CELLULAR_COMPONENT, GENES)
    monkeypatch.setattr(gseapy, "get_library", lambda name, organism: {"kept": ["g05", "other"], "gone": ["other"]})
    assert lists.load_gene_sets(lists.GO_CELLULAR_COMPONENT, GENES) == {"kept": ["g05"]}


@pytest.mark.parametrize(("text", "message"), [
    ("gene,a vs. b\ng0,1\ng0,2\n", "genes twice"), ("gene,score\ng0,1\n", r"names as `i vs. j`.* found 1 \(score\)"),
    ("gene,a vs. b\ng0,\n", "gaps"), ("name,a vs. b\ng0,1\n", "gene, and a column of numbers"),
   
    ("gene,a vs. b\ng0,high\n", "a column of numbers"),
], ids=["twice", "no pair", "gap", "no gene column", "words"])
def test_what_is_no_table_of_attributions_is_refused(tmp_path, text, message):
    (tmp_path / "genes.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        lists.read_attributions(tmp_path / "genes.csv")
