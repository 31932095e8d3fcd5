"""What every explainer and every scorer promises. A new one is tested by being there."""

import json
from dataclasses import asdict, replace

import pytest
from rigs.interp_examples import BATCH, RIGHT, SINGLE, label, planted

from interp.client.requests import FINAL, RETRYABLE, ROLES, Abilities, Chat, Reply, key
from interp.explainers import Explainer
from interp.records import Examples, Explanation
from interp.scorers import Scorer, Trial
from sae.base.plugins import names

ALL = Abilities(choices=True, structured="json_schema", prompt_logprobs=True, prompt_top=20)
ABILITIES = {"single": SINGLE, "batch": BATCH, "all": ALL, "fits": Abilities(fits_texts=True), "none": Abilities()}
PASSAGES = [{"section": i, "clean": f"clean {i}", "amplified": f"more {i}"} for i in range(6)]
EXAMPLES = planted(n=12)
PREPARED = {"strength": 1.0, "kl": 1.0, "passages": PASSAGES}


@pytest.fixture(params=names(Scorer))
def scorer(request):
    return names(Scorer)[request.param]()


@pytest.fixture(params=names(Explainer))
def explainer(request):
    return names(Explainer)[request.param]()


@pytest.fixture(params=ABILITIES)
def abilities(request):
    return ABILITIES[request.param]


def said(reply_of, requests):
    return [reply_of(request) for request in requests]


def failed(request, failure="timeout"):
    return Reply(failure=failure)


def test_a_scorer_says_who_is_asked_and_what_counts(scorer):
    scorer.validate()
    assert scorer.role in ROLES
    score = scorer.score([], [], EXAMPLES.facts)
    assert scorer.headline in score.measures
    assert score.n == 0
    assert all(measure.value is None or measure.value >= 0 for measure in score.measures.values())


def test_the_same_question_is_asked_in_the_same_words(scorer, abilities):
    examples = EXAMPLES
    tasks, again = (scorer.tasks(examples, "test", PREPARED) for _ in range(2))
    assert tasks == again
    first, second = (scorer.requests(Trial(label(RIGHT), tasks, abilities)) for _ in range(2))
    assert first == second
    assert {request.role for request in first} <= {scorer.role}
    keys = [key(request, "model", "here", abilities) for request in first]
    assert len(set(keys)) == len(set(first))
    json.dumps([asdict(task) for task in tasks])


@pytest.mark.parametrize("failure", [*RETRYABLE, *FINAL])
def test_a_failed_call_is_never_a_score(scorer, abilities, failure):
    examples = EXAMPLES
    tasks = scorer.tasks(examples, "test", PREPARED)
    requests = scorer.requests(Trial(label(RIGHT), tasks, abilities))
    replies = [Reply(failure=failure) for _ in requests]
    found = scorer.judgements(Trial(label(RIGHT), tasks, abilities), replies)
    assert len(found) == len(tasks)
    if requests:
        assert {judgement.value for judgement in found} <= {None}
        assert all(judgement.reason for judgement in found)
    score = scorer.score(tasks, found, examples.facts)
    if requests:
        assert score.n == 0
        assert score.coverage == 0
        assert score.measures[scorer.headline].value is None
        assert sum(score.invalid.values()) == len(tasks)


@pytest.mark.parametrize(
    "reply", [Reply(), Reply(text="maybe"), Reply(data={}), Reply(data={"answers": "yes"}), Reply(data=[])]
)
def test_an_answer_to_something_else_is_missing(scorer, abilities, reply):
    examples = EXAMPLES
    tasks = scorer.tasks(examples, "test", PREPARED)
    requests = scorer.requests(Trial(label(RIGHT), tasks, abilities))
    if not all(isinstance(request, Chat) for request in requests):
        pytest.skip("an answer in numbers has the form that was asked for, or is a failure: the client sees to it")
    found = scorer.judgements(Trial(label(RIGHT), tasks, abilities), [reply for _ in requests])
    assert len(found) == len(tasks)
    if requests:
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


def test_an_explainer_sees_the_explain_split_alone(explainer, abilities):
    explainer.validate()
    examples = EXAMPLES
    asked = explainer.requests(examples, abilities)
    assert asked == explainer.requests(replace(examples, valid=(), test=()), abilities)
    assert bool(asked) == explainer.needs_llm
    assert {request.role for request in asked} <= {"explainer"}


def test_failed_calls_are_no_explanation(explainer, abilities):
    if explainer.needs_llm:
        examples = EXAMPLES
        replies = [Reply(failure="refused") for _ in explainer.requests(examples, abilities)]
        assert explainer.explanations(examples, replies) == []


def test_explanations_are_texts_that_survive_the_journal(explainer, abilities):
    examples = EXAMPLES
    replies = [Reply(data={"explanation": "ripe fruit"}) for _ in explainer.requests(examples, abilities)]
    found = explainer.explanations(examples, replies)
    for explanation in found:
        assert explanation.latent == examples.latent
        assert explanation.text.strip()
        assert Explanation.from_json(json.loads(json.dumps(explanation.to_json()))) == explanation
    bare = Examples(0, examples.facts)
    assert explainer.explanations(bare, [Reply(failure="empty") for _ in explainer.requests(bare, abilities)]) == []
