"""From a server's JSON to a reply: what was asked for, or the name of what is missing.

**Choices.** The probability of a word is the sum over the alternatives to the first token that speak for it. A token,
without leading blanks (also written U+2581 or U+0120) and in lower case, speaks for the word that it equals, or else
for the only word that begins with it; "no" and "n" speak for "no", "1" for "1" even where "10" is a word, and a token
that fits none or several speaks for none. What no alternative speaks for has probability 0.

**Spans** are those of `interp.client.spans`. The first token of a text has no log-probability, and counts in no span,
unless the model puts one of its own before it.
"""

import json
import math
import re
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

from interp.client import schema
from interp.client.requests import Abilities, Chat, Embed, LogProb, Reply, Request
from interp.client.spans import token_places, tokens_in_span

_LEADING = " \t\n\u2581\u0120\u010a"
_THOUGHT = re.compile(r"\s*<think(?:ing)?>.*?</think(?:ing)?>\s*", re.DOTALL)
_OPEN_THOUGHT = re.compile(r"\s*<think(?:ing)?>")
_CLOSE_THOUGHT = re.compile(r"</think(?:ing)?>\s*")


def read(request: Request, abilities: Abilities, body: dict[str, Any]) -> Reply:
    """Returns the reply that a server's answer to `payload(request, ...)` holds, with the tokens that it reports."""
    if isinstance(request, Chat):
        reply = _chat(request, abilities, body["choices"][0])
    elif isinstance(request, LogProb):
        reply = _logprob(request, body["choices"][0])
    else:
        reply = _embed(request, body["data"])
    return reply


def usage(body: Any) -> tuple[int, int] | None:
    """Returns the (prompt, answer) tokens that a server says it used; None where it does not say."""
    told = body.get("usage") if isinstance(body, dict) else None
    if not isinstance(told, dict) or not isinstance(told.get("prompt_tokens"), int):
        return None
    answered = told.get("completion_tokens")
    return told["prompt_tokens"], answered if isinstance(answered, int) else 0


def choice_of(token: str, choices: Sequence[str]) -> str | None:
    """Returns the word that a first token speaks for, by the rule above."""
    said = token.lstrip(_LEADING).lower()
    if not said:
        return None
    begun = [choice for choice in choices if choice.lower().startswith(said)]
    equal = [choice for choice in begun if choice.lower() == said]
    found = equal or begun
    return found[0] if len(found) == 1 else None


def by_choice(tokens: Iterable[tuple[str, float]], choices: Sequence[str]) -> dict[str, float]:
    """Returns the probability of each word from (token, log-probability) pairs."""
    sums = dict.fromkeys(choices, 0.0)
    for token, logprob in tokens:
        choice = choice_of(token, choices)
        if choice is not None:
            sums[choice] += math.exp(min(0.0, logprob))
    return sums


def thought(text: str, thinks: bool) -> str | None:
    """Returns an answer without what was thought before it; None where the thinking does not end.

    Args:
        text: the answer.
        thinks: whether the model is known to think: some servers keep the opening mark to themselves.
    """
    if _OPEN_THOUGHT.match(text):
        rest, count = _THOUGHT.subn("", text, count=1)
        return rest if count else None
    return _CLOSE_THOUGHT.split(text, maxsplit=1)[-1] if thinks else text


def in_single_precision(values: Iterable[float]) -> tuple[float, ...]:
    """Returns numbers rounded to float32, as they come back from the cache."""
    return tuple(array("f", values))


