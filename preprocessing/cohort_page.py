"""Draw the page over a cohort: one HTML file that loads nothing, with failures and oddities first, a row a sample, and strips of counts.

On a narrow screen every row of the table becomes a card. Quality pages of single samples are linked, relative to this one.
"""
from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocessing.cohort_numbers import MPP_FACTOR, QUANTILES, STAIN_DEGREES, UMI_FACTOR, SampleNumbers, stain_rgb, warnings
from preprocessing.outputs import finished_file
from preprocessing.quality_page import STYLE, VIEWPORT, as_png, embedded_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

THUMBNAIL_PX = 320
COLOURS = {"finished": "#1a7f37", "failed": "#b3261e", "unfinished": "#8a5a00", "not started": "#5c5c5c"}
COHORT_STYLE = """body{max-width:84em}h1{margin-bottom:.2em}a{color:#0b57a4}
.badge{color:#fff;border-radius:.7em;padding:.05em .7em;white-space:nowrap}
.note{border-left:.3em solid;padding:.1em 0 .1em .8em;margin:.5em 0}.bad{border-color:#b3261e}.odd{border-color:#c77700}
.cohort{width:100%}.cohort td,.cohort th{padding:.5em .7em;border-bottom:1px solid #ddd;vertical-align:middle}
.cohort thead th{border-bottom:2px solid #222;vertical-align:bottom}.cohort td.number{text-align:right}
.cohort td,.cohort th{overflow-wrap:normal}.cohort th[scope=row]{white-space:nowrap}.cohort .reason{overflow-wrap:anywhere}
.cohort img{display:block;width:9em;border:1px solid #ccc}
.swatch{display:inline-block;width:1.5em;height:1.5em;border-radius:.25em;border:1px solid #0005;vertical-align:middle}
.stain{white-space:nowrap}small{color:#555}small.reason{color:#8c1d18}small.oddity{color:#7a4900}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(20em,1fr));gap:1em}.plots img{width:100%}
a:focus-visible{outline:3px solid #0b57a4;outline-offset:2px}
@media(max-width:760px){.cohort thead{position:absolute;left:-999em}.cohort tr{display:block;border-bottom:2px solid #222;padding:.5em 0}
.cohort td,.cohort th{display:flex;justify-content:space-between;gap:1em;border:0;padding:.2em 0;text-align:right!important}
.cohort td[data-label]::before{content:attr(data-label);color:#555;text-align:left;flex:none}.cohort td:empty{display:none}
.cohort th{font-size:1.15em}.cohort td.wide{display:block;text-align:left!important}.cohort td.wide::before{content:none}
.cohort img{width:100%;margin-top:.3em}}"""


def summary_line(cohort: Sequence[SampleNumbers]) -> str:
    """`3 samples: 2 finished, 1 failed`."""
    counted = Counter(sample.status for sample in cohort)
    return f"{len(cohort):,} samples: " + ", ".join(f"{counted[status]:,} {status}" for status in COLOURS if counted[status])


def write_cohort_page(page: Path, cohort: Sequence[SampleNumbers]) -> None:
    """Write the page; folders of the samples lie beside it."""
    odd = warnings(cohort)
    name = page.absolute().parent.name
    title = "Cohort" if name.lower() == "cohort" else f"Cohort {name}"
    parts = [f"<h1>{html.escape(title)}</h1>",
             f"<p>{html.escape(summary_line(cohort))} · numbers as <a href='cohort.csv'>cohort.csv</a></p>",
             *_notes(cohort, odd), _table(page.parent, cohort, odd), *_plots(cohort)]
    text = (f'<!doctype html><html lang="en"><head><meta charset="utf-8">{VIEWPORT}<title>{html.escape(title)}</title>'
            f"<style>{STYLE}{COHORT_STYLE}</style></head><body><main>" + "\n".join(parts) + "</main></body></html>\n")
    with finished_file(page) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _notes(cohort: Sequence[SampleNumbers], odd: dict[str, list[str]]) -> list[str]:
    """Failures with their reasons, then samples far from the others."""
    failed = [f'<p class="note bad"><b>{sample.sample_id}</b>: {html.escape(sample.reason)}</p>'
              for sample in cohort if sample.status == "failed"]
    far = [f'<p class="note odd"><b>{sample_id}</b>: {html.escape("; ".join(found))}</p>' for sample_id, found in odd.items() if found]
    rule = (f"<p><small>Far from the others: median UMIs beyond a factor of {UMI_FACTOR:g}, mpp beyond {MPP_FACTOR:g}, "
            f"a stain vector by more than {STAIN_DEGREES:g}°. Not wrong by itself, but look at the slide.</small></p>")
    return [*(["<h2>Failed</h2>", *failed] if failed else []), *(["<h2>Far from the others</h2>", *far, rule] if far else [])]


# ---- the table ------------------------------------------------------------------------------------------------------

COLUMN_TITLES = ("sample", "status", "platform", "mpp", "spots kept", "dropped", "median UMIs", "median genes", "stain H, E", "slide")


def _table(folder: Path, cohort: Sequence[SampleNumbers], odd: dict[str, list[str]]) -> str:
    heads = "".join(f'<th scope="col">{title}</th>' for title in COLUMN_TITLES)
    rows = "\n".join(_row(folder, sample, odd[sample.sample_id]) for sample in cohort)
    return f'<h2>Samples</h2>\n<table class="cohort"><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>'


