"""Which text shows which value."""

import re
from html import unescape

from sae.pages.marks import marked


def test_tokens_are_the_darker_the_more_they_fire():
    shown = marked(["a ", "cat", " sat", " on"], (0.0, 4.0, 1.0, -2.0), 4.0)
    assert re.findall(r'rgba\(([\d,]+),([\d.]+)\)[^>]*title="([^"]*)">([^<]*)</mark>', shown) == [
        ("255,140,0", "1.00", "4", "cat"),
        ("255,140,0", "0.25", "1", " sat"),
        ("70,130,255", "0.50", "-2", " on"),
    ]
    assert unescape(re.sub("<[^>]*>", "", shown)) == "a cat sat on"


def test_what_fires_on_a_part_of_a_character_is_seen():
    shown = marked(["", "\u00e9", "x"], (3.0, 1.0, 0.0), 3.0)
    assert 'title="3">\u00e9</mark>x' in shown


def test_a_silent_window_has_no_mark():
    assert "<mark" not in marked(["a", "b"], (0.0, 0.0), 0.0)
