"""What is done with one latent, as generators: each yields requests, is sent their replies, and returns a journal row.

The same flow runs live, from the cache, or in waves through the Batch API: `interp.run.pipeline` only answers requests.
"""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from itertools import islice
from typing import Any

from interp.client.requests import RETRYABLE, Abilities, Chat, Reply, Request
from interp.explainers import Explainer
from interp.records import Examples, Explanation, Judged, Measure, Score, Task
from interp.run.kept import asked_kept, seen_kept
from interp.run.reasons import DEAD, FAILED, INSUFFICIENT, NONE, NOT_APPLICABLE, OK, PARTIAL, first_messages
from interp.scorers import Scorer, Trial
from interp.scoring.metrics import best_threshold

Row = dict[str, Any]
Flow = Generator[list[Request], list[Reply], Row]
AGAIN = (PARTIAL, FAILED)  # what asking once more may mend
LEAST_COVERAGE = 0.5


class CutOff(Exception):
    """Ends a run that gets no more answers: the budget or quota is spent, or the models do not answer any more."""

    exit_code = 3


def explanation_flow(
    explainer: Explainer, examples: Examples, abilities: dict[str, Abilities], chooser: Scorer | None
) -> Flow:
    """Returns the row of an explanation: `status`, `explanation`, and of several candidates how it was chosen.

    Among candidates the valid split decides, by the headline of `chooser`. An explainer that refines is then shown
    where the best one was wrong, and its answer is taken only if it does better on the valid split.
    """
    if examples.missing:
        return {**_lacking(examples), "explanation": None}
    requests = explainer.requests(examples, abilities.get("explainer", Abilities()))
    replies, asked = (yield from _asked(requests)), {"asked": asked_kept(requests)} if requests else {}
    found = explainer.explanations(examples, replies)
    if not found:
        failures = Counter(reply.failure for reply in replies if reply.failure)
        counts = failures or ({"unusable": len(replies)} if replies else {"nothing": 1})
        row = {"status": FAILED if failures else NONE, "reason": _counted(counts)}
        return {**row, "messages": first_messages(replies), **asked, "explanation": None}
    best, detail = found[0], {}
    if chooser is not None and (len(found) > 1 or explainer.refines):
        judged = yield from _judged(chooser, found, examples, abilities)
        tried = [_tried(text, score) for text, (score, _) in zip(found, judged, strict=True)]
        at = max(range(len(found)), key=lambda i: _worth(judged[i][0], chooser))
        best, (score, answers) = found[at], judged[at]
        if explainer.refines:
            ask = explainer.refined(examples, best, answers, abilities["explainer"])
            better = explainer.explanations(examples, (yield from _asked(ask))) if ask else []
            if better:
                again = yield from _judged(chooser, better[:1], examples, abilities)
                tried.append({**_tried(better[0], again[0][0]), "refined": True})
                if _worth(again[0][0], chooser) > _worth(score, chooser):
                    best = better[0]
        detail = {"candidates": tried}
    return {"status": OK, "reason": "", **asked, "explanation": best.with_(detail=detail).to_json()}


