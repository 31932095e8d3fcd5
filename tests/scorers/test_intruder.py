"""The intruder scorer: how questions are made, and what becomes of answers."""

from collections import Counter
from dataclasses import replace

import pytest
from rigs.interp_examples import BATCH, SINGLE, facts, judge, label, planted, texts_of

from interp.client.requests import Reply
from interp.prompts.windows import shown
from interp.records import Judgement
from interp.scorers import Trial
from interp.scorers.intruder import Intruder
from sae.base.errors import ConfigError

EXAMPLES = planted(3)


def test_questions_hold_one_silent_window_at_a_random_place():
    tasks = Intruder(questions=40).tasks(EXAMPLES, "test", {})
    assert len(tasks) == 40
    for task in tasks:
        assert len(task.items) == 5
        assert [item.tier for item in task.items].count("random") == 1
        assert task.items[int(task.truth)].tier == "random"
        assert sum(item.active for item in task.items) == 4
        assert len({item.window.section for item in task.items}) == 5
        assert task.section == task.items[int(task.truth)].window.section
    assert set(Counter(task.truth for task in tasks)) == {0, 1, 2, 3, 4}
    assert len({task.section for task in tasks}) == 40
    used = Counter(id(item) for task in tasks for item in task.items if item.active)
    assert set(used.values()) == {4}  # 40 questions of 4 among 40 windows: each serves as often
    assert tasks == Intruder(questions=40).tasks(EXAMPLES, "test", {})
    assert tasks != Intruder(questions=40).tasks(replace(EXAMPLES, latent=4), "test", {})


def test_windows_of_one_section_are_no_common_ground():
    few = tuple(
        replace(item, window=replace(item.window, section=n % 3)) if item.active else item
        for n, item in enumerate(EXAMPLES.test)
    )
    assert Intruder().tasks(replace(EXAMPLES, test=few), "test", {}) == []
    assert Intruder(windows=4).tasks(replace(EXAMPLES, test=few), "test", {})
    assert Intruder().tasks(replace(EXAMPLES, test=()), "test", {}) == []


@pytest.mark.parametrize("abilities", [SINGLE, BATCH])
def test_requests_show_the_windows_alone(abilities):
    tasks = Intruder().tasks(EXAMPLES, "test", {})
    requests = Intruder().requests(Trial(label("a secret"), tasks, abilities))
    for task, request in zip(tasks, requests, strict=True):
        labels, texts = zip(*texts_of(request)[1], strict=True)
        assert list(texts) == [shown(item.window) for item in task.items]
        assert request.choices == (labels if abilities.choices else ())
        assert bool(request.schema) != abilities.choices
        assert "secret" not in str(request.messages)


def test_answers_are_read_by_number_or_id_and_nothing_else():
    tasks = Intruder().tasks(EXAMPLES, "test", {})[:4]
    read = Intruder().judgements
    replies = [
        Reply(probabilities={"1": 0.1, "4": 0.6}),
        Reply(probabilities={"1": 0.2, "2": 0.1}),
        Reply(failure="timeout"),
        Reply(probabilities={"7": 0.9}),
    ]
    assert read(Trial(label(""), tasks, SINGLE), replies) == [
        Judgement(3.0),
        Judgement(None, "no_mass"),
        Judgement(None, "timeout"),
        Judgement(None, "no_mass"),
    ]
    ids = texts_of(Intruder().requests(Trial(label(""), tasks, BATCH))[1])[1]
    answers = [
        Reply(data={"id": "1"}),
        Reply(data={"id": ids[2][0]}),
        Reply(data=None, failure="empty"),
        Reply(data=[2]),
    ]
    assert read(Trial(label(""), tasks, BATCH), answers) == [
        Judgement(None, "parse"),
        Judgement(2.0),
        Judgement(None, "empty"),
        Judgement(None, "parse"),
    ]


def test_missing_answers_are_not_wrong_ones():
    scorer = Intruder()
    tasks = scorer.tasks(EXAMPLES, "test", {})
    replies = [judge(request) for request in scorer.requests(Trial(label(""), tasks, SINGLE))]
    replies[3:8] = [Reply(failure="refused")] * 5
    score = scorer.score(tasks, scorer.judgements(Trial(label(""), tasks, SINGLE), replies), facts())
    assert (score.measures["accuracy"].value, score.n, score.coverage, score.invalid) == (1, 15, 0.75, {"refused": 5})
    none = scorer.score([], [], facts())
    assert (none.measures["accuracy"].value, none.n, none.coverage) == (None, 0, 0)


@pytest.mark.parametrize(
    ("windows", "questions", "field"), [(2, 1, "windows"), (10, 1, "windows"), (5, 0, "questions")]
)
def test_bad_fields_are_named(windows, questions, field):
    with pytest.raises(ConfigError, match=rf"scorers\.intruder\.{field}: "):
        Intruder(windows, questions).validate()
    Intruder().validate()
