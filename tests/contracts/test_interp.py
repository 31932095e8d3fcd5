"""What every explainer and every scorer promises. A new one is tested by being there."""

import json
import random
from dataclasses import asdict, replace
from functools import cache, partial

import numpy as np
import pytest
from rigs.interp_examples import BATCH, RIGHT, SINGLE, label, planted

from interp.client.requests import ROLES, Abilities, Chat, Reply, cache_key
from interp.explainers import Explainer
from interp.records import Examples, Explanation, Judgement
from interp.run.flows import explanation_flow, score_flow
from interp.run.kept import FEW, LONGEST, asked_of, cut, seen_kept, seen_of
from interp.scorers import Scorer, Trial
from interp.scorers.fuzzing import Fuzzing
from interp.scorers.intruder import Intruder
from interp.scoring.misses import SEEN
from sae.base.plugins import names

ALL = Abilities(choices=True, structured="json_schema", prompt_logprobs=True, prompt_top=20)
ABILITIES = {"single": SINGLE, "batch": BATCH, "all": ALL, "fits": Abilities(fits_texts=True), "none": Abilities()}
PASSAGES = [{"section": i, "clean": f"clean {i}", "amplified": f"more {i}"} for i in range(6)]
EXAMPLES = planted(n=12)
PREPARED = {"strength": 1.0, "kl": 1.0, "passages": PASSAGES}
WRONG = (Reply(), Reply(text="maybe"), Reply(data={}), Reply(data={"answers": "yes"}), Reply(data=[]))
"""Answers to something else."""


def run_flow(flow, failure):
    """Ends a flow whose every question fails; returns its row, and what it asked."""
    asked, replies = [], None
    while True:
        try:
            some = flow.send(replies)
        except StopIteration as ended:
            return ended.value, asked
        asked += some
        replies = [Reply(failure=failure) for _ in some]


@cache
def ways(of_text):
    """Returns every scorer with each of the abilities that make it ask in another way; chats alone, or all."""
    found = []
    for name, kind in names(Scorer).items():
        asked = []
        for able, abilities in ABILITIES.items():
            trial = Trial(label(RIGHT), kind().tasks(EXAMPLES, "test", PREPARED), abilities)
            requests = kind().requests(trial)
            fits = not of_text or all(isinstance(request, Chat) for request in requests)
            if requests and requests not in asked and fits:
                asked.append(requests)
                found.append(pytest.param(kind(), trial, requests, id=f"{name}-{able}"))
    return found


@pytest.fixture(params=names(Scorer))
def scorer(request):
    return names(Scorer)[request.param]()


@pytest.fixture(params=names(Explainer))
def explainer(request):
    return names(Explainer)[request.param]()


def test_a_scorer_says_who_is_asked_and_what_counts(scorer):
    scorer.validate()
    assert scorer.role in ROLES
    score = scorer.score([], [], EXAMPLES.facts)
    assert scorer.headline in score.measures
    assert scorer.needs_explanation or score.measures["chance"].value is not None
    assert score.n == 0
    assert all(measure.value is None or measure.value >= 0 for measure in score.measures.values())


@pytest.mark.parametrize(("scorer", "trial", "requests"), ways(of_text=False))
def test_the_same_question_is_asked_in_the_same_words(scorer, trial, requests):
    assert trial.tasks == scorer.tasks(EXAMPLES, "test", PREPARED)
    assert requests == scorer.requests(trial)
    assert {request.role for request in requests} == {scorer.role}
    keys = [cache_key(request, "model", "here", trial.abilities) for request in requests]
    assert len(set(keys)) == len(set(requests))
    json.dumps([asdict(task) for task in trial.tasks])


@pytest.mark.parametrize(("scorer", "trial", "requests"), ways(of_text=False))
def test_a_failed_call_is_never_a_score(scorer, trial, requests):
    found = scorer.judgements(trial, [Reply(failure="timeout") for _ in requests])
    assert found == [Judgement(None, "timeout")] * len(trial.tasks)
    score = scorer.score(trial.tasks, found, EXAMPLES.facts)
    assert (score.n, score.coverage, score.invalid) == (0, 0, {"timeout": len(trial.tasks)})
    assert score.measures[scorer.headline].value is None


@pytest.mark.parametrize(("scorer", "trial", "requests"), ways(of_text=False))
def test_what_is_missing_is_no_miss_and_stands_among_what_is_seen(scorer, trial, requests):
    lost = scorer.judgements(trial, [Reply(failure="timeout") for _ in requests])
    assert scorer.misses(trial.tasks, lost) == [None] * len(trial.tasks)
    row, asked = run_flow(score_flow(scorer, trial.explanation, EXAMPLES, PREPARED, trial.abilities), "timeout")
    assert asked[: len(requests)] == requests
    assert (row["status"], row["score"]["n"]) == ("failed", 0)
    seen = seen_of(json.loads(json.dumps(row)))
    assert 0 < len(seen) <= SEEN
    assert {(one.value, one.miss, one.reason) for one in seen} == {(None, None, "timeout")}


