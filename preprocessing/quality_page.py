"""Draw the quality page of an extraction: where patches were cut, what was dropped, how deep the counts are, what patches look like.

`write_quality_page` writes one picture (`NAME.png`) and one HTML file (`NAME.html`) that holds everything and loads nothing.
"""
from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.outputs import finished_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from shapely import MultiPolygon

MAP_PX = 1400               # longer side of the slide's picture
MOST_OVERLAP = 1.5          # area of all patches over the area they cover: beyond it the map outlines that: squares would hide the tissue
MOST_SQUARES = 20_000       # beyond it too: squares would be smaller than a dot and slow to draw; so would be dots at the centres
SHEET_COLUMNS, SHEET_PATCHES, SHEET_PATCH_PX = 12, 48, 128
VIEWPORT = '<meta name="viewport" content="width=device-width,initial-scale=1">'
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222;overflow-wrap:anywhere}
img{max-width:100%}table{border-collapse:collapse}td,th{padding:.15em 1em .15em 0;text-align:left;vertical-align:top}
td.number{text-align:right;font-variant-numeric:tabular-nums}h2{margin-top:1.6em}"""


@dataclass(frozen=True)
class PatchQuality:
    """What the page shows. Positions are level-0 (x, y) px; arrays of kept patches are in row order."""

    title: str
    lines: tuple[str, ...]                   # what was understood, warnings, the counts in words
    thumbnail: np.ndarray                    # uint8 (h, w, 3), the whole slide
    slide_px: tuple[int, int]                # width, height
    side_px: float                           # side of a patch at level 0
    centre_xy_px: np.ndarray                 # (P, 2) patches kept
    patches: np.ndarray                      # uint8 (n, px, px, 3), a few of them
    dropped_xy_px: Mapping[str, np.ndarray]  # reason -> (n, 2) of spots without a patch whose place is known
    numbers: Mapping[str, int]               # kept, and each reason, counted
    settings: Mapping[str, object]
    library_sizes: np.ndarray | None = None  # (P,) UMIs a patch; None for patches without expression
    n_genes: np.ndarray | None = None        # (P,) genes seen a patch
    tissue: MultiPolygon | None = None       # outlines that random patches were drawn in
    files: tuple[Path, ...] = field(default=())


def sheet_rows(count: int) -> np.ndarray:
    """Rows shown in the contact sheet: spread evenly over all."""
    return np.unique(np.linspace(0, count - 1, min(count, SHEET_PATCHES)).round().astype(int)) if count else np.empty(0, int)


def write_quality_page(picture: Path, page: Path, quality: PatchQuality) -> None:
    """Write the map with histograms as PNG, and the page that embeds it with a contact sheet."""
    overview = as_png(_overview(quality))
    with finished_file(picture) as temporary:
        temporary.write_bytes(overview)
    with finished_file(page) as temporary:
        temporary.write_text(_page(quality, overview), encoding="utf-8")


def _overview(quality: PatchQuality) -> Figure:
    """The patch grid over the slide; beside it, where there is expression, the histograms."""
    from matplotlib.figure import Figure

    height, width = quality.thumbnail.shape[:2]
    has_counts = quality.library_sizes is not None
    map_in = np.array([9.0, 9.0 * height / width]) if width >= height else np.array([9.0 * width / height, 9.0])
    figure = Figure(figsize=(map_in[0] + (4.2 if has_counts else 0) + 0.6, max(map_in[1], 5.5) + 0.9), dpi=110, layout="constrained")
    if has_counts:
        figure.get_layout_engine().set(h_pad=0.15)       # between the label of one histogram and the title of the next
        grid = figure.add_gridspec(2, 2, width_ratios=(map_in[0], 4.0))
        _draw_histogram(figure.add_subplot(grid[0, 1]), quality.library_sizes, "UMIs a patch")
        _draw_histogram(figure.add_subplot(grid[1, 1]), quality.n_genes, "genes seen a patch")
        _draw_map(figure.add_subplot(grid[:, 0]), quality)
    else:
        _draw_map(figure.add_subplot(), quality)
    return figure


def _draw_map(axes, quality: PatchQuality) -> None:
    width, height = quality.slide_px
    axes.imshow(quality.thumbnail, extent=(0, width, height, 0), interpolation="bilinear")
    rings = [ring for part in (quality.tissue.geoms if quality.tissue is not None else ()) for ring in (part.exterior, *part.interiors)]
    for number, ring in enumerate(rings):
        axes.plot(*np.asarray(ring.coords).T, color="black", linewidth=0.8, label="_" if number else "outline of tissue")
    groups = [("kept", quality.centre_xy_px, "#00c8ff"), *((reason, xy, "#ff6000") for reason, xy in quality.dropped_xy_px.items())]
    for label, centres, colour in groups:
        if len(centres) == 0:
            continue
        label, covered = f"{label} ({len(centres):,})", covered_area(centres, quality.side_px, quality.slide_px)
        if len(centres) <= MOST_SQUARES and len(centres) * quality.side_px ** 2 <= MOST_OVERLAP * covered.mean() * width * height:
            _draw_squares(axes, quality, centres, colour, label)
        else:
            _draw_outline(axes, quality, centres, covered, colour, label)
    margin = quality.side_px
    axes.set(xlim=(-margin, width + margin), ylim=(height + margin, -margin), xlabel="x, level-0 px", ylabel="y, level-0 px")
    axes.set_title(quality.title)
    axes.legend(loc="upper right", fontsize=8, framealpha=0.9)


def _draw_squares(axes, quality: PatchQuality, centres: np.ndarray, colour: str, label: str) -> None:
    """Each patch as it lies."""
    from matplotlib.collections import PolyCollection

    corners = quality.side_px / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    squares = centres[:, None] + corners                                                   # (n, 4, 2)
    axes.add_collection(PolyCollection(squares, facecolors="none", edgecolors=colour, linewidths=0.9, label=label))


def _draw_outline(axes, quality: PatchQuality, centres: np.ndarray, covered: np.ndarray, colour: str, label: str) -> None:
    """The area that patches cover, tinted and outlined, and a dot at the centre of each where there is room for them."""
    from matplotlib.colors import to_rgba
    from matplotlib.patches import Rectangle

    height, width = covered.shape
    x, y = (np.arange(width) + 0.5) * quality.slide_px[0] / width, (np.arange(height) + 0.5) * quality.slide_px[1] / height
    axes.contourf(x, y, covered, levels=[0.5, 1.5], colors=[colour], alpha=0.13)
    axes.contour(x, y, covered, levels=[0.5], colors=[colour], linewidths=1.1)
    if len(centres) <= MOST_SQUARES:
        axes.plot(*centres.T, linestyle="none", marker=",", color=colour)
    axes.add_patch(Rectangle((0, 0), 0, 0, facecolor=to_rgba(colour, 0.13), edgecolor=colour, label=label))      # for the legend


def covered_area(centre_xy_px: np.ndarray, side_px: float, slide_px: tuple[int, int]) -> np.ndarray:
    """float (h, w), the longer side at most `MAP_PX`: 1 where a patch lies, 0 elsewhere."""
    width, height = slide_px
    scale = min(1.0, MAP_PX / max(slide_px))
    shape = (max(2, round(height * scale)), max(2, round(width * scale)))
    steps = np.zeros((shape[0] + 1, shape[1] + 1), np.int32)                               # +1 and -1 at the corners of each patch
    low = np.clip(np.floor((centre_xy_px - side_px / 2) * scale), 0, [shape[1] - 1, shape[0] - 1]).astype(int)
    high = np.clip(np.ceil((centre_xy_px + side_px / 2) * scale), low + 1, [shape[1], shape[0]]).astype(int)
    for one, other, sign in ((low, low, 1), (low, high, -1), (high, low, -1), (high, high, 1)):
        np.add.at(steps, (one[:, 1], other[:, 0]), sign)
    return (steps.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0).astype(float)


def _draw_histogram(axes, values: np.ndarray, label: str) -> None:
    axes.hist(values, bins=whole_number_bins(values, min(60, max(10, len(values) // 20))), color="#0072b2")
    axes.axvline(np.median(values), color="#d55e00", linewidth=1.2)
    axes.set(xlabel=label, ylabel="patches", title=f"median {np.median(values):,.0f}; {np.count_nonzero(values == 0):,} with none")


def whole_number_bins(values: np.ndarray, most: int) -> np.ndarray:
    """Edges of at most `most` bins, each as many whole numbers wide: bins of one number beside bins of two would draw a comb."""
    low, high = int(values.min()), int(values.max())
    width = -(-(high - low + 1) // most)
    return np.arange(low, high + width + 1, width) - 0.5


def as_png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _contact_sheet(patches: np.ndarray, gap_px: int = 4) -> np.ndarray:
    """uint8 (n, px, px, 3) -> one white-framed picture, row by row; large patches are shown smaller."""
    from PIL import Image

    if patches.shape[1] > SHEET_PATCH_PX:
        small = [Image.fromarray(patch).resize((SHEET_PATCH_PX,) * 2, Image.Resampling.BOX) for patch in patches]
        patches = np.stack([np.asarray(patch) for patch in small])
    count, side = patches.shape[0], patches.shape[1] + gap_px
    columns = min(SHEET_COLUMNS, count)
    sheet = np.full((-(-count // columns) * side + gap_px, columns * side + gap_px, 3), 255, dtype=np.uint8)
    for number, patch in enumerate(patches):
        y, x = (index * side + gap_px for index in divmod(number, columns))
        sheet[y:y + patch.shape[0], x:x + patch.shape[1]] = patch
    return sheet


def _page(quality: PatchQuality, overview: bytes) -> str:
    from PIL import Image

    sheet = io.BytesIO()
    Image.fromarray(_contact_sheet(quality.patches)).save(sheet, "PNG")
    parts = [
        f"<h1>{html.escape(quality.title)}</h1>", *(f"<p>{html.escape(line)}</p>" for line in quality.lines),
        "<h2>Kept and dropped</h2>", _table(quality.numbers),
        "<h2>Where the patches lie</h2>", embedded_png(overview, "patch grid over the slide, histograms of UMIs and genes"),
        f"<h2>{len(quality.patches)} of {len(quality.centre_xy_px):,} patches</h2>",
        embedded_png(sheet.getvalue(), "contact sheet of patches"),
        "<h2>Settings</h2>", _table(quality.settings),
        "<h2>Files</h2>", "<ul>", *(f"<li>{html.escape(file.name)}</li>" for file in quality.files), "</ul>"]
    return (f'<!doctype html><html lang="en"><head><meta charset="utf-8">{VIEWPORT}<title>{html.escape(quality.title)}</title>'
            f"<style>{STYLE}</style></head><body>" + "\n".join(parts) + "</body></html>\n")


def embedded_png(png: bytes, description: str) -> str:
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _table(rows: Mapping[str, object]) -> str:
    cells = ((html.escape(str(name)), f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else html.escape(str(value)))
             for name, value in rows.items())
    return "<table>" + "".join(f'<tr><th>{name}</th><td class="number">{value}</td></tr>' for name, value in cells) + "</table>"
