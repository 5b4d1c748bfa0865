"""Lay patches out in labelled rows and columns: one picture a person can judge at a glance.

Images are uint8 (H, W, 3) RGB. Patches of different sides are brought to the largest side by whole-pixel enlargement
where that fits, else by box or bicubic resampling; rows may have different lengths.
"""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from preprocessing.outputs import finished_file

WHITE, INK = (255, 255, 255), (40, 40, 40)
LABEL_PX = 13


def contact_sheet(rows: Sequence[Sequence[np.ndarray]], row_labels: Sequence[str] | None = None,
                  column_labels: Sequence[str] | None = None, gap_px: int = 2, cell_px: int | None = None) -> np.ndarray:
    """Rows of uint8 (H, W, 3) patches -> one uint8 (H, W, 3) sheet on white. `cell_px`: side of a cell, by default the largest patch."""
    cell = cell_px or max((max(patch.shape[:2]) for row in rows for patch in row), default=1)
    n_columns = max((len(row) for row in rows), default=0)
    font = ImageFont.load_default(size=LABEL_PX)
    left = gap_px + (max((int(font.getlength(label)) for label in row_labels), default=0) + 6 if row_labels else 0)
    top = gap_px + (LABEL_PX + 6 if column_labels else 0)
    step = cell + gap_px
    sheet = Image.new("RGB", (max(left + n_columns * step, 1), max(top + len(rows) * step, 1)), WHITE)
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate((column_labels or [])[:n_columns]):
        draw.text((left + column * step + 2, 2), fitting(label, font, cell), fill=INK, font=font)
    for number, row in enumerate(rows):
        if row_labels:
            draw.text((gap_px + 2, top + number * step + (cell - LABEL_PX) // 2), row_labels[number], fill=INK, font=font)
        for column, patch in enumerate(row):
            sheet.paste(Image.fromarray(as_cell(patch, cell)), (left + column * step, top + number * step))
    return np.asarray(sheet)


def as_cell(patch: np.ndarray, cell_px: int) -> np.ndarray:
    """A patch brought to (cell_px, cell_px, 3)."""
    height, width = patch.shape[:2]
    if height == width and cell_px % height == 0:                 # pixels stay pixels
        return np.repeat(np.repeat(patch, cell_px // height, axis=0), cell_px // height, axis=1)
    shrinking = max(height, width) > cell_px
    method = Image.Resampling.BOX if shrinking else Image.Resampling.BICUBIC
    return np.asarray(Image.fromarray(patch).resize((cell_px, cell_px), method))


def fitting(label: str, font: ImageFont.ImageFont, width_px: int) -> str:
    """The label cut so that it stays over its column."""
    if font.getlength(label) <= width_px:
        return label
    while label and font.getlength(label + "…") > width_px:
        label = label[:-1]
    return label + "…"


def save_png(path: Path | str, image: np.ndarray) -> None:
    """Write a uint8 (H, W, 3) image by the rule of finished files."""
    with finished_file(path) as temporary:
        Image.fromarray(image).save(temporary, format="PNG")
