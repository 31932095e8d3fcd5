"""A real browser: Debian's chromium by playwright, which sees every request and every line of the console."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
WIDTHS = {"desk": 1280, "phone": 390}


def needs_browser() -> Any:
    """Marks tests that are skipped where there is no browser, or nothing to drive it."""
    try:
        import playwright  # noqa: F401
    except ImportError:
        return pytest.mark.skip(reason="playwright is not installed")
    return pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")


class Seen:
    """What a page did that it should not: requests beyond what is allowed, errors, lines of the console."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.errors: list[str] = []


@contextmanager
def opened(address: Path | str, width: int = WIDTHS["desk"], **options: Any) -> Iterator[tuple[Any, Seen]]:
    """Yields (page, seen) of a file or an address; `seen.requests` holds all but the page itself."""
    from playwright.sync_api import sync_playwright

    url = address.resolve().as_uri() if isinstance(address, Path) else address
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            context = browser.new_context(viewport={"width": width, "height": 900}, **options)
            page, seen = context.new_page(), Seen()
            page.on("request", lambda one: seen.requests.append(one.url) if one.url.partition("#")[0] != url else None)
            page.on("console", lambda one: seen.errors.append(one.text) if one.type in ("error", "warning") else None)
            page.on("pageerror", lambda error: seen.errors.append(str(error)))
            page.goto(url)
            yield page, seen
        finally:
            browser.close()


ASTRAY = """() => [...document.querySelectorAll("table")].flatMap((table) => {
  const head = table.tHead && table.tHead.rows[0], row = table.tBodies[0] && table.tBodies[0].rows[0];
  if (!head || !row || !table.offsetParent || getComputedStyle(row).display !== "table-row") return [];
  const left = (cell) => cell.getBoundingClientRect().left;
  const astray = (cell, i) => row.cells[i] && Math.abs(left(cell) - left(row.cells[i])) > 2;
  return [...head.cells].filter(astray).map((cell) => cell.innerText);
})"""


def faults(page: Any) -> list[str]:
    """Returns what axe-core finds serious or critical on a page, each with where it is, and headings astray."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [
        f"{one['id']}: {one['help']}: {[node['target'] for node in one['nodes']][:3]}"
        for one in found
        if one["impact"] in ("serious", "critical")
    ] + [f"table: {name} stands above another column" for name in page.evaluate(ASTRAY)]
