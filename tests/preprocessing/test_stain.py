"""Macenko: the same figures as torchstain on the same pixels, and never NaN."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preprocessing.errors import InputError
from preprocessing.slide import Slide, SlideReadError, open_slide
from preprocessing.stain import (
    TARGET_MAXIMA,
    TARGET_VECTORS,
    NoStainError,
    StainVectors,
    _tables,
    estimate_stain,
    normalise_stain,
    read_stain_file,
    slide_stain,
    tissue_mask,
    tissue_pixels,
)

REAL_TISSUE = {"her2st breast": "her2st/C2/image.jpg", "CMU skin": "wsi/CMU-1-Small-Region.svs",
               "mouse brain": "mouse-brain-crop/fullres.tif"}
HE = np.array([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]]) / np.linalg.norm([[0.65, 0.07], [0.70, 0.99], [0.29, 0.11]], axis=0)


def stained_pixels(vectors=HE, n=20_000, seed=0):
    """Pixels of known stain: many nearly pure in one stain, the rest mixed."""
    generator = np.random.default_rng(seed)
    mostly = np.where(generator.random((n, 1)) < 0.5, (1, 0.02), (0.02, 1))
    amounts = 0.1 + generator.gamma(2.0, 0.4, (n, 2)) * mostly
    return np.clip(240 * np.exp(-amounts @ np.asarray(vectors).T) - 1, 0, 255).round().astype(np.uint8)


@pytest.fixture(scope="module", params=REAL_TISSUE, ids=lambda name: name.replace(" ", "-"))
def real_pixels(request, shared_data):
    """Some 400,000 pixels of a real slide's middle, tissue and glass alike."""
    with open_slide(shared_data / REAL_TISSUE[request.param]) as slide:
        width, height = min(700, slide.width_px), min(600, slide.height_px)
        x = int(slide.width_px * 0.37) if request.param == "her2st breast" else (slide.width_px - width) // 2
        y = int(slide.height_px * 0.6) if request.param == "her2st breast" else (slide.height_px - height) // 2
        return slide.read_region(x, y, width, height)


def test_fitting_agrees_with_torchstain_on_real_tissue(real_pixels):
    import torchstain
    reference = torchstain.normalizers.MacenkoNormalizer(backend="numpy")
    reference.fit(real_pixels)
    stain = estimate_stain(real_pixels.reshape(-1, 3))
    assert np.abs(np.array(stain.vectors) - reference.HERef).max() < 1e-3
    assert np.abs(np.array(stain.maxima) - reference.maxCRef).max() < 1e-3


def published_formula(image, stain):
    """Macenko as published: least squares for the amounts, scaled to the target's maxima, back through Beer-Lambert."""
    density = -np.log((image.reshape(-1, 3).astype(np.float64) + 1) / 240)
    amounts = np.linalg.lstsq(np.array(stain.vectors), density.T, rcond=None)[0]
    amounts *= (np.array(TARGET_MAXIMA) / np.array(stain.maxima))[:, None]
    return np.clip(240 * np.exp(-np.array(TARGET_VECTORS) @ amounts), 0, 255).astype(np.uint8).T.reshape(image.shape)


def test_applying_agrees_with_the_published_formula_on_real_tissue(real_pixels):
    stain = estimate_stain(real_pixels.reshape(-1, 3))
    difference = normalise_stain(real_pixels, stain).astype(int) - published_formula(real_pixels, stain)
    assert np.abs(difference).max() <= 1


COLOURS = np.stack(np.meshgrid(*[[*range(0, 256, 5), 1, 239, 254]] * 3), axis=-1).astype(np.uint8)     # (55, 55, 55, 3): the whole cube


@pytest.mark.parametrize("vectors, maxima", [
    (HE, (1.5, 1.0)), (TARGET_VECTORS, TARGET_MAXIMA), (HE[:, ::-1], (3.0, 0.2)), ([[0.5, 0.4], [0.7, 0.8], [0.5, 0.45]], (2.5, 2.5)),
    ([[0.58, 0.60], [0.60, 0.56], [0.55, 0.57]], (1.0, 1.0)),
], ids=["published", "as the target", "swapped, faint", "like one another", "hardly two stains"])
def test_every_colour_comes_out_as_the_published_formula_says(vectors, maxima):
    stain = StainVectors(tuple(map(tuple, np.asarray(vectors).tolist())), maxima)
    difference = normalise_stain(COLOURS, stain).astype(int) - published_formula(COLOURS, stain)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("vectors, maxima", [([[1, 1], [1, 1.0001], [1, 1]], (1.0, 1.0)), (HE, (1e-300, 1e300))],
                         ids=["one stain", "no maxima"])
