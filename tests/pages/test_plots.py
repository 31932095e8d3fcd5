"""Plots as a reader meets them: seen, read by pointer and keys, saved; and as a table."""

import re

import pytest
from rigs.browser import WIDTHS, faults, needs_browser, opened

from sae.pages.page import write_page

pytestmark = needs_browser()
HOSTILE = '</script><b>x</b>"'
TOKENS = [1024 * (i + 1) for i in range(100)]
DATA = {
    "series": [
        {"name": HOSTILE, "x": TOKENS, "y": [1 / (i + 1) for i in range(100)]},
        {"name": "b", "x": TOKENS[::10], "y": [None if i == 3 else 0.5 for i in range(10)]},
    ],
    "options": {"title": "Loss", "x": "tokens", "y": "FVU", "log": "y"},
    "counts": [188, 0, 65, 1162],
    "labels": ["dead", "1e-3", "1e-2", "1e-1"],
    "points": [{"name": f"k={k}", "x": k, "y": y, "href": f"#k={k}"} for k, y in ((8, 0.3), (16, 0.2), (32, 0.25))],
}


def test_a_plot_is_read_by_pointer_and_keys_and_as_a_table_and_saves_itself(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "Plots", [("rigs.pages", "plots.js")], [("main", DATA)])
    with opened(path) as (page, seen):
        curve, histogram, points = (page.locator("figure.plot").nth(i) for i in range(3))
        drawing = curve.get_by_role("img")
        assert drawing.get_attribute("aria-label").startswith(f"Loss; {HOSTILE}, b;")
        drawing.focus()
        page.keyboard.press("ArrowRight")
        reading = curve.locator(".reading span")
        assert reading.all_inner_texts() == ["tokens 2,048", HOSTILE + " 0.5", "b 0.5 at 1,024"]
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert reading.all_inner_texts() == ["tokens 6,144", HOSTILE + " 0.1667"]  # b was measured nowhere near
        legend = curve.locator(".legend button")
        legend.nth(1).focus()
        page.keyboard.press("Space")
        assert legend.nth(1).get_attribute("aria-pressed") == "false"
        assert curve.locator("path.curve").count() == 1 + 2  # one is drawn, two are in the legend
        curve.get_by_text("Data").click()
        curve.locator("tbody").wait_for()
        assert curve.locator("tbody tr").count() == 100
        assert curve.locator("tbody tr").nth(9).inner_text().split("\t")[2].strip() == ""  # where b has none
        bars = histogram.locator("rect.bar")
        heights = [float(bars.nth(i).get_attribute("height")) for i in range(4)]
        assert [round(h / heights[3], 2) for h in heights] == [round(n / 1162, 2) for n in DATA["counts"]]
        assert "apart" in bars.nth(0).get_attribute("class")
        histogram.get_by_role("img").hover()
        assert re.search("1e-2: 65|1e-3: 0", histogram.locator(".reading").inner_text())
        assert points.locator("path.front").get_attribute("d").count("V") == 1  # k=32 is above k=16
        points.get_by_role("img").focus()
        page.keyboard.press("End")
        page.keyboard.press("Enter")
        assert page.evaluate("location.hash") == "#k=32"
        with page.expect_download() as saved:
            curve.get_by_text("Save as SVG").click()
        text = saved.value.path().read_text(encoding="utf-8")
        assert saved.value.suggested_filename == "Loss.svg"
        assert "class=" not in text
        assert "var(" not in text
        assert re.search(r'<path [^>]*d="M[^>]*stroke="rgb\(', text)
        assert not faults(page)
        assert not seen.requests
        assert not seen.errors


@pytest.mark.slow
def test_a_plot_fits_a_phone_in_letters_of_the_same_size(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "Plots", [("rigs.pages", "plots.js")], [("main", DATA)])
    with opened(path, WIDTHS["phone"], color_scheme="dark") as (page, seen):
        page.wait_for_function("document.querySelector('svg.drawing').getAttribute('viewBox').startsWith('0 0 358 ')")
        assert page.evaluate("document.documentElement.scrollWidth") == WIDTHS["phone"]
        assert not faults(page)
        assert not seen.errors
