"""Tables and lines of text as HTML for notebooks, with inline styles; text of strangers is text there."""

from collections.abc import Iterable

from sae.pages.marks import as_html

CELL = "text-align:left;vertical-align:top;padding:0 1em 0 0"


class Html(str):
    """HTML that is put into a table as it is: what `marked` and the like have made."""


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns cells of text, or of `Html`, as a table; without a head, the first cell of a row says what it is of."""
    names = list(head)
    cells = "".join(f'<th style="{CELL}">{as_html(name)}</th>' for name in names)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    top = f"<thead><tr>{cells}</tr></thead>" if names else ""
    return f'<table style="border-collapse:collapse">{top}<tbody>{body}</tbody></table>'


def text_lines(lines: Iterable[str]) -> str:
    """Returns lines of text as they are."""
    return f'<pre style="white-space:pre-wrap">{chr(10).join(map(as_html, lines))}</pre>'


def _cell(part: str) -> str:
    inner = part if isinstance(part, Html) else as_html(part)
    return f'<td style="{CELL}">{inner}</td>'
