"""Faithfulness: every number puts real patches above good ones, good above poor, poor above shuffled and noise."""
import numpy as np
import pytest
import scipy.sparse as sp
import torch

from evaluation.faithfulness import score_all, share_of_ceiling
from evaluation.readout import balanced_accuracy, explained_by_column, pearson_by_column, variable_genes
from evaluation.sections import FeatureBank, Generated, Section
from evaluation.spatial import folds_of, morans_i, neighbours
from networks.clip import CLIP, ClipModelConfig
from networks.histo_models import build_encoder
from networks.layers import images_to_float
from preprocessing.errors import InputError
from preprocessing.stain import TARGET_VECTORS
from training.clip_losses import clip_loss

SIDE, PX, GENES, SEEDS = 11, 40, 30, 2


def latents(rng):
    """(N, 2) of a section of SIDE x SIDE spots: nuclear density and eosin, smooth in space, each of unit deviation."""
    from scipy.ndimage import gaussian_filter
    fields = [gaussian_filter(rng.normal(size=(SIDE, SIDE)), 1.6, mode="nearest").ravel() for _ in range(2)]
    return np.stack([(field - field.mean()) / field.std() for field in fields], axis=1)


def draw(rng, latent):
    """uint8 (N, PX, PX, 3) at 1 µm a pixel: nuclei as many as latent 0 says, eosin as strong as latent 1 says, places by chance."""
    y, x = np.mgrid[:PX, :PX]
    patches = []
    for density, eosin in latent:
        amount = np.full((PX, PX), 0.08)
        for _ in range(int(np.clip(6 + 3 * density, 0, 18))):
            amount[np.hypot(x - rng.uniform(0, PX), y - rng.uniform(0, PX)) < rng.uniform(2.6, 3.4)] = rng.normal(1.4, 0.1)
        stain = np.stack([amount, np.full((PX, PX), np.clip(0.45 + 0.13 * eosin, 0.02, 2))], axis=-1)
        stain += rng.normal(0, 0.02, stain.shape)
        patches.append(np.clip(240 * np.exp(-stain @ np.array(TARGET_VECTORS).T) - 1, 0, 255).astype(np.uint8))
    return np.stack(patches)


def expression(rng, latent):
    """(N, G): ten genes follow each latent, ten nothing."""
    weights = np.zeros((2, GENES))
    weights[0, :10], weights[1, 10:20] = 0.8, 0.8
    return sp.csr_matrix(np.clip(3 + latent @ weights + rng.normal(0, 0.35, (len(latent), GENES)), 0, None).astype(np.float32))


def made_by(rng, latent, error):
    """Patches of a generator that reads the genes with this error, SEEDS a prompt."""
    images = [draw(rng, (latent + error * rng.normal(size=latent.shape)) / np.hypot(1, error)) for _ in range(SEEDS)]
    return generated(np.stack(images, axis=1))


def generated(images):
    return Generated(np.arange(len(images)), [str(i) for i in range(images.shape[1])], images)


