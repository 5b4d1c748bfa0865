"""Lay out a kidney-like section whose truth is known: what lies where, and every cell with its type, size and direction.

Touches no files. Positions are (x, y) in µm from the slide's top left corner. The layout is a pure function of the
seed and the position: a mosaic of tubules (Voronoi cells with a lumen), straight ducts, stroma, lymphoid tissue,
glomeruli in Bowman's space and vessels, inside an outline on glass.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from preprocessing.simulation.noise import lattice_random, noise_at
from preprocessing.simulation.outline import Outline

REGIONS = ("glass", "proximal tubules", "distal tubules", "collecting ducts", "glomerulus", "stroma", "lymphoid", "vessel")
GLASS, PROXIMAL, DISTAL, DUCT, GLOMERULUS, STROMA, LYMPHOID, VESSEL = range(8)
TUBULAR = (PROXIMAL, DISTAL, DUCT)


@dataclass(frozen=True)
class CellType:
    """How cells of one type look. Lengths in µm, darkness in units of haematoxylin concentration."""

    name: str
    spacing: float        # no other cell's centre within the sum of the two spacings
    major: float          # half axes of the nucleus
    minor: float
    darkness: float
    clumped: float        # 0 vesicular (pale inside, dark rim, nucleolus) ... 1 evenly dark
    rna: float            # RNA content relative to the average cell


CELL_TYPES = (
    CellType("proximal", 4.1, 3.2, 2.9, 1.45, 0.35, 1.6),
    CellType("distal", 3.3, 2.9, 2.5, 1.55, 0.5, 1.2),
    CellType("collecting_duct", 3.3, 3.1, 2.5, 1.50, 0.4, 1.0),
    CellType("glomerular", 2.8, 2.9, 2.1, 1.60, 0.6, 0.9),
    CellType("fibroblast", 3.6, 5.6, 1.35, 1.60, 0.8, 0.7),
    CellType("smooth_muscle", 3.6, 6.2, 1.3, 1.45, 0.7, 0.8),
    CellType("lymphocyte", 2.55, 2.6, 2.4, 1.95, 0.9, 0.5),
    CellType("macrophage", 3.8, 3.7, 2.8, 1.15, 0.3, 1.3),
    CellType("erythrocyte", 2.5, 2.8, 2.6, 0.0, 1.0, 0.2),      # no nucleus: drawn in eosin
)
CELL_NAMES = tuple(cell.name for cell in CELL_TYPES)
(T_PROXIMAL, T_DISTAL, T_DUCT, T_GLOMERULAR, T_FIBROBLAST, T_MUSCLE, T_LYMPHOCYTE, T_MACROPHAGE, T_ERYTHROCYTE) = range(9)

TUBULE_UM, GLOMERULUS_UM, VESSEL_UM = 50.0, 250.0, 400.0   # spacing of the lattices the structures are jittered from
CANDIDATE_UM = 3.4                                         # spacing of the candidates for cells
BLOCK_POINTS = 1 << 18                                     # points laid out at a time: bounds memory


@dataclass(frozen=True)
class Layout:
    """What lies at each of N points; every field (N,). Depths are µm inside a border, negative outside it."""

    region: np.ndarray        # int8, index into REGIONS; interstitium between tubules counts to its tubule
    edge: np.ndarray          # depth inside the outline of the tissue
    tubule: np.ndarray        # depth inside the tubule's basement membrane; negative in the interstitium
    epithelium: np.ndarray    # thickness of the tubule's wall; deeper is lumen
    glomerulus: np.ndarray    # depth inside Bowman's capsule
    vessel: np.ndarray        # depth inside the vessel's outer border
    wall: np.ndarray          # thickness of that vessel's wall
    dilation: np.ndarray      # 0..1 programme: how wide the lumina are
    fibrosis: np.ndarray      # 0..1 programme: how much matrix lies between the tubules
    inflammation: np.ndarray  # 0..1 programme: how many lymphocytes have wandered in
    site: np.ndarray          # int8, REGIONS of the mosaic alone, without glomeruli, vessels and glass


@dataclass(frozen=True)
class Cells:
    """All cells of a section, ordered by y; every field (N,)."""

    x_um: np.ndarray
    y_um: np.ndarray
    cell_type: np.ndarray     # int8, index into CELL_TYPES
    major_um: np.ndarray      # half axes
    minor_um: np.ndarray
    angle: np.ndarray         # direction of the long axis, radians from +x towards +y
    darkness: np.ndarray
    shape_seed: np.ndarray    # uniform [0, 1): what else differs between two nuclei of a type

    def __len__(self) -> int:
        return len(self.x_um)


class Tissue:
    """The layout of one section of `width_um` by `height_um`; `region_um` is the scale at which regions change."""

    def __init__(self, width_um: float, height_um: float, seed: int, region_um: float = 280.0, outline: Outline | None = None):
        self.width_um, self.height_um, self.seed, self.region_um = width_um, height_um, seed, region_um
        self.outline = outline or Outline(width_um, height_um, seed)
        self._mosaic = _Sites(self, 10, TUBULE_UM, width_um, height_um)
        self._ducts = _Sites(self, 20, TUBULE_UM, width_um, height_um)
        self._duct_angle = np.float32(np.pi * lattice_random(seed, 29, 0, 0))

    def layout(self, x_um: np.ndarray, y_um: np.ndarray) -> Layout:
        """What lies at the points (N,), block by block."""
        blocks = [self._layout(x_um[k:k + BLOCK_POINTS], y_um[k:k + BLOCK_POINTS]) for k in range(0, max(len(x_um), 1), BLOCK_POINTS)]
        return Layout(**{name: np.concatenate([getattr(block, name) for block in blocks]) for name in Layout.__dataclass_fields__})

    def edge_depth(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """µm inside the outline of the tissue; arrays broadcast."""
        return self.outline.depth(x_um, y_um)

    def programmes(self, x_um: np.ndarray, y_um: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """dilation, fibrosis, inflammation at the points: smooth, independent of each other, 0..1."""
        scale = (1.5 * self.region_um, 1.1 * self.region_um, 0.7 * self.region_um)
        return tuple(1 / (1 + np.exp(-1.7 * noise_at(self.seed, 3 + k, x_um, y_um, scale[k]))) for k in range(3))

    def mosaic_region(self, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
        """Which tissue the mosaic holds about the points: tubules (PROXIMAL), DUCT, STROMA or LYMPHOID."""
        choice = np.stack([noise_at(self.seed, 40 + k, x_um, y_um, self.region_um) + bias
                           for k, bias in enumerate((0.60, 0.20, 0.25, 0.10))])
        return np.array([PROXIMAL, DUCT, STROMA, LYMPHOID], np.int8)[choice.argmax(axis=0)]

    def fibre_coordinates(self, x_um: np.ndarray, y_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(along, across) µm: collagen runs where `across` is constant."""
        angle = np.pi * lattice_random(self.seed, 50, 0, 0)
        along, across = x_um * np.cos(angle) + y_um * np.sin(angle), y_um * np.cos(angle) - x_um * np.sin(angle)
        across = across + 30 * noise_at(self.seed, 51, x_um, y_um, 150) + 5 * noise_at(self.seed, 52, x_um, y_um, 38)
        return along.astype(np.float32), across.astype(np.float32)

    def _layout(self, x: np.ndarray, y: np.ndarray) -> Layout:
        dilation, fibrosis, inflammation = self.programmes(x, y)
        xw = x + 3.5 * noise_at(self.seed, 7, x, y, 32)          # walls are not straight
        yw = y + 3.5 * noise_at(self.seed, 8, x, y, 32)
        site, tubule, kind_random = self._mosaic.look_up(xw, yw)
        duct_depth = self._ducts.look_up(*self._along_ducts(xw, yw))[1]
        site = np.where((site == PROXIMAL) & (kind_random > 0.62), DISTAL, site).astype(np.int8)
        tubule = np.where(site == DUCT, np.minimum(duct_depth, tubule + 6), tubule) - (0.4 + 2.6 * fibrosis**2)
        glomerulus = self._round_structures(x, y, 60, GLOMERULUS_UM, (36, 50), in_cortex=True)[0]
        vessel, radius = self._round_structures(x, y, 70, VESSEL_UM, (16, 48), in_cortex=False)
        glomerulus = np.where(vessel > -8, np.minimum(glomerulus, -vessel - 8), glomerulus)
        tubule = np.minimum(tubule, np.minimum(-glomerulus - 1.5, -vessel - 7))   # tubules end before them
        edge = self.edge_depth(x, y)
        thick = np.choose(np.clip(site, 1, 3) - 1, [17.5, 11.5, 9.5]) * (1.12 - 0.42 * dilation) + 2.5 * (kind_random - 0.5)
        region = np.where(glomerulus > 0, GLOMERULUS, np.where(vessel > 0, VESSEL, site))
        region = np.where(edge > 0, region, GLASS).astype(np.int8)
        return Layout(region, edge, tubule.astype(np.float32), thick.astype(np.float32), glomerulus, vessel, 0.22 * radius + 3.5,
                      dilation, fibrosis, inflammation, site)

    def _along_ducts(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates in which straight ducts, four times as long as wide, are round."""
        c, s = np.cos(self._duct_angle), np.sin(self._duct_angle)
        bend = 14 * noise_at(self.seed, 28, x, y, 160)
        return (x * c + y * s) / 4.5, (y * c - x * s + bend) * 1.35

    def _round_structures(self, x, y, channel: int, spacing: float, radii: tuple[float, float], in_cortex: bool):
        """Depth inside the nearest of sparse round structures, and its radius; both (N,) float32."""
        i0, j0 = np.floor(x / spacing), np.floor(y / spacing)
        depth, radius = np.full(x.shape, -1e3, np.float32), np.full(x.shape, radii[0], np.float32)
        for di in (-1, 0, 1):
            for dj in (-1, 0, 1):
                i, j = i0 + di, j0 + dj
                chance = [lattice_random(self.seed, channel + k, i, j) for k in range(5)]
                cx, cy = (i + 0.2 + 0.6 * chance[0]) * spacing, (j + 0.2 + 0.6 * chance[1]) * spacing
                r = radii[0] + (radii[1] - radii[0]) * chance[2]
                angle, stretch = np.pi * chance[3], 1 + 0.25 * chance[4]
                u, v = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle), (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
                inside = r - np.hypot(u / stretch, v * stretch ** 0.5)
                if in_cortex:
                    inside = np.where((self.mosaic_region(cx, cy) == PROXIMAL) & (chance[4] < 0.85), inside, -1e3)
                closer = inside > depth
                depth, radius = np.where(closer, inside, depth).astype(np.float32), np.where(closer, r, radius).astype(np.float32)
        return depth + 1.3 * noise_at(self.seed, channel + 6, x, y, 17), radius

    def place_cells(self) -> Cells:
        """Put cells down by density, no two overlapping: candidates in random order, each kept if nothing kept is too near."""
        columns, rows = int(self.width_um / CANDIDATE_UM) + 1, int(self.height_um / CANDIDATE_UM) + 1
        bands = [self._candidates(columns, row, min(row + 256, rows)) for row in range(0, rows, 256)]
        x, y, cell_type, order = (np.concatenate(part) for part in zip(*bands, strict=True))
        spacing = np.array([cell.spacing for cell in CELL_TYPES], np.float32)[cell_type]
        kept = _keep_apart(np.stack([x, y], axis=1), spacing, order)
        x, y, cell_type, chance = x[kept], y[kept], cell_type[kept], order[kept]
        by_y = np.lexsort((x, y))
        return self._dress(x[by_y], y[by_y], cell_type[by_y], chance[by_y])

    def _candidates(self, columns: int, first_row: int, end_row: int):
        """x, y, cell type and random order of the candidates that a cell may grow from, of one band of lattice rows."""
        i, j = (part.ravel() for part in np.meshgrid(np.arange(columns), np.arange(first_row, end_row)))
        x = (i + 0.1 + 0.8 * lattice_random(self.seed, 80, i, j)) * CANDIDATE_UM
        y = (j + 0.1 + 0.8 * lattice_random(self.seed, 81, i, j)) * CANDIDATE_UM
        chance, which = lattice_random(self.seed, 82, i, j), lattice_random(self.seed, 83, i, j)
        density, cell_type = _cell_density(self.layout(x, y), which)
        grows = chance < density
        order = lattice_random(self.seed, 84, i, j)
        return x[grows], y[grows], cell_type[grows], order[grows]

    def _dress(self, x, y, cell_type, chance) -> Cells:
        """Give each cell its size, direction and darkness."""
        seen = [lattice_random(self.seed, 90 + k, np.round(x * 64), np.round(y * 64)) for k in range(4)]
        table = np.array([[cell.major, cell.minor, cell.darkness] for cell in CELL_TYPES], np.float32)[cell_type]
        size = np.exp(0.22 * (seen[0] - 0.5) * 2)
        angle = self._direction(x, y, cell_type) + 0.5 * (seen[2] - 0.5)
        return Cells(x, y, cell_type, table[:, 0] * size, table[:, 1] * size * (0.85 + 0.3 * seen[1]), angle.astype(np.float32),
                     table[:, 2] * (0.78 + 0.44 * seen[3]), chance)

    def _direction(self, x, y, cell_type) -> np.ndarray:
        """Fibroblasts lie along fibres or walls, muscle around its vessel, duct cells stand on their membrane; others any way."""
        here, right, below = self.layout(x, y), self.layout(x + 1, y), self.layout(x, y + 1)
        angle = 2 * np.pi * lattice_random(self.seed, 95, np.round(x * 64), np.round(y * 64))
        across = [self.fibre_coordinates(*point)[1] for point in ((x, y), (x + 1, y), (x, y + 1))]
        fibres = np.arctan2(across[2] - across[0], across[1] - across[0]) + np.pi / 2
        walls = np.arctan2(below.tubule - here.tubule, right.tubule - here.tubule) + np.pi / 2
        vessels = np.arctan2(below.vessel - here.vessel, right.vessel - here.vessel) + np.pi / 2
        in_wall = np.isin(here.site, TUBULAR)
        angle = np.where(cell_type == T_FIBROBLAST, np.where(in_wall, walls, fibres), angle)
        angle = np.where(cell_type == T_MUSCLE, vessels, angle)
        return np.where((cell_type == T_DUCT) | (cell_type == T_DISTAL), walls + np.pi / 2, angle)


class _Sites:
    """A jittered lattice of Voronoi sites over the section, with what each of their cells holds."""

    def __init__(self, tissue: Tissue, channel: int, spacing: float, width_um: float, height_um: float):
        reach = int(2 * (width_um + height_um) / spacing) + 8          # ducts look the lattice up in turned coordinates
        self.spacing, self.first = spacing, -reach if channel == 20 else -8
        end = reach if channel == 20 else int(max(width_um, height_um) / spacing) + 9
        j, i = np.meshgrid(np.arange(self.first, end), np.arange(self.first, end), indexing="ij")
        self.x = ((i + 0.5 * (j % 2) + 0.7 * (lattice_random(tissue.seed, channel, i, j) - 0.5)) * spacing).astype(np.float32)
        self.y = ((j + 0.7 * (lattice_random(tissue.seed, channel + 1, i, j) - 0.5)) * spacing).astype(np.float32)
        self.region = tissue.mosaic_region(self.x, self.y)
        self.random = lattice_random(tissue.seed, channel + 2, i, j)

    def look_up(self, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Region and random number of the nearest site, and the depth (µm) inside its cell, corners rounded."""
        i0 = np.floor(x / self.spacing).astype(np.int64) - self.first
        j0 = np.floor(y / self.spacing + 0.5).astype(np.int64) - self.first
        near = np.full(x.shape, np.inf, np.float32)
        own_i, own_j = i0.copy(), j0.copy()
        for di, dj in ((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)):
            squared = (self.x[j0 + dj, i0 + di] - x) ** 2 + (self.y[j0 + dj, i0 + di] - y) ** 2
            closer = squared < near
            near = np.where(closer, squared, near)
            own_i, own_j = np.where(closer, i0 + di, own_i), np.where(closer, j0 + dj, own_j)
        own_x, own_y = self.x[own_j, own_i], self.y[own_j, own_i]
        crowd = np.zeros(x.shape, np.float32)
        for di, dj in ((a, b) for a in (-2, -1, 0, 1, 2) for b in (-2, -1, 0, 1, 2) if (a, b) != (0, 0)):
            other_x, other_y = self.x[own_j + dj, own_i + di], self.y[own_j + dj, own_i + di]
            apart = np.hypot(other_x - own_x, other_y - own_y)
            bisector = ((other_x - x) ** 2 + (other_y - y) ** 2 - near) / (2 * apart)      # exact distance to the Voronoi edge
            crowd += np.exp(-bisector / 3.0)                                               # smooth minimum: 3 µm corners
        return self.region[own_j, own_i], (-3.0 * np.log(crowd)).astype(np.float32), self.random[own_j, own_i]


def _cell_density(at: Layout, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chance that a candidate becomes a cell, and the type it would have; `which` is uniform [0, 1)."""
    in_site = [at.site == region for region in range(len(REGIONS))]
    tubular = np.isin(at.site, TUBULAR)
    own_type = np.choose(np.clip(at.site, 1, 3) - 1, [T_PROXIMAL, T_DISTAL, T_DUCT])
    nuclear_band = (at.tubule > 3.0) & (at.tubule < np.minimum(at.epithelium - 2.5, np.where(in_site[PROXIMAL], 8.0, 5.6)))
    wanderer = np.where(which < 0.9, T_LYMPHOCYTE, T_MACROPHAGE)
    infiltrate = 0.75 * np.clip(at.inflammation - 0.55, 0, 1) / 0.45

    interstitium = tubular & (at.tubule < -0.4)
    is_wanderer = which < infiltrate / (infiltrate + 0.2)
    density = np.where(interstitium, 0.2 + infiltrate, 0.0)
    cell_type = np.where(is_wanderer, wanderer, T_FIBROBLAST)
    density = np.where(tubular & nuclear_band, np.where(in_site[PROXIMAL], 0.5, 0.85), density)
    cell_type = np.where(tubular & (at.tubule >= -0.4), own_type, cell_type)
    density = np.where(in_site[STROMA], 0.13 + 0.8 * infiltrate, density)
    density = np.where(in_site[LYMPHOID], 0.97, density)
    lymphoid_type = np.where(which < 0.93, T_LYMPHOCYTE, np.where(which < 0.98, T_MACROPHAGE, T_FIBROBLAST))
    cell_type = np.where(in_site[LYMPHOID], lymphoid_type, cell_type)

    in_capsule, in_tuft = at.glomerulus > 0, at.glomerulus > 6.5
    density = np.where(in_capsule, np.where(in_tuft, 0.55, 0.0), density)
    cell_type = np.where(in_capsule, T_GLOMERULAR, cell_type)
    in_sleeve, in_wall, in_lumen = (at.vessel > -7) & ~in_capsule, at.vessel > 1.5, at.vessel > at.wall + 3
    vessel_density = np.where(in_lumen, 0.5, np.where(at.vessel > at.wall - 1, 0.0, np.where(in_wall, 0.3, 0.1)))
    density = np.where(in_sleeve, vessel_density, density)
    cell_type = np.where(in_sleeve, np.where(in_lumen, T_ERYTHROCYTE, np.where(in_wall, T_MUSCLE, T_FIBROBLAST)), cell_type)
    return np.where(at.edge > 4, density, 0.0), cell_type.astype(np.int8)


def _keep_apart(centre: np.ndarray, spacing: np.ndarray, order: np.ndarray) -> np.ndarray:
    """(N,) bool: walk the points in `order`, keep each that is farther from every kept one than both spacings together.

    Solved in rounds over the list of conflicting pairs; equal to the walk, without a Python loop over points.
    """
    pairs = cKDTree(centre).query_pairs(2 * float(spacing.max()), output_type="ndarray")
    apart = np.hypot(*(centre[pairs[:, 0]] - centre[pairs[:, 1]]).T)
    pairs = pairs[apart < spacing[pairs[:, 0]] + spacing[pairs[:, 1]]]
    swap = order[pairs[:, 0]] > order[pairs[:, 1]]
    first, second = np.where(swap, pairs[:, 1], pairs[:, 0]), np.where(swap, pairs[:, 0], pairs[:, 1])
    kept, open_ = np.zeros(len(centre), bool), np.ones(len(centre), bool)
    while open_.any():
        waits = np.zeros(len(centre), bool)
        waits[second[open_[first] & open_[second]]] = True
        kept |= open_ & ~waits
        open_ &= waits
        open_[second[kept[first]]] = False
    return kept
