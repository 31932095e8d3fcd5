"""A page: one file that opens from disk, asks no network, and in which text of strangers is text.

    style and scripts  +  blocks of data, compressed, in tags that run nothing  ->  HTML

The policy in the page lets nothing run but its own scripts, by their hashes. Data is gzip in base64, so that no text
can end its tag, and a browser unpacks a block when it is looked at (DecompressionStream, `block` in core.js). Scripts
put text into the page as text nodes only.
"""

import base64
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from sae.base.files import write_whole

Asset = tuple[str, str]
"""A package, and the name of a file in its assets/."""
CORE: tuple[Asset, ...] = (("sae.pages", "core.js"), ("sae.pages", "plots.js"), ("sae.pages", "table.js"))
STYLE: Asset = ("sae.pages", "page.css")


def write_page(
    path: Path | str,
    title: str,
    scripts: Sequence[Asset],
    blocks: Iterable[tuple[str, Any]],
    style: Sequence[Asset] = (),
) -> None:
    """Writes a page to a file, whole or not at all; blocks are made one after the other, so that none waits in memory.

    Args:
        path: the file.
        title: what the page is called.
        scripts: what runs in it beside `CORE`, in this order; the last one begins the page.
        blocks: (name, value) of what `block(name)` gives the scripts: plain values, as JSON has them.
        style: what is added to the style of all pages.
    """
    found = page(title, scripts, blocks, style)
    write_whole(path, lambda temp: found.dump(str(temp), encoding="utf-8"))


def page(
    title: str,
    scripts: Sequence[Asset],
    blocks: Iterable[tuple[str, Any]],
    style: Sequence[Asset] = (),
    live: bool = False,
) -> Any:
    """Returns a page as a stream of text (of jinja2); of a `live` one, scripts may ask the server it came from."""
    script = "".join(map(text_of, (*CORE, *scripts)))
    css = "".join(map(text_of, (STYLE, *style)))
    template = Environment(loader=PackageLoader("sae.pages", "assets"), autoescape=True).get_template("page.html")
    return template.stream(
        title=title,
        policy=policy(script, css, live),
        css=css,
        script=script,
        blocks=((name, packed(value)) for name, value in blocks),
    )


def policy(script: str, css: str, live: bool) -> str:
    """Returns the Content-Security-Policy of a page: these scripts and this style, and nothing else."""
    ours = [f"script-src '{_hash(script)}'", f"style-src '{_hash(css)}'", "img-src data:"]
    asks = "connect-src 'self'" if live else "connect-src 'none'"
    return "; ".join(["default-src 'none'", *ours, asks, "base-uri 'none'", "form-action 'none'"])


def packed(value: Any) -> str:
    """Returns a value as JSON, compressed, in characters that end no tag."""
    plain = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode("utf-8", "replace")
    return base64.b64encode(gzip.compress(plain, 6, mtime=0)).decode("ascii")


@cache
def text_of(asset: Asset) -> str:
    """Returns the text of a file that ships with a package."""
    package, name = asset
    return files(package).joinpath("assets", name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
