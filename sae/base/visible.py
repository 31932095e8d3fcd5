r"""Text of strangers as people see it, on one line: what cannot be seen, or steers a terminal, is a code.

newline, tab, carriage return                          \n  \t  \r
other characters that cannot be seen or have no form   \u{hex}
"""

import unicodedata

CODES = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}
UNSEEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def visible(text: str) -> str:
    """Returns text on one line for people, as it is: only what cannot be seen, or steers a terminal, is a code."""
    return text if text.isprintable() else "".join(map(seen, text))  # what is printable has none of it


def seen(character: str) -> str:
    """Returns a character, or the code of one that cannot be seen."""
    unseen = unicodedata.category(character) in UNSEEN
    return CODES.get(character) or (f"\\u{{{ord(character):x}}}" if unseen else character)