def _row(folder: Path, sample: SampleNumbers, odd: Sequence[str]) -> str:
    name, page = html.escape(sample.sample_id), folder / sample.sample_id / "qc.html"
    has_page = sample.kept is not None and page.is_file()
    linked = f'<a href="{name}/qc.html">{name}</a>' if has_page else name
    status = f'<span class="badge" style="background:{COLOURS[sample.status]}">{sample.status}</span>'
    said = [f'<br><small class="reason">{html.escape(sample.reason)}</small>' if sample.reason else "",
            *(f'<br><small class="oddity">{html.escape(line)}</small>' for line in odd)]
    dropped = "".join(f"{count:,} <small>{html.escape(reason)}</small><br>" for reason, count in sample.dropped.items())
    numbers = [("mpp", sample.mpp, ".4g"), ("spots kept", sample.kept, ",")]
    medians = [("median UMIs", sample.median_umis, ",.0f"), ("median genes", sample.median_genes, ",.0f")]
    cells = [f'<td data-label="status"><span>{status}{"".join(said)}</span></td>',
             _cell("platform", html.escape(sample.platform or "")),
             *(_cell(label, "" if value is None else f"{value:{form}}", "number") for label, value, form in numbers),
             _cell("dropped", f"<span>{dropped}</span>" if dropped else "0" if sample.kept is not None else "", "number"),
             *(_cell(label, "" if value is None else f"{value:{form}}", "number") for label, value, form in medians),
             _cell("stain H, E", _swatches(sample), "stain"), _cell("slide", _thumbnail(page, name) if has_page else "", "wide")]
    return f'<tr><th scope="row">{linked}</th>{"".join(cells)}</tr>'


def _cell(label: str, content: str, kind: str = "") -> str:
    return f'<td class="{kind}" data-label="{label}">{content}</td>'


def _swatches(sample: SampleNumbers) -> str:
    """The colours of haematoxylin and eosin on this slide; numbers in the tooltip and for a screen reader."""
    if sample.stain is None:
        return f"<small>{html.escape(sample.stain_note)}</small>" if sample.stain_note else ""
    swatches = []
    for stain, vector in zip(("haematoxylin", "eosin"), sample.stain.T, strict=True):
        words = f"{stain} {', '.join(f'{value:.2f}' for value in vector)}"
        swatches.append(f'<span class="swatch" role="img" aria-label="{words}" title="{words}" '
                        f'style="background:rgb{stain_rgb(vector)}"></span>')
    return f"<span>{' '.join(swatches)}</span>"


def _thumbnail(page: Path, name: str) -> str:
    """The sample's map, small, as a link to its quality page."""
    from PIL import Image

    picture = page.with_suffix(".png")
    if not picture.is_file():
        return ""
    with Image.open(picture) as image:
        image = image.convert("RGB")
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.LANCZOS)
        stream = io.BytesIO()
        image.save(stream, "JPEG", quality=82)
    source = f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
    return f'<a href="{name}/qc.html"><img alt="quality page of {name}" src="{source}"></a>'


# ---- strips ---------------------------------------------------------------------------------------------------------

def _plots(cohort: Sequence[SampleNumbers]) -> list[str]:
    counted = [sample for sample in cohort if sample.umis is not None]
    if not counted:
        return []
    pictures = [embedded_png(as_png(_strips(counted, kind)), f"{kind} a spot in every sample: violins with medians")
                for kind in ("UMIs", "genes")]
    return ["<h2>UMIs and genes a spot</h2>", '<div class="plots">', *pictures, "</div>",
            "<p><small>White: median; thick: the middle half of the spots. Spots that caught nothing stand at 1 UMI.</small></p>"]


def _strips(cohort: Sequence[SampleNumbers], kind: str) -> Figure:
    """A violin a sample, in the sheet's order from the top; UMIs on a logarithmic axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, 1.1 + 0.42 * len(cohort)), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    for place, sample in enumerate(cohort):
        quantiles = np.log10(np.maximum(sample.umis, 1)) if kind == "UMIs" else sample.genes
        if np.ptp(quantiles[1:-1]) > 1e-6:
            violin = axes.violinplot([quantiles[1:-1]], [place], orientation="horizontal", widths=0.8, showextrema=False)
            violin["bodies"][0].set(facecolor="#0072b2", alpha=0.45)
        low, median, high = np.interp([0.25, 0.5, 0.75], QUANTILES, quantiles)
        axes.plot([low, high], [place, place], color="#00466e", linewidth=4, solid_capstyle="butt")
        axes.plot(median, place, "o", color="white", markeredgecolor="#00466e", markersize=5)
    axes.set(yticks=range(len(cohort)), yticklabels=[sample.sample_id for sample in cohort], ylim=(len(cohort) - 0.4, -0.6),
             xlabel=f"{kind} a spot")
    if kind == "UMIs":
        axes.set_xticks(np.log10(ticks := plain_ticks(*10 ** np.array(axes.get_xlim()))), [f"{tick:,.0f}" for tick in ticks])
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="x", color="#ddd")
    axes.set_axisbelow(True)
    return figure


def plain_ticks(low: float, high: float) -> np.ndarray:
    """1, 2, 5, 10, 20, ... from `low` to `high` (above 0) for a logarithmic axis; over more than four decades powers of ten alone."""
    powers = np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    digits = (1, 2, 5) if high < 1e4 * low else (1,)
    ticks = np.outer(10.0 ** powers, digits).ravel()
    return ticks[(ticks >= max(low, 1)) & (ticks <= high)]
