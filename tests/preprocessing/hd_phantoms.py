"""Visium HD samples whose picture and counts both say which bin they come from: any wrong pairing can be read off."""
import numpy as np
import scipy.sparse as sp
import tifffile

from preprocessing.sample import Sample
from preprocessing.simulation.space_ranger_files import hd_barcodes, positions_table, write_count_matrix, write_images, write_positions

BIN_PX, MPP, MARGIN_BINS = 4, 0.5, 20
BIN_UM = BIN_PX * MPP


def plain_code(place: np.ndarray) -> np.ndarray:
    """The colour of the bins at these rows or columns of the slide."""
    return place


def bright_code(place: np.ndarray) -> np.ndarray:
    """A picture as bright as a slide's glass."""
    return 25 + 2 * place


def inverted_code(place: np.ndarray) -> np.ndarray:
    """A bright picture that darkens where rows and columns rise, as tissue does."""
    return 255 - 2 * place


def phantom_hd_folder(folder, *, offset, columns_run_left=False, holes=(), shape=(40, 45), rows_run_up=False, code=plain_code):
    """Space Ranger folder and slide of `shape` bins in tissue from array position `offset` on.

    Colour (red, green) of a bin = `code` of its array (row, column), all over the slide; a bin's counts are 1, row, column.
    """
    n_rows, n_cols = (start + size for start, size in zip(offset, shape, strict=True))
    slide_bins = (n_rows + 2 * MARGIN_BINS, n_cols + 2 * MARGIN_BINS)
    colour = np.zeros((*slide_bins, 3), dtype=np.uint8)
    colour[..., 0], colour[..., 1] = code(np.arange(slide_bins[0]))[:, None], code(np.arange(slide_bins[1]))
    colour[..., 2] = 200 if code is plain_code else 255
    flip = (slice(None, None, -1 if rows_run_up else 1), slice(None, None, -1 if columns_run_left else 1))
    pixels = np.kron(colour[flip], np.ones((BIN_PX, BIN_PX, 1), dtype=np.uint8))
    tifffile.imwrite(folder / "slide.tif", pixels, tile=(64, 64), resolution=(1e4 / MPP, 1e4 / MPP), resolutionunit="CENTIMETER",
                     photometric="rgb")
    row, col = (index.ravel() for index in np.indices((n_rows, n_cols)))
    in_tissue = (row >= offset[0]) & (col >= offset[1])
    for hole in holes:
        in_tissue &= ~((row == offset[0] + hole[0]) & (col == offset[1] + hole[1]))
    place_row, place_col = ((size - 1 - index if reverse else index) for index, size, reverse in (
        (row + MARGIN_BINS, slide_bins[0], rows_run_up), (col + MARGIN_BINS, slide_bins[1], columns_run_left)))
    row_px, col_px = (place_row + 0.5) * BIN_PX, (place_col + 0.5) * BIN_PX
    bin_folder = folder / "SAMPLE" / "binned_outputs" / "square_002um"
    (bin_folder / "spatial").mkdir(parents=True)
    barcodes = hd_barcodes(row, col)
    shuffled = np.random.default_rng(0).permutation(len(row))
    table = positions_table(barcodes, in_tissue, row, col, row_px, col_px, whole_px=False)
    write_positions(bin_folder / "spatial", table.iloc[shuffled], "visium-hd")
    write_images(bin_folder / "spatial", pixels, pixels.shape[1], pixels.shape[0], MPP, bin_um=2.0)
    counted = shuffled[::-1][in_tissue[shuffled[::-1]]]
    counts = sp.csr_matrix(np.stack([np.ones(len(counted)), row[counted], col[counted]], axis=1).astype(np.int32))
    write_count_matrix(bin_folder / "filtered_feature_bc_matrix.h5", [(barcodes[counted], counts)], gene_names=["One", "Row", "Col"],
                       gene_ids=["ENS1", "ENS2", "ENS3"], library_id="phantom", chemistry="Visium HD", software="spaceranger-3.0.0",
                       genome="mm10")
    return folder / "SAMPLE", folder / "slide.tif"


def decode_counts(counts) -> np.ndarray:
    """(P, 2) centre of mass (row, column) of the member bins, from the summed counts."""
    counts = np.asarray(counts.todense(), dtype=float)
    return counts[:, 1:] / counts[:, :1]


def decode_colour(patches: np.ndarray, code=plain_code) -> np.ndarray:
    """(P, 2) the array position (row, column) that the middle of each patch shows."""
    at_zero, step = code(0), code(1) - code(0)
    return (patches[..., :2].mean(axis=(1, 2)) - at_zero) / step - MARGIN_BINS


def n_windows(offset, shape, holes, n, stride) -> int:
    """Windows of the array, stepping from (0, 0), that are all tissue: counted the slow way."""
    in_tissue = np.zeros((offset[0] + shape[0], offset[1] + shape[1]), dtype=bool)
    in_tissue[offset[0]:, offset[1]:] = True
    for row, col in holes:
        in_tissue[offset[0] + row, offset[1] + col] = False
    return sum(in_tissue[top:top + n, left:left + n].all() for top in range(0, in_tissue.shape[0] - n + 1, stride)
               for left in range(0, in_tissue.shape[1] - n + 1, stride))


def hd_sample(in_tissue: np.ndarray, *, offset=(0, 0), columns_run_left=False, counts=None, seed=0) -> Sample:
    """A sample of one bin per cell of `in_tissue` (rows, columns), its rows shuffled; bin (0, 0) lies off the slide's corner."""
    rows, columns = (index.ravel() for index in np.indices(in_tissue.shape))
    order = np.random.default_rng(seed).permutation(in_tissue.size)
    rows, columns, inside = rows[order], columns[order], in_tissue.ravel()[order]
    array_row, array_col = rows + offset[0], columns + offset[1]
    x = (in_tissue.shape[1] - columns if columns_run_left else columns) * BIN_PX + 100
    counts = np.ones((in_tissue.size, 1), dtype=np.int32) if counts is None else counts(array_row, array_col)
    return Sample(
        sample_id="phantom", platform="Visium HD", counts=sp.csr_matrix(counts * inside[:, None]),
        barcodes=np.array([f"s_002um_{row:05d}_{col:05d}-1" for row, col in zip(array_row, array_col, strict=True)]),
        gene_names=np.array([f"gene{g}" for g in range(counts.shape[1])]), gene_ids=None, in_tissue=inside,
        array_row=array_row, array_col=array_col, centre_xy_px=np.stack([x, rows * BIN_PX + 60], axis=1), mpp=MPP, bin_um=BIN_UM)


def position_code(array_row, array_col):
    """One UMI in gene 0, row in gene 1, column in gene 2: sums decode to a centre of mass."""
    return np.stack([np.ones_like(array_row), array_row, array_col], axis=1).astype(np.int32)


def with_holes(shape=(40, 45), holes=((12, 13), (30, 7), (31, 7))) -> np.ndarray:
    in_tissue = np.ones(shape, dtype=bool)
    in_tissue[tuple(np.transpose(holes))] = False
    return in_tissue


def member_rows(sample: Sample, spots) -> np.ndarray:
    """(P, K) rows of the sample of every bin of every pseudo-spot, looked up one by one."""
    row_of = {place: row for row, place in enumerate(zip(sample.array_row.tolist(), sample.array_col.tolist(), strict=True))}
    half = spots.bins_per_side // 2
    return np.array([[row_of[row + i, col + j] for i in range(-half, half + 1) for j in range(-half, half + 1)]
                     for row, col in zip(spots.array_row.tolist(), spots.array_col.tolist(), strict=True)])
