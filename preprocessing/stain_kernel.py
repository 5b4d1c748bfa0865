"""The loop over pixels of `stain.normalise_stain`, compiled when it is first called. Touches no files; releases the GIL.
"""
from __future__ import annotations

import numpy as np

from preprocessing.kernels import kernel


@kernel
def multiply_tables(pixels, tables, out):
    """out[i, k] = tables[k, 0, r] * tables[k, 1, g] * tables[k, 2, b], at most 255, for pixel i = (r, g, b).

    `pixels` and `out` uint8 (n, 3), `tables` float64 (3, 3, 256) of positive numbers.
    """
    for i in range(pixels.shape[0]):
        r, g, b = pixels[i, 0], pixels[i, 1], pixels[i, 2]
        for k in range(3):
            out[i, k] = np.uint8(min(tables[k, 0, r] * tables[k, 1, g] * tables[k, 2, b], 255.0))
