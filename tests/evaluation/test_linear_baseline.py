"""The linear baseline: ridge regression whose strength is chosen on spots held out."""
import numpy as np
import pytest
import scipy.sparse as sp

from evaluation.linear_baseline import fit_linear_baseline, fit_strengths, held_out_parts
from evaluation.retrieval import retrieval_metrics


def paired(rng, n, weights, noise=0.3):
    """Expression (n, 30) and features (n, 20) that share 4 hidden numbers."""
    hidden = rng.normal(size=(n, 4))
    return hidden @ weights[0] + 0.1 * rng.normal(size=(n, 30)), hidden @ weights[1] + noise * rng.normal(size=(n, 20))


@pytest.fixture
def weights(rng):
    return rng.normal(size=(4, 30)), rng.normal(size=(4, 20))


def test_a_planted_linear_relation_is_found_in_a_section_never_seen(rng, weights):
    x, y = paired(rng, 120, weights)
    model = fit_linear_baseline(x, y, ["A"] * 60 + ["B"] * 60, rng=rng)
    new_x, new_y = paired(rng, 80, weights)
    found = retrieval_metrics(model.predict(new_x), model.project(new_y))
    assert found["r1"] > 0.5
    unrelated = retrieval_metrics(model.predict(new_x), model.project(rng.permutation(new_y)))
    assert unrelated["r10_ci95"][0] < unrelated["chance_r10"] + 0.1 and unrelated["r1"] < 0.1


def test_sparse_and_dense_expression_give_the_same_predictions(rng, weights):
    x, y = paired(rng, 60, weights)
    x[np.abs(x) < 0.5] = 0
    dense, sparse = (fit_strengths(form, y, 10, [10.0])[0] for form in (x, sp.csr_matrix(x)))
    assert np.allclose(dense.predict(x) @ dense.project(y).T, sparse.predict(sp.csr_matrix(x)) @ sparse.project(y).T, atol=1e-6)


def test_the_prediction_is_ridge_regression(rng, weights):
    from sklearn.linear_model import Ridge
    x, y = paired(rng, 60, weights)
    model = fit_strengths(x, y, 6, [7.0])[0]
    reference = Ridge(alpha=7.0).fit(model.expression_pca.transform(x), model.feature_pca.transform(y))
    assert np.allclose(model.predict(x), reference.predict(model.expression_pca.transform(x)))


def test_the_strength_grows_with_noise(rng, weights):
    def chosen(noise):
        x, y = paired(rng, 60, weights, noise)
        x += noise * rng.normal(size=x.shape)
        return fit_linear_baseline(x, y, ["A"] * 30 + ["B"] * 30, n_components=25, rng=rng).strength
    assert np.mean([chosen(5.0) for _ in range(5)]) > np.mean([chosen(0.1) for _ in range(5)])


def test_every_spot_is_held_out_once_by_section_or_by_part(rng):
    sections = np.array(["A", "B", "B", "C"])
    assert [part.tolist() for part in held_out_parts(sections, rng)] == [[True, False, False, False], [False, True, True, False],
                                                                         [False, False, False, True]]
    alone = held_out_parts(np.array(["A"] * 23), rng)
    assert len(alone) == 5 and (np.sum(alone, axis=0) == 1).all()
