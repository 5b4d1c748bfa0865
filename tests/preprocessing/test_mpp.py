"""One mpp per sample: from the known pitch of the array, whatever the image's orientation, and never from two sources that disagree."""
import numpy as np
import pandas as pd
import pytest

from preprocessing.errors import InputError, OptionError
from preprocessing.mpp import SPOT_DIAMETER_UM, ST_PITCH_UM, VISIUM_COL_UM, VISIUM_ROW_UM, check_axes, decide_mpp, fit_grid
from preprocessing.position_checks import check_on_image

MPP = 0.65


def visium_array(rows=20, cols=30):
    row, col = (part.ravel() for part in np.indices((rows, cols)))
    on = (row + col) % 2 == 0
    return row[on], col[on]


def place(row, col, *, angle=0.0, mirror=False, mpp=MPP, row_um=VISIUM_ROW_UM, col_um=VISIUM_COL_UM):
    """Pixels of array positions under a rotation and a reflection."""
    x, y = col * col_um / mpp * (-1 if mirror else 1), row * row_um / mpp
    turn = np.deg2rad(angle)
    return np.column_stack([np.cos(turn) * x - np.sin(turn) * y, np.sin(turn) * x + np.cos(turn) * y]) + (4000, 5000)


def fit(row, col, pixels, row_um=VISIUM_ROW_UM, col_um=VISIUM_COL_UM):
    return fit_grid(row, col, pixels, row_um=row_um, col_um=col_um)


@pytest.mark.parametrize("mirror", [False, True], ids=["upright", "mirrored"])
@pytest.mark.parametrize("angle", [0, 90, 180, 270, 17.3])
def test_the_fit_does_not_depend_on_how_the_image_is_turned(angle, mirror):
    row, col = visium_array()
    grid = fit(row, col, place(row, col, angle=angle, mirror=mirror))
    assert grid.mpp == pytest.approx(MPP, rel=1e-9) and grid.anisotropy == pytest.approx(1) and grid.mirrored == mirror


def test_sparse_spots_without_neighbours_fit_as_well(seed=0):
    row, col = visium_array(78, 128)
    few = np.random.default_rng(seed).choice(len(row), 12, replace=False)
    assert fit(row[few], col[few], np.rint(place(row[few], col[few], angle=3))).mpp == pytest.approx(MPP, rel=1e-3)


def test_a_fifth_of_misplaced_positions_does_not_move_the_fit():
    row, col = visium_array()
    pixels = place(row, col, angle=5)
    wrong = np.arange(len(row)) % 5 == 0
    pixels[wrong] += np.random.default_rng(1).normal(0, 3000, (wrong.sum(), 2)) + 2000
    grid = fit(row, col, pixels)
    assert grid.mpp == pytest.approx(MPP, rel=1e-6) and grid.n_fitted == (~wrong).sum()


@pytest.mark.parametrize("along", ["row", "col"])
def test_positions_on_one_line_fix_the_scale_along_it(along):
    steps = np.arange(0, 20, 2)
    row, col = (steps, np.full_like(steps, 4)) if along == "row" else (np.full_like(steps, 4), steps)
    assert fit(row, col, place(row, col, angle=30)).mpp == pytest.approx(MPP)


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_positions_are_no_fit(n):
    row, col = visium_array()
    assert fit(row[:n], col[:n], place(row[:n], col[:n])) is None
    assert fit(np.repeat(row[:n], 5), np.repeat(col[:n], 5), np.repeat(place(row[:n], col[:n]), 5, axis=0)) is None


def test_positions_that_all_lie_on_one_pixel_are_no_fit():
    row, col = visium_array()
    assert fit(row, col, np.full((len(row), 2), 7.0)) is None


def test_swapped_array_axes_are_refused_and_right_ones_are_not():
    row, col = visium_array()
    pixels = place(row, col)
    check_axes("positions.csv", fit(row, col, pixels))
    with pytest.raises(InputError, match=r"stretched 3\.00 : 1 .*Are array_row and array_col swapped"):
        check_axes("positions.csv", fit(col, row, pixels))


@pytest.mark.parametrize("section", ["C2", "C3", "C4"])
def test_real_legacy_sections_have_the_known_mpp(shared_data, section):
    spots = pd.read_csv(shared_data / "her2st" / section / "spots.tsv", sep="\t")
    grid = fit(spots["y"], spots["x"], spots[["pixel_x", "pixel_y"]], row_um=ST_PITCH_UM, col_um=ST_PITCH_UM)
    assert grid.mpp == pytest.approx(0.690, rel=0.01) and grid.anisotropy < 1.02


