"""A site of pages for any static host: a folder of them with an index, in which no link leads out of it.

    FOLDER/index.html     a link to each page
    FOLDER/.nojekyll      so that GitHub's pages leave names as they are
    FOLDER/.site.json     what was written: what a later site may replace
    FOLDER/...            the pages, where they are below their run

It works from disk and under any address.
"""

import html
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from sae.base.errors import ConfigError
from sae.base.files import atomic_write, read_json, safe_join, write_json, write_whole
from sae.base.visible import visible
from sae.pages.page import Asset, write_page

INDEX, MARKER, PLAIN = "index.html", ".site.json", ".nojekyll"
SCRIPT: Asset = ("sae.pages", "site.js")
PART = re.compile(r"part-\d+\.html")
"""A page that another one lists."""
HEAD = 100_000  # of a page, where its title is


def check_site(folder: Path, option: str) -> None:
    """Raises ConfigError, naming the option, if a folder holds files that are not those of a former site."""
    ours = _written(folder)
    if ours is None and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{option}: {folder} is not empty, and holds no former site; choose another folder")


def write_site(folder: Path, title: str, root: Path, pages: Sequence[Path], option: str = "folder") -> list[str]:
    """Writes a site of pages below `root`, and returns the names of its files below `folder`, the index first.

    What a former site left in its folder goes with it; ConfigError, and nothing is written, if something else is there.
    """
    check_site(folder, option)
    names = {page.relative_to(root).as_posix(): page for page in pages}
    files, before = [INDEX, PLAIN, *names], _written(folder) or []
    for name in files:
        if name not in before and safe_join(folder, name).exists():
            raise ConfigError(f"{option}: {folder / name} exists and is of no former site; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / MARKER, {"files": sorted({*before, *files})})  # so that one that is cut off can be replaced
    for name, page in names.items():
        write_whole(folder / name, lambda temp, page=page: shutil.copyfile(page, temp))
    listed = [{"name": name, "title": _title(page)} for name, page in names.items() if not PART.fullmatch(page.name)]
    write_page(folder / INDEX, title, [SCRIPT], [("main", {"pages": listed})])
    atomic_write(folder / PLAIN, "")
    for name in {*before} - {*files}:
        safe_join(folder, name).unlink(missing_ok=True)
    write_json(folder / MARKER, {"files": sorted(files)})
    return files


def _written(folder: Path) -> list[str] | None:
    """Returns the names of what a former site wrote; None if there is none."""
    if not (folder / MARKER).is_file():
        return None
    return list(read_json(folder / MARKER)["files"])


def _title(page: Path) -> str:
    """Returns what a page is called."""
    with page.open(encoding="utf-8") as file:
        found = re.search(r"<title>(.*?)</title>", file.read(HEAD), re.DOTALL)
    return visible(html.unescape(found[1])) if found and found[1] else page.name
