"""The one self-contained page: what is foreign is escaped, wide things say how they are read, charts shrink to a phone."""
import numpy as np

from evaluation import page

HOSTILE = '<script>alert("x")</script>'


def test_names_from_outside_are_text_wherever_they_stand():
    html = page.page(HOSTILE, [page.heading(HOSTILE), page.paragraph(HOSTILE), page.table([HOSTILE], [[HOSTILE]], HOSTILE),
                               page.picture(np.zeros((4, 4, 3), np.uint8), HOSTILE), page.facts({HOSTILE: HOSTILE})])
    assert "<script" not in html and 'aria-label="&lt;script&gt;alert(&quot;x&quot;)' in html


def test_wide_tables_and_pictures_say_that_they_scroll_and_charts_shrink():
    narrow, wide = (page.picture(np.zeros((4, side, 3), np.uint8), "c") for side in (300, 900))
    assert "scrolls" not in narrow and 'class="scrolls"' in wide
    chart = page.picture(np.zeros((4, 900, 3), np.uint8), "c", shrinks=True)
    assert 'class="shrinks"' in chart and "scrolls" not in chart
    two, seven = (page.table(["c"] * count, [["x"] * count], "what") for count in (2, 7))
    assert "scrolls" not in two and "note scrolls" in seven
    assert all('tabindex="0"' in part for part in (wide, two, seven))            # the box can be scrolled by keyboard


def test_numbers_have_three_digits_and_what_is_not_known_is_a_dash():
    assert [page.number(value) for value in (0.0123456, 1234.5, 0.0, float("nan"), None, 12000, "a")] == [
        "0.0123", "1,234", "0", "-", "-", "12,000", "a"]
