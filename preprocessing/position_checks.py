"""Check that positions lie where the tissue is: on an image of their own scale, on it at all, and not transposed.

Positions are (x, y) pixels of the image at hand. Exchanged pixel columns cannot be seen in the numbers alone, as scans may be
rotated and mirrored; the image can tell. Touches no files.
"""
from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from preprocessing.errors import InputError
from preprocessing.mpp import TOLERANCE

ENOUGH = 20               # positions in and out of tissue below which contrast says nothing
MIN_CONTRAST = 25.0       # grey levels between tissue and glass that the exchanged columns must show
NO_CONTRAST = 5.0         # and that the columns as given must not
GLASS_GREY = 180.0        # brightfield: off the tissue the slide is bright, ...
GLASS_RANGE = 20.0        # without colour (highest less lowest channel; 0 to 9 on real slides), ...
GLASS_SPREAD = 8.0        # and alike everywhere (0 to 2.5 on real slides). Other pictures (fluorescence, phantoms) say nothing
SWAPPED = "With x and y exchanged they lie {where}: the two pixel columns of the positions are swapped"


def check_slide_size(slide_path: Path | str, slide_px: tuple[int, int], images: Mapping[str, np.ndarray],
                     factors: Mapping[str, float]) -> str:
    """Refuse a slide of another scale than the image of the sample; returns a notice about one cut on a side, or ''.

    `slide_px` (width, height). An image of (w, h) px with scale factor f was made from w / f by h / f px. A slide larger or
    smaller than that in both directions alike is another copy; in one direction only, a part.
    """
    kind = next((kind for kind in ("hires", "lowres") if kind in images and factors.get(f"tissue_{kind}_scalef")), None)
    if kind is None:
        return ""
    image_px = np.array(images[kind].shape[1::-1], dtype=float)
    expected = image_px / factors[f"tissue_{kind}_scalef"]
    ratio, rounding = np.array(slide_px) / expected, 1 / image_px                  # the image was rounded to whole pixels
    differs = np.abs(np.log(ratio)) > TOLERANCE + rounding
    if not differs.any():
        return ""
    needed = f"{expected[0]:.0f} x {expected[1]:.0f} px"
    found, source = f"{slide_px[0]} x {slide_px[1]} px", f"the {kind} image and tissue_{kind}_scalef of the sample"
    if differs.all() and abs(np.log(ratio[0] / ratio[1])) <= TOLERANCE + rounding.sum():
        raise InputError(slide_path, "size", f"{needed}, of which {source} speak", f"{found}, {np.sqrt(ratio.prod()):.3g} times that",
                         "Give the slide at full resolution, the one the positions were measured on")
    return f"{slide_path}: {found}, where {source} speak of {needed} (was it cropped?)"


def check_on_image(path: Path | str, centre_xy_px: np.ndarray, width_px: float, height_px: float, image: Path | str,
                   may_be_cropped: bool = False) -> str:
    """Refuse positions most of which lie off the image; returns a notice about single ones that do, or ''.

    `centre_xy_px` (P, 2) are the positions in tissue. With `may_be_cropped` the image is a thumbnail that need not
    show everything: then only exchanged pixel columns are refused.
    """
    inside = _inside(centre_xy_px, width_px, height_px)
    if len(inside) == 0 or inside.all():
        return ""
    outside = f"{np.count_nonzero(~inside):,} of {len(inside):,} positions in tissue lie off it"
    swapped = _inside(centre_xy_px[:, ::-1], width_px, height_px).mean() > 0.9
    if inside.mean() < 0.5 and (swapped or not may_be_cropped):
        hint = SWAPPED.format(where="on it") if swapped else "Is it the image these positions were measured on, at full resolution?"
        raise InputError(path, "pixel positions", f"positions on {image}, {width_px:.0f} x {height_px:.0f} px", outside, hint)
    return f"{image}: {outside}{' (was it cropped?)' if may_be_cropped else ''}"


def _inside(xy: np.ndarray, width: float, height: float) -> np.ndarray:
    return ((xy >= 0) & (xy <= np.array([width, height], dtype=float))).all(axis=1)


def check_over_tissue(path: Path | str, xy: np.ndarray, in_tissue: np.ndarray, image: np.ndarray, image_path: Path | str) -> None:
    """Refuse pixel columns that are exchanged: tissue is darker than glass, and only the exchanged positions show it.

    `xy` (P, 2) in pixels of `image` uint8 (H, W, 3). Says nothing about images that are not brightfield or show no contrast,
    or positions all in tissue.
    """
    given, exchanged = _contrast(xy, in_tissue, image), _contrast(xy[:, ::-1], in_tissue, image)
    if given is None or exchanged is None:
        return
    if exchanged.off_tissue_is_glass and exchanged.difference >= MIN_CONTRAST and given.difference <= NO_CONTRAST:
        raise InputError(path, "pixel positions", f"positions in tissue where {image_path} is dark",
                         f"a contrast to the other positions of {given.difference:.0f} grey levels, "
                         f"and of {exchanged.difference:.0f} with x and y exchanged",
                         SWAPPED.format(where="over tissue"))


class _Contrast(NamedTuple):
    difference: float            # how much darker the image is under positions in tissue than under the others, grey levels
    off_tissue_is_glass: bool    # under the others the image is bright, neutral and uniform


def _contrast(xy: np.ndarray, in_tissue: np.ndarray, image: np.ndarray) -> _Contrast | None:
    """Contrast of the image between positions in tissue and the others; None where too few lie on it."""
    usable = np.isfinite(xy).all(axis=1)
    usable[usable] = _inside(xy[usable], image.shape[1] - 1, image.shape[0] - 1)
    if min(np.count_nonzero(usable & in_tissue), np.count_nonzero(usable & ~in_tissue)) < ENOUGH:
        return None
    columns, rows = np.rint(xy[usable]).astype(int).T
    under = image[rows, columns].astype(float)                                                          # (n, 3)
    others, grey = under[~in_tissue[usable]], under.mean(axis=1)
    other_grey = others.mean(axis=1)
    middle = np.median(other_grey)
    spread = 1.4826 * np.median(np.abs(other_grey - middle))
    is_glass = middle >= GLASS_GREY and np.median(np.ptp(others, axis=1)) < GLASS_RANGE and spread < GLASS_SPREAD
    return _Contrast(float(other_grey.mean() - grey[in_tissue[usable]].mean()), bool(is_glass))
