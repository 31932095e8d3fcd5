"""Text of files, in lines: what their bytes spell, and where their lines end."""

import codecs

MARKS = {  # longer ones first: that of UTF-32 begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def marked(head: bytes) -> str | None:
    """Returns the encoding that a byte-order mark tells, of those wider than UTF-8; None where there is none."""
    return next((name for mark, name in MARKS.items() if head.startswith(mark)), None)


def decoded(raw: bytes, errors: str = "strict") -> str:
    """Returns the text that bytes hold: UTF-8, or what a byte-order mark tells; the mark is no part of it."""
    return raw.decode(marked(raw) or "utf-8-sig", errors)


def lines_of(raw: bytes, errors: str = "strict") -> list[str]:
    """Returns the lines of a text file, of JSON lines above all: each ends at a line feed, and at nothing else.

    What `str.splitlines` takes for ends besides (U+2028, U+0085, ...) may stand within a line of JSON.
    """
    return [line.removesuffix("\r") for line in decoded(raw, errors).split("\n")]
