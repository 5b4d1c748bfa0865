"""Inception's weights: where they are found, what is refused, and distances that agree with torch-fidelity."""
import urllib.error

import numpy as np
import pytest
import torch

from evaluation import inception
from evaluation.distances import frechet_distance, kernel_distance
from evaluation.features import image_features, list_images
from evaluation.inception import FILE_NAME, build_inception
from preprocessing.errors import InputError, WeightsError


@pytest.mark.slow
def test_fid_and_kid_equal_torch_fidelity_on_the_same_weights_and_images(rng, inception_file, write_images, tmp_path):
    from torch_fidelity import calculate_metrics
    noise = rng.integers(0, 256, size=(9, 40, 40, 3), dtype=np.uint8)
    smooth = np.repeat(np.repeat(rng.integers(0, 256, size=(12, 4, 4, 3), dtype=np.uint8), 10, axis=1), 10, axis=2)
    a, b = write_images(tmp_path / "a", noise), write_images(tmp_path / "b", smooth)
    theirs = calculate_metrics(input1=str(a), input2=str(b), cuda=False, batch_size=12, fid=True, kid=True, kid_subset_size=6,
                               kid_subsets=20, rng_seed=3, feature_extractor="inception-v3-compat", save_cpu_ram=True,
                               feature_extractor_weights_path=str(inception_file), cache=False, verbose=False)
    encoder = build_inception(inception_file)
    first, second = (image_features(list_images(folder).paths, encoder, batch_size=5, progress=False) for folder in (a, b))
    mean, deviation = kernel_distance(first, second, subset_size=6, n_subsets=20, seed=3)
    assert theirs["frechet_inception_distance"] > 1e-3
    assert frechet_distance(first, second) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert mean == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-3)


def test_without_a_network_one_line_says_which_file_to_put_where(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception.urllib.request, "urlopen", unreachable)
    with pytest.raises(InputError) as caught:
        build_inception()
    message = str(caught.value)
    assert str(tmp_path / "checkpoints" / FILE_NAME) in message and "no network" in message and inception.URL in message
    assert "\n" not in message and not list(tmp_path.rglob("*.pth*"))


def test_a_file_in_the_hub_cache_is_used_without_asking_the_network(monkeypatch, tmp_path, inception_file):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception.urllib.request, "urlopen", None)          # calling it would fail
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / FILE_NAME).symlink_to(inception_file)
    assert build_inception().source == build_inception(inception_file).source


def test_a_download_that_is_not_the_published_file_is_not_kept(monkeypatch, tmp_path):
    class Answer:
        blocks = [b"<html>blocked</html>", b""]

        def read(self, _):
            return self.blocks.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            return False
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception.urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(WeightsError, match="expected 6726825d"):
        build_inception()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_another_models_weights_are_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="torch-fidelity's Inception"):
        build_inception(tmp_path / "other.pth")
    with pytest.raises(InputError, match="nothing there"):
        build_inception(tmp_path / "gone.pth")