@pytest.mark.parametrize("scorer", names(Scorer))
def test_misses_rank_the_worst_first_and_what_is_seen_is_what_was_judged(scorer):
    scorer = names(Scorer)[scorer]()
    tasks = scorer.tasks(EXAMPLES, "test", PREPARED)
    draw = random.Random(0)
    values = [
        draw.gauss(task.truth, 1) if len(task.items) < 2 else (task.truth + draw.randrange(2)) % 5 for task in tasks
    ]
    levels = [tuple(draw.random() for item in task.items[:1] for _ in item.window.tokens) for task in tasks]
    given = [Judgement(*pair) for pair in zip(values, [""] * len(tasks), levels, strict=True)]
    given[1] = Judgement(None, "parse")
    for threshold in (None, 0.4):
        misses = scorer.misses(tasks, given, threshold)
        assert [miss is None for miss in misses] == [not judgement.valid for judgement in given]
        assert all(0 <= miss <= 1 for miss in misses if miss is not None)
        assert len(set(misses)) > 2 or isinstance(scorer, Intruder)
    found = seen_of(json.loads(json.dumps({"seen": seen_kept(scorer, tasks, given, misses)})))
    wrong = [one.miss for one in found if one.miss is not None and one.miss > 0.5]
    assert wrong == sorted(wrong, reverse=True) == [one.miss for one in found[: len(wrong)]]
    assert any(one.miss is not None and one.miss <= 0.5 for one in found)
    by_text = {(*(item.window.text for item in task.items), task.text): i for i, task in enumerate(tasks)}
    for one in found:
        at = by_text[(*(window.text for window in one.windows), one.text)]
        task = tasks[at]
        assert (one.truth, one.tier, one.decile, one.clean) == (task.truth, task.tier, task.decile, task.clean)
        assert (one.value, one.reason) == (given[at].value, given[at].reason)
        assert one.marks == (task.items[0].marks if isinstance(scorer, Fuzzing) else ())
        assert one.levels == pytest.approx(given[at].levels, abs=5e-4)
        assert one.miss == misses[at]
        for window, item in zip(one.windows, task.items, strict=True):
            assert replace(window, tokens=item.window.tokens) == replace(
                item.window, activations=tuple(np.array(item.window.activations, np.float32).tolist())
            )


@pytest.mark.parametrize(("scorer", "trial", "requests"), ways(of_text=False))
def test_what_was_asked_is_kept_as_it_went_out_and_nothing_of_a_null(scorer, trial, requests):
    flow = partial(score_flow, scorer, trial.explanation, EXAMPLES, PREPARED, trial.abilities)
    row, _ = run_flow(flow(), "refused")
    first = requests[0]
    texts = first.messages if isinstance(first, Chat) else [("text", t) for t in getattr(first, "texts", ())[:FEW]]
    wanted = texts or [("text", first.text)]
    kept = asked_of(json.loads(json.dumps(row)))
    for (role, text), (told_role, told_text) in zip(wanted, kept, strict=False):
        assert role == told_role
        assert told_text == text if len(text) <= LONGEST else told_text.startswith(text[: LONGEST // 2])
    assert len(kept) in (len(wanted), FEW + 1)
    null, _ = run_flow(flow(null=True), "refused")
    assert not {"seen", "asked"} & null.keys()
    assert {**row, **null} == row
    assert seen_of(null) == asked_of(null) == ()


@pytest.mark.parametrize(("scorer", "trial", "requests"), ways(of_text=True))
def test_an_answer_to_something_else_is_missing(scorer, trial, requests):
    """An answer in numbers has the form that was asked for, or is a failure: the client sees to it."""
    for reply in WRONG:
        found = scorer.judgements(trial, [reply for _ in requests])
        assert len(found) == len(trial.tasks)
        assert not any(judgement.valid for judgement in found)


def test_nothing_is_asked_of_a_latent_without_examples(scorer):
    examples = Examples(0, EXAMPLES.facts)
    assert scorer.tasks(examples, "test", {}) == []
    assert scorer.requests(Trial(label(RIGHT), [], ALL)) == []
    assert scorer.judgements(Trial(label(RIGHT), [], ALL), []) == []


def test_tests_are_of_the_test_split(scorer):
    examples = EXAMPLES
    starts = {item.window.start for item in examples.test}
    for task in scorer.tasks(examples, "test", PREPARED):
        assert {item.window.start for item in task.items} <= starts


def test_an_explainer_sees_the_explain_split_alone(explainer):
    explainer.validate()
    asked = explainer.requests(EXAMPLES, ALL)
    assert asked == explainer.requests(replace(EXAMPLES, valid=(), test=()), ALL)
    assert bool(asked) == explainer.needs_llm
    assert {request.role for request in asked} <= {"explainer"}


def test_an_explainer_s_question_is_kept(explainer):
    row, asked = run_flow(explanation_flow(explainer, EXAMPLES, {"explainer": ALL}, None), "refused")
    assert [text for _, text in asked_of(row)] == [cut(text) for one in asked[:1] for _, text in one.messages]
    assert bool(asked_of(row)) == explainer.needs_llm


def test_failed_calls_are_no_explanation(explainer):
    replies = [Reply(failure="refused") for _ in explainer.requests(EXAMPLES, ALL)]
    assert not (explainer.needs_llm and explainer.explanations(EXAMPLES, replies))
    bare = Examples(0, EXAMPLES.facts)
    assert explainer.explanations(bare, [Reply(failure="empty") for _ in explainer.requests(bare, ALL)]) == []


def test_explanations_are_texts_that_survive_the_journal(explainer):
    found = []
    for examples in (EXAMPLES, replace(EXAMPLES, facts=replace(EXAMPLES.facts, promoted=(" fig", " plum")))):
        replies = [Reply(data={"explanation": "ripe fruit"}) for _ in explainer.requests(examples, ALL)]
        found += explainer.explanations(examples, replies)
    for explanation in found:
        assert explanation.latent == EXAMPLES.latent
        assert explanation.text.strip()
        assert Explanation.from_json(json.loads(json.dumps(explanation.to_json()))) == explanation
