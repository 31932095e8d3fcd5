"""Flows: how candidates are chosen, what becomes of failing answers, and that a row says what happened."""

import pytest
from rigs.interp_examples import BATCH, FRUIT, RIGHT, SINGLE, judge, label, planted

from interp.client.local.tfidf import tfidf
from interp.client.requests import FINAL, RETRYABLE, Abilities, Reply
from interp.explainers.llm import LanguageModelExplainer
from interp.explainers.token_lookup import TokenLookup
from interp.records import Examples
from interp.run.flows import (
    FAILED,
    INSUFFICIENT,
    NONE,
    NOT_APPLICABLE,
    OK,
    PARTIAL,
    CutOff,
    explanation_flow,
    score_flow,
)
from interp.scorers.detection import Detection
from interp.scorers.embedding import Embedding

TOO_BROAD = f"words: {', '.join(FRUIT)}"  # also where they do not stand after the word
TOO_NARROW = f"words: {FRUIT[0]}; after: ripe"
BROKEN = "words: unheard"
ABLE = {"explainer": Abilities(structured="json_schema"), "judge": BATCH}


def drive(flow, answer):
    """Runs a flow to its end; `answer` is from a request to a reply. Returns (row, waves)."""
    waves, replies = [], None
    while True:
        try:
            requests = flow.send(replies)
        except StopIteration as ended:
            return ended.value, waves
        waves.append(requests)
        replies = [answer(request) for request in requests]


def explainers(*texts):
    """Answers explainer requests with these texts in turn, and others as the judge would."""
    left = list(texts)

    def answer(request):
        if request.role != "explainer":
            return judge(request)
        text = left.pop(0)
        return text if isinstance(text, Reply) else Reply(data={"explanation": text})

    return answer


def test_one_candidate_is_taken_unjudged():
    row, waves = drive(explanation_flow(LanguageModelExplainer(), planted(), ABLE, Detection()), explainers(BROKEN))
    assert row["explanation"]["text"] == BROKEN
    assert [len(wave) for wave in waves] == [1]


def test_the_best_of_several_on_the_valid_split_is_taken():
    flow = explanation_flow(LanguageModelExplainer(candidates=3), planted(), ABLE, Detection())
    row, waves = drive(flow, explainers(TOO_NARROW, RIGHT, BROKEN))
    assert row["explanation"]["text"] == RIGHT
    assert [wave[0].role for wave in waves] == ["explainer", "judge"]
    tried = row["explanation"]["detail"]["candidates"]
    assert [one["text"] for one in tried] == [TOO_NARROW, RIGHT, BROKEN]
    values = [one["valid"]["balanced_accuracy"] for one in tried]
    assert values[1] == 1 > values[0] > values[2] == 0.5


@pytest.mark.parametrize(("answer", "taken"), [(RIGHT, True), (BROKEN, False), (TOO_NARROW, False)])
def test_a_correction_is_taken_only_if_it_wins_on_the_valid_split(answer, taken):
    flow = explanation_flow(LanguageModelExplainer(refine=True), planted(), ABLE, Detection())
    row, waves = drive(flow, explainers(TOO_NARROW, answer))
    assert [wave[0].role for wave in waves] == ["explainer", "judge", "explainer", "judge"]
    assert row["explanation"]["text"] == (RIGHT if taken else TOO_NARROW)
    shown = str(waves[2][0].messages)
    assert any(word in shown for word in FRUIT[1:])  # what it overlooked
    assert "test" not in {item.tier for item in planted().valid}


def test_the_valid_and_not_the_test_split_is_judged_in_choosing():
    examples = planted()
    flow = explanation_flow(LanguageModelExplainer(candidates=2), examples, ABLE, Detection())
    _, waves = drive(flow, explainers(TOO_NARROW, RIGHT))
    asked = str([request.messages for request in waves[1]])
    assert all(item.window.text.strip() in asked for item in examples.valid if item.tier in ("active", "random"))
    assert not any(item.window.text.strip() in asked for item in examples.test)


