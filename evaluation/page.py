"""Build one self-contained HTML page: tables, pictures and settings in one file, without network or script.

Wide tables and sheets scroll inside their own box, reachable by keyboard, so that the page reads at phone width.
Every function returns a piece of HTML; text is escaped here and nowhere else.
"""
from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image

from preprocessing.outputs import finished_file

FITTING_COLUMNS, PHONE_PX = 5, 358    # of a table, of a picture: what a phone of 390 px shows without scrolling
STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
h1, h2, p, figcaption { overflow-wrap: anywhere; }
p { max-width: 46rem; } .lead { font-size: 1.05rem; } .note { color: #555; font-size: .9rem; }
.box { overflow-x: auto; margin: .75rem 0; } .box:focus-visible { outline: 3px solid #2563a8; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
figure { margin: 1rem 0; } figcaption { color: #444; font-size: .92rem; max-width: 46rem; } img { display: block; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { color: #555; } dd { margin: 0; overflow-wrap: anywhere; }
img.shrinks { max-width: 100%; height: auto; }
@media (max-width: 40rem) { .scrolls::before { content: "Scroll sideways. "; font-weight: 600; } }
@media (max-width: 40rem) { th, td { padding: .25rem .2rem; white-space: normal; font-size: .8rem; } }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
""".strip()


def page(title: str, parts: Sequence[str]) -> str:
    """The whole document."""
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{escape(title)}</title>\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>\n{STYLE}\n</style>\n</head>\n'
            f"<body>\n<main>\n<h1>{escape(title)}</h1>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n")


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, kind: str = "") -> str:
    """`kind`: "lead" for the first sentence, "note" for small print."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], caption: str) -> str:
    """The first column names the row; numbers are shown by `number`."""
    head = "".join(f'<th scope="col">{escape(str(column))}</th>' for column in columns)
    body = "\n".join(f'<tr><th scope="row">{escape(number(row[0]))}</th>' + "".join(f"<td>{escape(number(cell))}</td>" for cell in row[1:])
                     + "</tr>" for row in rows)
    note = "note scrolls" if len(columns) > FITTING_COLUMNS else "note"
    return (f'<p class="{note}">{escape(caption)}</p>\n'
            f'<div class="box" tabindex="0" role="region" aria-label="{escape(caption, quote=True)}"><table>\n'
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>")


def picture(image: np.ndarray, caption: str, shrinks: bool = False) -> str:
    """A uint8 (H, W, 3) picture inside the page: at its own size, behind a scroll bar where it is wider than the page; or, for a chart,
    shrunk to the page's width."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    label, kind = escape(caption, quote=True), 'class="shrinks" ' if shrinks else ""
    wide = ' class="scrolls"' if image.shape[1] > PHONE_PX and not shrinks else ""
    return (f'<figure><div class="box" tabindex="0" role="region" aria-label="{label}">'
            f'<img {kind}width="{image.shape[1]}" height="{image.shape[0]}" alt="{label}" src="data:image/png;base64,{data}">'
            f"</div><figcaption{wide}>{escape(caption)}</figcaption></figure>")


def facts(values: Mapping[str, object]) -> str:
    """Settings, versions and hashes, one a line."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(number(value))}</dd>" for name, value in values.items()) + "</dl>"


def number(value: object) -> str:
    """Three significant digits for floats, thousands marked, "-" for nothing known."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "-"
    if isinstance(value, float):
        if value == 0:
            return "0"
        digits = max(0, 2 - int(np.floor(np.log10(abs(value)))))
        return f"{value:,.{digits}f}" if digits < 7 else f"{value:.2e}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def with_interval(value: float, low: float, high: float) -> str:
    """`12.3 (11.0 to 13.9)`; the number alone where there is no interval."""
    return f"{number(value)} ({number(low)} to {number(high)})" if np.isfinite(low) and np.isfinite(high) else number(value)


def write_page(path: Path | str, html: str) -> None:
    """Write a page by the rule of finished files."""
    with finished_file(path) as temporary:
        temporary.write_text(html, encoding="utf-8")
