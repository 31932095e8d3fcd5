"""What all pages share, in a browser."""

from rigs.browser import needs_browser, opened

from sae.pages.page import write_page

pytestmark = needs_browser()
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\u202e\u200b\"'\U0001f600"


def test_a_page_opens_from_disk_and_text_is_text(tmp_path):
    path, script = tmp_path / "page.html", ("rigs.pages", "show.js")
    write_page(path, HOSTILE, [script], [("main", {"text": HOSTILE, "runs": [[HOSTILE, 1.5], ["x", 0]]})])
    with opened(path) as (page, seen):
        assert page.locator("main").inner_text() == HOSTILE + "\n\n" + HOSTILE + "x"
        page.get_by_role("button", name="Theme").click()
        assert page.evaluate("document.documentElement.dataset.theme") == "light"
        assert not seen.requests
        assert not seen.errors
