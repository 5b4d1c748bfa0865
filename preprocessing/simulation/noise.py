"""Random fields that are pure functions of a seed and a position, so that tiles drawn apart join without a seam.

Touches no files. Positions in µm, float64; noise is roughly standard normal (mean 0, deviation 1), float32.
"""
from __future__ import annotations

import numpy as np

_MIX_I, _MIX_J = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)   # finaliser of splitmix64


def lattice_bits(seed: int, channel: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """uint64 hash of integer lattice points; i and j broadcast."""
    key = np.uint64((seed * 0x2545F4914F6CDD1D + channel * 0xD1342543DE82EF95 + 0x632BE5AB) % (1 << 64))
    bits = np.atleast_1d(i).astype(np.int64).view(np.uint64) * _MIX_I
    bits = bits ^ (np.atleast_1d(j).astype(np.int64).view(np.uint64) * _MIX_J + key)
    bits = (bits ^ (bits >> np.uint64(30))) * _MIX_1
    bits = (bits ^ (bits >> np.uint64(27))) * _MIX_2
    return bits ^ (bits >> np.uint64(31))


def lattice_random(seed: int, channel: int, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """float32 uniform in [0, 1) at integer lattice points."""
    return (lattice_bits(seed, channel, i, j) >> np.uint64(40)).astype(np.float32) * np.float32(2.0 ** -24)


def noise_at(seed: int, channel: int, x_um: np.ndarray, y_um: np.ndarray, wavelength_um: float) -> np.ndarray:
    """Value noise at any points (arrays that broadcast)."""
    u, v = np.asarray(x_um) / wavelength_um, np.asarray(y_um) / wavelength_um
    i, j = np.floor(u), np.floor(v)
    s, t = _smooth(u - i), _smooth(v - j)
    top = lattice_random(seed, channel, i, j) * (1 - s) + lattice_random(seed, channel, i + 1, j) * s
    low = lattice_random(seed, channel, i, j + 1) * (1 - s) + lattice_random(seed, channel, i + 1, j + 1) * s
    return ((top * (1 - t) + low * t - 0.5) * np.float32(2 / 0.429)).astype(np.float32)   # 0.429: its own deviation


def _smooth(fraction: np.ndarray) -> np.ndarray:
    return (fraction * fraction * (3 - 2 * fraction)).astype(np.float32)


def noise_on_grid(seed: int, channel: int, x_um: np.ndarray, y_um: np.ndarray, wavelength_um: float) -> np.ndarray:
    """Smoother noise on the grid y_um (H,) by x_um (W,): a cubic B-spline over the lattice. Returns (H, W).

    Only sums of products, element by element: a value does not depend on the grid it was asked in.
    """
    column, column_weights = _spline(x_um / wavelength_um)
    row, row_weights = _spline(y_um / wavelength_um)
    j, i = np.arange(row[0], row[-1] + 4), np.arange(column[0], column[-1] + 4)
    lattice = lattice_random(seed, channel, i[None, :], j[:, None]) * 2 - 1
    rows = sum(row_weights[k][:, None] * lattice[row - row[0] + k] for k in range(4))               # (H, columns of the lattice)
    grid = sum(column_weights[k][None, :] * rows[:, column - column[0] + k] for k in range(4))       # (H, W)
    return grid * np.float32(1 / 0.277)


def _spline(position: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """First of the four lattice points about each position, and their cubic B-spline weights."""
    first = np.floor(position).astype(np.int64) - 1
    t = (position - np.floor(position)).astype(np.float32)
    weights = [(1 - t) ** 3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (-3 * t**3 + 3 * t**2 + 3 * t + 1) / 6, t**3 / 6]
    return first, weights


def upsample(coarse: np.ndarray, first: tuple[int, int], step_um: float, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    """Linear interpolation of a coarse grid. `coarse[r, c]` lies at ((first[0] + c), (first[1] + r)) * step_um. Returns (H, W)."""
    column, row = x_um / step_um - first[0], y_um / step_um - first[1]
    c, r = np.floor(column).astype(np.int64), np.floor(row).astype(np.int64)
    s, t = (column - c).astype(np.float32)[None, :], (row - r).astype(np.float32)[:, None]
    rows = coarse[r] + t * (coarse[r + 1] - coarse[r])
    left = rows[:, c]
    return left + s * (rows[:, c + 1] - left)
