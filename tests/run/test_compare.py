"""Two explained runs: matchings against brute force, how alike pairs are against a known spread, and what is asked."""

import asyncio
from itertools import permutations

import numpy as np
import pytest
from rigs.fake_llm import FakeLLM, error

import interp.run.compare
from interp.client.config import EndpointConfig
from interp.client.local.tfidf import tfidf
from interp.run.compare import Matching, cosines, match, semantic
from sae.base.errors import ConfigError


def embedded(encoder, texts, cache):
    return asyncio.run(interp.run.compare._embedded(encoder, texts, cache))


def test_a_matching_has_the_largest_sum():
    draw = np.random.default_rng(0)
    for shape in ((5, 5), (4, 6), (6, 3)):
        table = draw.random(shape)
        found = match(table)
        few, wide = sorted(shape)
        tall = table if shape[0] == few else table.T
        best = max(sum(tall[i, j] for i, j in enumerate(order)) for order in permutations(range(wide), few))
        assert found.strength.sum() == pytest.approx(best)
        assert found.strength.tolist() == [table[i, j] for i, j in found.pairs.tolist()]
        assert [len(set(side)) for side in found.pairs.T.tolist()] == [few, few]


def paired(n, seed, spread=0.1, lift=0.2):
    """Similarities of n latents with n others: each latent is alike to all others by some amount of its own."""
    draw = np.random.default_rng(seed)
    table = spread * (draw.standard_normal((n, 1)) + draw.standard_normal((1, n))) + 0.01 * draw.standard_normal((n, n))
    order = draw.permutation(n)
    table[np.arange(n), order] += lift
    return Matching(np.stack([np.arange(n), order], 1), np.ones(n)), table


def test_the_null_is_the_mean_over_all_that_are_no_pair():
    matching, table = paired(12, 3)
    found = semantic(matching, table)
    others = np.ones(table.shape, bool)
    others[tuple(matching.pairs.T)] = False
    assert found["value"]["value"] == pytest.approx(table[~others].mean())
    assert found["null"]["value"] == pytest.approx(table[others].mean())
    assert found["lift"]["value"] == pytest.approx(table[~others].mean() - table[others].mean())


def test_intervals_count_latents_and_not_pairs_of_them():
    n, spread = 60, 0.1
    held, widths = [], []
    for seed in range(60):
        found = semantic(*paired(n, seed, spread))
        null, lift = found["null"], found["lift"]
        held.append(null["low"] <= 0 <= null["high"])
        widths.append(null["high"] - null["low"])
        assert lift["low"] < lift["value"] < lift["high"]
        assert lift["high"] - lift["low"] < null["high"] - null["low"]  # what a latent is to all falls out of the lift
    assert np.mean(held) >= 0.85
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread * np.sqrt(2 / n), rel=0.1)


def test_one_pair_has_no_null():
    found = semantic(Matching(np.array([[0, 1]]), np.ones(1)), np.array([[0.1, 0.7, 0.2]]))
    assert found["value"]["value"] == 0.7
    assert found["null"]["value"] is found["lift"]["value"] is None


def test_a_server_is_asked_for_so_many_texts_as_it_takes(tmp_path):
    texts = tuple(f"text {number}" for number in range(150))
    with FakeLLM(lambda asked: "hello") as server:
        encoder = EndpointConfig("fake", base_urls=(server.url,))
        vectors = embedded(encoder, texts, tmp_path / "cache.sqlite")
        asked = [call.body["input"] for call in server.calls if len(call.body.get("input", ())) > 2]
        one = embedded(encoder, texts[149:], tmp_path / "other.sqlite")
    assert sorted(map(len, asked)) == [22, 64, 64]
    assert len(vectors) == 150
    assert vectors[149].tolist() == one[0].tolist()


def test_an_encoder_that_is_fitted_to_texts_gets_them_together(tmp_path):
    texts = tuple(f"the word number{number} of {number % 7}" for number in range(150))
    vectors = embedded(EndpointConfig("tfidf", via="local"), texts, tmp_path / "cache.sqlite")
    expected = np.array(tfidf(texts))
    assert np.allclose(cosines(vectors, vectors), cosines(expected, expected))


def test_an_encoder_that_fails_is_said(tmp_path):
    with FakeLLM(lambda asked: "hello") as server:
        encoder = EndpointConfig("fake", base_urls=(server.url,), max_tries=1)
        embedded(encoder, ("a",), tmp_path / "cache.sqlite")
        server.always = error(400, "too long")
        with pytest.raises(ConfigError, match="--encoder: fake: bad_request HTTP 400: too long"):
            embedded(encoder, ("b",), tmp_path / "cache.sqlite")


def test_too_many_latents_are_said_before_anything_loads(tmp_path, monkeypatch):
    monkeypatch.setattr(interp.run.compare, "MOST", 2)
    monkeypatch.setattr(interp.run.compare, "saved_config", lambda folder: None)
    monkeypatch.setattr(interp.run.compare, "resolve_config", lambda config: config)
    monkeypatch.setattr(interp.run.compare, "explanations_of_run", lambda folder: {"llm": dict.fromkeys(range(3), "x")})
    with pytest.raises(ConfigError, match=r"path: .* has 3 explained latents; at most 2 can be compared"):
        interp.run.compare._side(tmp_path, None, False)
