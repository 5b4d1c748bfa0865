"""Tissue maps: every patch at its spot, in x and y as on the slide."""
import numpy as np

from evaluation.tissue_map import maps_side_by_side, tissue_map


def test_patches_lie_where_their_spots_do():
    places = np.array([[100.0, 50.0], [300.0, 50.0], [100.0, 250.0], [500.0, 450.0]])
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 10, 10]], np.uint8)
    patches = np.broadcast_to(colours[:, None, None], (4, 16, 16, 3)).copy()
    picture = tissue_map(patches, places)
    cell = picture.shape[0] // 3
    assert picture.shape == (3 * cell, 3 * cell, 3)
    for colour, (column, row) in zip(colours, [(0, 0), (1, 0), (0, 1), (2, 2)], strict=True):
        assert (picture[row * cell:(row + 1) * cell, column * cell:(column + 1) * cell] == colour).all()
    assert (picture[:cell, 2 * cell:] == 255).all()                        # no spot, no tissue
    both = maps_side_by_side(patches, patches[::-1], places)
    assert (both[:cell, :cell] == colours[0]).all() and (both[:cell, -3 * cell:-2 * cell] == colours[3]).all()