def trained_judge(rng, encoder):
    """A CLIP that has seen two other sections."""
    latent = np.concatenate([latents(rng) for _ in range(2)])
    genes = torch.from_numpy(expression(rng, latent).toarray())
    with torch.inference_mode():
        features = encoder(images_to_float(torch.from_numpy(draw(rng, latent)).permute(0, 3, 1, 2))).clone()
    torch.manual_seed(0)
    config = ClipModelConfig(gene_encoder="bottleneck", gene_hidden=16, gene_width=16, projection=8, dropout=0, image_dropout=0,
                             image_encoder="random_tiny", temperature=0.1, gene_scaling="standardise", feature_scaling="standardise")
    clip = CLIP(config, [f"g{i}" for i in range(GENES)], image_encoder=encoder)
    clip.fit_inputs(genes, features)
    optimizer = torch.optim.Adam([p for p in clip.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        clip_loss(clip.project_image_features(features), clip.encode_genes(genes), 0.1).backward()
        optimizer.step()
    return clip.eval()


@pytest.fixture(scope="module")
def scores():
    """Scores of a good generator, a poor one and noise on one section."""
    rng, encoder = np.random.default_rng(4), build_encoder("random_tiny").eval()
    judge = trained_judge(rng, encoder)
    latent = latents(rng)
    genes, places = expression(rng, latent), np.stack(np.divmod(np.arange(SIDE ** 2), SIDE), axis=1) * 100.0
    clusters = np.array(["few", "many"])[(latent[:, 0] > 0).astype(int)].astype(object) + np.array([" pale", " pink"])[
        (latent[:, 1] > 0).astype(int)].astype(object)
    section = Section("S", [f"b{i}" for i in range(len(latent))], draw(rng, latent), genes, genes, clusters.astype(str), places)
    sets = {"good": made_by(rng, latent, 0.5), "poor": made_by(rng, latent, 1.3),
            "noise": generated(rng.integers(0, 256, (SIDE ** 2, SEEDS, PX, PX, 3), dtype=np.uint8))}
    null = draw(rng, np.zeros((6, 2)))
    return {name: score_all(section, made, encoder, FeatureBank(progress=False), judge=judge, um_per_px=1.0, null=null)
            for name, made in sets.items()}


def of(scores, number, key="score"):
    """Real, good, poor, shuffled (good patches), noise."""
    good, poor, noise = (scores[name][number] for name in ("good", "poor", "noise"))
    return [good["real"][key], good["generated"][key], poor["generated"][key], good["shuffled"][key], noise["generated"][key]]


@pytest.mark.parametrize("number", ["retrieval", "readout", "clusters", "nuclei", "spatial"])
def test_each_number_puts_real_above_good_above_poor_above_shuffled_and_noise(scores, number):
    real, good, poor, shuffled, noise = of(scores, number)
    assert real > good > poor > max(shuffled, noise)
    assert scores["good"][number]["share_of_ceiling"] > scores["poor"][number]["share_of_ceiling"] > 0


@pytest.mark.parametrize(("number", "key"), [("readout", "explained"), ("nuclei", "explained"), ("clusters", "log_likelihood")])
def test_numbers_that_see_the_level_put_noise_below_shuffled(scores, number, key):
    real, good, poor, shuffled, noise = of(scores, number, key)
    assert real > good > poor > shuffled > noise


def test_median_rank_and_cluster_confusion_say_the_same(scores):
    ranks = of(scores, "retrieval", "median_rank")
    assert ranks[0] < ranks[1] < ranks[2] < min(ranks[3:])
    confusion = np.array(scores["good"]["clusters"]["generated"]["confusion"])
    assert confusion.sum() == SEEDS * SIDE ** 2 and np.trace(confusion) / confusion.sum() == pytest.approx(
        scores["good"]["clusters"]["generated"]["accuracy"])


def test_patches_of_the_null_prompt_know_nothing_of_a_spot(scores):
    for number in ("readout", "nuclei"):
        assert abs(scores["good"][number]["null"]["score"]) < 0.15 < scores["good"][number]["generated"]["score"]


def test_intervals_hold_their_numbers(scores):
    for number in ("retrieval", "readout", "clusters", "nuclei"):
        low, high = scores["good"][number]["generated"]["score_ci95"]
        assert low <= scores["good"][number]["generated"]["score"] <= high and high - low < 0.4


def test_real_patches_are_perfect_only_where_they_are_held_against_themselves(scores):
    assert scores["good"]["nuclei"]["real"]["score"] == pytest.approx(1)
    assert scores["good"]["readout"]["real"]["score"] < 0.9            # judged by models that have not seen them


def test_morans_i_is_one_for_halves_zero_for_noise_and_negative_for_a_chequerboard():
    places = np.stack(np.divmod(np.arange(400), 20), axis=1).astype(float)
    near = neighbours(places, 4)
    row, column = places.T
    assert morans_i(column > 9, near) > 0.9
    assert abs(morans_i(np.random.default_rng(0).normal(size=400), near)) < 0.1
    assert morans_i((row + column) % 2, near) < -0.8
    assert morans_i(np.ones(400), near) == 0


def test_neighbours_are_others_and_folds_are_compact():
    places = np.stack(np.divmod(np.arange(100), 10), axis=1).astype(float)
    near = neighbours(np.concatenate([places, places[:1]]))              # two spots on one place
    assert (near != np.arange(101)[:, None]).all()
    folds = folds_of(places, 100)
    assert len(np.unique(folds)) == 5
    assert (folds[neighbours(places, 4)] == folds[:, None]).mean() > 0.7 > (folds_of(None, 100)[near[:100, :4] % 100] ==
                                                                           folds_of(None, 100)[:, None]).mean()


def test_closed_forms_of_the_scores():
    truth = np.array([[1.0], [2.0], [3.0], [np.nan]])
    assert pearson_by_column(2 * truth + 1, truth)[0] == pytest.approx(1) == -pearson_by_column(-truth, truth)[0]
    assert pearson_by_column(np.ones((4, 1)), truth)[0] == 0
    assert explained_by_column(truth, truth)[0] == 1 and explained_by_column(np.full((4, 1), 2.0), truth)[0] == pytest.approx(0)
    assert balanced_accuracy(np.array([[1, 0], [1, 0], [1, 0], [1, 0]]), np.array([0, 0, 0, 1])) == 0.5
    assert variable_genes(sp.csr_matrix(np.array([[0, 5, 1], [0, 0, 1.1]])), 2).tolist() == [1, 2]
    assert share_of_ceiling({"shuffled": {"score": 0.1}, "real": {"score": 0.5}, "generated": {"score": 0.2}}) == pytest.approx(0.25)
    assert share_of_ceiling({"shuffled": {"score": 0.5}, "real": {"score": 0.5}, "generated": {"score": 0.2}}) is None


def test_too_few_prompts_are_refused_and_missing_parts_left_out():
    rng, encoder = np.random.default_rng(1), build_encoder("random_tiny").eval()
    latent = latents(rng)
    genes = expression(rng, latent)
    section = Section("S", [f"b{i}" for i in range(len(latent))], draw(rng, latent), genes, genes, None)
    few = generated(draw(rng, latent)[:5, None])
    with pytest.raises(InputError, match="S: prompts: expected patches of at least 20 spots; found 5"):
        score_all(section, few, encoder, FeatureBank(progress=False), um_per_px=1.0)
    found = score_all(section, generated(draw(rng, latent)[:, None]), encoder, FeatureBank(progress=False), um_per_px=1.0)
    assert [name for name in ("retrieval", "readout", "clusters", "nuclei", "spatial") if name in found] == ["readout", "nuclei"]