def score_flow(
    scorer: Scorer,
    explanation: Explanation,
    examples: Examples,
    prepared: dict[str, Any],
    abilities: Abilities,
    split: str = "test",
    null: bool = False,
) -> Flow:
    """Returns the row of a score: `status`, `score`, and of every task the truth and the judgement.

    Some of what was judged and one of the questions are kept for people, but of a `null`, which nobody looks at.
    """
    if examples.missing:
        return _lacking(examples)
    tasks = scorer.tasks(examples, split, prepared)
    if not tasks:
        return {"status": NOT_APPLICABLE, "reason": str(prepared.get("missing", "too few examples"))}
    valid = scorer.tasks(examples, "valid", prepared) if scorer.tunes else []
    trial, tuning = (Trial(explanation, some, abilities) for some in (tasks, valid))
    requests, more = scorer.requests(trial), scorer.requests(tuning) if valid else []
    replies = yield from _asked([*requests, *more])
    first = replies[: len(requests)]
    judgements = scorer.judgements(trial, first)
    threshold = None
    if valid:
        tuned = scorer.judgements(tuning, replies[len(requests) :])
        pairs = [(found.value, task.truth) for task, found in zip(valid, tuned, strict=True) if found.value is not None]
        threshold = best_threshold([value for value, _ in pairs], [truth for _, truth in pairs])
    score = scorer.score(tasks, judgements, examples.facts, threshold)
    lost = any(reply.failure in RETRYABLE for reply in first)
    status = FAILED if score.coverage < LEAST_COVERAGE else PARTIAL if lost else OK
    misses = [] if null else scorer.misses(tasks, judgements, threshold)
    kept = {} if null else {"seen": seen_kept(scorer, tasks, judgements, misses), "asked": asked_kept(requests)}
    return {
        "status": status,
        "reason": _counted(score.invalid),
        "messages": {kind: said for kind, said in first_messages(first).items() if kind in score.invalid},
        "by_rule": not requests,
        "answers": _form(requests),
        "score": score.to_json(),
        "threshold": threshold,
        **kept,
        "tasks": task_columns(tasks),
        "values": [found.value for found in judgements],
        "levels": [list(found.levels) for found in judgements] if any(found.levels for found in judgements) else [],
        "reasons": {str(i): found.reason for i, found in enumerate(judgements) if not found.valid},
    }


def measure_of(row: Row, name: str) -> Measure:
    """Returns one figure of a score's row; n/a where it has none."""
    found = row.get("score", {}).get("measures", {}).get(name)
    return Measure(**found) if found else Measure(None)


def _lacking(examples: Examples) -> Row:
    return {"status": INSUFFICIENT if examples.facts.fired else DEAD, "reason": examples.missing}


def _asked(requests: list[Request]) -> Generator[list[Request], list[Reply], list[Reply]]:
    replies = (yield requests) if requests else []
    for reply in replies:
        if reply.cut_off:  # nobody is answered any more: this is no row's failure
            raise CutOff(reply.cut_off)
    return replies


def _judged(
    chooser: Scorer, found: list[Explanation], examples: Examples, abilities: dict[str, Abilities]
) -> Generator[list[Request], list[Reply], list[tuple[Score, list[Judged]]]]:
    """Scores explanations on the valid split, all at once, and returns with each score what was judged how."""
    tasks, able = chooser.tasks(examples, "valid", {}), abilities.get(chooser.role, Abilities())
    trials = [Trial(text, tasks, able) for text in found]
    asks = [chooser.requests(trial) for trial in trials]
    replies = iter((yield from _asked([request for ask in asks for request in ask])))
    judged = [
        chooser.judgements(trial, list(islice(replies, len(ask)))) for trial, ask in zip(trials, asks, strict=True)
    ]
    return [(chooser.score(tasks, found, examples.facts), list(zip(tasks, found, strict=True))) for found in judged]


def _worth(score: Score, chooser: Scorer) -> float:
    found = score.measures[chooser.headline].value
    return float("-inf") if found is None else found


def _tried(explanation: Explanation, score: Score) -> Row:
    figures = {name: found.value for name, found in score.measures.items() if found.value is not None}
    return {"text": explanation.text, "valid": figures}


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{n} {name}" for name, n in reasons.items())


def _form(requests: Sequence[Request]) -> str:
    """How a judge was read: from probabilities, one window a request, or from its words."""
    if not any(isinstance(request, Chat) for request in requests):
        return ""
    return "probabilities" if any(isinstance(one, Chat) and one.choices for one in requests) else "words"


def task_columns(tasks: Sequence[Task]) -> dict[str, list[Any]]:
    """Returns what a row has of every task beside its answer."""
    return {
        "truth": [task.truth for task in tasks],
        "tier": [task.tier for task in tasks],
        "decile": [task.decile for task in tasks],
        "section": [task.section for task in tasks],
        "starts": [[item.window.start for item in task.items] for task in tasks],
    }
