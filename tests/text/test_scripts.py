"""Words: in scripts with blanks between them as regular expressions know them, in others what stands together."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interp.client.local.tfidf import features
from sae.text.scripts import SIGN, UNSPACED, WORD, folded, parts, signs


@given(st.text(st.characters(max_codepoint=0x2FF), max_size=40))
def test_latin_text_is_cut_as_ever(text):
    assert SIGN.findall(text) == re.findall(r"\w+|[^\w\s]", text)
    assert WORD.findall(text) == re.findall(r"\w+", text)
    assert not UNSPACED.search(text)
    assert signs(text) == SIGN.findall(folded(text))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("\u6211\u7231iPhone\u624b\u673a\u3002", ["\u6211\u7231", "iPhone", "\u624b\u673a", "\u3002"]),
        ("\u30b3\u30fc\u30d2\u30fc\u3092\u98f2\u3080", ["\u30b3\u30fc\u30d2\u30fc\u3092\u98f2\u3080"]),
        ("\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27 10", ["\u0e01\u0e34\u0e19\u0e02\u0e49\u0e32\u0e27", "10"]),
        ("\u1781\u17d2\u1789\u17bb\u17c6", ["\u1781\u17d2\u1789\u17bb\u17c6"]),
        ("\u1019\u103c\u1014\u103a\u1019\u102c", ["\u1019\u103c\u1014\u103a\u1019\u102c"]),
        ("\u0939\u093f\u0928\u094d\u0926\u0940 \u0915\u093e", ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u0915\u093e"]),
        ("cafe\u0301 \ud55c\uad6d\uc5b4\ub294", ["cafe\u0301", "\ud55c\uad6d\uc5b4\ub294"]),
    ],
)
def test_words_keep_their_marks_and_scripts_are_parted(text, words):
    assert SIGN.findall(text) == words


def test_parts_are_all_runs_of_up_to_three():
    assert parts("abcd") == ["a", "b", "c", "d", "ab", "bc", "cd", "abc", "bcd"]


@pytest.mark.parametrize(
    ("written", "usual"),
    [
        ("Cafe\u0301", "caf\u00e9"),
        ("\uff30\uff39\uff11", "py1"),
        ("\uff76\uff9e\uff85", "\u30ac\u30ca"),
        ("\u2026 \u00b2", "\u2026 \u00b2"),
    ],
)
def test_what_is_written_in_other_code_points_is_the_same_word(written, usual):
    assert folded(written) == usual
    assert features(written) == features(usual)
