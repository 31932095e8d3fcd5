"""What every explainer and every scorer promises. A new one is tested by being there."""

import json
from dataclasses import asdict, replace

import pytest
from rigs.interp_examples import BATCH, RIGHT, SINGLE, label, planted

from interp.client.requests import ROLES, Abilities, Chat, Reply, cache_key
from interp.explainers import Explainer
from interp.records import Examples, Explanation, Judgement
from interp.scorers import Scorer, Trial
from sae.base.plugins import names

ALL = Abilities(choices=True, structured="json_schema", prompt_logprobs=True, prompt_top=20)
ABILITIES = {"single": SINGLE, "batch": BATCH, "all": ALL, "fits": Abilities(fits_texts=True), "none": Abilities()}
PASSAGES = [{"section": i, "clean": f"clean {i}", "amplified": f"more {i}"} for i in range(6)]
EXAMPLES = planted(n=12)
PREPARED = {"strength": 1.0, "kl": 1.0, "passages": PASSAGES}
WRONG = (Reply(), Reply(text="maybe"), Reply(data={}), Reply(data={"answers": "yes"}), Reply(data=[]))
"""Answers to something else."""


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
