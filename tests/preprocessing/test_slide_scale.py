"""A slide of another scale than the sample's images is refused even if neither says an mpp; a cropped one is only said."""
import numpy as np
import pytest
from extract_runs import WRITTEN, fails, run
from PIL import Image

from preprocessing.errors import InputError
from preprocessing.position_checks import check_slide_size
from preprocessing.slide import open_slide


@pytest.fixture(scope="module")
def pixels(sim_v2):
    with open_slide(sim_v2.slide) as slide:
        return slide.read_region(0, 0, slide.width_px, slide.height_px)


def rescaled(pixels, factor, path):
    """A copy without an mpp."""
    height, width = pixels.shape[:2]
    Image.fromarray(pixels).resize((round(width * factor), round(height * factor))).save(path)
    return path


@pytest.mark.parametrize("factor", [0.9, 0.5, 1.25])
@pytest.mark.parametrize("more", [(), ("--mpp", 0.5)], ids=["", "with --mpp"])
def test_a_slide_of_another_scale_is_refused_showing_both_sizes(sim_v2, pixels, factor, more, tmp_path):
    slide = rescaled(pixels, factor, tmp_path / "copy.png")
    said = fails(3, "--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", slide, "--out-dir", tmp_path / "out", *more)
    assert f"{slide}: size: expected 1600 x 1400 px, " in said
    assert f"found {round(1600 * factor)} x {round(1400 * factor)} px, {factor:.3g} times that" in said
    assert not any((tmp_path / "out" / name).exists() for name in WRITTEN)


def test_a_slide_of_the_samples_own_scale_is_taken_in_silence(sim_v2, pixels, tmp_path):
    slide = rescaled(pixels, 1, tmp_path / "copy.png")
    assert "cropped" not in run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", slide, "--out-dir", tmp_path, "--dry-run")


def test_a_slide_cut_on_one_side_is_taken_and_said(sim_v2, pixels, tmp_path):
    Image.fromarray(pixels[:1150]).save(tmp_path / "cut.png")
    said = run("--space-ranger-dir", sim_v2.space_ranger_dir, "--wsi-file", tmp_path / "cut.png", "--out-dir", tmp_path, "--dry-run")
    assert "cut.png: 1600 x 1150 px, where " in said and "of 1600 x 1400 px (was it cropped?)" in said


def test_a_few_pixels_of_a_tiny_image_are_no_scale():
    image = np.zeros((14, 23, 3), np.uint8)                        # a real lowres image: 3.6 % wider than its hires one says
    assert check_slide_size("s.tif", (599, 1020), {"lowres": image.transpose(1, 0, 2)}, {"tissue_lowres_scalef": 0.022536058}) == ""
    with pytest.raises(InputError, match="size: expected 621 x 1021 px, "):
        check_slide_size("s.tif", (499, 820), {"lowres": image.transpose(1, 0, 2)}, {"tissue_lowres_scalef": 0.022536058})


def test_the_larger_image_decides_and_without_any_nothing_is_said():
    images = {"lowres": np.zeros((60, 60, 3), np.uint8), "hires": np.zeros((200, 200, 3), np.uint8)}
    factors = {"tissue_lowres_scalef": 0.05, "tissue_hires_scalef": 0.2}
    with pytest.raises(InputError, match="expected 1000 x 1000 px"):
        check_slide_size("s.tif", (1200, 1200), images, factors)
    assert check_slide_size("s.tif", (1200, 1200), images, {}) == check_slide_size("s.tif", (1200, 1200), {}, factors) == ""


@pytest.mark.parametrize("name", ["derived_spaceranger_v1", "derived_spaceranger_v2", "derived_visium_hd"])
def test_the_real_crop_and_its_slide_agree(name, shared_data, tmp_path):
    folder = shared_data / "mouse-brain-crop"
    for slide in (folder / "fullres.tif", folder / "original" / "test_img.jpg"):
        said = run("--space-ranger-dir", folder / name, "--wsi-file", slide, "--out-dir", tmp_path, "--dry-run", "--patch-sz-px", 32)
        assert "cropped" not in said and "kept " in said
