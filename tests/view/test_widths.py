"""Text in columns: never wider than there is room for, whatever its characters."""

import pytest

from interp.view.widths import columns, cut, wrapped

WORDS = "one two three"
WIDE = "\u4e2d\u6587\u5b57"


def test_characters_take_their_columns():
    assert [columns(text) for text in ("", "abc", WIDE, "e\u0301", "\U0001f98a!")] == [0, 3, 6, 1, 3]


@pytest.mark.parametrize("text", [WORDS, WIDE * 4, "e\u0301" * 9, "x" * 100])
@pytest.mark.parametrize("room", range(12))
def test_what_is_cut_fits_and_says_so(text, room):
    for from_start in (False, True):
        found = cut(text, room, from_start)
        assert columns(found) <= room
        if room:
            assert (found == text) == (columns(text) <= room)
            plain = found.replace("\u2026", "")
            assert found == text or (text.endswith(plain) if from_start else text.startswith(plain))


def test_lines_break_at_spaces_and_the_last_says_that_there_is_more():
    assert list(wrapped(WORDS, 7, 3)) == ["one two", "three"]
    assert list(wrapped(WORDS, 5, 2)) == ["one", "two \u2026"]
    assert list(wrapped(WORDS, 40, 1)) == [WORDS]
    assert list(wrapped("x" * 50, 10, 2)) == ["x" * 9 + "\u2026"]
    assert all(columns(line) <= 9 for line in wrapped(f"{WIDE * 3} a bb {WIDE}", 9, 3))
