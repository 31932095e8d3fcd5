"""Every figure against its definition or another's implementation; intervals by how often they hold the truth."""

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rigs.interp_examples import facts, make_window
from scipy.stats import binomtest, mannwhitneyu, pearsonr
from sklearn.metrics import balanced_accuracy_score, f1_score, precision_score, roc_auc_score

from interp.records import ACTIVE, TIERS, Item, Judgement, Measure, Task
from interp.scoring import metrics

NONE = Measure(None)
shares = st.integers(0, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))).filter(lambda pair: pair[1])


def independent(hits, n):
    return metrics.hit_rate([True] * hits + [False] * (n - hits), range(n))


def tasks_of(rows):
    """Rows of (tier, decile, value, section)."""
    item = Item(make_window(["a"]), "random")
    tasks = [Task((item,), float(tier == ACTIVE), tier, decile, section) for tier, decile, _, section in rows]
    return tasks, [Judgement(value, "" if value is not None else "parse") for _, _, value, _ in rows]


# Rates


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (19, 20), (81, 263), (1, 1000)])
def test_rates_have_wilsons_interval(hits, n):
    found, known = independent(hits, n), binomtest(hits, n).proportion_ci(method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((hits / n, known.low, known.high), abs=1e-12)


def test_windows_of_one_section_count_for_less_as_far_as_they_agree():
    alternating = [True, False] * 20
    alone = metrics.hit_rate(alternating, range(40))
    assert metrics.hit_rate(alternating, [i // 2 for i in range(40)]) == alone  # as they differ within, each is news
    assert metrics.hit_rate([i // 2 % 2 == 0 for i in range(40)], [i // 2 for i in range(40)]) == independent(10, 20)
    assert metrics.hit_rate([True] * 40, [i // 4 for i in range(40)]) == independent(10, 10)
    assert metrics.hit_rate(alternating, [-1] * 40) == alone  # no section is one of its own


def test_difference_of_rates_is_newcombes_example():
    """56/70 against 48/80 (Newcombe 1998, Stat. Med. 17:873, method 10)."""
    found = metrics.lift_over(independent(56, 70), independent(48, 80))
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@given(shares, shares)
def test_ratio_limits_solve_what_defines_them(a, b):
    x, y = independent(*a), independent(*b)
    found = metrics._ratio(x, y)
    if a[0] == b[0] == 0:
        assert found == NONE
        return
    assert found.low <= found.value <= found.high
    # R is a limit where the interval of x - R y ends at 0.
    assert metrics.linear((1.0, x), (-found.low, y)).low == pytest.approx(0, abs=1e-9)
    if math.isfinite(found.high):
        assert metrics.linear((1.0, x), (-found.high, y)).high == pytest.approx(0, abs=1e-9 * (1 + found.high))
    else:
        assert b[0] == 0


@given(shares, shares)
def test_made_of_rates_stays_in_range_and_is_symmetric(a, b):
    tpr, tnr = independent(*a), independent(*b)
    both = metrics.balanced_accuracy(tpr, tnr)
    assert 0 <= both.low <= both.value <= both.high <= 1
    assert both == metrics.balanced_accuracy(tnr, tpr)
    assert both.value == pytest.approx((a[0] / a[1] + b[0] / b[1]) / 2)
    lift, back = metrics.lift_over(tpr, tnr), metrics.lift_over(tnr, tpr)
    assert (lift.value, lift.low, lift.high) == pytest.approx((-back.value, -back.high, -back.low))
    for figure in (metrics.f1(tpr, tnr), *(metrics.precision(tpr, tnr, r) for r in (1e-6, 0.01, 0.5, 1.0))):
        assert figure == NONE or 0 <= figure.low <= figure.value <= figure.high <= 1


def test_precision_at_the_true_rate_shows_what_balanced_accuracy_hides():
    tpr, tnr = independent(45, 50), independent(45, 50)
    assert metrics.balanced_accuracy(tpr, tnr).value == pytest.approx(0.9)
    assert metrics.precision(tpr, tnr, 0.01).value == pytest.approx(0.009 / (0.009 + 0.099))
    assert metrics.precision(tpr, tnr, 0.5).value == pytest.approx(0.9)
    perfect = metrics.precision(independent(50, 50), independent(50, 50), 0.01)
    assert perfect.value == 1
    assert perfect.low < 0.2  # no false alarm in 50 silent windows is little news about 99 of 100
    assert metrics.precision(independent(0, 5), independent(5, 5), 0.01) == NONE  # nothing is said to hold
    assert metrics.precision(tpr, tnr, 0.0) == metrics.precision(tpr, tnr, None) == NONE


def test_nothing_comes_of_nothing():
    assert metrics.hit_rate([], []) == metrics.wilson(0.5, 0) == metrics.mean_measure([]) == NONE
    assert metrics.auroc([], [], []) == metrics.auroc([0.2, 0.3], [1, 1], [0, 1]) == NONE
    assert metrics.correlation([], [], []) == metrics.correlation([[1, 1]], [[1, 2]], [0]) == NONE
    some = Measure(0.5, 0.4, 0.6)
    assert metrics.lift_over(some, NONE) == metrics.lift_over(NONE, some) == metrics.f1(NONE, some) == NONE
    assert metrics.lift_over(some, Measure(0.25)) == Measure(0.25)
    assert metrics.best_threshold([], []) is None
    assert metrics.best_threshold([0.1, 0.2], [1, 1]) is None


# What has no closed form


@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.2, 0.25, 0.5, 0.9]), st.booleans(), st.integers(1, 4)),
        min_size=2,
        max_size=40,
    ).filter(lambda rows: len({truth for _, truth, _ in rows}) == 2)
)
def test_auroc_is_that_of_others(rows):
    values, truths, weights = (np.array(column, float) for column in zip(*rows, strict=True))
    plain = metrics.auroc(values, truths, range(len(values)))
    assert plain.value == pytest.approx(roc_auc_score(truths, values))
    active, silent = values[truths > 0], values[truths == 0]
    assert plain.value == pytest.approx(mannwhitneyu(active, silent).statistic / (len(active) * len(silent)))
    known = roc_auc_score(truths, values, sample_weight=weights)
    assert metrics.weighted_auroc(values, truths, weights[None])[0] == pytest.approx(known)
    assert metrics.weighted_auroc(values, 1 - truths, weights[None])[0] == pytest.approx(1 - known)
    assert metrics.weighted_auroc(np.exp(values), truths, weights[None])[0] == pytest.approx(known)
    assert 0 <= plain.low <= plain.value <= plain.high <= 1


def test_weights_are_repetitions():
    draw = np.random.default_rng(0)
    values, truths = draw.integers(0, 6, 50), draw.integers(0, 2, 50)
    weights = draw.integers(0, 3, (7, 50))
    found = metrics.weighted_auroc(values, truths, weights.astype(float))
    assert found == pytest.approx([roc_auc_score(np.repeat(truths, w), np.repeat(values, w)) for w in weights])


def test_bootstrap_is_that_of_a_plain_loop():
    draw = np.random.default_rng(1)
    truths, sections = draw.integers(0, 2, 80), draw.integers(0, 25, 80)
    values = truths + draw.normal(size=80) + draw.normal(size=25)[sections]
    found = metrics.auroc(values, truths, sections)
    again = []
    for _ in range(1000):
        chosen = np.concatenate([np.flatnonzero(sections == s) for s in draw.choice(25, 25)])
        again.append(roc_auc_score(truths[chosen], values[chosen]))
    low, high = np.percentile(again, (2.5, 97.5))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.02)
    assert found == metrics.auroc(values, truths, sections)
    shuffled = draw.permutation(80)
    other = metrics.auroc(values[shuffled], truths[shuffled], sections[shuffled])
    assert (other.value, other.low, other.high) == pytest.approx((found.value, found.low, found.high))


def test_a_perfect_auroc_is_not_certain():
    found = metrics.auroc([0.9] * 8 + [0.1] * 20, [1] * 8 + [0] * 20, range(28))
    assert found.value == found.high == 1
    assert found.low == pytest.approx(binomtest(8, 8).proportion_ci(method="wilson").low)


def test_correlation_is_pearsons_over_all_tokens():
    draw = np.random.default_rng(2)
    actual = [draw.normal(size=n) + 1000 for n in draw.integers(1, 9, 30)]
    predicted = [window * 2 + draw.normal(size=len(window)) for window in actual]
    found = metrics.correlation(predicted, actual, range(30))
    known = pearsonr(np.concatenate(predicted), np.concatenate(actual))
    assert found.value == pytest.approx(known.statistic)
    interval = known.confidence_interval()
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.06)
    assert metrics.correlation([[0.1] * 3] * 9, [[1, 2, 3]] * 9, range(9)) == NONE  # a constant predicts nothing
    assert metrics.correlation(actual, actual, range(30)).low == pytest.approx(1)


