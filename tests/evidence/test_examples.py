"""Which windows are shown: apart, silent where they should be, and told apart by nothing but what they say."""

import itertools
import json
import random
from collections import Counter

import numpy as np
import pytest
from rigs.interp_evidence import (
    CONTEXT,
    CONTEXT_LENGTH,
    D_SAE,
    DEAD,
    DENSE,
    NEGATIVE,
    ORDINARY,
    RARE,
    WORDS,
    Found,
    dense,
    drawn,
    read_corpus,
    tokenizer,
    write_documents,
)

import interp.evidence.examples
from interp.evidence.examples import GRAM, MARK_SHARE, OFFSETS, REPEATED, WINDOW, ExampleConfig, ExampleMaker
from interp.evidence.places import plan_places
from interp.evidence.second_pass import visit_places
from interp.records import ACTIVE, SPLITS, TIERS, Examples
from sae.base.errors import ConfigError
from sae.text.decode import Decoder


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Both passes over documents of many lengths; some rows are shorter than a window."""
    folder = tmp_path_factory.mktemp("examples")
    lengths = [9, 20, 40, 64, 150, 200, 90, 1300] * 45
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SAE_CACHE", str(folder / "cache"))
        yield Found(folder, read_corpus(write_documents(folder / "text.jsonl", lengths)))


@pytest.fixture(scope="module")
def made(found):
    return {latent: found.maker.make(latent) for latent in range(D_SAE)}


@pytest.fixture(scope="module")
def codes(found):
    """What every latent does in every row, computed at once."""
    return dense(found.rows.tokens(np.arange(found.rows.n_rows)).numpy())


def maker(found: Found, **changes) -> ExampleMaker:
    config = ExampleConfig(**changes)
    return ExampleMaker(found.evidence, found.visits, found.rows, Decoder(tokenizer()), config, 0)


def grams(item) -> set:
    tokens = item.window.tokens
    return {tokens[i : i + GRAM] for i in range(max(1, len(tokens) - GRAM + 1))}


def every(made: dict[int, Examples], split: str, tier: str) -> list:
    return [item for examples in made.values() for item in examples.of(split) if item.tier == tier]


def test_windows_are_pieces_of_rows_as_they_are(found, made, codes):
    rows, decoder = found.rows, Decoder(tokenizer())
    for latent, examples in made.items():
        for split in SPLITS:
            for item in examples.of(split):
                window = item.window
                row, place = divmod(window.start, CONTEXT_LENGTH)
                n = len(window.tokens)
                assert rows.first <= place <= place + n <= rows.length[row]  # neither BOS nor padding
                assert list(window.tokens) == rows.tokens([row])[0, place : place + n].tolist()
                assert window.activations == tuple(codes[row, place : place + n, latent].tolist())
                assert window.section == rows.section[row]
                assert SPLITS[rows.split[row]] == split
                assert window.text == decoder.text(list(window.tokens))
                assert "".join(window.pieces()) == window.text
                assert n == min(WINDOW, rows.length[row] - rows.first) or item.tier != ACTIVE


def test_no_section_is_in_two_parts(made):
    for examples in made.values():
        sections = [{item.window.section for item in examples.of(split)} for split in SPLITS]
        assert not any(a & b for a, b in itertools.combinations(sections, 2))
    tiers = {item.tier for examples in made.values() for item in examples.test}
    assert tiers == {ACTIVE, *TIERS}


def test_no_window_repeats_what_another_part_shows(made):
    for examples in made.values():
        shown = set().union(*(grams(item) for item in examples.explain))
        for item in examples.test + examples.valid:
            assert len(grams(item) & shown) < REPEATED * len(grams(item))
        starts = [item.window.start for split in SPLITS for item in examples.of(split) if item.active]
        assert len(set(starts)) == len(starts)


def test_text_that_repeats_is_shown_once(tmp_path, monkeypatch):
    phrase = drawn(5, 30)
    phrase[10:14] = [WORDS[9], WORDS[49], WORDS[89], WORDS[129]]  # a latent fires on at least one of them
    lines = []
    for number in range(300):
        start = random.Random(number).randrange(100)
        text = drawn(number, 150)
        text[start : start + 30] = phrase if number % 2 else text[start : start + 30]
        lines.append(json.dumps({"text": " ".join(text)}) + "\n")
    (tmp_path / "text.jsonl").write_text("".join(lines))
    found = Found(tmp_path, read_corpus(tmp_path / "text.jsonl"), [9])
    examples = found.maker.make(9)
    ids = tokenizer().convert_tokens_to_ids(phrase[8:16])
    holding = [
        item.window.start
        for split in SPLITS
        for item in examples.of(split)
        if any(list(item.window.tokens[i : i + 8]) == ids for i in range(25))
    ]
    positions = [p for s in SPLITS for p in found.evidence.places("sample", s, 9).tolist()]
    in_phrase = sum(any(found.rows.span(max(p - 12, 0), 24)[i : i + 8] == ids for i in range(17)) for p in positions)
    assert in_phrase > 20
    assert len(holding) <= 6  # only where the window shows little of it
    alone = maker(found, shown=1, contrast=0, valid=0).make(9)
    assert [i for i in alone.test if i.active] == [i for i in examples.test if i.active]  # the test chooses first


def test_silent_windows_are_silent_at_every_token(made, codes):
    counts = Counter()
    for latent, examples in made.items():
        for split in SPLITS:
            for item in examples.of(split):
                row, place = divmod(item.window.start, CONTEXT_LENGTH)
                values = codes[row, place : place + len(item.window.tokens), latent]
                if item.active:
                    assert values[item.window.peak] != 0
                else:
                    counts[split, item.tier] += 1
                    assert not values.any()
                    assert not any(item.window.activations)
                    assert item.decile == -1
    assert set(counts) == {("test", t) for t in TIERS} | {("explain", "random"), ("valid", "random")}
    assert min(counts.values()) > 100


def test_same_token_windows_hold_one_of_its_tokens(found, made):
    seen = 0
    for latent, examples in made.items():
        positions = found.evidence.places("sample", "explain", latent)
        usual = {found.rows.span(int(p), 1)[0] for p in positions}
        for item in examples.test:
            if item.tier == "same_token":
                seen += 1
                assert item.window.tokens[item.window.peak] in usual
    assert seen > 500


def test_neighbors_fire_in_neighbor_windows(found, made, codes):
    for latent, examples in made.items():
        near = [(latent + 40) % D_SAE, (latent + 1) % D_SAE]
        for item in examples.test:
            if item.tier == "neighbor":
                row, place = divmod(item.window.start + item.window.peak, CONTEXT_LENGTH)
                assert codes[row, place, near].any()


def test_a_tier_is_never_filled_from_another(found, made, tmp_path):
    by_tier = {latent: Counter(item.tier for item in examples.test) for latent, examples in made.items()}
    assert by_tier[DENSE].keys() == {ACTIVE}  # it is silent nowhere
    assert "same_token" not in by_tier[RARE]  # it always fires on its one token
    assert by_tier[RARE]["random"] == by_tier[9]["random"] == 50
    alone = plan_places(found.evidence, found.rows, np.array([9]), [[]], 0)  # without neighbors
    visits = visit_places(found.codes, found.rows, alone, tmp_path)
    examples = ExampleMaker(found.evidence, visits, found.rows, Decoder(tokenizer()), ExampleConfig(), 0).make(9)
    counts = Counter(item.tier for item in examples.test)
    assert counts.keys() == {ACTIVE, "random", "same_token"}
    assert counts["same_token"] < counts["random"] == 50


def test_too_few_windows_are_said_to_be(made):
    assert made[DEAD].missing.startswith("dead: it fires on none of")
    assert not any(made[DEAD].of(split) for split in SPLITS)
    assert made[DENSE].missing.startswith("insufficient: it is silent in no random window")
    assert not made[9].missing
    assert sum(not examples.missing for examples in made.values()) > 50


@pytest.mark.parametrize(("n", "sections", "missing"), [(9, 9, True), (12, 4, True), (12, 12, False)])
def test_ten_windows_of_five_sections_are_the_least(tmp_path, monkeypatch, n, sections, missing):
    silent = [w for w in WORDS[:-1] if int(w[1:]) % 40 != 9]
    draw = random.Random(0)
    lines = [[draw.choice(silent) for _ in range(40)] for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in lines))
    rows = read_corpus(tmp_path / "text.jsonl")
    parts = {number: int(rows.split[number]) for number in range(60)}
    test = [number for number, part in parts.items() if part == 2]
    explain = [number for number, part in parts.items() if part == 0]
    before = next(w for w in silent if (int(w[1:]) + 9) % 3)
    for number in explain[:5]:
        lines[number][19:21] = [before, WORDS[9]]
    per = -(-n // sections)
    placed = 0
    for number in test[:sections]:
        longer = [draw.choice(silent) for _ in range(60 * per)]
        for at in range(min(per, n - placed)):
            longer[60 * at + 19 : 60 * at + 21] = [before, WORDS[9]]
            placed += 1
        lines[number] = longer
    assert placed == n
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in lines))
    found = Found(tmp_path, read_corpus(tmp_path / "text.jsonl"), [9])
    examples = found.maker.make(9)
    active = [item for item in examples.test if item.active]
    assert len(active) == n
    assert len({item.window.section for item in active}) == sections
    assert examples.missing.startswith("insufficient: ") == missing
    assert bool(examples.missing) == missing


def test_sections_of_one_book_are_one_document(tmp_path):
    silent = [w for w in WORDS[:-1] if int(w[1:]) % 40 != 9]
    draw, before = random.Random(0), next(w for w in silent if (int(w[1:]) + 9) % 3)
    book = [draw.choice(silent) for _ in range(20_000)]
    for at in range(20, 20_000, 60):
        book[at : at + 2] = [before, WORDS[9]]
    texts = [[draw.choice(silent) for _ in range(40)] for _ in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": " ".join(t)}) + "\n" for t in [*texts, book]))
    (tmp_path / "text.txt").write_text(" ".join(book))
    documents, blocks = (
        Found(tmp_path / kind, read_corpus(tmp_path / f"text.{kind}"), [9]).maker.make(9) for kind in ("jsonl", "txt")
    )
    sections = {item.window.section for item in documents.test if item.active}
    assert len(sections) > 5
    assert documents.missing.endswith("active windows from 1 documents in test")
    assert not blocks.missing  # of a text without documents, sections are all there is


def test_the_peak_lies_anywhere_within_the_window(found, made):
    def has_room(window) -> bool:
        """Whether the row has room for the window, wherever its place lies in it."""
        row, place = divmod(window.start + window.peak, CONTEXT_LENGTH)
        first, last = place - (OFFSETS[1] - 1), place - OFFSETS[0] + WINDOW
        return found.rows.first <= first and last <= found.rows.length[row]

    windows = [item.window for split in SPLITS for item in every(made, split, ACTIVE)]
    interior = [window.peak for window in windows if has_room(window)]
    assert chi_square_of_places(interior) < 60  # of 19 degrees of freedom
    assert chi_square_of_places([24] * len(interior)) > 1000
    assert chi_square_of_places([place for place in interior if place < 26]) > 60


def chi_square_of_places(peaks: list[int]) -> float:
    counts = np.bincount(peaks, minlength=WINDOW)
    inside = counts[slice(*OFFSETS)]
    assert inside.sum() == counts.sum() > 500
    return float(((inside - inside.mean()) ** 2 / inside.mean()).sum())


def shapes(items: list) -> Counter:
    return Counter((item.window.peak, len(item.window.tokens), item.marks) for item in items)


def test_silent_windows_have_the_shapes_of_active_ones(made):
    equal = 0
    for examples in made.values():
        for split in ("valid", "test"):
            active = [item for item in examples.of(split) if item.active]
            for tier in TIERS:
                silent = [item for item in examples.of(split) if item.tier == tier]
                assert len({item.window.start + item.window.peak for item in silent}) == len(silent)
                if len(silent) == len(active):
                    equal += 1
                    assert shapes(silent) == shapes(active)
                elif len(silent) < len(active):
                    assert not shapes(silent) - shapes(active)
    assert equal > 60
    assert len({len(item.window.tokens) for item in every(made, "test", ACTIVE)}) > 3  # short rows too


def test_marks_are_where_it_fires_most(made):
    for examples in made.values():
        for item in examples.test:
            if item.active:
                values = np.abs(item.window.activations)
                assert item.marks == tuple(np.flatnonzero(values >= MARK_SHARE * values.max()).tolist())
                assert item.window.peak in item.marks or values[item.window.peak] < MARK_SHARE * values.max()


def test_deciles_are_equal_parts_of_the_sample_the_weakest_first(found, made):
    for latent in (9, 21, 33, NEGATIVE):
        spots = found.visits.spots(latent)
        values = np.abs(spots.values[spots.kind == 0, 31])
        strengths: dict[int, list[float]] = {}
        for item in made[latent].test:
            if item.active:
                strengths.setdefault(item.decile, []).append(abs(item.window.activations[item.window.peak]))
        order = sorted(strengths)
        for low, high in itertools.pairwise(order):
            assert max(strengths[low]) <= min(strengths[high])
        for decile, some in strengths.items():
            for value in some:
                assert (values < value).mean() <= (decile + 1) / 10 + 0.01
                assert (values <= value).mean() >= decile / 10 - 0.01


def test_deciles_of_distinct_strengths_are_equal_in_number(tmp_path, monkeypatch):
    real_dense = dense

    def distinct(tokens, d_sae=D_SAE):
        said = np.cumsum(np.asarray(tokens, np.int64) ** 2, axis=1) % 9973  # of all that stands before
        return real_dense(tokens, d_sae) * (1 + said[..., None] / 1e5).astype(np.float32)

    monkeypatch.setattr("rigs.interp_evidence.dense", distinct)
    found = Found(tmp_path, read_corpus(write_documents(tmp_path / "text.jsonl", [150] * 150)), [9, 21])
    for latent in (9, 21):
        spots = found.visits.spots(latent)
        values = np.abs(spots.values[spots.kind == 0, 31])
        build = interp.evidence.examples._Build(found.maker, latent)
        counts = np.bincount(np.searchsorted(build.edges, values, side="right"), minlength=10)
        assert len(values) == 180
        assert len(np.unique(values)) > 170
        assert counts.max() - counts.min() <= 2
        deciles = Counter(item.decile for item in maker(found, test=40).make(latent).test if item.active)
        assert all(abs(deciles[d] - 4) <= 1 for d in range(10))


@pytest.mark.parametrize("how", ["deciles", "top", "random", "mix"])
def test_what_is_shown_is_chosen_as_asked(found, how):
    latent = 21
    examples = maker(found, shown=20, shown_from=how).make(latent)
    shown = [item for item in examples.explain if item.active]
    assert len(shown) == 20
    strengths = [item.window.strength for item in shown]
    assert strengths == sorted(strengths, reverse=True)  # the strongest first
    assert not any(item.active for item in examples.explain[20:])
    spots = found.visits.spots(latent)
    here = (spots.split == 0) & (spots.kind < 2)
    best = np.sort(np.abs(spots.values[here, 31]))[::-1]
    places = sorted((abs(item.window.activations[item.window.peak]) for item in shown), reverse=True)
    if how == "top":
        assert places == pytest.approx(best[:20], rel=0.2)
    if how == "mix":
        assert np.mean(places[:4]) >= 0.9 * best[:4].mean()
    if how in ("random", "deciles"):
        assert places[10] < best[10]
    assert [i.window for i in examples.test] == [i.window for i in maker(found).make(latent).test]  # the same test


def test_numbers_of_windows_are_those_asked_for(found):
    examples = maker(found, shown=7, contrast=3, valid=4, test=11).make(21)
    counts = {split: Counter(item.tier for item in examples.of(split)) for split in SPLITS}
    assert counts["explain"] == {ACTIVE: 7, "random": 3}
    assert counts["valid"] == {ACTIVE: 4, "random": 4}
    assert counts["test"] == {ACTIVE: 11, **dict.fromkeys(TIERS, 11)}
    without = maker(found, contrast=0, valid=0).make(21)
    assert (len(without.explain), len(without.valid)) == (40, 0)


def test_the_same_seed_makes_the_same_examples(found, made):
    again = ExampleMaker(found.evidence, found.visits, found.rows, Decoder(tokenizer()), ExampleConfig(), 0)
    other = ExampleMaker(found.evidence, found.visits, found.rows, Decoder(tokenizer()), ExampleConfig(), 1)
    assert again.make(21) == made[21]
    assert other.make(21).test != made[21].test


def test_facts(found, made, codes):
    kept = found.rows.split >= 0
    for latent in (CONTEXT, NEGATIVE, 9):
        facts, values = made[latent].facts, codes[kept, :, latent]
        assert facts.fired == (values != 0).sum()
        assert facts.tokens == found.evidence.tokens
        assert facts.largest == np.abs(values).max()
        assert sum(facts.histogram) == sum(facts.positions) == facts.fired
        assert sum(share for _, share in facts.top_tokens) == pytest.approx(1)
        assert list(facts.top_tokens) == sorted(facts.top_tokens, key=lambda pair: -pair[1])
    assert {piece.strip() for piece, _ in made[CONTEXT].facts.top_tokens} == {WORDS[0]}
    assert made[DEAD].facts.largest == 0
    assert made[DEAD].facts.top_tokens == ()


def features(item) -> list[float]:
    """All that a judge could see of a window without reading it, where marks are shown."""
    marks, n = item.marks, len(item.window.tokens)
    marked = np.zeros(WINDOW)
    marked[list(marks)] = 1
    gaps = np.diff(marks) if len(marks) > 1 else np.zeros(1)
    return [len(marks), n, item.window.peak, min(marks), max(marks), float(np.mean(marks)), float(gaps.max()), *marked]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["linear", "trees"])
def test_marks_and_shapes_do_not_tell_the_classes_apart(made, model):
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def auc(x, y, groups) -> float:
        plain = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300))
        classifier = plain if model == "linear" else HistGradientBoostingClassifier(max_iter=30)
        p = cross_val_predict(classifier, x, y, groups=groups, cv=GroupKFold(5), method="predict_proba")[:, 1]
        return float(roc_auc_score(y, p))

    scored = [latent for latent in ORDINARY if not made[latent].missing]
    for tier in TIERS:
        rows = [(item, latent) for latent in scored for item in made[latent].test if item.tier in (ACTIVE, tier)]
        x = np.array([features(item) for item, _ in rows])
        y = np.array([item.active for item, _ in rows])
        assert len(y) >= 2000
        assert 0.45 < auc(x, y, [latent for _, latent in rows]) < 0.55, tier
    shifted = x.copy()
    shifted[:, 0] += y * (np.arange(len(y)) % 3 == 0)  # one more mark in a third of the active ones
    assert auc(shifted, y, [latent for _, latent in rows]) > 0.55


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shown_from": "deciels"}, r"examples.shown_from: .*Did you mean 'deciles'"),
        ({"test": 9}, r"examples.test: 9"),
        ({"shown": 0}, r"examples.shown: 0"),
        ({"valid": -1}, r"examples.valid: -1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        ExampleConfig(**changes).validate()
    ExampleConfig().validate()
