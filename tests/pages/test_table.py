"""A table of ten thousand rows, as a reader uses it."""

import pytest
from rigs.browser import faults, needs_browser, opened

from sae.pages.page import write_page

pytestmark = needs_browser()
MANY = 10_000
ROWS = {
    "id": list(range(MANY)),
    "label": [f"<i>text</i> {'even' if i % 2 == 0 else 'odd'} number{i}" for i in range(MANY)],
    "score": [None if i % 10 == 0 else (i * 7919 % MANY) / MANY for i in range(MANY)],
    "status": [("ok", "failed", "insufficient")[i % 3] for i in range(MANY)],
}
SHOWN = "[...document.querySelectorAll('tbody tr')].map((row) => Number(row.dataset.row))"
SECONDS = """() => {
    const begun = performance.now();
    document.querySelectorAll('thead button')[2].click();
    return (performance.now() - begun) / 1000;
}"""
FIRST = "document.querySelector('tbody tr').dataset.row"


@pytest.mark.slow
def test_ten_thousand_rows_are_sorted_filtered_searched_and_paged_and_the_address_keeps_it(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "Rows", [("rigs.pages", "table.js")], [("main", {"rows": ROWS})])
    with opened(path) as (page, seen):
        told = page.get_by_role("status")
        assert told.inner_text() == "1 to 100 of 10,000 latents"
        score = page.get_by_role("button", name="score")
        score.focus()
        page.keyboard.press("Enter")
        head = page.locator("thead th").nth(2)
        best = max(range(MANY), key=lambda i: (ROWS["score"][i] or -1.0, -i))
        assert head.get_attribute("aria-sort") == "descending"
        assert page.evaluate(FIRST) == str(best)
        took = page.evaluate(SECONDS)
        assert took < 1, took  # a few hundredths on a machine that does nothing else
        least = min((i for i in range(MANY) if ROWS["score"][i] is not None), key=lambda i: ROWS["score"][i])
        assert page.evaluate(FIRST) == str(least)  # those without a score stand last either way
        page.get_by_role("searchbox").fill("even NUMBER12")
        wanted = [i for i in range(0, MANY, 2) if str(i).startswith("12")]
        assert told.inner_text() == f"{len(wanted)} of 10,000 latents"
        page.get_by_text("Filters").click()
        page.get_by_label("status").select_option("failed")
        page.get_by_label("score, least").fill("0.5")
        wanted = [i for i in wanted if i % 3 == 1 and (ROWS["score"][i] or 0) >= 0.5]
        shown = page.evaluate(SHOWN)
        assert sorted(shown) == wanted
        page.reload()
        assert page.evaluate(SHOWN) == shown
        assert page.get_by_role("searchbox").input_value() == "even NUMBER12"
        page.get_by_role("searchbox").focus()
        for key in ("ArrowDown", "j", "j", "k", "Enter"):
            page.keyboard.press(key)
        assert f"latent={shown[1]}" in page.evaluate("location.hash")
        page.get_by_role("searchbox").fill("nowhere")
        assert told.inner_text() == "no latents left: 0 of 10,000 latents"
        page.get_by_role("searchbox").fill("")
        page.get_by_label("status").select_option("")
        page.get_by_label("score, least").fill("")
        page.get_by_role("button", name="Next").click()
        assert told.inner_text() == "101 to 200 of 10,000 latents"
        assert not page.locator("tbody i").count()  # text is text
        assert not faults(page)
        assert not seen.requests
        assert not seen.errors