def test_mean_over_latents():
    draw = np.random.default_rng(3)
    values = draw.normal(3, 1, 200)
    found, half = metrics.mean_measure(values), 1.96 * values.std() / math.sqrt(200)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert metrics.mean_measure([0.3]) == Measure(0.3)  # of one, nothing says how far another would lie


# How often intervals hold the truth


def test_intervals_hold_the_truth_nineteen_times_in_twenty():
    """At 40 + 40 windows, where rates are coarse: in the mean over truths, and nearly so at each of them."""
    draw, n, runs, r = np.random.default_rng(4), 40, 500, 0.05
    truths = [(a, b) for a in (0.3, 0.6, 0.85) for b in (0.5, 0.8, 0.95)]
    names = ("balanced_accuracy", "f1", "precision", "difference")
    held = np.zeros((len(truths), len(names)))
    for row, (tpr, tnr) in zip(held, truths, strict=True):
        alarms = 1 - tnr
        known = ((tpr + tnr) / 2, 2 * tpr / (tpr + alarms + 1), r * tpr / (r * tpr + (1 - r) * alarms), tpr - tnr)
        for _ in range(runs):
            a, b = independent(draw.binomial(n, tpr), n), independent(draw.binomial(n, tnr), n)
            found = metrics.balanced_accuracy(a, b), metrics.f1(a, b), metrics.precision(a, b, r)
            for place, figure in enumerate((*found, metrics.lift_over(a, b))):
                row[place] += figure.low <= known[place] <= figure.high
    held /= runs
    assert ((held.mean(0) > 0.94) & (held.mean(0) < 0.97)).all(), dict(zip(names, held.mean(0), strict=True))
    assert held.min() > 0.91


