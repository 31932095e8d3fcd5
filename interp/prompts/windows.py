r"""How a window becomes text: one line, in which nothing can pass for markup, and fences that nothing can break.

    newline, tab, carriage return                          \n  \t  \r
    other characters that cannot be seen or have no form   \u{hex}
    \ itself                                               \\
    < or > next to its like or to the edge of a mark       \<  \>
    | in what would begin <|im_end|>, ] in [INST]          \|  \]
    the name in <think>, </s> or <start_of_turn>           t\hink  \/s  \start_of_turn

So a backslash before n, t, r or u{ is a code and before anything else stands for what follows: reading backwards gives
the text again. An unescaped << or >> is a mark. No escaped text spells a control token of a chat template, and as it
has no line break, no text can begin a line of its own.
"""

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import count

from interp.records import Window
from sae.base.seeding import keyed_hash
from sae.base.visible import seen, visible
from sae.pages.marks import runs

OPEN, CLOSE = "<<", ">>"
TOP_LEVEL = 9

_NAMES = (  # control tokens without an underscore; those with one are told by it
    "s bos eos pad unk mask cls sep eod eop sop eot eom bot inst sys think thinking tool tools image img audio video "
    "user assistant system human model"
)
_CONTROL = re.compile(rf"<(/?(?:\w*_\w*|unused\d+|0x[0-9A-F]{{2}}|{'|'.join(_NAMES.split())}))>", re.IGNORECASE)
_BRACKETED = re.compile(r"(\[/?[a-z]?[A-Z][A-Z_]+)\]")
_BAR = re.compile(r"(?<=<)[|\uff5c]")
_ESCAPED_MARK = re.compile(r"\\(?=[<>])|(?<=<)\\(?=[|\uff5c])|(?<=[A-Z_])\\(?=\])")
_ESCAPED_NAME = re.compile(r"<(/?\w*)\\(/?\w+)>")
LONGEST_PROSE = 2000  # characters
_CONSONANTS = "bcdfghjklmnpqrstvwxz"


def spans(window: Window, marked: Collection[int]) -> list[tuple[str, bool]]:
    """Returns the text cut where marks begin and end, with whether each part is marked; neighbors are one part.

    A marked token that is a part of a character stands for the token that the whole character is told with.
    """
    values = [place in marked for place in range(len(window.tokens))]
    return [(text, bool(mark)) for text, mark in runs(window.pieces(), values)]


def shown(window: Window, marked: Collection[int] = ()) -> str:
    """Returns the window on one line, with << and >> around the marked tokens."""
    parts = spans(window, marked)
    last = len(parts) - 1
    line = ""
    for place, (text, inside) in enumerate(parts):
        line += OPEN + _escaped(text, True, True) + CLOSE if inside else _escaped(text, place > 0, place < last)
    return _harmless(line)


def quoted(text: str) -> str:
    """Returns the text of a token between quotation marks, as a message to a model has it: `prose` of `spelled`."""
    return '"' + _harmless(_escaped(text, False, False)).replace('"', r"\"") + '"'


def spelled(text: str) -> str:
    """Returns the text of a token between quotation marks, as people read it and explanations have it.

    What cannot be seen is a code, as in windows; what could pass for markup is escaped once it goes to a model.
    """
    return '"' + "".join(map(_code, text)).replace('"', r"\"") + '"'


def read_back(text: str) -> str:
    """Returns what a model wrote without the escapes of markup that it has copied from a window."""
    return _ESCAPED_NAME.sub(r"<\1\2>", _ESCAPED_MARK.sub("", text))


@lru_cache(256)  # the same explanation is asked about window by window
def prose(text: str) -> str:
    """Returns an explanation on one line as it goes into a message: its words as they are, nothing like a mark."""
    return _harmless(_escaped(_on_one_line(text), False, False, seen))


def on_one_line(text: str) -> str:
    """Returns a text on one line for a model that knows no marks, and that nothing in it can instruct."""
    return _harmless(visible(_on_one_line(text)))


def _on_one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_PROSE else line[: LONGEST_PROSE - 4] + " ..."


def activation_levels(window: Window, largest: float) -> tuple[int, ...]:
    """Returns every token's activation as 0 (none) to 9 (the top ninth of `largest`, the largest there is)."""
    scale = TOP_LEVEL / largest if largest > 0 else 0.0
    return tuple(min(TOP_LEVEL, math.ceil(abs(value) * scale)) for value in window.activations)


@dataclass(frozen=True)
class Fenced:
    """Texts of one line or more, each after a line of its own that none of them can contain."""

    text: str
    labels: tuple[str, ...]
    """By text, what its line ends with, and what an answer must name."""
    fence: str
    """What those lines begin with."""


def fenced(texts: Sequence[str], labels: Sequence[str] = (), beside: str = "") -> Fenced:
    """Returns texts between lines "=== code label"; without `labels`, every text gets a random-looking one.

    Code and labels come from a hash of all texts and of `beside`, which stands in the same message, and occur in none
    of them: so equal questions are equal, and no text can end its part, begin another, or name another's label.
    """
    everything = "\n".join([*texts, *labels, beside])
    digest = _hash(everything).hex()
    code = _absent(everything, lambda turn: _hash(digest, turn).hex()[:8])
    names = list(labels)
    while len(names) < len(texts):
        names.append(_absent("\n".join([everything, *names]), partial(_label, digest, len(names))))
    fence = f"=== {code}"
    parts = [f"{fence} {name}\n{text}\n" for name, text in zip(names, texts, strict=True)]
    return Fenced("".join([*parts, f"{fence} end"]), tuple(names), fence)


def _absent(text: str, make: Callable[[int], str]) -> str:
    """Returns the first thing made that does not occur in the text."""
    return next(made for made in map(make, count()) if made not in text)


def _label(digest: str, place: int, turn: int) -> str:
    """Returns four consonants, which are no word."""
    return "".join(_CONSONANTS[byte % len(_CONSONANTS)] for byte in _hash(digest, place, turn)[:4])


def _hash(*key: str | int) -> bytes:
    return keyed_hash(*key, size=16)


def _code(character: str) -> str:
    """Returns a character, or the code of one that cannot be seen or begins a code."""
    return r"\\" if character == "\\" else seen(character)


def _escaped(text: str, mark_before: bool, mark_after: bool, code: Callable[[str], str] = _code) -> str:
    """Returns a part of a window with what is unseen as a code and what could be taken for a mark escaped."""
    before = (text[:1] if mark_before else " ") + text[:-1]
    after = text[1:] + (text[-1:] if mark_after else " ")
    return "".join(
        "\\" + c if c in "<>" and c in (b, a) else code(c) for b, c, a in zip(before, text, after, strict=False)
    )


def _harmless(line: str) -> str:
    """Returns a line in which nothing spells a control token; marks around a name may make one."""
    return _CONTROL.sub(_broken, _BRACKETED.sub(r"\1\]", _BAR.sub(r"\\\g<0>", line)))


def _broken(match: re.Match[str]) -> str:
    """Returns <name> with a backslash in the name, where it makes no code."""
    name = match[1]
    place = next(place for place, character in enumerate(name) if character.lower() not in "ntru")
    return f"<{name[:place]}\\{name[place:]}>"
