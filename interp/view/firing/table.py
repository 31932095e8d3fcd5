"""The latents that fire in a text as a table: for terminals of any width, and for notebooks."""

import math
from collections.abc import Iterator, Sequence

from interp.view.firing.prompted import Logits, PromptLatent, PromptRecord
from interp.view.terminal import BOLD, CLOSE, OPEN, PLAIN
from interp.view.widths import columns, cut, wrapped
from sae.pages.marks import as_html, marked, runs
from sae.pages.notebook import Html, table, text_lines

BESIDE = 24  # tokens of text on each side of the one where a latent fires most
LABEL_LINES = 2
HEAD = f"{'latent':>8}{'value':>9}{'tokens':>7}{'effect':>8}"
NARROWEST = 24
COUNTS = "color:gray;text-decoration:line-through"
COLUMNS = ("latent", "value", "tokens", "effect", "where", "label", "raises", "lowers")


def lines(found: PromptRecord, some: Sequence[PromptLatent], width: int = 100, colors: bool = False) -> Iterator[str]:
    """Yields latents of a text as lines no wider than a terminal: of each the largest value, at how many tokens it
    fires, its largest effect on a token that follows, and the text around the token where it fires most; its label, and
    what it raises and lowers there.

    Args:
        found: all there is of the text.
        some: the latents, in their order.
        width: columns of the terminal.
        colors: whether the token is bold; else it has guillemets.
    """
    width = max(width, NARROWEST)
    yield from wrapped(found.title(), width, 4)
    if found.no_effects:
        yield from wrapped(f"effects on the next token are not known: {found.no_effects}", width, 4)
    yield "" if some else "no latent fires at a token that counts"
    beside = width - len(HEAD) - 2
    if some:
        yield cut(HEAD, width) if beside < NARROWEST else f"{HEAD}  where it fires most"
    indent = " " * (10 if width >= 60 else 2)
    for one in some:
        effect = "" if one.effect is None else f"{one.effect:+.2f}"
        figures = f"{one.latent:>8}{one.value:>9.2f}{one.fires:>7}{effect:>8}"
        if beside >= NARROWEST:
            yield f"{figures}  {_where(found, one, beside, colors)}".rstrip()
        else:
            yield cut(figures, width)
            yield f"{indent}{_where(found, one, width - len(indent), colors)}"
        if one.label:
            yield from (f"{indent}{line}" for line in wrapped(one.label, width - len(indent), LABEL_LINES))
        for what, moved in _moves(one):
            if moved:
                yield f"{indent}{what} {_pairs(moved, width - len(indent) - len(what) - 1)}"
    more = len(found.latents) - len(some)
    if more > 0:
        yield from ("", f"and {more:,} more")


def as_table(found: PromptRecord, some: Sequence[PromptLatent]) -> str:
    """Returns a text and the latents that fire in it as HTML: tokens that do not count struck out, and for each latent
    the text with the tokens shaded at which it fires, by their share of its largest value.
    """
    parts = runs(found.tokens, [float(counts) for counts in found.mask])
    shown = (as_html(text) if counts else f'<span style="{COUNTS}">{as_html(text)}</span>' for text, counts in parts)
    notes = [found.title()]
    notes += [f"effects on the next token are not known: {found.no_effects}"] if found.no_effects else []
    text = f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(shown)}</div>'
    return f"{text_lines(notes)}{text}{table(COLUMNS, (_cells(found, one) for one in some))}"


def _cells(found: PromptRecord, one: PromptLatent) -> Iterator[str]:
    first, last = max(0, one.position - BESIDE), one.position + BESIDE + 1
    values = _values(found, one)[first:last]
    yield from (str(one.latent), f"{one.value:.4g}", str(one.fires))
    yield "" if one.effect is None else f"{one.effect:+.3g}"
    yield Html(marked(found.tokens[first:last], values, abs(one.value)))
    yield one.label or ""
    for _, moved in _moves(one):
        pairs = (as_html(_pairs((pair,))) for pair in moved)
        yield Html(" ".join(f'<span style="white-space:nowrap">{pair}</span>' for pair in pairs))


def _values(found: PromptRecord, one: PromptLatent) -> list[float]:
    values = [0.0] * len(found.tokens)
    for position, value in zip(one.positions, one.values, strict=True):
        values[position] = value
    return values


def _moves(one: PromptLatent) -> tuple[tuple[str, Logits], tuple[str, Logits]]:
    return ("raises", one.raised), ("lowers", one.lowered)


def _pairs(moved: Logits, room: int = 2**31) -> str:
    """Returns tokens with what is added to their logits: as many as there is room for, none with half a number."""
    shown = ""
    for text, value in moved:
        longer = f'{shown}{"  " if shown else ""}"{text}" {value:+.2f}'
        if columns(longer) > room:
            return shown or cut(longer, room)
        shown = longer
    return shown


def _where(found: PromptRecord, one: PromptLatent, room: int, colors: bool) -> str:
    """Returns the text around the token at which a latent fires most, cut on both sides to have room."""
    first = max(0, one.position - BESIDE)
    pieces = found.tokens[first : one.position + BESIDE + 1]
    only = [float(place == one.position - first) for place in range(len(pieces))]
    parts = runs(pieces, only)
    place = next(place for place, (_, value) in enumerate(parts) if value) if any(only) and parts else 0
    before, own, after = (
        "".join(text for text, _ in part) for part in (parts[:place], parts[place : place + 1], parts[place + 1 :])
    )
    begin, end = (BOLD, PLAIN) if colors else (OPEN, CLOSE)
    room -= 0 if colors else 2
    inner = cut(own.lstrip(" ") or own, room)
    before += own[: len(own) - len(own.lstrip(" "))] if own.strip(" ") else ""
    left = room - columns(inner)
    before = cut(before, max(math.ceil(left / 2), left - columns(after)), from_start=True)
    return f"{before}{begin}{inner}{end}{cut(after, left - columns(before))}"
