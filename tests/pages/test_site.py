"""A site of pages: what is in its folder, what of a folder it replaces, and its index in a browser."""

import functools
import json
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from rigs.browser import faults, needs_browser, opened
from rigs.pages import blocks

from sae.base.errors import ConfigError
from sae.pages.page import write_page
from sae.pages.site import write_site

HOSTILE = "</title><script>alert(1)</script>\"'\u202e"


@pytest.fixture
def pages(tmp_path):
    """Two pages of a run, one below a folder with characters of addresses in its name, and a part of one."""
    root = tmp_path / "run"
    found = [root / "report.html", root / "a #1%" / "report.html", root / "a #1%" / "report" / "part-001.html"]
    for page, title in zip(found, ("First", HOSTILE, "Part"), strict=True):
        write_page(page, title, [("rigs.pages", "show.js")], [("main", {"text": "hello", "runs": []})])
    return root, found


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_pages_lie_as_below_their_run_and_the_index_lists_those_that_no_page_lists(pages, tmp_path):
    root, found = pages
    names = write_site(tmp_path / "site", "All", root, found)
    assert names[0] == "index.html"
    files = contents(tmp_path / "site")
    assert set(files) == {*names, ".site.json"} == {
        "index.html", ".nojekyll", ".site.json", "report.html", "a #1%/report.html", "a #1%/report/part-001.html",
    }  # fmt: skip
    for page in found:
        assert files[page.relative_to(root).as_posix()] == page.read_bytes()
    listed = blocks(tmp_path / "site" / "index.html")["main"]["pages"]
    assert listed[0] == {"name": "report.html", "title": "First"}
    assert [one["title"] for one in listed[1:]] == [HOSTILE.replace("\u202e", "\\u{202e}")]
    assert str(root).encode() not in b"".join(files.values())


def test_a_site_that_comes_again_is_the_same_and_takes_its_old_pages_along(pages, tmp_path):
    root, found = pages
    write_site(tmp_path / "site", "All", root, found)
    before = contents(tmp_path / "site")
    write_site(tmp_path / "site", "All", root, found)
    assert contents(tmp_path / "site") == before
    (tmp_path / "site" / "CNAME").write_text("mine.example")
    write_site(tmp_path / "site", "All", root, found[:1])
    assert set(contents(tmp_path / "site")) == {"index.html", ".nojekyll", ".site.json", "report.html", "CNAME"}


@pytest.mark.parametrize("there", ["index.html", "thesis.tex", "report.html"])
def test_what_is_of_no_site_is_not_overwritten(pages, tmp_path, there):
    root, found = pages
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / there).write_text("mine")
    with pytest.raises(ConfigError, match=r"^--export: .*site is not empty, and holds no former site; choose another"):
        write_site(tmp_path / "site", "All", root, found, "--export")
    (tmp_path / "site" / there).unlink()
    write_site(tmp_path / "site", "All", root, found[1:])
    (tmp_path / "site" / "report.html").write_text("mine")
    before = contents(tmp_path / "site")
    with pytest.raises(ConfigError, match=r"report.html exists and is of no former site"):
        write_site(tmp_path / "site", "All", root, found)
    assert contents(tmp_path / "site") == before


def test_what_a_marker_names_outside_of_the_folder_stays(pages, tmp_path):
    root, found = pages
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / ".site.json").write_text(json.dumps({"files": ["../precious"]}))
    with pytest.raises(Exception, match="points outside"):
        write_site(tmp_path / "site", "All", root, found)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.slow
@needs_browser()
@pytest.mark.parametrize("served", [False, True])
def test_the_index_leads_to_every_page_from_disk_and_under_any_address(pages, tmp_path, served):
    root, found = pages
    write_site(tmp_path / "top" / "of" / "site", "All", root, found)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *_: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(quiet, directory=str(tmp_path / "top"))) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        where = f"http://127.0.0.1:{server.server_port}/of/site/" if served else tmp_path / "top/of/site/index.html"
        with opened(where) as (page, seen):
            assert not faults(page)
            links = page.locator("main a")
            assert [links.nth(i).inner_text() for i in range(2)] == ["First", HOSTILE.replace("\u202e", "\\u{202e}")]
            links.nth(1).click()
            page.get_by_text("hello").wait_for()
            assert not seen.errors
        server.shutdown()
