"""Damage met in text: what is repaired, what is left out, what is too much, and which encoding may be meant."""

import re
from collections import Counter
from pathlib import Path

from sae.text.readers import opened

FEW = 10  # so many damaged characters say nothing
TOO_MUCH = 0.001  # of all characters: a text that has more is refused
NO_TEXT = 0.01  # of the characters of a document: one that has more is left out
HEAD_BYTES = 2**16
LETTERS = 0.3  # of the bytes beyond ASCII: the alphabet is not Latin
FILES = {
    b"\x1f\x8b": "gzip (its name must end in .gz)",
    b"\x28\xb5\x2f\xfd": "zstandard (its name must end in .zst)",
    b"PAR1": "parquet (its name must end in .parquet)",
    b"ARROW1": "Arrow (its name must end in .arrow)",
    b"SQLite": "a database",
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"GGUF": "a language model",
}
_DAMAGED = re.compile("[\0-\x06\x0e-\x1a\x7f\ufffd-\uffff\ud800-\udfff]")  # no text holds these, but for a few


def repaired(text: str, counts: Counter[str]) -> str | None:
    """Returns a text as valid Unicode, or None if it is none; counts its characters and those that are damaged.

    Tokenizers take neither broken UTF-8 nor the lone surrogates that JSON can spell: each becomes U+FFFD. Those that
    were replaced before, and control characters, which stand in no text, are damage as well.
    """
    text = text.removeprefix("\ufeff")
    counts["characters"] += len(text)
    if not _DAMAGED.search(text):
        return text
    damaged = len(_DAMAGED.findall(text))
    counts["damaged_characters"] += damaged
    if damaged > max(FEW, NO_TEXT * len(text)):
        return None
    counts["damaged"] += 1
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def too_much(counts: Counter[str]) -> bool:
    """Returns whether so much of a text is damaged that something else is wrong."""
    return counts["damaged_characters"] > max(FEW, TOO_MUCH * counts["characters"])


def what_it_may_be(file: Path, encoding: str | None) -> str:
    """Returns a guess why a file is not in the encoding that was named, or not in UTF-8: another one, or no text.

    Empty if its beginning is text in UTF-8.
    """
    if encoding:
        return f"it is not in text.encoding {encoding}"
    try:
        with opened(file) as raw:
            head = raw.read(HEAD_BYTES)
    except (OSError, EOFError):  # which is said already
        return ""
    known = next((what for start, what in FILES.items() if head.startswith(start)), "")
    if known:
        return f"it is not text: it begins like {known}"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even + odd > len(head) / 20:
        if max(even, odd) > 10 * min(even, odd):
            return f"name its encoding with text.encoding (it may be {'utf-16-le' if odd > even else 'utf-16-be'})"
        if len(head) / 2 < even + odd and not any(map(head[:256].count, range(1, 9))):
            return "name its encoding with text.encoding (it may be utf-32)"
        return "it is not text"
    wide = next((name for name in ("utf-16-le", "utf-16-be") if _is_text(head, name)), "")  # of Chinese: few zero bytes
    if wide:
        return f"name its encoding with text.encoding (it may be {wide})"
    if any(map(head.count, range(1, 7))):
        return "it is not text"
    try:
        head[: head.rfind(b"\n") + 1 or None].decode()
        return ""
    except UnicodeDecodeError:
        return f"name its encoding with text.encoding (it may be {' or '.join(_encodings(head))})"


def _encodings(head: bytes) -> list[str]:
    """Returns the encodings that bytes may be in: by pairs that are valid, and by how many letters are not of ASCII."""
    beyond, head = [byte for byte in head if byte > 0x7F], head[: head.rfind(b"\n") + 1 or None]
    found = [name for name in ("shift_jis", "euc_jp", "gb18030", "big5", "euc_kr") if _decodes(head, name)]
    if len(beyond) > LETTERS * len(head):
        return [*found, "cp1251", "koi8-r"]
    return ["cp1252", "latin-1", *found] if any(byte < 0xA0 for byte in beyond) else ["latin-1", "cp1252", *found]


def _is_text(head: bytes, encoding: str) -> bool:
    """Returns whether bytes are lines of letters in an encoding."""
    text = head.decode(encoding, errors="replace")
    return "\n" in text and not _DAMAGED.search(text[:-1]) and sum(map(str.isalpha, text)) > len(text) / 2


def _decodes(head: bytes, encoding: str) -> bool:
    try:
        head.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
