"""Report pages in headless Chromium: they fit a phone and a desk, all pictures show, wide parts take the keyboard, nothing is fetched."""
import json
import re
import shutil
import subprocess
from html import escape

import numpy as np
import pytest

from evaluation import page
from evaluation.effects import effects_of
from evaluation.perturbation_page import pairs_sheet, write_perturbation_page

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
WIDTHS = (390, 1280)
ASK = """
addEventListener("load", () => document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {
  const inside = frame.contentDocument, boxes = [...inside.querySelectorAll(".box")], body = inside.body.getBoundingClientRect()
  const out = [...inside.body.querySelectorAll("*")].filter(e => !e.closest(".box") && e.getBoundingClientRect().right > body.right + 1)
  return {width: inside.documentElement.clientWidth, page: inside.documentElement.scrollWidth, boxes: boxes.length,
          reached: boxes.filter(box => (box.focus(), inside.activeElement === box)).length, out: out.map(e => e.outerHTML.slice(0, 80)),
          images: inside.images.length, shown: [...inside.images].filter(image => image.complete && image.naturalWidth).length,
          fetched: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))}
})))
"""


def seen_in_a_browser(html, folder):
    """What Chromium makes of a page at each of WIDTHS."""
    frames = "".join(f'<iframe style="width:{width}px;height:2000px;border:0" srcdoc="{escape(html, quote=True)}"></iframe>'
                     for width in WIDTHS)
    (folder / "frames.html").write_text(f"<!doctype html><title>-</title><script>{ASK}</script>{frames}")
    done = subprocess.run([CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
                           "--virtual-time-budget=5000", "--dump-dom", f"file://{folder / 'frames.html'}"],
                          capture_output=True, text=True, timeout=280)
    (title,) = re.findall(r"<title>(.*?)</title>", done.stdout[:200_000], re.S)[:1]
    return json.loads(title.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))


def perturbation_page(folder):
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 256, (2, 2, 3, 32, 32, 3), dtype=np.uint8)
    before = rng.normal(10, 1, (3, 3, 5))
    effects = effects_of(before, before + 3 + rng.normal(0, 0.1, before.shape), before + rng.normal(0, 0.1, (19, 3, 3, 5)))
    write_perturbation_page(folder / "p.html", f"Perturbation: {'LongGeneName' * 9}:+1", "Up +1", effects,
                            pairs_sheet(*patches, ["AAACGT-1", "b"], [0, 1, 2]), {"genes": "x" * 300})
    return (folder / "p.html").read_text()


def wide_page(_folder):
    sheet = np.zeros((60, 1500, 3), np.uint8)
    return page.page("Wide", [page.heading("T" * 120),
                              page.table([f"column {i}" for i in range(14)], [["row", *range(1000, 1013)]], "wide"),
                              page.picture(sheet, "sheet"), page.facts({"hash": "0123456789abcdef" * 8})])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("make", [perturbation_page, wide_page])
def test_a_page_fits_phone_and_desk_and_needs_no_mouse_and_no_network(tmp_path, make):
    for width, seen in zip(WIDTHS, seen_in_a_browser(make(tmp_path), tmp_path), strict=True):
        assert seen["width"] <= width and seen["page"] <= seen["width"] and seen["out"] == []
        assert seen["images"] == seen["shown"] > 0
        assert seen["reached"] == seen["boxes"] > 1
        assert seen["fetched"] == []
