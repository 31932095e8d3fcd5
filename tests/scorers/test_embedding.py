"""Embedding with a bag-of-words encoder and with TF-IDF, whose explanations name words, and parts of words."""

import re
from collections import Counter

import numpy as np
import pytest
from rigs.planted import FACTS, TOPICS, examples, right, run, window

from interp.client.local.tfidf import DIGITS, features, tfidf, vectorizer, weights
from interp.client.requests import Abilities, Embed, Reply
from interp.prompts.reading import passage_for_encoder, query_for_encoder, query_for_words
from interp.records import Examples, Explanation, Item
from interp.scorers import Trial
from interp.scorers.embedding import BATCH, Embedding

ENCODER, FITTED = Abilities(), Abilities(fits_texts=True)
SCORER = Embedding()
VOCABULARY = sorted({word for topic in TOPICS for word in topic})


def bag_of_words(request: Embed) -> Reply:
    """Counts the words of the topics; the last number says that there is a text."""
    counts = [Counter(re.findall(r"[a-z]+", text.lower())) for text in request.texts]
    return Reply(vectors=tuple((*(float(count[word]) for word in VOCABULARY), 1.0) for count in counts))


def fitted(request: Embed) -> Reply:
    return Reply(vectors=tfidf(request.texts))


@pytest.mark.parametrize(("abilities", "encode"), [(ENCODER, bag_of_words), (FITTED, fitted)], ids=["bag", "tfidf"])
def test_the_right_explanation_is_told_from_all_others(abilities, encode):
    for latent in range(len(TOPICS)):
        given = examples(latent)
        score, _, _ = run(SCORER, right(latent), given, abilities, encode)
        assert score.measures["auroc"].value > 0.97
        assert score.measures["balanced_accuracy"].value > 0.9
        for other in {0, 1, 2, 3} - {latent}:
            assert run(SCORER, right(other), given, abilities, encode)[0].measures["auroc"].value < 0.65


def test_the_vectors_of_windows_are_asked_for_once_for_all_explanations():
    given = examples(0, n=40)
    tasks = SCORER.tasks(given, "test", {})
    asked = [SCORER.requests(Trial(right(latent), tasks, ENCODER)) for latent in (0, 1)]
    assert [len(request.texts) for request in asked[0]] == [1, BATCH, len(tasks) - BATCH]
    assert asked[0][1:] == asked[1][1:]
    assert asked[0][0] != asked[1][0]
    together = SCORER.requests(Trial(right(0), tasks, FITTED))
    assert [len(request.texts) for request in together] == [1 + len(tasks)]
    assert SCORER.requests(Trial(right(0), [], ENCODER)) == []
    assert SCORER.judgements(Trial(right(0), [], ENCODER), []) == []


def test_cosines_are_those_of_the_vectors():
    given = examples(0)
    tasks = SCORER.tasks(given, "test", {})
    requests = SCORER.requests(Trial(right(0), tasks, ENCODER))
    found = SCORER.judgements(Trial(right(0), tasks, ENCODER), [bag_of_words(request) for request in requests])
    query = np.array(bag_of_words(requests[0]).vectors[0])
    for task, judgement in zip(tasks, found, strict=True):
        x = np.array(bag_of_words(Embed("encoder", (task.items[0].window.text,))).vectors[0])
        assert judgement.value == pytest.approx(query @ x / np.linalg.norm(query) / np.linalg.norm(x))


def test_what_fails_is_missing_and_nothing_else():
    given = examples(0, n=40)
    tasks = SCORER.tasks(given, "test", {})
    requests = SCORER.requests(Trial(right(0), tasks, ENCODER))
    replies = [bag_of_words(request) for request in requests]
    found = SCORER.judgements(Trial(right(0), tasks, ENCODER), [replies[0], Reply(failure="timeout"), replies[2]])
    assert [judgement.reason for judgement in found] == ["timeout"] * BATCH + [""] * (len(tasks) - BATCH)
    found = SCORER.judgements(Trial(right(0), tasks, ENCODER), [Reply(failure="quota"), *replies[1:]])
    assert {judgement.reason for judgement in found} == {"quota"}
    assert SCORER.score(tasks, found, FACTS).coverage == 0
    broken = Reply(vectors=((float("nan"),) * len(replies[0].vectors[0]),) * BATCH)
    found = SCORER.judgements(Trial(right(0), tasks, ENCODER), [replies[0], broken, replies[2]])
    assert {judgement.reason for judgement in found[:BATCH]} == {"parse"}


def test_texts_without_words_are_like_nothing():
    given = [Item(window(["\n"], {0: 1.0} if i % 2 else None, i), "active" if i % 2 else "random") for i in range(8)]
    score, found, requests = run(SCORER, Explanation(0, "", "x"), Examples(0, FACTS, test=tuple(given)), FITTED, fitted)
    assert all(text for text in requests[0].texts[1:]), "servers refuse empty texts"
    assert score.coverage == 1
    assert len({judgement.value for judgement in found}) == 1


