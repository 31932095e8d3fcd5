"""Records of latents as HTML, for notebooks. Text of strangers is escaped in one place: `sae/pages/marks.py`."""

from collections.abc import Iterable, Iterator

from interp.records import Window
from interp.view.record import LatentRecord
from interp.view.terminal import firing, largest, title
from sae.pages.marks import as_html, marked
from sae.pages.notebook import Html, table


def page(record: LatentRecord) -> str:
    """Returns a latent: labels with their scores, what is known of it, and its windows."""
    edited = [] if record.edited is None else [f"edited: {record.edited}"]
    best = [_lines("b", [title(record)]), _lines("div", [*edited, *firing(record)])]
    for label in record.labels:
        best.append(_lines("div", [repr(label)], "margin-top:.5em") + _items(map(repr, label.scores)))
    best.append(_items(map(repr, record.scores)))
    if record.missing:
        best.append(_lines("div", [record.missing]))
    strength = max((one.window.strength for one in (*record.strongest, *record.sampled)), default=0.0)
    for name, some in (("strongest windows", record.strongest), ("sampled windows", record.sampled)):
        if some:
            best.append(_lines("div", [name], "margin-top:.5em") + windows((one.window for one in some), strength))
    return _box("".join(best))


def windows(some: Iterable[Window], strength: float) -> str:
    """Returns windows as a table: the largest activation, and the text in which tokens are the darker the more they
    fire, by their share of `strength`; a token says its activation when pointed at.
    """
    shown = ((largest(window), marked(window.pieces(), window.activations, strength)) for window in some)
    return table((), ((f"{most:.2f}", Html(text)) for most, text in shown))


def _lines(tag: str, lines: Iterable[str], style: str = "") -> str:
    return f'<{tag} style="white-space:pre-wrap;{style}">{"<br>".join(map(as_html, lines))}</{tag}>'


def _items(lines: Iterator[str]) -> str:
    return "".join(f'<div style="margin-left:1.5em">{as_html(line)}</div>' for line in lines)


def _box(inner: str) -> str:
    return f'<div style="text-align:left">{inner}</div>'
