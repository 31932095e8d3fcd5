"""Text of files, in lines: what their bytes spell, and where their lines end."""

import codecs


def decoded(raw: bytes, errors: str = "strict") -> str:
    """Returns the text that bytes hold: UTF-8, or UTF-16 if a byte-order mark says so; the mark is no part of it."""
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8-sig", errors)


def lines_of(raw: bytes, errors: str = "strict") -> list[str]:
    """Returns the lines of a text file, of JSON lines above all: each ends at a line feed, and at nothing else.

    What `str.splitlines` takes for ends besides (U+2028, U+0085, ...) may stand within a line of JSON.
    """
    return [line.removesuffix("\r") for line in decoded(raw, errors).split("\n")]
