"""Image features: the same from arrays and files, which files count as images, and a cache that goes by content."""
import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.features import (
    build_features,
    cached_features,
    feature_specs,
    image_features,
    list_images,
    read_samples_csv,
)
from networks.histo_models import build_encoder
from preprocessing.errors import InputError, OptionError


@pytest.fixture
def images(rng):
    return rng.integers(0, 256, size=(10, 24, 24, 3), dtype=np.uint8)


def test_arrays_tensors_and_files_have_the_same_features_at_any_batch_size(images, write_images, tmp_path):
    encoder = build_encoder("random_tiny")
    paths = list_images(write_images(tmp_path / "a", images)).paths
    expected = image_features(images, encoder, batch_size=10, progress=False)
    for other, batch_size in ((images, 3), (torch.from_numpy(images).permute(0, 3, 1, 2), 4), (paths, 3)):
        assert np.allclose(image_features(other, encoder, batch_size=batch_size, progress=False), expected, atol=1e-5)
    assert len(np.unique(expected.round(3), axis=0)) == 10


def test_mixed_sizes_keep_their_rows(rng, write_images, tmp_path):
    encoder = build_encoder("random_tiny")
    small, large = rng.integers(0, 256, (3, 16, 16, 3), np.uint8), rng.integers(0, 256, (3, 40, 40, 3), np.uint8)
    folder = write_images(tmp_path / "mixed", [image for both in zip(small, large, strict=True) for image in both])
    features = image_features(list_images(folder).paths, encoder, batch_size=4, progress=False)
    assert np.allclose(features[0::2], image_features(small, encoder, progress=False), atol=1e-5)
    assert np.allclose(features[1::2], image_features(large, encoder, progress=False), atol=1e-5)


def test_only_images_are_listed_and_the_rest_is_counted(images, write_images, tmp_path):
    folder = write_images(tmp_path / "a", images[:3])
    write_images(folder / "cluster_2", images[3:5])
    write_images(folder / ".ipynb_checkpoints", images[5:6])
    (folder / "notes.txt").write_text("x")
    (folder / ".DS_Store").write_text("x")
    listed = list_images(folder)
    assert [path.relative_to(folder).as_posix() for path in listed.paths] == [
        "cluster_2/patch_000.png", "cluster_2/patch_001.png", "patch_000.png", "patch_001.png", "patch_002.png"]
    assert listed.n_ignored == 1


def test_a_generated_folder_is_what_its_samples_csv_lists_and_the_grid_is_not_a_sample(images, write_images, tmp_path):
    folder = write_images(tmp_path / "g", images[:2], name="prompt{:05d}_seed0000.png")
    write_images(folder, images[2:3], name="grid.png")
    (folder / "samples.csv").write_text("file,prompt\nprompt00000_seed0000.png,0\nprompt00001_seed0000.png,1\n")
    listed = list_images(folder)
    assert [path.name for path in listed.paths] == ["prompt00000_seed0000.png", "prompt00001_seed0000.png"]
    assert listed.n_ignored == 2                              # grid.png and samples.csv


@pytest.mark.parametrize(("text", "message"), [
    ("file,prompt\ngone.png,0\n", r"the 1 images it lists; found missing 1 \(gone.png\)"),
    ("file,prompt\n../secret.png,0\n", "expected files inside the folder"),
    ("name\nx\n", "at least one row with `file`; found name"),
    ("file,prompt\n", "found no rows"),
], ids=["missing", "outside", "no column", "empty"])
def test_a_wrong_samples_csv_is_refused(tmp_path, text, message):
    (tmp_path / "samples.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_samples_csv(tmp_path)


@pytest.mark.parametrize("case", ["empty", "missing", "file"])
def test_a_folder_without_images_is_refused(tmp_path, case):
    path = {"empty": tmp_path, "missing": tmp_path / "none", "file": tmp_path / "f.txt"}[case]
    (tmp_path / "f.txt").write_text("x")
    with pytest.raises(InputError, match={"empty": "none among 1 files", "missing": "nothing there", "file": "found a file"}[case]):
        list_images(path)


def test_a_truncated_image_is_named(images, write_images, tmp_path):
    folder = write_images(tmp_path / "a", images[:3])
    damaged = folder / "patch_001.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    with pytest.raises(InputError, match="patch_001.png"):
        image_features(list_images(folder).paths, build_encoder("random_tiny"), progress=False)


def test_the_cache_goes_by_content_and_weights_not_by_names(images, write_images, tmp_path):
    encoder = build_encoder("random_tiny")
    cache = tmp_path / "cache"
    first, known = cached_features(list_images(write_images(tmp_path / "a", images)).paths, encoder, cache, progress=False)
    again, known_again = cached_features(list_images(write_images(tmp_path / "b", images, "other{:04d}.png")).paths, encoder, cache,
                                         progress=False)
    assert (known, known_again) == (False, True) and (first == again).all()
    images[4, 3, 3] ^= 255
    _, known_changed = cached_features(list_images(write_images(tmp_path / "a", images)).paths, encoder, cache, progress=False)
    encoder.source = "other weights"
    _, known_other = cached_features(list_images(tmp_path / "b").paths, encoder, cache, progress=False)
    assert (known_changed, known_other) == (False, False)


def test_feature_specs_read_names_and_weight_files():
    inception, mobile = feature_specs("inception, timm:mobilenetv2_100=some/file.safetensors")
    assert (inception.name, inception.weights, inception.label) == ("inception", None, "inception")
    assert (mobile.name, str(mobile.weights), mobile.label) == ("timm:mobilenetv2_100", "some/file.safetensors", "mobilenetv2_100")
    for text in ("", "uni,uni"):
        with pytest.raises(OptionError, match="names separated by commas"):
            feature_specs(text)


def test_a_real_encoder_is_built_from_its_local_file(images):
    (spec,) = feature_specs("efficientnet_lite0")
    features = image_features(images[:2], build_features(spec), progress=False)
    assert features.shape == (2, 1280) and np.isfinite(features).all()


def test_grey_and_transparent_files_become_rgb(images, write_images, tmp_path):
    folder = write_images(tmp_path / "a", images[:1])
    Image.fromarray(images[0]).convert("RGBA").save(folder / "patch_001.png")
    features = image_features(list_images(folder).paths, build_encoder("random_tiny"), progress=False)
    assert np.allclose(features[0], features[1], atol=1e-5)
