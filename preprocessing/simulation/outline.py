"""Outline a simulated section: how deep inside its ragged border, and outside its tears, a point lies.

Touches no files. Positions in µm from the slide's top left corner, depths in µm, negative on glass.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preprocessing.simulation.noise import noise_at

TEAR_UM, TEAR_LEVEL = 700.0, 1.75      # tears lie where noise of this wavelength rises above this level: 2-3 % of the section


@dataclass(frozen=True)
class Outline:
    """A rounded square with a wavy border, within a rim of empty glass. The slide's own border is always glass."""

    width_um: float                   # of the slide
    height_um: float
    seed: int
    rim_um: float = 0.0               # glass on every side before anything else begins
    margin_um: float | None = None    # between the rim and the tissue, on average; None: 8 % of the shorter side, 20 to 400
    is_torn: bool = False             # holes within the section

    def depth(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """float32 µm inside the tissue; arrays broadcast."""
        centre = np.array([self.width_um, self.height_um]) / 2
        half = centre - self.rim_um
        margin = np.clip(0.08 * half.min() * 2, 20, 400) if self.margin_um is None else self.margin_um
        sides = np.abs(np.asarray(x_um) - centre[0]) / (half[0] - margin), np.abs(np.asarray(y_um) - centre[1]) / (half[1] - margin)
        radius = (sides[0] ** 3.5 + sides[1] ** 3.5) ** (1 / 3.5)
        wobble = 0.28 * noise_at(self.seed, 1, x_um, y_um, 3.5 * margin) + 0.05 * noise_at(self.seed, 2, x_um, y_um, 0.6 * margin)
        depth = ((1 - radius) * (half.min() - margin) + wobble.clip(-0.8, 0.8) * margin).astype(np.float32)
        return np.minimum(depth, self._tear_depth(x_um, y_um)) if self.is_torn else depth

    def _tear_depth(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        ragged = noise_at(self.seed, 4, x_um, y_um, TEAR_UM) + 0.06 * noise_at(self.seed, 9, x_um, y_um, TEAR_UM / 12)
        return (TEAR_LEVEL - ragged) * np.float32(TEAR_UM / 4)       # the noise changes by about 4 a wavelength