def test_spot_diameters_of_a_real_sample_span_65_um(shared_data):
    positions = pd.read_csv(shared_data / "mouse-brain-crop/derived_spaceranger_v2/spatial/tissue_positions.csv")
    grid = fit(positions["array_row"], positions["array_col"], positions[["pxl_col_in_fullres", "pxl_row_in_fullres"]])
    assert 89.44476 * grid.mpp == pytest.approx(SPOT_DIAMETER_UM, rel=0.01)


# ---- deciding -------------------------------------------------------------------------------------------------------

def grid_of(mpp):
    row, col = visium_array()
    return fit(row, col, place(row, col, mpp=mpp))


def test_sources_within_two_percent_agree_and_the_array_is_taken():
    decision = decide_mpp("p.csv", grid=grid_of(0.500), slide_mpp=0.509, slide_path="s.tif")
    assert decision.mpp == pytest.approx(0.5) and decision.source.startswith("the fit") and decision.notices == ()


def test_the_slides_own_mpp_is_taken_on_request():
    decision = decide_mpp("p.csv", grid=grid_of(0.500), slide_mpp=0.509, slide_path="s.tif", use_wsi_res=True)
    assert decision.mpp == 0.509 and "s.tif" in decision.source


@pytest.mark.parametrize("sources, shown", [
    ({"grid": 0.5, "slide_mpp": 0.511}, ["0.5 from the fit", "0.511 from the slide s.tif"]),
    ({"declared": 0.5, "slide_mpp": 1.0}, ["0.5 from microns_per_pixel", "1 from the slide s.tif"]),
    ({"declared": 0.5, "grid": 0.25}, ["0.25 from the fit", "0.5 from microns_per_pixel"]),
    ({"grid": 0.5, "slide_mpp": 0.25, "use_wsi_res": True}, ["0.25 from the slide s.tif", "0.5 from the fit"]),
], ids=["fit-slide", "hd-slide", "hd-fit", "use-wsi-res"])
def test_sources_further_apart_are_refused_showing_both(sources, shown):
    sources = {**sources, **({"grid": grid_of(sources["grid"])} if "grid" in sources else {})}
    with pytest.raises(InputError) as caught:
        decide_mpp("p.csv", slide_path="s.tif", **sources)
    assert all(text in str(caught.value) for text in [*shown, "--mpp"])


def test_mpp_of_the_user_ends_the_comparison():
    assert decide_mpp("p.csv", override=0.3, grid=grid_of(0.5), declared=0.7, slide_mpp=1.9).mpp == 0.3


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_mpp_of_the_user_must_be_a_positive_number(wrong):
    with pytest.raises(OptionError, match="--mpp: expected a positive number"):
        decide_mpp("p.csv", override=wrong)


@pytest.mark.parametrize("slide_mpp", [352.78, 0.01, 2.01])
def test_an_implausible_mpp_of_the_slide_is_ignored_with_a_notice(slide_mpp):
    decision = decide_mpp("p.csv", grid=grid_of(0.5), slide_mpp=slide_mpp, slide_path="s.tif")
    assert decision.mpp == pytest.approx(0.5)
    assert decision.notices == (f"s.tif: its mpp of {slide_mpp:g} is outside 0.05-2 and is ignored",)


@pytest.mark.parametrize("use_wsi_res", [False, True])
@pytest.mark.parametrize("slide_mpp", [None, 352.78])
def test_no_source_at_all_asks_for_mpp(slide_mpp, use_wsi_res):
    with pytest.raises(InputError, match="s.tif: mpp: .*--mpp"):
        decide_mpp("p.csv", slide_mpp=slide_mpp, slide_path="s.tif", use_wsi_res=use_wsi_res)


def test_the_spot_diameter_counts_only_where_nothing_else_is_known():
    assert decide_mpp("p.csv", spot_diameter_px=130).mpp == pytest.approx(0.5)
    assert decide_mpp("p.csv", spot_diameter_px=130, slide_mpp=0.25, slide_path="s.tif").mpp == 0.25
    assert decide_mpp("p.csv", spot_diameter_px=130, grid=grid_of(0.6)).mpp == pytest.approx(0.6)


# ---- on the image ---------------------------------------------------------------------------------------------------

def test_single_positions_off_the_image_are_said_and_most_are_refused():
    xy = np.array([[10.0, 10], [90, 40], [95, 45], [150, 20]])
    assert check_on_image("p.csv", xy[:3], 100, 50, "s.tif") == ""
    assert check_on_image("p.csv", xy, 100, 50, "s.tif") == "s.tif: 1 of 4 positions in tissue lie off it"
    with pytest.raises(InputError, match="4 of 4 .*Is it the image these positions were measured on"):
        check_on_image("p.csv", xy + 1000, 100, 50, "s.tif")


def test_positions_that_only_fit_with_x_and_y_exchanged_are_refused():
    with pytest.raises(InputError, match="With x and y exchanged they lie on it"):
        check_on_image("p.csv", np.array([[10.0, 90], [40, 80], [5, 95]]), 100, 50, "s.tif")
