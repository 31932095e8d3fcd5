"""Which documents have all words of a query."""

import pytest

from interp.view.searching.word_index import Part, WordIndex, parts_of, signs

DOCUMENTS = [
    {"label": ["fires on names of colors"], "token": [" red", " green"]},
    {"label": ["the word tokenizer in code"], "token": ["foo_bar.baz"]},
    {"label": ["\u4e2d\u6587\u7684\u6587\u5b57"], "token": []},
    {"label": ["fires on red, then green"], "token": ["\\n"]},
]


@pytest.fixture(scope="module")
def index():
    return WordIndex(DOCUMENTS, {"label": 4.0, "token": 2.0})


def found(index, query):
    hits = [index.hits(part) for part in parts_of(query)]
    return [row for row in range(index.size) if all(hit[row] for hit in hits)]


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ("red", [0, 3]),
        ("red names", [0]),
        ("RED", [0, 3]),
        ("token", [1]),  # the beginning of a word
        ("okenizer", []),
        ('"token"', []),  # a phrase is whole
        ('"fires on"', [0, 3]),
        ('"on fires"', []),
        ('"red green"', []),  # no phrase goes over the edge of a text
        ("bar", [1]),
        ("foo_ba", [1]),
        ("bar.baz", [1]),
        ("baz.bar", []),
        ("\u6587\u5b57", [2]),
        ("\u5b57\u6587", []),
        (r"\n", [3]),
        ('"fires on', [0, 3]),  # not closed yet
        ("nowhere red", []),
    ],
)
def test_all_parts_of_a_query_are_found(index, query, rows):
    assert found(index, query) == rows


def test_what_is_typed_falls_into_parts():
    assert parts_of('Red "a b" c.d') == [Part(("red",), False), Part(("a", "b"), True), Part(("c", ".", "d"), False)]
    assert parts_of('  "" ') == []
    assert signs("caf\u00e9 A_b") == ["caf\u00e9", "a", "_", "b"]


def test_whole_words_labels_and_short_texts_count_more(index):
    label, token = index.hits(Part(("red",), False))[[3, 0]]
    assert label > token > 0
    assert index.hits(Part(("code",), False))[1] > index.hits(Part(("cod",), False))[1] > 0
    short, long = WordIndex([{"a": ["red"]}, {"a": ["red and more"]}], {"a": 1.0}).hits(Part(("red",), False))
    assert short > long


def test_a_part_names_its_fields(index):
    assert index.fields(0, Part(("red",), False)) == ["token"]
    assert index.fields(3, Part(("red",), False)) == ["label"]


def test_no_document_is_no_error():
    assert not WordIndex([], {"label": 1.0}).hits(Part(("red",), False)).size
