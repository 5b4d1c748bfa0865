"""Perturbation: a planted gene moves the nuclei it carries, random sets do not; changes are read as they are meant."""
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch

from evaluation.effects import difference_map, effects_of
from evaluation.nuclei import STATISTICS
from networks.clip import CLIP, ClipModelConfig
from preprocessing.errors import InputError, OptionError
from preprocessing.stain import TARGET_VECTORS
from training.data import ExpressionTable
from training.gene_changes import GeneChanges, read_gene_changes
from training.perturbation import Embedder, compare, shortened

GENES = [f"g{i}" for i in range(40)]
SPOTS, PX = 12, 48


def table(seed=0):
    rng = np.random.default_rng(seed)
    rows = sp.csr_matrix(rng.uniform(0.5, 2.5, (SPOTS, len(GENES))).astype(np.float32))
    barcodes = np.array([f"S__b{i}" for i in range(SPOTS)])
    return ExpressionTable(GENES, barcodes, np.full(SPOTS, "S"), rows, np.zeros((SPOTS, 2)), pd.DataFrame(index=barcodes))


class FirstGenes:
    """A gene encoder whose embedding is the first two genes, and a little of all others."""

    scales_by_sample = False

    def embed_expression(self, rows):
        dense = torch.from_numpy(rows.toarray())
        return torch.stack([dense[:, 0] + 0.08 * dense[:, 2:].sum(1), dense[:, 1]], dim=1)


def paint(prompts, keys, _what):
    """Patches with 3 nuclei for each unit of gene 0 and a few for all others; gene 1 is eosin; places and sizes are the key's."""
    y, x = np.mgrid[:PX, :PX]
    for (density, eosin), key in zip(prompts.tolist(), keys, strict=True):
        rng = np.random.default_rng(key)
        grid = np.stack(np.divmod(rng.permutation(36), 6), axis=1) * 8 + 3.5            # apart from each other
        places = grid + rng.uniform(-0.5, 0.5, (36, 2))
        amount = np.full((PX, PX), 0.08)
        for place_x, place_y in places[:round(3 * density)]:
            amount[np.hypot(x - place_x, y - place_y) < 3] = 1.4
        stain = np.stack([amount, np.full((PX, PX), 0.3 + 0.1 * eosin)], axis=-1)
        yield np.clip(240 * np.exp(-stain @ np.array(TARGET_VECTORS).T) - 1, 0, 255).astype(np.uint8)


def effects(genes, controls=19, seeds=(0, 1, 2, 3)):
    found = compare(Embedder(FirstGenes(), table()), read_gene_changes(genes, GENES), np.arange(4), list(seeds), paint, um_per_px=1.0,
                    controls=controls)
    return {effect.name: effect for effect in found.effects}, found


@pytest.fixture(scope="module")
def planted():
    return effects("g0:+2")


def test_a_planted_gene_moves_the_nuclei_it_carries_and_random_genes_do_not(planted):
    nuclei = planted[0]["nuclei"]
    assert nuclei.stands_out and nuclei.interval[0] > 2 and nuclei.change == pytest.approx(6, abs=2)
    assert 0 < np.abs(nuclei.controls).max() < 1.5 and nuclei.p_value == pytest.approx(1 / 20)
    eosin = planted[0]["eosin"]
    assert planted[0]["haematoxylin"].stands_out and abs(eosin.change) < 0.05 * eosin.spread


def test_a_gene_set_to_zero_takes_its_stain_away():
    found, _ = effects("g1:0")
    assert found["eosin"].stands_out and found["eosin"].change < -0.05 and not found["nuclei"].stands_out


def test_genes_that_carry_nothing_do_not_stand_out():
    found, patches = effects("g7:+1,g9:+1")
    assert not any(found[name].stands_out for name in ("nuclei", "eosin"))
    assert abs(found["eosin"].change) < 1e-3 and patches.before.shape == (4, 4, PX, PX, 3)


def test_patches_before_and_after_share_their_noise(planted):
    _, found = planted
    darker = (found.after.astype(int) - found.before).mean(axis=-1) < -20
    lighter = (found.after.astype(int) - found.before).mean(axis=-1) > 20
    assert darker.any() and not lighter.any()        # nuclei came, none moved


def test_a_change_that_changes_nothing_has_no_effect():
    found, patches = effects("g5:+0", controls=0)
    assert (patches.before == patches.after).all() and all(effect.change == 0 and not effect.stands_out for effect in found.values())


def test_a_change_of_all_spots_is_not_scaled_away_with_the_sample():
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=16, gene_width=16, projection=8, gene_sample_scaling="centre")
    clip, sample = CLIP(config, GENES, feature_width=4).eval(), table()
    embedder, rows = Embedder(clip, sample), np.arange(SPOTS)
    before = embedder.embed(rows, embedder.rows(rows))
    assert torch.allclose(before, clip.embed_expression(sample.expression), atol=1e-5)
    after = embedder.embed(rows, read_gene_changes("g0:+2,g3:+2", GENES).apply(embedder.rows(rows)))
    assert (after - before).norm(dim=1).min() > 0.05


