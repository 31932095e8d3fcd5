"""Words in any script: what belongs to one, and what to do where none is set apart by a blank.

Chinese, Japanese, Thai, Lao, Khmer, Burmese and their like are written without blanks between words. What stands
together there is a sentence: its runs of a few characters are what such texts have in common.
"""

import re
import unicodedata

LONGEST = 3
_BLOCKS = (  # letters and marks alone; their digits and punctuation are like those of other scripts
    (0x0E01, 0x0E3A), (0x0E40, 0x0E4E), (0x0E81, 0x0ECE), (0x0EDC, 0x0EDF),  # Thai, Lao
    (0x1000, 0x103F), (0x1050, 0x109D), (0x1780, 0x17D3), (0x1950, 0x19C9), (0x1A20, 0x1A7C),  # Burmese, Khmer, Tai
    (0x1B00, 0x1B4C), (0xA980, 0xA9C0), (0xA9E0, 0xA9EF), (0xA9FA, 0xA9FE), (0xAA60, 0xAADF),  # Balinese, Javanese
    (0x2E80, 0x2FD5), (0x3005, 0x3007), (0x3021, 0x3029), (0x3031, 0x3035), (0x303B, 0x303B),  # Han
    (0x3041, 0x309F), (0x30A1, 0x30FA), (0x30FC, 0x30FF), (0x3105, 0x312F), (0x31A0, 0x31BF),  # kana, Bopomofo
    (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xA000, 0xA48C), (0xF900, 0xFAFF),  # Han, Yi
    (0xFF66, 0xFF9F), (0x20000, 0x3FFFF),  # narrow kana, Han
)  # fmt: skip


_MARKS = "".join(mark for mark in map(chr, range(0x20000)) if unicodedata.category(mark) in ("Mn", "Mc"))
_UNSPACED = "".join(f"{chr(first)}-{chr(last)}" for first, last in _BLOCKS)
UNSPACED = re.compile(f"[{_UNSPACED}]+")
"""Text of a script without blanks between words."""
WORD = re.compile(rf"[{_UNSPACED}]+|(?![{_UNSPACED}])\w(?:(?![{_UNSPACED}])[\w{_MARKS}])*")
"""A word with the marks on its letters, or as much as stands together of a script without blanks."""
SIGN = re.compile(rf"{WORD.pattern}|[^\w\s]")
"""A word, or any other character that can be seen."""

_PLAIN = re.compile(r"\w+|[^\w\s]")  # the same of ASCII alone, at a fifth of the time

_WIDE = re.compile("[\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uffdc]+")  # letters and digits of another width


def folded(text: str) -> str:
    """Returns a text in lower case, its marks joined to their letters, and letters of another width as the usual."""
    return _WIDE.sub(lambda wide: unicodedata.normalize("NFKC", wide[0]), unicodedata.normalize("NFC", text)).lower()


def signs(text: str) -> list[str]:
    """Returns what `SIGN` finds in a text once it is folded, in order."""
    text = folded(text)
    return (_PLAIN if text.isascii() else SIGN).findall(text)


def parts(text: str) -> list[str]:
    """Returns the runs of one to three characters of a text: what stands for its words where nothing parts these."""
    return [text[start : start + size] for size in range(1, LONGEST + 1) for start in range(len(text) - size + 1)]
