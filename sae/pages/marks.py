"""The token highlighter: which text shows which value. Prompts, terminals, notebooks and pages mark by it."""

from bisect import bisect_left
from collections.abc import Sequence
from html import escape
from itertools import groupby

from sae.base.visible import visible

RISES, FALLS = "255,140,0", "70,130,255"  # behind tokens on which a latent is positive, and negative
FAINTEST = 0.15  # of the colors that can be told from none


def shown_with(pieces: Sequence[str]) -> list[int]:
    """Returns for every token the one whose text shows it; none (an empty list) where no text is there at all.

    That is itself, or for a part of a character the token that the whole character is told with.
    """
    full = [place for place, piece in enumerate(pieces) if piece]
    return [full[min(bisect_left(full, place), len(full) - 1)] for place in range(len(pieces))] if full else []


def runs(pieces: Sequence[str], values: Sequence[float]) -> list[tuple[str, float]]:
    """Returns the text of tokens cut where their value changes, each part with that value.

    The token that a whole character is told with has the largest, by magnitude, of all that are a part of it.
    """
    told: dict[int, float] = {}
    for place, value in zip(shown_with(pieces), values, strict=False):
        told[place] = max(told.get(place, 0.0), value, key=abs)
    parts = groupby(sorted(told), told.__getitem__)
    return [("".join(pieces[place] for place in part), value) for value, part in parts]


def marked(pieces: Sequence[str], values: Sequence[float], strength: float) -> str:
    """Returns the text of tokens as HTML for notebooks, those that fire colored by their share of `strength`."""
    parts = []
    for text, value in runs(pieces, values):
        color = RISES if value > 0 else FALLS
        share = max(FAINTEST, min(1.0, abs(value) / strength)) if strength > 0 else 1.0
        mark = f'<mark style="background:rgba({color},{share:.2f});color:inherit" title="{value:.4g}">'
        parts.append(f"{mark}{as_html(text)}</mark>" if value else as_html(text))
    return f'<span style="white-space:pre-wrap;font-family:monospace">{"".join(parts)}</span>'


def as_html(text: str) -> str:
    """Returns text as HTML: it is text there, whatever it says, and what cannot be seen is a code."""
    return escape(visible(text))