@pytest.mark.parametrize(("text", "changed"), [
    ("g0:+2,g1:0", {0: 3.0, 1: 0.0}), (" g0:-3 , g2:1.5 ", {0: 0.0, 2: 1.5}), ("g1:-0.25", {1: 0.75}),
], ids=["add and set", "never below 0", "take away"])
def test_changes_are_added_or_set(text, changed):
    rows = np.ones((2, len(GENES)), np.float32)
    expected = rows.copy()
    for column, value in changed.items():
        expected[:, column] = value
    assert np.allclose(read_gene_changes(text, GENES).apply(rows), expected) and (rows == 1).all()


def test_sets_and_files_name_genes(tmp_path):
    (tmp_path / "sets.gmt").write_text("HYPOXIA\tx\tg3\tg4\tunknown\nOTHER\tx\tnobody\n")
    (tmp_path / "changes.txt").write_text("HYPOXIA:+1   # up\ng0:0\n")
    found = read_gene_changes(str(tmp_path / "changes.txt"), GENES, tmp_path / "sets.gmt")
    assert found.columns.tolist() == [3, 4, 0] and found.values.tolist() == [1, 1, 0] and found.adds.tolist() == [True, True, False]
    assert found.describe(GENES) == "g3 +1, g4 +1, g0 = 0"
    with pytest.raises(InputError, match=r"sets of .*sets.gmt; found others: 1 \(OTHER\)"):
        read_gene_changes("OTHER:0", GENES, tmp_path / "sets.gmt")


@pytest.mark.parametrize(("text", "message"), [
    ("g0", "expected NAME:[+]2 .* found g0"), ("g0:up", "found g0:up"), ("g0:nan", "found g0:nan"), (":+1", "found :[+]1"),
    ("g0:+1,g0:0", r"every gene changed once; found twice: 1 \(g0\)"), (" , ", "expected at least one"),
], ids=["no change", "a word", "not a number", "no name", "twice", "nothing"])
def test_changes_that_cannot_be_meant_are_refused(text, message, tmp_path):
    with pytest.raises(OptionError, match=f"--genes: .*{message}"):
        read_gene_changes(text, GENES)
    (tmp_path / "changes.txt").write_text(text)
    with pytest.raises(InputError, match=f"changes.txt: .*{message}"):
        read_gene_changes(str(tmp_path / "changes.txt"), GENES)


def test_a_gene_that_the_model_does_not_know_is_wrong_input():
    with pytest.raises(InputError, match=r"--genes: .*others: 1 \(nobody\)"):
        read_gene_changes("nobody:+1", GENES)


def test_a_title_names_whole_changes():
    assert shortened("A:+1, B:0") == "A:+1, B:0" and shortened("A" * 90) == "A" * 90
    assert shortened(",".join(f"Gene{i:02d}:+1" for i in range(20)), most=30) == "Gene00:+1, Gene01:+1, ..."


def test_random_genes_are_others_of_like_expression():
    means = np.arange(200.0)
    changes = GeneChanges(np.array([100, 103]), np.array([1.0, 0.0]), np.array([True, False]))
    rng = np.random.default_rng(0)
    drawn = np.array([changes.random_like(means, rng).columns for _ in range(50)])
    assert not np.isin(drawn, [100, 103]).any() and (drawn[:, 0] != drawn[:, 1]).all()
    assert np.abs(drawn - 101.5).max() <= 30 and len(np.unique(drawn)) > 30
    with pytest.raises(OptionError, match="1 left"):
        changes.at(np.array([0, 1])).random_like(np.zeros(3), rng)


def test_intervals_are_students_over_seeds_and_areas_that_are_not_known_are_left_out():
    before, after = np.zeros((2, 3, len(STATISTICS))), np.zeros((2, 3, len(STATISTICS)))
    after[..., 0] = [[1, 2, 3], [3, 4, 5]]                       # seeds change it by 2, 3, 4
    after[0, 0, 1], after[:, 1:, 1], before[1, 0, 1] = np.nan, 1, np.nan
    found = effects_of(before, after, np.zeros((0, 2, 3, len(STATISTICS))))
    assert found[0].change == 3 and found[0].interval == pytest.approx((3 - 4.3027 / 3 ** 0.5, 3 + 4.3027 / 3 ** 0.5), abs=1e-3)
    assert found[1].change == 1                                  # of the two seeds that have an area on both sides


def test_difference_maps_are_blue_where_darker_and_orange_where_lighter():
    before = np.full((2, 1, 3), 120, np.uint8)
    after = before + np.array([[[-60]], [[60]]], dtype=np.int16)
    darker, lighter = difference_map(before, after.astype(np.uint8))[:, 0].astype(int)
    assert darker[2] > darker[0] and lighter[0] > lighter[2]
    assert (difference_map(before, before) == 255).all()


def test_more_genes_than_a_file_name_may_have_letters_are_read():
    text = ",".join(f"g{i}:+1.{'0' * 100}" for i in range(3))
    assert read_gene_changes(text, GENES).columns.tolist() == [0, 1, 2]


def test_members_of_a_set_that_the_model_does_not_know_are_told(tmp_path):
    (tmp_path / "sets.gmt").write_text("HYPOXIA\tx\tg3\tunknown\tother\n")
    found = read_gene_changes("HYPOXIA:+1,g0:0", GENES, tmp_path / "sets.gmt")
    assert found.strangers == ("unknown", "other") and found.columns.tolist() == [3, 0]
