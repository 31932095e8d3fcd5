"""Latents are found by what their labels and tokens say."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

import interp
from interp.records import Facts
from interp.view.record import Label, LatentRecord
from interp.view.searching.search import Searcher
from sae.base.errors import ConfigError

NO_FACTS = Facts(fired=1, tokens=9, rates={}, largest=1.0, histogram=(), positions=())


def latent(number, text, fires=(), promotes=(), status="ok", reason=""):
    facts = replace(NO_FACTS, top_tokens=tuple((token, 0.1) for token in fires), promoted=promotes)
    return LatentRecord(number, 100, True, facts=facts, labels=(Label("llm", "", text, status, reason, ()),))


RECORDS = [
    latent(3, "names of colors", fires=[" red"]),
    latent(7, "red things"),
    latent(8, "words about the weather, such as rain", promotes=(" red",)),
    latent(20, None, fires=[" blue"], status="failed", reason="failed: 3 timeout\u202e"),
    LatentRecord(21, 100, True),
]


@pytest.fixture(scope="module")
def searcher():
    return Searcher(RECORDS)


def ids(found):
    return [one.latent for one in found]


def test_labels_come_before_tokens_and_tokens_before_what_is_promoted(searcher):
    found = searcher.find("red")
    assert [(one.latent, one.where) for one in found] == [(7, "label"), (3, "fires on"), (8, "promotes")]
    assert found == sorted(found, key=lambda one: -one.score)
    assert found[1].label == "names of colors"


def test_a_latent_without_a_label_is_found_and_says_why(searcher):
    (found,) = searcher.find("blu")
    assert (found.latent, found.label) == (20, r"failed: 3 timeout\u{202e}")


def test_a_number_finds_its_latent_first(searcher):
    assert [(one.latent, one.where) for one in searcher.find(" 8 ")] == [(8, "its number")]
    assert searcher.find("9") == searcher.find("0" * 900) == []


def test_an_edited_label_is_found_and_shown_first(searcher):
    edited = {8: "red sky\n", 99: "red of no latent here"}
    found = searcher.find("red", edited=edited)
    assert [(one.latent, one.label, one.where) for one in found][:1] == [(8, r"red sky\n", "edited label")]
    assert ids(found) == [8, 7, 3]
    assert ids(searcher.find("rain", edited=edited)) == [8]
    assert ids(searcher.find("sky", edited={8: "rain"})) == ids(searcher.find("sky")) == []


def test_no_more_are_told_than_asked_for(searcher):
    assert ids(searcher.find("red", limit=2)) == [7, 3]
    assert ids(searcher.find("red things or rain", "meaning", limit=1)) == [7]


def test_nothing_is_sought_for_nothing(searcher):
    assert searcher.find("") == searcher.find(' "" ') == searcher.find(" ", "meaning") == []
    assert Searcher([]).find("red") == Searcher([]).find("red", "meaning") == []


@pytest.mark.parametrize(
    ("query", "by", "told"), [("a", "word", "by: "), ("a" * 1001, "words", "query: 1,001 characters; up to 1,000")]
)
def test_what_cannot_be_sought_is_one_line(searcher, query, by, told):
    with pytest.raises(ConfigError, match=told) as raised:
        searcher.find(query, by)
    assert "\n" not in str(raised.value)


def test_meaning_goes_by_telling_words_and_parts_of_words(searcher):
    found = searcher.find("rainy weather", "meaning")
    assert (ids(found), found[0].where) == ([8], "words about the weather, such as rain")
    assert 0 < found[0].score <= 1
    edited = searcher.find("weather", "meaning", edited={3: "the weather"})
    assert [(one.latent, one.where) for one in edited] == [
        (3, "the weather"),
        (8, "words about the weather, such as rain"),
    ]


def test_two_at_once_get_their_own(searcher):
    with ThreadPoolExecutor(4) as threads:
        found = threads.map(lambda word: ids(searcher.find(word, "meaning")), ["weather", "colors"] * 8)
    assert list(found) == [[8], [3]] * 8


def test_a_run_is_searched_in_its_folder(explained_coder):
    run = interp.results(explained_coder)
    token = run[run.latents[0]].facts.top_tokens[0][0].strip()
    found = run.search(f'"{token}"', limit=100)
    assert run.latents[0] in ids(found)
    for one in found:
        facts = run[one.latent].facts
        texts = [one.label, *(text for text, _ in facts.top_tokens), *facts.promoted]
        assert any(token.lower() in text.lower() for text in texts)
    assert run.searcher.encoder == "tfidf"
    label = run[run.latents[0]].label.text
    assert run.search(label, "meaning")[0].label == label
