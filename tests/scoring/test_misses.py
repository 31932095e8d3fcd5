"""What a judge got wrong, and by how much: told by ranks, so that any scale will do, and not of what has no answer."""

import math
import random

import numpy as np
import pytest
from rigs.interp_examples import make_window

from interp.records import ACTIVE, Item, Judgement, Task
from interp.scorers.intervention import Intervention
from interp.scorers.intruder import Intruder
from interp.scorers.simulation import Simulation
from interp.scoring.metrics import auroc, correlation
from interp.scoring.misses import MISSING, RIGHT, SEEN, ranked_misses, worth_seeing


def tasks(*truths):
    return [Task((), float(truth), ACTIVE if truth else "random") for truth in truths]


def answers(*values):
    return [Judgement(value, "" if value is not None else "timeout") for value in values]


def drawn(n=60, seed=0):
    draw = random.Random(seed)
    truths = [draw.random() < 0.4 for _ in range(n)]
    values = [None if draw.random() < 0.1 else draw.gauss(float(truth), 1) for truth in truths]
    return tasks(*truths), answers(*values)


@pytest.mark.parametrize("scale", [lambda v: v, lambda v: 1 / (1 + math.exp(-v)), lambda v: 1000 * v - 7, math.atan])
def test_only_the_order_of_answers_counts(scale):
    asked, found = drawn()
    other = [one if one.value is None else Judgement(scale(one.value)) for one in found]
    assert ranked_misses(asked, other) == ranked_misses(asked, found)


def test_on_average_it_is_what_is_missing_to_an_auroc_of_1():
    asked, found = drawn(200)
    pairs = [(task.truth, one.value) for task, one in zip(asked, found, strict=True) if one.valid]
    measured = auroc([value for _, value in pairs], [truth for truth, _ in pairs], [-1] * len(pairs)).value
    misses = ranked_misses(asked, found)
    for kind in (0.0, 1.0):
        mine = [miss for miss, task in zip(misses, asked, strict=True) if miss is not None and task.truth == kind]
        others = sum(truth != kind for truth, _ in pairs)
        assert np.mean(mine) * (others + 1) / others - 0.5 / others == pytest.approx(1 - measured)


def test_a_missing_answer_has_no_miss():
    asked, found = drawn()
    for threshold in (None, 0.3):
        misses = ranked_misses(asked, found, threshold)
        assert [miss is None for miss in misses] == [not one.valid for one in found]
        assert all(0 < miss < 1 for miss in misses if miss is not None)


def test_a_threshold_says_which_answers_are_wrong():
    asked, found = drawn()
    for miss, task, one in zip(ranked_misses(asked, found, 0.3), asked, found, strict=True):
        if one.value is not None:
            assert (miss > 0.5) == ((one.value >= 0.3) != (task.truth > 0))


def test_without_the_other_kind_only_a_threshold_tells():
    assert ranked_misses(tasks(1, 1), answers(0.9, 0.1)) == [0.5, 0.5]
    right, wrong = ranked_misses(tasks(1, 1), answers(0.9, 0.1), 0.5)
    assert right < 0.5 < wrong


def test_the_worst_come_first_then_what_is_missing_then_what_is_right():
    asked, found = drawn(200, seed=1)
    misses = ranked_misses(asked, found, 0.5)
    chosen = worth_seeing(asked, found, misses)
    told = [misses[i] for i in chosen]
    n_wrong, n_missing = SEEN - RIGHT - MISSING, MISSING
    every = sorted((miss for miss in misses if miss is not None), reverse=True)
    assert told[:n_wrong] == every[:n_wrong]
    assert told[n_wrong : n_wrong + n_missing] == [None] * n_missing
    for kind in (0, 1):  # the most right of either kind
        right = [miss for miss, task in zip(misses, asked, strict=True) if miss is not None and task.truth == kind]
        shown = [misses[i] for i in chosen[n_wrong + n_missing :] if asked[i].truth == kind]
        assert shown == sorted(right)[: RIGHT // 2]
    assert len(set(chosen)) == SEEN


@pytest.mark.parametrize(
    ("wrong", "lost", "right"), [(0, 0, 30), (30, 0, 0), (0, 30, 0), (1, 1, 1), (3, 9, 2), (30, 0, 2)]
)
def test_room_that_one_kind_leaves_is_for_the_others(wrong, lost, right):
    misses = [0.9] * wrong + [None] * lost + [0.1] * right
    found = answers(*(None if miss is None else 0.5 for miss in misses))
    chosen = worth_seeing(tasks(*[1] * len(misses)), found, misses)
    assert len(chosen) == min(SEEN, len(misses))
    kinds = [misses[i] for i in chosen]
    assert sum(kind == 0.1 for kind in kinds) >= min(RIGHT, right)
    assert sum(kind is None for kind in kinds) >= min(MISSING, lost)
    assert kinds == sorted(kinds, key=lambda kind: {0.9: 0, None: 1, 0.1: 2}[kind])


def test_of_equal_ones_both_kinds_are_seen():
    asked = tasks(*[1] * 50, *[0] * 50)
    chosen = worth_seeing(asked, answers(*[0.5] * 100), [0.9] * 100)
    assert sum(asked[i].truth for i in chosen) == SEEN / 2
    chosen = worth_seeing(asked, answers(*[0.5] * 100), [0.1] * 100)
    assert sum(asked[i].truth for i in chosen) == SEEN / 2


def test_every_reason_is_seen_before_one_again():
    found = [Judgement(None, reason) for reason in ["timeout"] * 9 + ["parse", "refused"]]
    chosen = worth_seeing(tasks(*[1] * 11), found, [None] * 11, most=3)
    assert {found[i].reason for i in chosen} == {"timeout", "parse", "refused"}


def test_another_text_than_the_intruder_is_a_miss():
    asked = [Task((), 3.0), Task((), 3.0), Task((), 3.0)]
    assert Intruder().misses(asked, answers(3.0, 1.0, None)) == [0.0, 1.0, None]


def test_an_explanation_that_became_less_likely_is_a_miss():
    misses = Intervention().misses([Task((), 1.0)] * 5, answers(2.0, 0.0, -2.0, None, -1e6))
    assert misses[0] < 0.5 == misses[1] < misses[2] < misses[4] <= 1
    assert misses[3] is None


def test_levels_that_follow_the_activations_are_right():
    fires = [{3: 5.0}, {20: 2.0}, {}, {7: 4.0, 8: 3.0}]
    windows = [make_window(["a"] * 32, fired) for fired in fires]
    asked = [Task((Item(window, ACTIVE),), float(any(window.activations))) for window in windows]
    given = [tuple(2 * value for value in window.activations) for window in windows]
    given[1], given[2] = given[1][::-1], (*given[2][:5], 9.0, *given[2][6:])
    found = [Judgement(max(levels), levels=levels) for levels in given]
    misses = Simulation().misses([*asked, asked[0]], [*found, Judgement(None, "no_mass")])
    assert misses[4] is None
    assert max(misses[0], misses[3]) < min(misses[1], misses[2])
    apart = np.array([miss / (1 - miss) * 2 for miss in misses[:4]])
    r = correlation(given, [window.activations for window in windows], range(4)).value
    assert apart.mean() == pytest.approx(2 - 2 * r)  # windows are equally long
    silent = [Judgement(0.0, levels=(0.0,) * 32)] * 4
    assert all(0 <= miss < 1 for miss in Simulation().misses(asked, silent))
