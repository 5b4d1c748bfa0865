"""Draw a simulated section as a scanned H&E slide.

Stains are concentrations; light follows Beer-Lambert, I = I0 exp(-(c_H v_H + c_E v_E)). Any rectangle can be drawn on
its own: a pixel depends on the seed and its position alone, so tiles join without a seam and memory stays bounded.
Images are uint8 (H, W, 3) RGB; positions are (x, y) in level-0 pixels.
"""
from __future__ import annotations

from copy import copy
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import gaussian_filter

from preprocessing.simulation import tissue as st
from preprocessing.simulation.noise import lattice_bits, noise_on_grid, upsample
from preprocessing.simulation.tissue import Cells, Layout, Tissue

STEP_UM = 2.0            # the layout is laid out on this grid and interpolated
FOCUS_UM = 0.42          # blur of the scanner
NOISE_GREY = 2.2         # deviation of the sensor's noise, grey levels
REFERENCE_STAINS = ((0.5626, 0.7201, 0.4062), (0.2159, 0.8012, 0.5581))   # H and E of Macenko's reference slide


@dataclass(frozen=True)
class Stains:
    """One slide's own optics."""

    haematoxylin: tuple[float, float, float]   # optical density of one unit, per RGB channel; unit length
    eosin: tuple[float, float, float]
    strength: tuple[float, float]              # how strongly this slide took H and E
    light: tuple[float, float, float]          # I0, grey levels of empty glass


