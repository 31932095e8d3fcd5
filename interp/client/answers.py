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
from array import array
from base64 import b64decode
from collections.abc import Iterable, Sequence
from typing import Any

from interp.client import schema
from interp.client.requests import Abilities, Chat, Embed, LogProb, Reply, Request
from interp.client.said import Said, said_in, thought
from interp.client.shapes import count, first, listed, number, record, told
from interp.client.spans import token_places, tokens_in_span

ROUNDING = 0.01
"""Nats above 0 that a log-probability may be; what is more is none."""
LEAST = -1e9
"""Nats that stand for a probability of 0, as what is below does."""
_LEADING = " \t\n\u2581\u0120\u010a"
_CUT = ("length", "max_tokens", "model_length", "max_output_tokens")
_WITHHELD = (
    *("content_filter", "refusal", "safety", "recitation", "prohibited_content", "blocklist", "spii"),
    *("guardrail_intervened", "error_toxic"),
)
"""How the reasons begin for which an answer is kept back; Gemini's go on: "content_filter: RECITATION"."""
_BROKEN = ("error", "abort", "cancel", "fail", "timeout", "insufficient_system_resource")
"""How the reasons begin for which a server gives up in the middle of an answer."""


def read(request: Request, abilities: Abilities, body: Any) -> Reply:
    """Returns the reply that a server's answer to `payload(request, ...)` holds, whatever it is.

    Its failure is "server_error" where the server, not the model, is at fault: another try may go well.
    """
    if isinstance(request, Embed):
        return _embed(request, listed(record(body).get("data")))
    choice = first(record(body).get("choices"))
    fault = fault_of(body, isinstance(request, Chat))
    if fault:
        return Reply(failure="server_error", detail=fault)
    return _chat(request, abilities, choice) if isinstance(request, Chat) else _logprob(request, choice)


def fault_of(body: Any, chat: bool) -> str:
    """Returns why an answer with choices is none by its server's doing, or ""."""
    choice = first(record(body).get("choices"))
    if not choice:
        return f"the server's answer is empty: {told(body)}"
    ending, message = _ending(choice), record(choice.get("message"))
    if choice.get("error") or (ending.startswith(_BROKEN) and not ending.startswith(_WITHHELD)):
        return f"the server gave up (finish_reason {ending}): {told(choice.get('error') or '')}"
    ended = ending in _CUT or ending.startswith(_WITHHELD)  # Gemini and Azure then leave the message out
    if chat and not ended and not (message and isinstance(message.get("content"), str | list | dict | None)):
        return f"the server's answer holds no message: {told(choice)}"
    return ""


def ends(body: Any) -> bool:
    """Returns whether an answer tells how it came to its end."""
    choice = first(record(body).get("choices"))
    return choice.get("finish_reason", "") is not None


def is_cut(body: Any) -> bool:
    """Returns whether an answer ended at the limit."""
    return _ending(first(record(body).get("choices"))) in _CUT


def usage(body: Any) -> tuple[int, int] | None:
    """Returns the (prompt, answer) tokens that a server says it used; None where it does not say."""
    said = record(record(body).get("usage"))
    asked, answered, both = (count(said.get(f"{name}_tokens")) for name in ("prompt", "completion", "total"))
    if asked is None:
        return None
    return asked, max(0, (both or 0) - asked) if answered is None else answered


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


def in_single_precision(values: Iterable[float]) -> tuple[float, ...]:
    """Returns numbers rounded to float32, as they come back from the cache."""
    return tuple(array("f", values))


def structured(request: Chat, answer: str) -> Reply:
    """Returns the reply with a text, parsed if a schema was asked for."""
    if not request.schema:
        return Reply(text=answer)
    data, problem = schema.parse(answer, json.loads(request.schema))
    return Reply(text=answer, failure="parse", detail=problem[:200]) if problem else Reply(text=answer, data=data)


def _chat(request: Chat, abilities: Abilities, choice: dict[str, Any]) -> Reply:
    said, ending = said_in(choice.get("message")), _ending(choice)
    if said.refusal or ending.startswith(_WITHHELD):
        return Reply(failure="refused", detail=said.refusal[:200] or "the server's content filter")
    if request.choices:
        return _choices(request, choice)
    if abilities.ends and choice.get("finish_reason", "") is None:
        return Reply(failure="server_error", detail="the server gave up: the answer has no end (finish_reason null)")
    answer = thought(said.text, abilities.thinking_tokens > 0)
    if answer is None or ending in _CUT:
        return Reply(text=(answer or "").strip(), failure="length", detail=_why_cut(abilities))
    answer = answer.strip()
    if not answer:
        hint = _thought_alone(request, said)
        return Reply(failure="empty", detail=f"the answer is empty (finish_reason {ending}){hint}")
    return structured(request, answer)


def _ending(choice: dict[str, Any]) -> str:
    """Returns why an answer ended, in lower case; "" where nothing is told."""
    return told(choice.get("finish_reason") or "").lower()


