"""Text in the columns of a terminal: how many it takes, cut to some, and broken into lines of some.

A character of East Asian scripts and most emoji take two, what combines with the one before takes none.
"""

import unicodedata
from collections.abc import Iterator

CUT = "\u2026"


def columns(text: str) -> int:
    """Returns how many columns a text takes."""
    return sum(map(_of, text))


def cut(text: str, room: int, from_start: bool = False) -> str:
    """Returns a text as it is if it has room, else its beginning, or its end, with a sign that more is missing."""
    kept, taken, fitting = [], 0, 0
    for character in reversed(text) if from_start else text:
        taken += _of(character)
        if taken > room:
            break
        kept.append(character)
        fitting = len(kept) if taken < room else fitting  # with the sign
    if len(kept) == len(text):
        return text
    shown = "".join(kept[:fitting])
    sign = CUT if room > 0 else ""
    return sign + shown[::-1] if from_start else shown + sign


def wrapped(text: str, room: int, most: int) -> Iterator[str]:
    """Yields at most so many lines of a text, broken at spaces; the last one is cut if there is more."""
    words, line, lines = text.split(" "), "", 1
    for place, word in enumerate(words):
        longer = f"{line} {word}" if line else word
        if columns(longer) <= room or not line:
            line = longer
        elif lines == most:
            yield cut(" ".join([line, *words[place:]]), room)
            return
        else:
            yield cut(line, room)
            line, lines = word, lines + 1
    yield cut(line, room)


def _of(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