def test_tfidf_is_that_of_the_formula():
    texts = ["The cat, the cat!", "a dog", "cats and dogs", ""]
    counts = [Counter(features(text)) for text in texts]
    names = sorted({name for count in counts for name in count})
    x = np.zeros((len(texts), len(names)))
    for row, count in enumerate(counts):
        for column, name in enumerate(names):
            n, seen = count[name], sum(name in other for other in counts)
            x[row, column] = (1 + np.log(n)) * (1 + np.log((1 + len(texts)) / (1 + seen))) if n else 0.0
    x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30)
    found = np.array(tfidf(texts))
    assert found.shape == (4, 4)
    assert np.abs(found @ found.T - x @ x.T).max() < 10 * 10.0**-DIGITS
    assert np.array(tfidf(["a"])).shape[0] == 1
    assert tfidf(["", " "]) == ((0.0,), (0.0,))
    assert tfidf([]) == ()
    assert tfidf(texts) == tfidf(texts)


def test_weights_are_those_of_the_vectorizer_to_the_bit():
    texts = ["dogs and a cat", "", "a cat, a dog, the cats", "\u82f9\u679c (x)", "zebras and a dog", "."]
    assert np.array_equal(weights(texts), vectorizer().fit_transform(texts).toarray())


def test_parts_of_words_and_signs_are_found():
    texts = ["ing", "he was running home", "he ran to the house", "f(x) = y", "("]
    vectors = np.array(tfidf(texts))
    ending, sign = vectors[0] @ vectors.T, vectors[4] @ vectors.T
    assert ending[1] > ending[2] == ending[3] == 0
    assert sign[3] > sign[1] == sign[2] == 0


@pytest.mark.parametrize(
    ("description", "right", "others"),
    [
        (
            "\u82f9\u679c",
            "\u6211\u559c\u6b22\u5403\u82f9\u679c\u548c\u9999\u8549",
            ["\u4eca\u5929\u7684\u5929\u6c14\u5f88\u597d", "the weather is good"],
        ),
        ("\u5929\u6c14", "the \u5929\u6c14 today", ["\u6211\u559c\u6b22\u5403\u82f9\u679c", "an apple a day"]),
        (
            "\u30b3\u30fc\u30d2\u30fc",
            "\u6bce\u671d\u30b3\u30fc\u30d2\u30fc\u3092\u98f2\u307f\u307e\u3059",
            ["\u5929\u6c17\u304c\u3044\u3044\u3067\u3059\u306d"],
        ),
        (
            "\u0e01\u0e32\u0e41\u0e1f",
            "\u0e09\u0e31\u0e19\u0e14\u0e37\u0e48\u0e21\u0e01\u0e32\u0e41\u0e1f\u0e17\u0e38\u0e01\u0e40\u0e0a\u0e49\u0e32",
            ["\u0e2d\u0e32\u0e01\u0e32\u0e28\u0e14\u0e35\u0e21\u0e32\u0e01"],
        ),
        (
            "\u0e81\u0eb2\u0ec0\u0e9f",
            "\u0e82\u0ec9\u0ead\u0e8d\u0e94\u0eb7\u0ec8\u0ea1\u0e81\u0eb2\u0ec0\u0e9f",
            ["\u0eae\u0ec9\u0ead\u0e99\u0eab\u0ebc\u0eb2\u0e8d"],
        ),
        (
            "\u1780\u17b6\u17a0\u17d2\u179c\u17c1",
            "\u1781\u17d2\u1789\u17bb\u17c6\u1795\u17b9\u1780\u1780\u17b6\u17a0\u17d2\u179c\u17c1",
            ["\u1794\u17d2\u179a\u1791\u17c1\u179f"],
        ),
        (
            "\u1000\u1031\u102c\u103a\u1016\u102e",
            "\u1000\u103b\u103d\u1014\u103a\u1010\u1031\u102c\u103a\u1000\u1031\u102c\u103a\u1016\u102e\u101e\u1031\u102c\u1000\u103a",
            ["\u1019\u1014\u1000\u103a\u1016\u103c\u1014\u103a"],
        ),
    ],
    ids=["Chinese", "mixed", "Japanese", "Thai", "Lao", "Khmer", "Burmese"],
)
@pytest.mark.parametrize("form", ["{}", 'fires on the tokens "{}"', "\u300c{}\u300d"])
def test_a_word_is_found_where_no_blanks_part_words(description, right, others, form):
    vectors = np.array(tfidf([query_for_words(form.format(description)), right, *others]))
    near = vectors[0] @ vectors.T
    assert near[1] > 0.1
    assert near[1] > 2 * near[2:].max()


@pytest.mark.parametrize(
    ("description", "query"),
    [
        ('fires on the tokens " the", " of"', "the of the of the of"),
        ("words such as \u201cCaesar\u201d in Roman texts", "Roman Caesar Caesar Caesar"),
        (r'on ">>>", "\>\>\>"', ">>> >>> >>> >>> >>> >>>"),  # as it is now, and as earlier versions wrote it
        (r'the token "\n" or "\"x\""', '"x" "x" "x"'),
        ("names of rivers", "names rivers"),
        ("the of", "the of"),
        ("", ""),
    ],
)
def test_quoted_tokens_are_what_texts_are_looked_through_for(description, query):
    assert query_for_words(description).split() == query.split()


def test_real_encoders_are_told_what_to_look_for():
    assert query_for_encoder("names\nof rivers").endswith("Query: names of rivers")
    assert passage_for_encoder(window(["a", "b\nc"])) == "a b c"