def test_what_stops_an_explanation_is_said():
    missing = Examples(3, planted().facts, missing="insufficient: 2 active windows from 1 documents in test")
    row, waves = drive(explanation_flow(LanguageModelExplainer(), missing, ABLE, None), None)
    assert (row["status"], row["explanation"], waves) == (INSUFFICIENT, None, [])
    for failure in (*RETRYABLE, *FINAL):
        flow = explanation_flow(LanguageModelExplainer(), planted(), ABLE, None)
        if failure in ("budget", "quota"):
            with pytest.raises(CutOff, match=failure):
                drive(flow, explainers(Reply(failure=failure)))
            continue
        with pytest.raises(CutOff, match="does not answer any more"):  # the server's, and nobody's row
            drive(
                explanation_flow(LanguageModelExplainer(), planted(), ABLE, None),
                explainers(Reply(failure=failure, given_up=True)),
            )
        row, _ = drive(flow, explainers(Reply(failure=failure)))
        assert (row["status"], row["reason"], row["explanation"]) == (FAILED, f"1 {failure}", None)
    row, _ = drive(explanation_flow(LanguageModelExplainer(), planted(), ABLE, None), explainers(" "))
    assert row["status"] == NONE


def test_a_rule_is_scored_without_any_question():
    row, waves = drive(explanation_flow(TokenLookup(), planted(), {}, Detection()), None)
    from interp.records import Explanation

    explanation = Explanation.from_json(row["explanation"])
    row, waves = drive(score_flow(Detection(), explanation, planted(), {}, SINGLE), None)
    assert waves == []
    assert row["by_rule"]
    assert row["status"] == OK
    assert row["score"]["measures"]["balanced_accuracy"]["value"] > 0.9
    assert row["score"]["measures"]["balanced_accuracy[same_token]"]["value"] < 0.6  # tokens alone do not tell these


def failing(n, failure="timeout"):
    """Answers like the judge, but fails every n-th request."""
    count = 0

    def answer(request):
        nonlocal count
        count += 1
        return Reply(failure=failure) if count % n == 0 else judge(request)

    return answer


def test_a_missing_answer_is_in_no_figure_but_in_the_coverage():
    whole, _ = drive(score_flow(Detection(), label(RIGHT), planted(), {}, SINGLE), judge)
    row, _ = drive(score_flow(Detection(), label(RIGHT), planted(), {}, SINGLE), failing(4))
    n = len(row["values"])
    assert row["status"] == PARTIAL
    assert row["score"]["coverage"] == pytest.approx(0.75)
    assert row["score"]["invalid"] == {"timeout": n // 4}
    assert sum(value is None for value in row["values"]) == n // 4 == len(row["reasons"])
    assert row["score"]["measures"]["balanced_accuracy"]["value"] == 1
    assert whole["status"] == OK
    row, _ = drive(score_flow(Detection(), label(RIGHT), planted(), {}, SINGLE), failing(4, "refused"))
    assert row["status"] == OK  # asking again would not mend it
    assert row["score"]["coverage"] == pytest.approx(0.75)


def test_a_score_without_answers_has_failed_and_has_no_value():
    row, _ = drive(score_flow(Detection(), label(RIGHT), planted(), {}, SINGLE), failing(1, "connection"))
    assert row["status"] == FAILED
    assert row["score"]["measures"]["balanced_accuracy"]["value"] is None
    assert row["score"]["n"] == 0


def test_thresholds_are_tuned_on_the_valid_split():
    examples = planted()

    def answer(request):
        return Reply(vectors=tfidf(request.texts))

    row, waves = drive(
        score_flow(Embedding(), label("ripe apple, ripe pear, ripe plum"), examples, {}, Abilities(fits_texts=True)),
        answer,
    )
    asked = [str(request.texts) for request in waves[0]]
    assert len(asked) == 2
    assert row["threshold"] is not None
    assert row["score"]["measures"]["balanced_accuracy"]["value"] > 0.8
    worse = Examples(0, examples.facts, examples.explain, (), examples.test)
    row, _ = drive(score_flow(Embedding(), label("ripe apple"), worse, {}, Abilities(fits_texts=True)), answer)
    assert row["threshold"] is None
    assert row["score"]["measures"]["balanced_accuracy"]["value"] is None
    assert row["score"]["measures"]["auroc"]["value"] > 0.8


def test_a_scorer_without_tasks_is_not_applicable():
    bare = Examples(0, planted().facts, planted().explain)
    row, waves = drive(score_flow(Detection(), label(RIGHT), bare, {}, SINGLE), None)
    assert row["status"] == NOT_APPLICABLE
    assert waves == []
