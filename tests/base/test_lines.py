"""Lines of text files end where JSON lines do, and marks of byte order are no text."""

import json

import pytest

from sae.base.lines import decoded, lines_of

ODD = "a\u2028b\u2029c\x85d\x0be\x0cf\x1cg"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_at_line_feeds_alone_and_marks_of_byte_order_are_no_text(encoding, end):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    raw = (mark + json.dumps({"text": ODD}, ensure_ascii=False) + end + "{}" + end).encode(encoding)
    assert [json.loads(line) for line in lines_of(raw) if line] == [{"text": ODD}, {}]
    assert decoded(raw).startswith("{")


def test_what_is_no_text_is_told_or_replaced():
    with pytest.raises(UnicodeDecodeError):
        lines_of(b"{}\n\xe9\n")
    assert lines_of(b"{}\n\xe9", errors="replace") == ["{}", "\ufffd"]
