"""A latent in a notebook: what it says stays text, and colors are where it fires."""

import re
from dataclasses import replace

from rigs.interp_examples import facts, of_pieces

from interp.records import Excerpt, Measure
from interp.view.html import page
from interp.view.record import Label, LatentRecord, LatentScore
from sae.pages.notebook import table, text_lines

HOSTILE = "<script>alert(1)</script><img src=x onerror=y>\"'>&lt;</pre></td><b>\x1b[2J\u202e\nnext"
TAGS = {"div", "b", "br", "table", "thead", "tbody", "tr", "td", "th", "span", "mark", "pre"}


def firing(pieces, values):
    return replace(of_pieces(pieces), activations=tuple(values))


def record(text):
    score = LatentScore(text, text, Measure(0.5), Measure(None), Measure(None), 3, "ok", text, {})
    label = Label(text, text, text, "ok", text, (score,))
    window = Excerpt(firing([text, text], (0.0, 2.0)))
    known = facts(top_tokens=((text, 0.5),), promoted=(text,), suppressed=(text,))
    return LatentRecord(3, 8, True, 5, 9, known, text, (window,), (window,), (label,), (score,))


def test_text_of_strangers_is_text():
    shown = page(record(HOSTILE)) + table([HOSTILE], [[HOSTILE]]) + text_lines([HOSTILE])
    assert "alert(1)" in shown
    assert set(re.findall(r"</?([\w!]+)", shown)) <= TAGS
    assert not re.search(r"\son\w+=(?![^<]*&)", re.sub(r">[^<]*<", "><", shown))  # no attribute of an event
    assert "\x1b" not in shown
    assert "\u202e" not in shown
    plain = page(record("plain"))
    assert re.sub(r">[^<]*<", "><", page(record(HOSTILE))) == re.sub(r">[^<]*<", "><", plain)  # same tags, other text


def test_a_label_shows_its_scores():
    shown = record(HOSTILE).labels[0]._repr_html_()
    assert set(re.findall(r"</?([\w!]+)", shown)) <= TAGS
    assert ">0.500</td>" in shown
    failed = LatentScore(
        "detection[x]", "auroc", Measure(None), Measure(None), Measure(None), None, "failed", "http", {}
    )
    shown = Label("llm", "gpt", "about <cats>", "ok", "", (failed,))._repr_html_()
    assert "about &lt;cats&gt;" in shown
    assert ">no score</td>" in shown