def test_sections_are_what_makes_intervals_honest():
    draw, runs = np.random.default_rng(5), 800
    sections = np.repeat(np.arange(25), 4)
    held = {"rate": 0, "naive": 0, "auroc": 0}
    for run in range(runs):
        mood = draw.beta(1.2, 1.2, 25)[sections]  # windows of a section are alike
        hits = draw.random(100) < mood
        for name, by in (("rate", sections), ("naive", np.arange(100))):
            found = metrics.hit_rate(hits, by)
            held[name] += found.low <= 0.5 <= found.high
        if run < 200:
            truths = np.repeat([0, 1], 50)
            values = draw.normal(size=100) * 0.5 + draw.normal(size=25)[sections] + truths
            found = metrics.auroc(values, truths, sections)
            held["auroc"] += found.low <= 0.7364554 <= found.high  # Phi(1 / sqrt(2 * 1.25))
    assert held["naive"] / runs < 0.88
    assert 0.92 <= held["rate"] / runs <= 0.98
    assert 0.9 <= held["auroc"] / 200 <= 0.99


# Thresholds


@given(
    st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.1, 0.3, 0.30000000000000004, 5.0]), st.booleans()), max_size=20)
)
def test_threshold_is_the_best_there_is(rows):
    values, truths = [value for value, _ in rows], [float(truth) for _, truth in rows]
    found = metrics.best_threshold(values, truths)
    if len(set(truths)) < 2:
        assert found is None
        return

    def accuracy(threshold):
        return balanced_accuracy_score(truths, [float(value >= threshold) for value in values])

    assert accuracy(found) == pytest.approx(max(accuracy(threshold) for threshold in [*values, 9.0]))


def test_threshold_lies_in_the_widest_gap():
    assert metrics.best_threshold([0, 1, 4, 5], [0, 0, 1, 1]) == 2.5
    assert metrics.best_threshold([1, 2, 3, 3.5], [0, 1, 0, 1]) == 1.5


# Classification