def _why_cut(abilities: Abilities) -> str:
    room = abilities.thinking_tokens
    more = f"more than {room} thinking_tokens" if room else "thinking_tokens, if the model thinks first,"
    return f"the answer did not end within the limit; {more} would give it room"


def _thought_alone(request: Chat, said: Said) -> str:
    """Returns a hint for an answer that is empty beside what was thought; "" where nothing was."""
    if not said.thinking.strip():
        return ""
    if request.schema and structured(request, said.thinking.strip()).ok:
        return f"; the JSON that was asked for stands in {said.where}: the server takes the answer for thinking"
    return f"; only {said.where} holds text: the model thought and said nothing, or the server takes all for thinking"


def _choices(request: Chat, choice: dict[str, Any]) -> Reply:
    token = first(record(choice.get("logprobs")).get("content"))
    if not token:
        return Reply(failure="empty", detail="no log-probabilities of the first token came back")
    offered = map(record, [token, *listed(token.get("top_logprobs"))])
    pairs = [(said.get("token"), said.get("logprob")) for said in offered]
    # by token: the one that was said is among the alternatives too, or beyond them
    return Reply(probabilities=by_choice(_numbers(pairs), request.choices))


def _embed(request: Embed, data: list[Any]) -> Reply:
    entries, texts = list(map(record, data)), len(request.texts)
    places = [entry.get("index") for entry in entries]
    if places == [None] * texts:  # Gemini's way
        places = list(range(texts))
    vectors = [_vector(entry.get("embedding")) for entry in entries]
    wrong = ""
    if len(entries) != texts:
        wrong = f"{len(entries)} vectors for {texts} texts"
    elif set(map(count, places)) != set(range(texts)):
        wrong = f"the places of the vectors are {told(places)}"
    elif len({len(vector) for vector in vectors}) != 1 or not vectors[0]:
        wrong = "the vectors are no lists of finite numbers of one length"
    if wrong:
        return Reply(failure="server_error", detail=f"the server's answer cannot be used: {wrong}")
    by_place = dict(zip(map(count, places), vectors, strict=True))
    return Reply(vectors=tuple(tuple(by_place[place]) for place in range(texts)))


def _vector(value: Any) -> Sequence[float]:
    """Returns a vector in single precision, also of float32 bytes in base64; () for what is none."""
    try:
        found = array("f", b64decode(value, validate=True) if isinstance(value, str) else listed(value))
    except (TypeError, ValueError, OverflowError):
        return ()
    truths = any(entry is True or entry is False for entry in listed(value))
    return found if all(map(math.isfinite, found)) and not truths else ()


def _logprob(request: LogProb, choice: dict[str, Any]) -> Reply:
    said = record(choice.get("logprobs"))
    tokens, values = listed(said.get("tokens")), listed(said.get("token_logprobs"))
    found = token_places(request.text, tokens) if all(isinstance(token, str) for token in tokens) else None
    logprobs = [None if value is None else _logarithm(value) for value in values]
    known = [value is None for value in logprobs] == [value is None for value in values]
    if not found or not known or len(values) < len(found):
        return Reply(failure="unsupported", detail="the log-probabilities that came back do not fit the text")
    if request.choices:
        tops = listed(said.get("top_logprobs"))
        after = [tokens_in_span(found, (start, len(request.text) + 1)) for start, _ in request.spans]
        rows = [_top(tops, tokens_of[0] if tokens_of else len(found), request.choices) for tokens_of in after]
        if None in rows:
            return Reply(failure="unsupported", detail="no alternatives came back where a span starts")
        return Reply(logprobs=tuple(row for row in rows if row is not None))
    inside = [tokens_in_span(found, span) for span in request.spans]
    counted = [[value for token in tokens_of if (value := logprobs[token]) is not None] for tokens_of in inside]
    return Reply(logprobs=tuple((math.fsum(row),) for row in counted), counts=tuple(map(len, counted)))


def _top(tops: list[Any], token: int, choices: Sequence[str]) -> tuple[float, ...] | None:
    """Returns the log-probability of each choice at a token; minus infinity where no alternative speaks for it."""
    offered = tops[token] if token < len(tops) else None
    if not isinstance(offered, dict):
        return None
    return tuple(math.log(p) if p > 0 else -math.inf for p in by_choice(_numbers(offered.items()), choices).values())


def _numbers(pairs: Iterable[tuple[Any, Any]]) -> list[tuple[str, float]]:
    """Returns what each token was given last, where that is a log-probability."""
    last = {token: _logarithm(value) for token, value in pairs if isinstance(token, str)}
    return [(token, value) for token, value in last.items() if value is not None]


def _logarithm(value: Any) -> float | None:
    """Returns a log-probability, which may be minus infinity; None for what is none."""
    found = LEAST if value == -math.inf else number(value)
    if found is None or found > ROUNDING:
        return None
    return found if found > LEAST else -math.inf
