"""Detection and fuzzing: what is asked, in which order, and what becomes of every kind of answer."""

from collections import Counter
from dataclasses import replace

import pytest
from rigs.interp_examples import BATCH, RIGHT, SINGLE, facts, judge, label, planted, scored, texts_of

from interp.client.requests import Reply
from interp.prompts.windows import shown
from interp.records import Judgement
from interp.scorers import Trial
from interp.scorers.detection import Detection
from interp.scorers.fuzzing import Fuzzing
from sae.base.errors import ConfigError

EXAMPLES = planted(n=12)
FACTS = facts()


def asked(scorer, abilities, examples=EXAMPLES, explanation=None):
    tasks = scorer.tasks(examples, "test", {})
    return tasks, scorer.requests(Trial(explanation or label(RIGHT), tasks, abilities))


def judged(scorer, tasks, replies, abilities=SINGLE):
    return scorer.judgements(Trial(label(RIGHT), tasks, abilities), replies)


@pytest.mark.parametrize("scorer", [Detection(), Fuzzing()])
def test_one_window_a_request_is_answered_by_one_word(scorer):
    tasks, requests = asked(scorer, SINGLE)
    assert len(tasks) == len(requests) == len(EXAMPLES.test)
    for task, request in zip(tasks, requests, strict=True):
        assert (request.role, request.max_tokens, request.choices, request.schema) == ("judge", 1, ("yes", "no"), "")
        item = task.items[0]
        marks = item.marks if isinstance(scorer, Fuzzing) else ()
        assert texts_of(request) == (RIGHT, [("", shown(item.window, marks))])
        assert (task.truth, task.tier, task.decile) == (float(item.active), item.tier, item.decile)
        assert task.section == item.window.section
    assert ("<<" in requests[0].messages[1][1]) == isinstance(scorer, Fuzzing)


def test_several_windows_a_request_are_answered_by_id():
    tasks, requests = asked(Detection(windows_per_request=5), BATCH)
    assert [len(texts_of(request)[1]) for request in requests] == [5] * 9 + [3]  # the last batch is short
    assert [text for request in requests for _, text in texts_of(request)[1]] == [
        shown(t.items[0].window) for t in tasks
    ]
    assert len({request.schema for request in requests}) == 1
    assert all(request.max_tokens >= 32 * 4 and not request.choices for request in requests)
    found = judged(Detection(windows_per_request=5), tasks, [judge(request) for request in requests], BATCH)
    assert [judgement.value for judgement in found] == [0.9 if task.truth else 0.1 for task in tasks]


def test_a_request_does_not_tell_how_many_of_its_windows_are_active():
    mixes, firsts = Counter(), 0
    for latent in range(60):
        tasks = Detection().tasks(planted(latent, 16, ("random",)), "test", {})
        mixes[sum(task.truth for task in tasks[:8])] += 1
        firsts += tasks[0].truth
    assert set(mixes) == set(range(9))
    assert max(mixes.values()) < 20
    assert 15 < firsts < 45


def actives_by_request(latent, n_silent):
    """How many active windows each batch has, of 48 and so many silent ones."""
    few = planted(latent, 48, ("random",)).test
    more = [item for seed in range(1, 4) for item in planted(1000 * seed + latent, 48, ("random",)).test]
    silent = [item for item in (*few, *more) if not item.active][:n_silent]
    given = replace(planted(latent, 10), test=(*[item for item in few if item.active], *silent))
    truths = [task.truth for task in Detection().tasks(given, "test", {})]
    assert (sum(truths), len(truths)) == (48, 48 + n_silent)
    return [sum(truths[start : start + 8]) for start in range(0, len(truths), 8)]


@pytest.mark.parametrize(("n_silent", "numbers"), [(16, range(4, 9)), (48, range(9)), (144, range(5))])
def test_active_windows_last_to_the_last_request(n_silent, numbers):
    found = [actives_by_request(latent, n_silent) for latent in range(60)]
    for turn in zip(*found, strict=True):  # 8 times their share, in the first requests as in the last
        assert sum(turn) / len(turn) == pytest.approx(8 * 48 / (48 + n_silent), abs=1.25)
    first = Counter(turn for turn, *_ in found)
    assert set(first) == set(numbers)
    assert max(first.values()) < 2.5 * 60 / len(numbers)
    alike = sum(n in (0, 8) for turns in found for n in turns)
    assert alike < 0.35 * sum(map(len, found))


def test_probability_is_yes_against_no():
    tasks = Detection().tasks(EXAMPLES, "test", {})[:5]
    replies = [
        Reply(probabilities={"yes": 0.6, "no": 0.2}),
        Reply(probabilities={"yes": 0.2, "no": 0.2}),
        Reply(probabilities={"no": 0.7}),
        Reply(probabilities={}),
        Reply(probabilities={"yes": float("nan"), "no": 0.5}),
    ]
    found = judged(Detection(), tasks, replies)
    missing = Judgement(None, "no_mass")
    assert [found[0].value, found[2].value] == [pytest.approx(0.75), 0]
    assert found[1] == found[3] == found[4] == missing


@pytest.mark.parametrize("abilities", [SINGLE, BATCH], ids=["window", "batch"])
def test_a_failed_call_is_missing_with_its_reason(abilities):
    whole = scored(Detection(), EXAMPLES, label(RIGHT), abilities)
    failing = iter([True])

    def unlucky(chat):
        return Reply(failure="timeout") if next(failing, False) else judge(chat)

    score = scored(Detection(), EXAMPLES, label(RIGHT), abilities, unlucky)
    lost = 1 if abilities is SINGLE else 8
    assert (score.n, score.invalid) == (len(EXAMPLES.test) - lost, {"timeout": lost})
    assert score.coverage == pytest.approx(1 - lost / len(EXAMPLES.test))
    assert score.measures["balanced_accuracy"].value == whole.measures["balanced_accuracy"].value == 1


def test_examples_that_do_not_suffice_give_no_tasks():
    silent = replace(EXAMPLES, test=tuple(item for item in EXAMPLES.test if not item.active))
    active = replace(EXAMPLES, test=tuple(item for item in EXAMPLES.test if item.active))
    for examples in (silent, active, replace(EXAMPLES, test=())):
        assert Detection().tasks(examples, "test", {}) == Fuzzing().tasks(examples, "test", {}) == []
    one = replace(EXAMPLES, test=(active.test[0], silent.test[0]))
    assert scored(Detection(), one, label(RIGHT), BATCH).measures["balanced_accuracy"].value == 1


def test_fuzzing_leaves_out_what_has_no_marks():
    bare = replace(
        EXAMPLES, test=tuple(replace(item, marks=()) if n % 3 == 0 else item for n, item in enumerate(EXAMPLES.test))
    )
    tasks = Fuzzing().tasks(bare, "test", {})
    assert len(tasks) == sum(bool(item.marks) for item in bare.test) == 32
    assert len(Detection().tasks(bare, "test", {})) == len(bare.test)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (
            Detection(layout="windows"),
            r"scorers\.detection\.layout: 'windows' is not one of auto, .* Did you mean 'window'",
        ),
        (Fuzzing(windows_per_request=0), r"scorers\.fuzzing\.windows_per_request: 0 is too small"),
    ],
)
def test_bad_fields_are_named(scorer, message):
    with pytest.raises(ConfigError, match=message):
        scorer.validate()
    replace(scorer, layout="auto", windows_per_request=3).validate()