def test_vectors_beyond_reason_give_black_or_white_never_what_is_not_a_number(vectors, maxima):
    tables = _tables(tuple(map(tuple, np.asarray(vectors, dtype=float).tolist())), maxima)
    assert np.isfinite(tables.max(axis=2).prod(axis=1)).all() and (tables > 0).all()


def test_a_view_into_other_pixels_is_normalised_and_left_as_it_was():
    pixels = stained_pixels(n=64 * 64).reshape(64, 64, 3)
    before, stain = pixels.copy(), estimate_stain(stained_pixels())
    assert (normalise_stain(pixels[::2, 3:], stain) == normalise_stain(pixels, stain)[::2, 3:]).all() and (pixels == before).all()


def test_normalised_real_tissue_has_the_stain_of_the_target(real_pixels):
    again = estimate_stain(normalise_stain(real_pixels, estimate_stain(real_pixels.reshape(-1, 3))).reshape(-1, 3))
    assert np.abs(np.array(again.vectors) - TARGET_VECTORS).max() < 0.08
    assert np.abs(np.array(again.maxima) / TARGET_MAXIMA - 1).max() < 0.25      # what was clipped at white is lost


def test_known_stain_vectors_are_found():
    stain = estimate_stain(stained_pixels())
    cosines = (np.array(stain.vectors) * HE).sum(axis=0)
    assert (cosines > 0.99).all()


def test_haematoxylin_stands_first_whatever_order_the_pixels_come_in():
    swapped = estimate_stain(stained_pixels()[::-1])
    assert np.allclose(swapped.vectors, estimate_stain(stained_pixels()).vectors) and swapped.vectors[0][0] > swapped.vectors[0][1]


def test_a_batch_is_normalised_as_its_patches_one_by_one():
    patches = stained_pixels(n=4 * 64).reshape(4, 8, 8, 3)
    stain = estimate_stain(stained_pixels())
    assert (normalise_stain(patches, stain) == np.stack([normalise_stain(patch, stain) for patch in patches])).all()


NOISE = np.random.default_rng(0).integers(-1, 2, (5000, 3))


@pytest.mark.parametrize("pixels", [
    np.full((5000, 3), 255), np.full((5000, 3), 240) + NOISE,
    np.full((5000, 3), (180, 90, 150)), np.full((5000, 3), (180, 90, 150)) + NOISE,
    np.zeros((5000, 3)), np.repeat(np.arange(50, 200)[:, None], 3, axis=1).repeat(30, axis=0), np.zeros((0, 3)),
], ids=["white", "noisy glass", "one colour", "noisy colour", "black", "grey", "nothing"])
def test_pixels_without_two_stains_are_refused(pixels):
    with pytest.raises(NoStainError, match="expected tissue in two stains.*--on-stain-failure skip"):
        estimate_stain(pixels.astype(np.uint8), "slide.tif")


def test_white_and_black_pixels_survive_normalisation():
    extremes = np.array([[[255, 255, 255], [0, 0, 0], [240, 240, 240]]], np.uint8)
    normalised = normalise_stain(extremes, estimate_stain(stained_pixels()))
    assert (normalised[0, 0] > 235).all() and (normalised[0, 1] < 60).all()


# ---- stain.json ----

def test_stain_file_round_trip(tmp_path):
    stain = estimate_stain(stained_pixels())
    (tmp_path / "stain.json").write_text(json.dumps(stain.to_json()))
    assert read_stain_file(tmp_path / "stain.json") == stain
    assert stain.to_json()["target_maxima"] == TARGET_MAXIMA and stain.settings["beta"] == 0.15


@pytest.mark.parametrize("content, message", [
    ('{"normalised": false}', "normalised: expected stain vectors; found false"),
    ("{", "file: expected a stain.json; found text that is not JSON"),
    ("[" * 100_000, "file: expected a stain.json; found text that is not JSON"),
    ("[1]", "content: expected numbers as vectors, maxima and n_pixels; found other JSON"),
    ('{"normalised": true, "vectors": [[1, 0], [0]], "maxima": [1, 1]}', "content: expected numbers as vectors"),
    ('{"normalised": true, "vectors": [["a", "b"]], "maxima": [1, 1]}', "content: expected numbers as vectors"),
    ('{"normalised": true, "vectors": [[1, 0], [0, 1], [0, 0]], "maxima": [1, 1], "n_pixels": "many"}', "content: expected numbers as"),
    ('{"normalised": true, "vectors": [[1, 0], [0, 1], [0, 0]], "maxima": [1, 1], "n_pixels": 1e999}', "content: expected numbers as"),
    ('{"normalised": true, "vectors": [[1, 0]], "maxima": [1, 1]}', "expected 3 x 2 and 2 positive numbers"),
    ('{"normalised": true, "vectors": [[1, 1], [1, 1], [1, 1]], "maxima": [1, 1]}', "a single colour"),
    ('{"normalised": true, "vectors": [[1, 0], [0, 1], [0, 0]], "maxima": [1, NaN]}', "2 positive numbers"),
], ids=["unnormalised", "broken", "nested without end", "a list", "ragged", "words", "words for pixels",
        "infinite pixels", "shape", "one direction", "NaN"])
