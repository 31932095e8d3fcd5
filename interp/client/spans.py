"""Which tokens of a text belong to which part of it.

A token belongs to the span in which its last character lies (a part of a character lies where that character does): so
a token that begins with the blank before a span belongs to it, and adjacent spans share none.

Where tokens lie is worked out from what they spell. The offsets that servers give beside them are of no use: some count
a token of the model's own that stands before every text, some count each part of a character as one.
"""

from collections.abc import Sequence

Place = tuple[int, int]
"""Where a token starts and ends in the text; (-1, -1) for one of the model's own before it."""
OWN = (-1, -1)


def tokens_in_span(places: Sequence[Place], span: tuple[int, int]) -> list[int]:
    """Returns the tokens that belong to a span of the text."""
    return [token for token, (start, end) in enumerate(places) if span[0] <= max(start, end - 1) < span[1]]


def token_places(text: str, tokens: Sequence[str]) -> list[Place] | None:
    """Returns where the tokens of a text lie, without those generated after it; None if they do not spell it.

    A token that is shown as no text ("", or with U+FFFD) is a part of a character: a run of them takes up the
    characters before the next token that is shown, at least one of which must not be ASCII. A tokenizer may keep the
    blank before a token to itself.
    """
    found: list[Place] = []
    at = run = 0
    for number, token in enumerate(tokens):
        if at >= len(text) and not run:
            break
        if not _shown(token):
            run += 1
            continue
        start = _start(text, at, token, run)
        if start is None and number == 0:
            found.append(OWN)
            continue
        if start is None and run and number == len(tokens) - 1:
            break  # generated, after a text that ends in parts of a character
        if start is None:
            return None
        found += _parts(at, start, run)
        run, blank = 0, not text.startswith(token, start)
        at = start + blank + len(token)
        found.append((start, at))
    if run and _may_be_parts(text[at:], run):
        found += _parts(at, len(text), run)
        at = len(text)
    return found if at == len(text) else None


def _start(text: str, at: int, token: str, run: int) -> int | None:
    """Returns where a token that is shown starts, after `run` parts of characters from `at` on."""
    if not run:
        fits = text.startswith(token, at) or (text.startswith(" ", at) and text.startswith(token, at + 1))
        return at if fits else None
    for start in range(at + 1, min(len(text), at + 4 * run) + 1):
        if text.startswith(token, start) and _may_be_parts(text[at:start], run):
            return start
    return None


def _may_be_parts(text: str, run: int) -> bool:
    return not text.isascii() and len(text.encode(errors="replace")) >= run


def _parts(at: int, end: int, run: int) -> list[Place]:
    """Returns places for a run of parts of the characters from `at` to `end`."""
    spots = [at + number * (end - at) // run for number in range(run)]
    return [(spot, spot + 1) for spot in spots]


def _shown(token: str) -> bool:
    return bool(token) and "\ufffd" not in token and not token.startswith("bytes:")