def slide_stains(seed: int) -> Stains:
    """Stain vectors scattered about the reference by a few degrees, staining strength by a tenth."""
    rng = np.random.default_rng([seed, 0x57A1])
    vectors = np.array(REFERENCE_STAINS) + rng.normal(0, 0.026, (2, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    light = 243 + rng.normal(0, 1.5) + rng.normal(0, 0.6, 3)
    strength = np.exp(rng.normal(0, 0.09, 2))
    return Stains(*(tuple(map(float, row)) for row in (*vectors, strength, light)))


class SlidePainter:
    """Draws rectangles of one section's slide."""

    def __init__(self, tissue: Tissue, cells: Cells, stains: Stains, mpp: float):
        self.tissue, self.cells, self.stains, self.mpp = tissue, cells, stains, mpp
        self.width_px, self.height_px = int(tissue.width_um / mpp), int(tissue.height_um / mpp)
        self._fibre_table = _periodic_noise(tissue.seed)

    def paint(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """The rectangle with top left (x, y), level-0 px: uint8 (height, width, 3)."""
        margin = int(np.ceil(4 * FOCUS_UM / self.mpp)) + 1
        columns, rows = np.arange(x - margin, x + width + margin), np.arange(y - margin, y + height + margin)
        haematoxylin, eosin = self._concentrations((columns + 0.5) * self.mpp, (rows + 0.5) * self.mpp)
        inner = slice(margin, -margin)
        blurred = [gaussian_filter(stain, FOCUS_UM / self.mpp, truncate=4)[inner, inner] for stain in (haematoxylin, eosin)]
        return self._expose(*blurred, columns[inner], rows[inner])

    def paint_glass(self, x: int, y: int, width: int, height: int) -> np.ndarray:
        """As `paint` where there is no tissue."""
        return self._expose(*np.zeros((2, height, width), np.float32), np.arange(x, x + width), np.arange(y, y + height))

    def of(self, tissue: Tissue, cells: Cells) -> SlidePainter:
        """A painter of other tissue on the same slide."""
        other = copy(self)
        other.tissue, other.cells = tissue, cells
        return other

    def _expose(self, haematoxylin: np.ndarray, eosin: np.ndarray, columns: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """What the scanner sees of the stains (H, W) at the pixels rows by columns: uint8 (H, W, 3)."""
        bits = lattice_bits(self.tissue.seed, 200, columns[None, :], rows[:, None])
        picture = np.empty((*haematoxylin.shape, 3), np.uint8)
        for channel in range(3):
            density = haematoxylin * np.float32(self.stains.strength[0] * self.stains.haematoxylin[channel])
            density += eosin * np.float32(self.stains.strength[1] * self.stains.eosin[channel])
            light = np.float32(self.stains.light[channel]) * np.exp(-density) + _sensor_noise(bits, channel)
            picture[..., channel] = np.clip(np.rint(light), 0, 255)
        return picture

    def _concentrations(self, x_um: np.ndarray, y_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Haematoxylin and eosin on the grid y_um by x_um; both float32 (H, W)."""
        coarse_x = np.arange(np.floor(x_um[0] / STEP_UM), np.floor(x_um[-1] / STEP_UM) + 2)
        coarse_y = np.arange(np.floor(y_um[0] / STEP_UM), np.floor(y_um[-1] / STEP_UM) + 2)
        grid_x, grid_y = (part.ravel() for part in np.meshgrid(coarse_x * STEP_UM, coarse_y * STEP_UM))
        shape, first = (len(coarse_y), len(coarse_x)), (int(coarse_x[0]), int(coarse_y[0]))

        def fine(coarse: np.ndarray) -> np.ndarray:
            return upsample(coarse.reshape(shape).astype(np.float32), first, STEP_UM, x_um, y_um)

        layout = self.tissue.layout(grid_x, grid_y)
        if (layout.edge < -4).all():
            empty = np.zeros((len(y_um), len(x_um)), np.float32)
            return empty, empty
        noise = {wave: noise_on_grid(self.tissue.seed, 100 + k, x_um, y_um, wave) for k, wave in enumerate((0.9, 2.2, 5.5, 13.0, 130.0))}
        fibres = self._fibres(*(fine(part) for part in self.tissue.fibre_coordinates(grid_x, grid_y)))
        haematoxylin, eosin = _ground(layout, fine, noise, fibres)
        self._draw_cells(haematoxylin, eosin, x_um, y_um, noise)
        thickness = 1 + 0.07 * noise[130.0]
        inside = _step(fine(layout.edge) + 1.2 * noise[5.5] + 0.5 * noise[2.2], 1.5) * thickness
        return haematoxylin * inside, eosin * inside

    def _fibres(self, along: np.ndarray, across: np.ndarray) -> np.ndarray:
        """Streaks along the collagen, roughly standard normal (H, W)."""
        coarse = _table_noise(self._fibre_table, along / 38, across / 3.6)
        return 0.75 * coarse + 0.65 * _table_noise(self._fibre_table, along / 15 + 91.3, across / 1.5 + 17.7)

    def _draw_cells(self, haematoxylin, eosin, x_um, y_um, noise) -> None:
        """Lay nuclei (and erythrocytes) over the ground, in place."""
        cells, reach = self.cells, 9.0
        first, end = np.searchsorted(cells.y_um, (y_um[0] - reach, y_um[-1] + reach))
        near = first + np.flatnonzero((cells.x_um[first:end] > x_um[0] - reach) & (cells.x_um[first:end] < x_um[-1] + reach))
        nucleated = cells.cell_type[near] != st.T_ERYTHROCYTE
        stain, cover = _stamps(cells, near[nucleated], x_um, y_um, self.mpp)
        texture = 1 + 0.16 * noise[0.9] + 0.12 * noise[2.2]
        haematoxylin *= 1 - cover
        haematoxylin += stain * texture
        eosin *= 1 - 0.62 * cover
        red, cover = _stamps(cells, near[~nucleated], x_um, y_um, self.mpp)
        eosin *= 1 - cover
        eosin += red


def _ground(at: Layout, fine, noise: dict[float, np.ndarray], fibres: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Everything but the nuclei: cytoplasm, lumina, matrix. `fine` takes a field of the layout to the pixels."""
    tubule, epithelium = fine(at.tubule), fine(at.epithelium)
    fibrosis = fine(at.fibrosis)
    share = {region: fine(at.site == region) for region in (st.PROXIMAL, st.DISTAL, st.DUCT, st.STROMA, st.LYMPHOID)}
    grain = 1 + 0.10 * noise[0.9] + 0.10 * noise[2.2] + 0.07 * noise[5.5]

    # tubules: a wall of cytoplasm between the basement membrane and a lumen, fuzzy (brush border) in proximal ones
    ragged = epithelium + noise[5.5] * (0.8 + 1.0 * share[st.PROXIMAL]) + 0.5 * noise[2.2]
    wall = _step(tubule + 0.25 * noise[2.2], 0.5) * (1 - _step(tubule - ragged, 1.3))
    flock = 0.05 + 0.10 * np.clip(noise[13.0] + 0.5 * noise[2.2] - 0.8, 0, 1.5)
    membrane = np.exp(-(tubule / 0.7) ** 2)
    cytoplasm_e = 0.84 * share[st.PROXIMAL] + 0.56 * share[st.DISTAL] + 0.42 * share[st.DUCT]
    cytoplasm_h = 0.24 * share[st.PROXIMAL] + 0.20 * share[st.DISTAL] + 0.24 * share[st.DUCT]
    in_tubule = _step(tubule, 0.6)
    matrix_e = np.clip(0.50 + 0.16 * fibrosis + 0.11 * fibres + 0.05 * noise[5.5], 0.06, 1.3)
    tubules_e = wall * cytoplasm_e * grain + (in_tubule - wall).clip(0) * flock + (1 - in_tubule) * matrix_e + 0.22 * membrane
    tubules_h = wall * cytoplasm_h * grain + (1 - in_tubule) * 0.10

    # stroma: collagen in wavy bundles with clefts between; lymphoid: a fine mesh
    bundle = _step(fibres + 0.6 * noise[13.0] + 0.3 * noise[5.5] + 1.0 * fibrosis + 0.65, 0.75)
    stroma_e = bundle * np.clip(0.55 + 0.28 * fibrosis + 0.15 * fibres, 0.15, 1.4) * (1 + 0.06 * noise[2.2]) + 0.09 * (1 - bundle)
    lymphoid_e = np.clip(0.30 + 0.12 * noise[2.2] + 0.10 * noise[5.5], 0.03, 1)
    tubular = share[st.PROXIMAL] + share[st.DISTAL] + share[st.DUCT]
    eosin = tubular * tubules_e + share[st.STROMA] * stroma_e + share[st.LYMPHOID] * lymphoid_e
    haematoxylin = tubular * tubules_h + share[st.STROMA] * 0.10 * bundle + share[st.LYMPHOID] * (0.26 + 0.05 * noise[5.5])

    if (at.glomerulus > -6).any():
        glomerulus = fine(at.glomerulus) + 0.2 * noise[2.2]
        tuft = _step(glomerulus - 6 - 1.8 * noise[13.0] - 0.8 * noise[5.5], 0.8)
        capillary = _step(noise[5.5] + 0.5 * noise[2.2] - 0.75, 0.35)
        tuft_e = tuft * np.clip(0.62 * grain * (1 - capillary) + 0.06, 0, 2) + 0.55 * np.exp(-((glomerulus - 0.7) / 0.75) ** 2)
        inside = _step(glomerulus, 0.4)
        eosin = eosin * (1 - inside) + inside * tuft_e
        haematoxylin = haematoxylin * (1 - inside) + inside * tuft * (1 - 0.8 * capillary) * 0.30
    if (at.vessel > -12).any():
        eosin, haematoxylin = _add_vessel(eosin, haematoxylin, fine(at.vessel), fine(at.wall), noise, fibres)
    if (at.edge < 14).any():                                       # a thin capsule of collagen about the organ
        capsule = 0.85 * (1 - _step(fine(at.edge) - 4.5 - 1.5 * noise[13.0], 1.5))
        eosin = eosin * (1 - capsule) + capsule * np.clip(0.62 + 0.12 * noise[2.2] + 0.12 * noise[5.5], 0.2, 1.2)
        haematoxylin = haematoxylin * (1 - capsule) + capsule * 0.10
    return haematoxylin.clip(0), eosin.clip(0)


def _add_vessel(eosin, haematoxylin, vessel, wall, noise, fibres):
    """A muscular wall in rings about a lumen of plasma, in a sleeve of loose collagen."""
    sleeve = _step(vessel + 6 + 1.5 * noise[13.0], 1.0)
    inside = _step(vessel, 0.6)
    lumen = _step(vessel - wall - 0.5 * noise[5.5], 0.6)
    rings = np.sin(vessel * (2 * np.pi / 3.1) + 1.2 * noise[13.0] + 0.8 * noise[5.5])
    wall_e = 0.88 + 0.13 * rings + 0.06 * noise[2.2]
    elastic = 0.35 * np.exp(-((vessel - wall + 0.8) / 0.7) ** 2)
    new_e = (1 - inside) * np.clip(0.55 + 0.28 * fibres, 0.08, 1.3) + inside * ((1 - lumen) * (wall_e + elastic) + lumen * 0.07)
    new_h = 0.10 + inside * 0.08 - lumen * 0.17
    return eosin * (1 - sleeve) + sleeve * new_e, haematoxylin * (1 - sleeve) + sleeve * new_h


def _stamps(cells: Cells, chosen: np.ndarray, x_um, y_um, mpp: float) -> tuple[np.ndarray, np.ndarray]:
    """Stain and cover of the chosen cells on the grid; where two touch the stronger wins, so order does not matter."""
    stain, cover = (np.zeros((len(y_um), len(x_um)), np.float32) for _ in range(2))
    first_x, first_y = x_um[0] / mpp, y_um[0] / mpp
    for reach_um in (3.6, 8.8):                                   # small and long cells apart: smaller stamps for the many
        size = cells.major_um[chosen] * 1.22 + 0.3
        group = chosen[(size <= reach_um) & (size > (0 if reach_um == 3.6 else 3.6))]
        half = int(np.ceil(reach_um / mpp))
        offset = np.arange(-half, half + 1)
        for part in np.array_split(group, len(group) * (2 * half + 1) ** 2 // 4_000_000 + 1):
            column = np.rint(cells.x_um[part] / mpp - first_x).astype(np.int64)[:, None] + offset     # (n, side)
            row = np.rint(cells.y_um[part] / mpp - first_y).astype(np.int64)[:, None] + offset
            dx = (column * mpp + x_um[0] - cells.x_um[part, None]).astype(np.float32)[:, None, :]
            dy = (row * mpp + y_um[0] - cells.y_um[part, None]).astype(np.float32)[:, :, None]
            cell_stain, cell_cover = _nucleus(cells, part, dx, dy)                                    # (n, side, side)
            column, row = np.broadcast_arrays(column[:, None, :], row[:, :, None])
            seen = (cell_cover > 0) & (column >= 0) & (column < len(x_um)) & (row >= 0) & (row < len(y_um))
            place = row[seen] * len(x_um) + column[seen]
            np.maximum.at(stain.ravel(), place, cell_stain[seen])
            np.maximum.at(cover.ravel(), place, cell_cover[seen])
    return stain, cover


def _nucleus(cells: Cells, part: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Stain and cover of each cell at offsets from its centre (µm): a dented ellipse, pale inside with a dark rim, or dark."""
    def each(values):
        return values[part].astype(np.float32)[:, None, None]

    cos, sin, phase = np.cos(each(cells.angle)), np.sin(each(cells.angle)), 6.283 * each(cells.shape_seed)
    u, v = (dx * cos + dy * sin) / each(cells.major_um), (dy * cos - dx * sin) / each(cells.minor_um)
    radius = np.sqrt(u * u + v * v)
    turn = np.arctan2(v, u)
    radius = radius * (1 + 0.09 * np.cos(2 * turn + phase) + 0.06 * np.cos(3 * turn + 7 * phase) + 0.025 * np.cos(5 * turn + 3 * phase))
    cover = _step(1 - radius, 0.30 / each(cells.minor_um))
    clumped = np.array([cell.clumped for cell in st.CELL_TYPES], np.float32)[cells.cell_type[part]][:, None, None]
    pale = (1 - clumped) * (0.60 * (1 - np.minimum(radius, 1) ** 3))
    spot_u, spot_v = u - 0.35 * np.cos(5 * phase), v - 0.35 * np.sin(5 * phase)
    nucleolus = (1 - clumped) * 0.5 * np.exp(-(spot_u**2 + spot_v**2) / 0.05)
    erythrocyte = (cells.cell_type[part] == st.T_ERYTHROCYTE)[:, None, None]
    darkness = np.where(erythrocyte, 1.15 - 0.35 * np.exp(-(radius**2) / 0.2), each(cells.darkness) * (1 - pale + nucleolus))
    return (cover * darkness).astype(np.float32), cover.astype(np.float32)


def _step(depth: np.ndarray, softness: np.ndarray | float) -> np.ndarray:
    """0 below -softness, 1 above +softness, smooth between."""
    t = np.clip(depth / (2 * np.float32(softness) if np.isscalar(softness) else 2 * softness) + 0.5, 0, 1)
    return t * t * (3 - 2 * t)


def _sensor_noise(bits: np.ndarray, channel: int) -> np.ndarray:
    """Triangular noise of NOISE_GREY from three sixteen-bit pieces of a hash (the channels share one, as light does)."""
    pieces = [((bits >> np.uint64(16 * k)) & np.uint64(0xFFFF)).astype(np.float32) * np.float32(2.0 ** -16) for k in (channel, 3)]
    return (pieces[0] + pieces[1] - 1) * np.float32(NOISE_GREY * 2.449)


def _periodic_noise(seed: int) -> np.ndarray:
    """(1024, 1024) float32 of standard normal noise on a lattice, to be read at warped coordinates."""
    return np.random.default_rng([seed, 0xF1B]).standard_normal((1024, 1024), dtype=np.float32)


def _table_noise(table: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Read the periodic table between its points, smoothly."""
    i, j = np.floor(u), np.floor(v)
    s, t = (u - i).astype(np.float32), (v - j).astype(np.float32)
    s, t = s * s * (3 - 2 * s), t * t * (3 - 2 * t)
    i, j = i.astype(np.int64) & 1023, j.astype(np.int64) & 1023
    i1, j1 = (i + 1) & 1023, (j + 1) & 1023
    top = table[j, i] * (1 - s) + table[j, i1] * s
    low = table[j1, i] * (1 - s) + table[j1, i1] * s
    return (top * (1 - t) + low * t) * np.float32(1 / 0.743)