def test_a_wrong_stain_file_is_refused(tmp_path, content, message):
    (tmp_path / "stain.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_stain_file(tmp_path / "stain.json")


# ---- tissue of a slide ----

@pytest.fixture
def glass_with_tissue(tmp_path):
    """A 1200 x 800 slide: grey-white glass with a black pen dot, tissue in 400 <= x < 900, 200 <= y < 600."""
    generator = np.random.default_rng(0)
    image = (235 + generator.integers(-3, 4, (800, 1200, 1))).repeat(3, axis=2).astype(np.uint8)
    image[200:600, 400:900] = stained_pixels(n=400 * 500).reshape(400, 500, 3)
    image[50:90, 50:90] = 5
    Image.fromarray(image).save(tmp_path / "slide.png")
    return tmp_path / "slide.png"


def test_the_mask_is_the_tissue_without_glass_and_pen(glass_with_tissue):
    with open_slide(glass_with_tissue) as slide:
        mask = tissue_mask(slide.thumbnail(1200))
    inside = np.zeros_like(mask)
    inside[200:600, 400:900] = True
    assert mask[inside].mean() > 0.98 and mask[~inside].mean() < 0.005


def test_stain_is_estimated_on_tissue_only(glass_with_tissue):
    with open_slide(glass_with_tissue) as slide:
        on_slide, pixels = slide_stain(slide), tissue_pixels(slide)
    assert (np.array(on_slide.vectors) * HE).sum(axis=0).min() > 0.99
    assert 0.95 * 200_000 < len(pixels) < 1.01 * 200_000
    assert np.abs(np.array(on_slide.maxima) / estimate_stain(stained_pixels(n=400 * 500)).maxima - 1).max() < 0.02


def test_a_slide_gives_the_same_stain_every_time(glass_with_tissue):
    with open_slide(glass_with_tissue) as slide:
        assert slide_stain(slide) == slide_stain(slide)


class HugeSlide(Slide):
    """40 gigapixels, tissue all over; counts the pixels that are decoded."""

    def __init__(self):
        super().__init__(Path("huge.tif"), 200_000, 200_000, None)
        self.decoded = 0

    def close(self):
        pass

    def thumbnail(self, max_px):
        return np.tile(stained_pixels(n=64 * 64).reshape(64, 64, 3), (max_px // 64, max_px // 64, 1))

    def _read(self, x, y, width, height):
        self.decoded += width * height
        return np.full((height, width, 3), (120, 60, 130), np.uint8)


def test_of_a_slide_of_any_size_no_more_than_64_tiles_are_read():
    slide = HugeSlide()
    pixels = tissue_pixels(slide)
    assert slide.decoded == 64 * 256 * 256 and 0.9 * slide.decoded < len(pixels) <= slide.decoded


def test_a_blank_slide_is_refused_by_name(tmp_path):
    Image.fromarray(np.full((300, 300, 3), 250, np.uint8)).save(tmp_path / "blank.png")
    with open_slide(tmp_path / "blank.png") as slide, pytest.raises(NoStainError, match="blank.png: stain: .* found no tissue"):
        slide_stain(slide)


@pytest.mark.parametrize("readable", [False, True], ids=["every tile", "one tile"])
def test_a_tile_that_cannot_be_decoded_does_not_speak_for_the_slide(glass_with_tissue, readable, monkeypatch):
    with open_slide(glass_with_tissue) as slide:
        whole, read, calls = slide_stain(slide), slide.read_region, []

        def fails(*region):
            calls.append(region)
            if readable and len(calls) > 1:
                return read(*region)
            raise SlideReadError(slide.path, f"region {region}", "pixels", "a tile that cannot be decoded")

        monkeypatch.setattr(slide, "read_region", fails)
        if readable:
            assert np.abs(np.array(slide_stain(slide).vectors) - whole.vectors).max() < 0.02
        else:
            with pytest.raises(SlideReadError, match="a tile that cannot be decoded"):
                slide_stain(slide)


def test_vectors_are_plain_numbers():
    assert isinstance(StainVectors(((1.0, 0.0), (0.0, 1.0), (0.0, 0.0)), (1.0, 1.0)).to_json()["vectors"][0][0], float)