def _chat(request: Chat, abilities: Abilities, choice: dict[str, Any]) -> Reply:
    message = choice.get("message") or {}
    content = message.get("content")
    text = content.encode(errors="replace").decode() if isinstance(content, str) else ""  # no half characters
    finish = choice.get("finish_reason")
    if message.get("refusal") or finish == "content_filter":
        return Reply(failure="refused", detail=str(message.get("refusal") or "the server's content filter")[:200])
    if request.choices:
        return _choices(request, choice)
    answer = thought(text, abilities.thinking_tokens > 0)
    if answer is None or finish == "length":
        return Reply(text=(answer or "").strip(), failure="length", detail="the answer did not end within the limit")
    answer = answer.strip()
    if not answer:
        return Reply(failure="empty", detail=f"the answer is empty (finish_reason {finish})")
    return structured(request, answer)


def structured(request: Chat, answer: str) -> Reply:
    """Returns the reply with a text, parsed if a schema was asked for."""
    if not request.schema:
        return Reply(text=answer)
    data, problem = schema.parse(answer, json.loads(request.schema))
    return Reply(text=answer, failure="parse", detail=problem[:200]) if problem else Reply(text=answer, data=data)


def _choices(request: Chat, choice: dict[str, Any]) -> Reply:
    listed = (choice.get("logprobs") or {}).get("content") or []
    if not listed or not isinstance(listed[0], dict):
        return Reply(failure="empty", detail="no log-probabilities of the first token came back")
    first = listed[0]
    pairs = [(said.get("token"), said.get("logprob")) for said in [first, *(first.get("top_logprobs") or [])]]
    # by token: the one that was said is among the alternatives too, or beyond them
    return Reply(probabilities=by_choice(_numbers(dict(pairs)), request.choices))


def _embed(request: Embed, data: list[dict[str, Any]]) -> Reply:
    listed = sorted(data, key=lambda entry: entry.get("index", 0))
    places = [entry.get("index") for entry in listed]
    vectors = [entry.get("embedding") for entry in listed]
    if places != list(range(len(request.texts))):
        return Reply(failure="parse", detail=f"{len(data)} vectors for {len(request.texts)} texts")
    widths = {len(vector) if isinstance(vector, list) else 0 for vector in vectors}
    if len(widths) != 1 or widths == {0} or not all(_is_number(value) for vector in vectors for value in vector or ()):
        return Reply(failure="parse", detail="the vectors are no lists of numbers of one length")
    return Reply(vectors=tuple(in_single_precision(vector or ()) for vector in vectors))


def _logprob(request: LogProb, choice: dict[str, Any]) -> Reply:
    told = choice.get("logprobs") or {}
    tokens, values = told.get("tokens") or [], told.get("token_logprobs") or []
    found = token_places(request.text, list(map(str, tokens)))
    if not found or not all(value is None or _is_number(value) for value in values) or len(values) < len(found):
        return Reply(failure="unsupported", detail="the log-probabilities that came back do not fit the text")
    if request.choices:
        tops = told.get("top_logprobs") or []
        after = [tokens_in_span(found, (start, len(request.text) + 1)) for start, _ in request.spans]
        rows = [_top(tops, tokens_of[0] if tokens_of else len(found), request.choices) for tokens_of in after]
        if None in rows:
            return Reply(failure="unsupported", detail="no alternatives came back where a span starts")
        return Reply(logprobs=tuple(row for row in rows if row is not None))
    inside = [tokens_in_span(found, span) for span in request.spans]
    counted = [[values[token] for token in tokens_of if values[token] is not None] for tokens_of in inside]
    return Reply(logprobs=tuple((math.fsum(row),) for row in counted), counts=tuple(map(len, counted)))


def _top(tops: list[Any], token: int, choices: Sequence[str]) -> tuple[float, ...] | None:
    """Returns the log-probability of each choice at a token; minus infinity where no alternative speaks for it."""
    listed = tops[token] if token < len(tops) else None
    if not isinstance(listed, dict):
        return None
    return tuple(math.log(p) if p > 0 else -math.inf for p in by_choice(_numbers(listed), choices).values())


def _numbers(said: dict[Any, Any]) -> list[tuple[str, float]]:
    return [(token, value) for token, value in said.items() if isinstance(token, str) and _is_number(value)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not math.isnan(value)
