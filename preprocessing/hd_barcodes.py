"""Take Visium HD barcodes `s_002um_RRRRR_CCCCC-1` apart, eleven million at a time.

Touches no files. Works on the bytes of fixed-width strings: no Python loop over barcodes. Any case is accepted; the
suffix `-1` may be missing, as in Space Ranger's `barcode_mappings.parquet`.
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preprocessing.errors import InputError, first_few

PATTERN = b"s_DDDum_DDDDD_DDDDD"                     # D is a digit; "-1" follows
DIGITS = np.frombuffer(PATTERN, np.uint8) == ord("D")
BLOCK = 1 << 18                                      # barcodes whose bytes are compared at once
KEY_STRIDE = 100_000                                 # rows and columns have five digits


@dataclass(frozen=True)
class HdBarcodes:
    """Where each barcode says its bin is; (P,) each."""

    bin_um: np.ndarray       # int16
    array_row: np.ndarray    # int32
    array_col: np.ndarray    # int32

    @property
    def key(self) -> np.ndarray:
        """One integer a bin, equal for equal bins whatever the case of their barcodes."""
        return (self.bin_um.astype(np.int64) * KEY_STRIDE + self.array_row) * KEY_STRIDE + self.array_col


def parse_hd_barcodes(barcodes: np.ndarray, path: object) -> HdBarcodes:
    """Barcodes (P,) `S` or `U` -> bins; anything that is not a Visium HD barcode is an error that names five."""
    barcodes = np.asarray(barcodes)
    numbers = [np.empty(len(barcodes), dtype) for dtype in (np.int16, np.int32, np.int32)]
    for start in range(0, len(barcodes), BLOCK):
        block = slice(start, min(start + BLOCK, len(barcodes)))
        parsed, is_hd = _parse_block(barcodes[block])
        for whole, part in zip(numbers, parsed, strict=True):
            whole[block] = part
        if not is_hd.all():
            foreign = [str(barcode) for barcode in as_text(barcodes[block][~is_hd][:5])]
            total = sum(int(np.count_nonzero(~_parse_block(barcodes[i:i + BLOCK])[1])) for i in range(0, len(barcodes), BLOCK))
            kind = "Visium barcodes" if all(len(barcode) >= 16 and set(barcode[:16]) <= set("ACGT") for barcode in foreign) else "others"
            raise InputError(path, "barcodes", "Visium HD bins named s_002um_RRRRR_CCCCC-1",
                             f"{kind}: {total:,} of {len(barcodes):,} ({', '.join(foreign)}{', ...' if total > len(foreign) else ''})")
    return HdBarcodes(*numbers)


def _parse_block(barcodes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers (3, n) int32 of bin side, row and column, and which of the n barcodes are well-formed."""
    wide = np.ascontiguousarray(as_bytes(barcodes).astype(f"S{len(PATTERN) + 3}"))          # one more, to see what is too long
    letters = wide.view(np.uint8).reshape(len(barcodes), -1)
    body, tail = letters[:, :len(PATTERN)], letters[:, len(PATTERN):]
    lower = np.where((body >= ord("A")) & (body <= ord("Z")), body + 32, body)
    is_digit = (body >= ord("0")) & (body <= ord("9"))
    expected = np.frombuffer(PATTERN, np.uint8)
    well_formed = np.where(DIGITS, is_digit, lower == expected).all(axis=1)
    suffix = np.frombuffer(b"-1\0", np.uint8)
    well_formed &= (tail == suffix).all(axis=1) | (tail == 0).all(axis=1)
    number = np.zeros((3, len(barcodes)), dtype=np.int32)
    for i, (first, width) in enumerate(((2, 3), (8, 5), (14, 5))):
        for place in range(first, first + width):
            number[i] = 10 * number[i] + body[:, place] - ord("0")
    return number, well_formed


def check_agreement(path: object, parsed: HdBarcodes, array_row: np.ndarray, array_col: np.ndarray, barcodes: np.ndarray,
                    bin_um: float | None) -> None:
    """Refuse positions whose `array_row`, `array_col` or bin size are not what their barcodes say."""
    wrong = (parsed.array_row != array_row) | (parsed.array_col != array_col)
    if wrong.any():
        swapped = (parsed.array_row[wrong] == array_col[wrong]) & (parsed.array_col[wrong] == array_row[wrong])
        shown = [f"{barcode} at row {row}, column {col}" for barcode, row, col in
                 zip(as_text(barcodes[wrong][:5]), array_row[wrong][:5], array_col[wrong][:5], strict=True)]
        raise InputError(path, "array_row, array_col", "the row and column that the barcode names",
                         f"{int(wrong.sum()):,} of {len(wrong):,} that differ, first {first_few(shown)}",
                         "The two columns are swapped" if swapped.all() else "")
    sides = np.unique(parsed.bin_um)
    if len(sides) > 1 or (bin_um is not None and len(sides) and sides[0] != round(bin_um)):
        raise InputError(path, "barcodes", f"bins of {bin_um:g} µm, as the scale factors say" if bin_um else "bins of one size",
                         f"barcodes of {', '.join(str(side) for side in sides)} µm bins")


def as_bytes(strings: np.ndarray) -> np.ndarray:
    """`S` array of an `S`, `U` or object array; what is not ASCII is marked with `?`."""
    strings = np.asarray(strings)
    if strings.dtype.kind == "S":
        return strings
    try:
        return strings.astype("S")
    except UnicodeEncodeError:
        return np.char.encode(strings.astype(str), "ascii", "replace")


def as_text(strings: np.ndarray) -> np.ndarray:
    """`U` array of an `S`, `U` or object array of str or bytes."""
    strings = np.asarray(strings)
    if strings.dtype.kind == "U":
        return strings
    try:
        return (strings if strings.dtype.kind == "S" else strings.astype("S")).astype("U")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return np.array([item.decode("utf-8", "replace") if isinstance(item, bytes) else str(item) for item in strings.tolist()])