def rows_of(seed, n=150, missing=0.0):
    draw = random.Random(seed)
    rows = []
    for section in range(n):
        tier = draw.choice([ACTIVE, ACTIVE, *TIERS])
        value = min(1.0, max(0.0, draw.gauss(0.65 if tier == ACTIVE else 0.4, 0.25)))
        decile = draw.randrange(10) if tier == ACTIVE else -1
        rows.append((tier, decile, None if draw.random() < missing else round(value, 1), section))
    return rows


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("threshold", [0.5, 0.35])
def test_classification_is_what_others_compute(seed, threshold):
    rows = rows_of(seed)
    score = metrics.classification(*tasks_of(rows), facts(rates={"test": 0.02}), threshold)
    assert (score.n, score.coverage, score.invalid) == (len(rows), 1, {})
    for tier in TIERS:
        mine = [(value, float(kind == ACTIVE)) for kind, _, value, _ in rows if kind in (ACTIVE, tier)]
        values, truths = np.array(mine).T
        said, suffix = values >= threshold, "" if tier == "random" else f"[{tier}]"
        equal = np.where(truths > 0, 1 / truths.mean(), 1 / (1 - truths.mean()))
        true = np.where(truths > 0, 0.02 / truths.mean(), 0.98 / (1 - truths.mean()))
        known = {
            "balanced_accuracy": balanced_accuracy_score(truths, said),
            "auroc": roc_auc_score(truths, values),
            "f1": f1_score(truths, said, sample_weight=equal),
            "tnr": 1 - said[truths == 0].mean(),
        }
        if not suffix:
            known["precision_true_rate"] = precision_score(truths, said, sample_weight=true)
            known["tpr"] = said[truths > 0].mean()
        for name, value in known.items():
            assert score.measures[name + suffix].value == pytest.approx(value), name
    for decile in range(10):
        hits = [value >= threshold for kind, at, value, _ in rows if kind == ACTIVE and at == decile]
        assert score.measures[f"recall_decile_{decile}"].value == pytest.approx(np.mean(hits))


def test_a_tier_is_never_filled_from_another():
    rows = [row for row in rows_of(0) if row[0] in (ACTIVE, "random", "neighbor")]
    without = metrics.classification(*tasks_of(rows), facts()).measures
    assert all(measure == NONE for name, measure in without.items() if name.endswith("[same_token]"))
    whole = metrics.classification(*tasks_of(rows_of(0)), facts()).measures
    assert {name: m for name, m in whole.items() if "same" not in name} == {
        name: m for name, m in without.items() if "same" not in name
    }
    hard = metrics.classification(*tasks_of([row for row in rows if row[0] != "random"]), facts()).measures
    assert hard["balanced_accuracy"] == hard["tnr"] == hard["precision_true_rate"] == NONE
    assert hard["balanced_accuracy[neighbor]"] == whole["balanced_accuracy[neighbor]"]


def test_missing_answers_are_in_no_figure_and_are_counted():
    rows = rows_of(1, missing=0.2)
    tasks, judgements = tasks_of(rows)
    score = metrics.classification(tasks, judgements, facts())
    kept = [row for row in rows if row[2] is not None]
    assert score.measures == metrics.classification(*tasks_of(kept), facts()).measures
    assert score.n == len(kept) < len(rows)
    assert score.coverage == pytest.approx(len(kept) / len(rows))
    assert score.invalid == {"parse": len(rows) - len(kept)}
    none = metrics.classification(tasks, [Judgement(None, "timeout")] * len(tasks), facts())
    assert set(none.measures.values()) == {NONE}
    assert (none.n, none.coverage, none.invalid) == (0, 0, {"timeout": len(tasks)})


def test_mere_yes_and_no_have_no_auroc():
    rows = [(tier, decile, None if value is None else round(value), s) for tier, decile, value, s in rows_of(2)]
    measures = metrics.classification(*tasks_of(rows), facts()).measures
    assert measures["auroc"] == NONE
    assert measures["balanced_accuracy"].value is not None


@given(
    st.lists(
        st.tuples(
            st.sampled_from([ACTIVE, *TIERS]),
            st.integers(-1, 9),
            st.one_of(st.none(), st.floats(0, 1)),
            st.integers(-1, 3),
        ),
        max_size=12,
    )
)
def test_no_answers_break_nothing(rows):
    score = metrics.classification(*tasks_of(rows), facts(rates={}))
    assert 0 <= score.coverage <= 1
    for measure in score.measures.values():
        if measure.value is None:
            assert measure == NONE
        elif measure.low is not None:
            assert 0 <= measure.low <= measure.value <= measure.high <= 1
