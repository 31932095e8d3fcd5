"""Records of latents as HTML, for notebooks. Text of a data set or a model is escaped in one place: `_text`."""

from collections.abc import Iterable, Iterator
from html import escape

from interp.prompts.windows import runs, visible
from interp.records import Window
from interp.view.record import LatentRecord
from interp.view.terminal import firing, largest, title

RISES, FALLS = "255,140,0", "70,130,255"  # behind tokens on which a latent is positive, and negative
FAINTEST = 0.15  # of the colors that can be told from none


def page(record: LatentRecord) -> str:
    """Returns a latent: labels with their scores, what is known of it, and its windows."""
    best = [_lines("b", [title(record)]), _lines("div", firing(record))]
    for label in record.labels:
        best.append(_lines("div", [repr(label)], "margin-top:.5em") + _items(map(repr, label.scores)))
    best.append(_items(map(repr, record.scores)))
    if record.missing:
        best.append(_lines("div", [record.missing]))
    strength = max((window.strength for window in (*record.strongest, *record.sampled)), default=0.0)
    for name, some in (("strongest windows", record.strongest), ("sampled windows", record.sampled)):
        if some:
            best.append(_lines("div", [name], "margin-top:.5em") + windows(some, strength))
    return _box("".join(best))


def windows(some: Iterable[Window], strength: float) -> str:
    """Returns windows as a table: the largest activation, and the text in which tokens are the darker the more they
    fire, by their share of `strength`; a token says its activation when pointed at.
    """
    rows = (f"<tr>{_cell(f'{largest(window):.2f}', 'right')}{_cell(marked(window, strength))}</tr>" for window in some)
    return f'<table style="border-collapse:collapse">{"".join(rows)}</table>'


def marked(window: Window, strength: float) -> str:
    """Returns the text of a window, with the tokens that fire colored by their share of `strength`."""
    parts = []
    for text, value in runs(window, window.activations):
        color = RISES if value > 0 else FALLS
        share = max(FAINTEST, min(1.0, abs(value) / strength)) if strength > 0 else 1.0
        mark = f'<mark style="background:rgba({color},{share:.2f});color:inherit" title="{value:.4g}">'
        parts.append(f"{mark}{_text(text)}</mark>" if value else _text(text))
    return f'<span style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</span>'


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Returns plain text as a table."""
    cells = "".join(f'<th style="text-align:left">{_text(name)}</th>' for name in head)
    body = "".join(f"<tr>{''.join(_cell(_text(part)) for part in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>"


def text_lines(lines: Iterable[str]) -> str:
    """Returns lines of text as they are."""
    return f'<pre style="white-space:pre-wrap">{chr(10).join(map(_text, lines))}</pre>'


def _text(text: str) -> str:
    """Returns text as HTML: it is text there, whatever it says, and what cannot be seen is a code."""
    return escape(visible(text))


def _lines(tag: str, lines: Iterable[str], style: str = "") -> str:
    return f'<{tag} style="white-space:pre-wrap;{style}">{"<br>".join(map(_text, lines))}</{tag}>'


def _items(lines: Iterator[str]) -> str:
    return "".join(f'<div style="margin-left:1.5em">{_text(line)}</div>' for line in lines)


def _cell(inner: str, align: str = "left") -> str:
    return f'<td style="text-align:{align};vertical-align:top">{inner}</td>'


def _box(inner: str) -> str:
    return f'<div style="text-align:left">{inner}</div>'
