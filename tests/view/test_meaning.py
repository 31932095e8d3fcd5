"""Vectors of an encoder are made once and kept; without one, words compare texts."""

import threading

import numpy as np
import pytest

from interp.client.config import EndpointConfig
from interp.client.local.tfidf import tfidf
from interp.prompts.reading import query_for_words
from interp.view.searching.meaning import Asking, ByEncoder, ByWords, meaning_of
from sae.base.errors import ConfigError

TEXTS = ["names of colors", "rain and snow", "the red color", "rain and snow"]


@pytest.fixture
def encoder(tiny_model):
    return EndpointConfig(str(tiny_model), via="local")


@pytest.fixture
def asked(monkeypatch):
    """The texts that the encoder is asked about, as it is."""
    seen, asking = [], Asking.vectors
    monkeypatch.setattr(Asking, "vectors", lambda self, texts: seen.append(list(texts)) or asking(self, texts))
    return seen


def test_words_compare_as_the_scorer_does():
    near = ByWords(TEXTS).near("a color", ["blue colors"])
    vectors = np.array(tfidf([*map(query_for_words, TEXTS)]))
    assert near[:4].argmax() == 2
    assert near[1] == near[3] == 0
    assert near[4] > 0
    itself = ByWords(TEXTS).near(TEXTS[0], [])
    assert itself == pytest.approx(vectors @ vectors[0], abs=1e-5)
    assert not ByWords(["", " "]).near("a", ["b"]).any()


def test_vectors_are_made_once_and_kept(encoder, asked, tmp_path):
    kept = tmp_path / "search" / "vectors.safetensors"
    first = ByEncoder(TEXTS, encoder, kept).near("rain and snow", ["rain and snow"])
    assert asked == [TEXTS[:3], ["rain and snow", "rain and snow"]]
    assert first[[1, 3, 4]] == pytest.approx(1, abs=1e-3)
    assert first.shape == (5,)
    written = kept.read_bytes()
    again = ByEncoder(TEXTS, encoder, kept)
    assert len(asked) == 2
    assert again.near("rain and snow", ["rain and snow"]) == pytest.approx(first, abs=1e-6)
    assert kept.read_bytes() == written
    ByEncoder([*TEXTS, "new"], encoder, kept)
    assert asked[3:] == [["new"]]


@pytest.mark.parametrize("harm", ["damage", "other encoder"])
def test_what_is_damaged_or_of_another_encoder_is_made_again(encoder, asked, tmp_path, harm):
    kept = tmp_path / "vectors.safetensors"
    before = ByEncoder(TEXTS, encoder, kept).near("x", [])
    if harm == "damage":
        kept.write_bytes(kept.read_bytes()[:-7])
    else:
        from safetensors.numpy import load_file, save_file

        save_file({name: one.copy() for name, one in load_file(kept).items()}, kept, {"encoder": "another"})
    after = ByEncoder(TEXTS, encoder, kept).near("x", [])
    assert asked.count(TEXTS[:3]) == 2
    assert after == pytest.approx(before, abs=1e-6)


@pytest.mark.slow
def test_an_encoder_that_does_not_answer_is_one_line(monkeypatch):
    away = EndpointConfig("embedder", base_urls=("http://127.0.0.1:9/v1",), max_tries=1, timeout_s=1)
    with pytest.raises(ConfigError, match="embedder") as raised:
        meaning_of(TEXTS, away, None)
    assert "\n" not in str(raised.value)


def test_threads_take_turns(encoder):
    meaning = ByEncoder(TEXTS, encoder, None)
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: meaning.near(TEXTS[n], [])})) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [int(found[n].argmax()) for n in range(3)] == [0, 1, 2]
