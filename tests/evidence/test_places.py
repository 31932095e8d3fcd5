"""Where the second pass looks: samples by hash, and candidates in turn."""

import numpy as np
from rigs.interp_evidence import CONTEXT_LENGTH, FIRST_WORD, of_rows

import interp.evidence.places
from interp.evidence.places import CANDIDATES, PLACES_OF_TOKEN
from sae.base.seeding import GOLDEN, mixed


def test_places_of_a_token_are_a_sample_by_hash(tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    lines = [[0, *(FIRST_WORD + draw.integers(0, 5, 60)).tolist()] for _ in range(90)]
    rows = of_rows(tmp_path, lines, draw.integers(0, 3, 90).tolist())
    wanted = [0, FIRST_WORD, FIRST_WORD + 3, FIRST_WORD + 100]  # BOS is no text
    found = interp.evidence.places._occurrences(rows, wanted, 0)
    every = {
        (token, split): [
            row * CONTEXT_LENGTH + place
            for row in range(90)
            if rows.split[row] == split
            for place in range(1, 61)
            if lines[row][place] == token
        ]
        for token in wanted
        for split in range(3)
    }
    for (token, split), positions in every.items():
        kept = found[token][split]
        assert len(kept) == min(PLACES_OF_TOKEN, len(positions))
        draws = mixed((np.array(positions, np.uint64) + np.uint64(1)) * GOLDEN, steps=1)
        order = np.argsort(draws, kind="stable")
        assert kept.tolist() == np.array(positions, np.int64)[order][: len(kept)].tolist()
    assert any(len(positions) > PLACES_OF_TOKEN for positions in every.values())
    monkeypatch.setattr(interp.evidence.places, "ROWS_AT_ONCE", 4)  # in many parts
    for token, kept in interp.evidence.places._occurrences(rows, wanted, 0).items():
        assert all(np.array_equal(a, b) for a, b in zip(kept, found[token], strict=True))
    assert interp.evidence.places._occurrences(rows, [], 0) == {}


def test_candidates_are_taken_in_turn_and_once():
    lists = [np.array([5, 3, 9]), np.array([3, 4]), np.array([], np.int64)]
    assert interp.evidence.places._in_turn(lists).tolist() == [5, 3, 4, 9]
    assert interp.evidence.places._in_turn([]).tolist() == []
    assert len(interp.evidence.places._in_turn([np.arange(100), np.arange(1000, 1100)])) == CANDIDATES
