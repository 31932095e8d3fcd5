"""From a judge's replies to judgements. What cannot be read without doubt is missing, and never guessed."""

import json
import math
from collections.abc import Sequence
from typing import Any

from interp.client.requests import Reply
from interp.records import Judgement

YES, NO = "yes", "no"
LEAST_MASS = 0.5  # of the first token's probability must lie on the choices, or the judge did not answer the question


def _schema(**properties: Any) -> dict[str, Any]:
    """Returns the schema of an object with exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_ANSWER = _schema(id={"type": "string"}, p={"type": "number"})
ANSWERS = json.dumps(_schema(answers={"type": "array", "items": _ANSWER}))
CHOSEN = json.dumps(_schema(id={"type": "string"}))


def yes_or_no(reply: Reply) -> Judgement:
    """Returns P(yes) / (P(yes) + P(no)); missing ("no_mass") where the two hold less than half of the probability."""
    found = choice(reply, (YES, NO))
    return found if not found.valid else Judgement(reply.probabilities.get(YES, 0.0) / _mass(reply, (YES, NO)))


def choice(reply: Reply, choices: Sequence[str]) -> Judgement:
    """Returns the place of the most probable choice; missing ("no_mass") where they hold less than half in all."""
    if not reply.ok:
        return Judgement(None, reply.failure)
    if not _mass(reply, choices) >= LEAST_MASS:
        return Judgement(None, "no_mass")
    return Judgement(float(max(range(len(choices)), key=lambda at: reply.probabilities.get(choices[at], 0.0))))


def by_id(reply: Reply, ids: Sequence[str]) -> list[Judgement]:
    """Returns the probabilities that answers in the form ANSWERS give to texts, by their ids alone.

    A text whose id is named once, with a number from 0 to 1, has an answer. One that is not named, is named twice
    (even with equal numbers) or with anything else has none ("parse"). Other ids are nobody's and change nothing.
    """
    if not reply.ok:
        return [Judgement(None, reply.failure)] * len(ids)
    given: dict[str, list[Any]] = {}
    answers = reply.data.get("answers") if isinstance(reply.data, dict) else None
    for answer in answers if isinstance(answers, list) else []:
        if isinstance(answer, dict) and isinstance(answer.get("id"), str):
            given.setdefault(answer["id"], []).append(answer.get("p"))
    return [_probability(given.get(name, [])) for name in ids]


def chosen_id(reply: Reply, ids: Sequence[str]) -> Judgement:
    """Returns the place of the id that an answer in the form CHOSEN names; missing ("parse") where it names none."""
    if not reply.ok:
        return Judgement(None, reply.failure)
    name = reply.data.get("id") if isinstance(reply.data, dict) else None
    return Judgement(float(ids.index(name))) if name in ids else Judgement(None, "parse")


def likelier(more: Reply, less: Reply, per_token: bool = False) -> Judgement:
    """Returns by how much the text of LogProb's only span is likelier in one reply than in the other.

    In nats, or in nats per token; missing ("empty") where it has no tokens.
    """
    found = []
    for reply in (more, less):
        if not reply.ok:
            return Judgement(None, reply.failure)
        if not reply.counts[0]:
            return Judgement(None, "empty")
        found.append(reply.logprobs[0][0] / (reply.counts[0] if per_token else 1))
    value = found[0] - found[1]
    return Judgement(value) if math.isfinite(value) else Judgement(None, "no_mass")


def _probability(given: list[Any]) -> Judgement:
    """Returns the one number given, where it is one and a probability."""
    if len(given) == 1 and isinstance(given[0], int | float) and not isinstance(given[0], bool) and 0 <= given[0] <= 1:
        return Judgement(float(given[0]))
    return Judgement(None, "parse")


def _mass(reply: Reply, choices: Sequence[str]) -> float:
    """Returns the probability of all choices together."""
    return math.fsum(reply.probabilities.get(name, 0.0) for name in choices)
