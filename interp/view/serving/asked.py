"""A request of OpenAI's protocol, checked: what is asked for, in our terms.

Fields that change nothing here (user, metadata, store ...) are left out of account, as other servers do; those that
would change the answer and are not served (tools, response_format, logit_bias, penalties) are refused. The edit of the
model stands in the field "steer", in the grammar of `sae-steer --edits` or as JSON, or behind the model's name:
"NAME+508=4x".
"""

import secrets
from dataclasses import dataclass
from typing import Any

from interp.view.serving.limits import Limits
from interp.view.serving.refusing import Refused, one_line
from sae.base.errors import ConfigError
from sae.steering.edits import Edit, as_edits, check_latents

UNSERVED = {
    "audio": None,
    "best_of": (None, 1),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "prediction": None,
    "presence_penalty": (None, 0),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": None,
}
"""Fields that would change the answer, and their values that do not."""
ROLES = ("system", "developer", "user", "assistant")
MOST_TOP = {True: 20, False: 5}  # of likeliest tokens, in chat and in completions
COMPLETION_TOKENS = 16


@dataclass(frozen=True)
class Asked:
    """What is asked for."""

    prompts: tuple[Any, ...]
    """Each a text, token ids, or the messages of a chat."""
    chat: bool
    edits: tuple[Edit, ...]
    new_tokens: int | None
    """None for as many as there is room for."""
    temperature: float
    top_p: float
    seed: int
    n: int
    stop: tuple[str, ...]
    logprobs: bool
    top: int
    """Likeliest tokens told beside each."""
    echo: bool
    stream: bool
    usage: bool
    """Whether a stream ends with how many tokens there were."""


def asked(body: Any, chat: bool, model: str, d_sae: int, limits: Limits) -> Asked:
    """Returns what the body of a request asks for; Refused names the field that is wrong."""
    if not isinstance(body, dict):
        raise Refused(400, "the request is no JSON object")
    fields = _Fields({name: value for name, value in body.items() if value is not None})
    for name, same in UNSERVED.items():
        if name in fields.given and fields.given[name] not in (same or ()):
            raise Refused(400, f"{name}: this server does not serve it", field=name)
    own = _steered(fields, model, d_sae, limits)
    if chat:
        prompts: tuple[Any, ...] = (_messages(fields.given.get("messages"), limits),)
        logprobs = fields.truth("logprobs")
        top = fields.whole("top_logprobs", 0, MOST_TOP[chat]) or 0
        if top and not logprobs:
            raise Refused(400, "top_logprobs: it needs logprobs to be true", field="top_logprobs")
    else:
        prompts = _prompts(fields.given.get("prompt"), limits)
        found = fields.whole("logprobs", 0, MOST_TOP[chat])
        logprobs, top = found is not None, found or 0
    most = fields.whole("max_tokens", 0, limits.new_tokens)
    newer = fields.whole("max_completion_tokens", 0, limits.new_tokens) if chat else None
    most = newer if newer is not None else most
    options, seed = fields.given.get("stream_options"), fields.whole("seed", -(2**63), 2**63 - 1)
    temperature, top_p = fields.number("temperature", 0, 2), fields.number("top_p", 0, 1)
    return Asked(
        prompts=prompts,
        chat=chat,
        edits=own,
        new_tokens=most if most is not None or chat else COMPLETION_TOKENS,
        temperature=1.0 if temperature is None else temperature,
        top_p=1.0 if top_p is None else top_p,
        seed=secrets.randbits(63) if seed is None else seed,
        n=fields.whole("n", 1, limits.choices) or 1,
        stop=_stops(fields.given.get("stop"), limits),
        logprobs=logprobs,
        top=top,
        echo=not chat and fields.truth("echo"),
        stream=fields.truth("stream"),
        usage=isinstance(options, dict) and options.get("include_usage") is True,
    )


@dataclass(frozen=True)
class _Fields:
    """The fields of a request that are given."""

    given: dict[str, Any]

    def truth(self, name: str) -> bool:
        value = self.given.get(name, False)
        if not isinstance(value, bool):
            raise Refused(400, f"{name}: it is neither true nor false", field=name)
        return value

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self.given.get(name)
        if value is not None and (type(value) is not int or not least <= value <= most):
            raise Refused(400, f"{name}: {_short(value)} is no whole number from {least} to {most}", field=name)
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self.given.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
            raise Refused(400, f"{name}: {_short(value)} is no number from {least} to {most}", field=name)
        return float(value)


def edits_of(value: Any, d_sae: int, limits: Limits, field: str = "steer") -> tuple[Edit, ...]:
    """Returns edits as they were typed, or given as JSON; Refused says what is wrong with them."""
    if value is None or value in ("", []):
        return ()
    try:
        edits = as_edits(value)
        check_latents(edits, d_sae)
    except (ConfigError, TypeError) as error:
        said = str(error)
        raise Refused(400, one_line(said if said.startswith(field) else f"{field}: {said}"), field=field) from error
    except RecursionError as error:
        raise Refused(400, f"{field}: lists within lists", field=field) from error
    if len(edits) > limits.edits:
        raise Refused(400, f"{field}: {len(edits)} edits; at most {limits.edits} are taken", field=field)
    return edits


def _steered(fields: _Fields, model: str, d_sae: int, limits: Limits) -> tuple[Edit, ...]:
    named = fields.given.get("model", model)
    name, plus, typed = named.partition("+") if isinstance(named, str) else ("", "", "")
    if isinstance(named, str) and named.startswith(f"{model}+"):  # the name may hold a plus of its own
        name, plus, typed = model, "+", named.removeprefix(f"{model}+")
    if name != model:
        raise Refused(404, f"model: {_short(named)} is not served here; {model} is", field="model")
    given = fields.given.get("steer")
    if plus and given is not None:
        raise Refused(400, "steer: the model's name has an edit as well; give one of them", field="steer")
    return edits_of(typed if plus else given, d_sae, limits, "model" if plus else "steer")


def _messages(value: Any, limits: Limits) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value or len(value) > limits.prompts:
        raise Refused(400, f"messages: it is no list of 1 to {limits.prompts} messages", field="messages")
    found = []
    for number, message in enumerate(value):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ROLES:
            raise Refused(400, f"messages: the role of number {number} is none of {', '.join(ROLES)}", field="messages")
        found.append({"role": "system" if role == "developer" else role, "content": _content(message, number)})
    checked_text("messages", "".join(message["content"] for message in found), limits)
    return found


def _content(message: dict[str, Any], number: int) -> str:
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    said = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    texts = [text for text in said if isinstance(text, str)]
    if len(texts) < len(parts):
        raise Refused(400, f"messages: number {number} holds something else than text", field="messages")
    return "".join(texts)


def _prompts(value: Any, limits: Limits) -> tuple[Any, ...]:
    several = [value] if isinstance(value, str) or _is_ids(value) else value
    if not isinstance(several, list) or not several:
        raise Refused(400, "prompt: it is no text, list of texts, token ids or list of token ids", field="prompt")
    if len(several) > limits.prompts:
        raise Refused(400, f"prompt: {len(several)} texts; at most {limits.prompts} are taken", field="prompt")
    for one in several:
        if isinstance(one, str):
            checked_text("prompt", one, limits)
        elif not _is_ids(one):
            raise Refused(400, "prompt: it is no text, list of texts, token ids or list of token ids", field="prompt")
    return tuple(several)


def checked_text(field: str, text: Any, limits: Limits) -> str:
    """Returns a text that is no longer than is taken."""
    if not isinstance(text, str):
        raise Refused(400, f"{field}: it is no text", field=field)
    if len(text) > limits.text:
        raise Refused(400, f"{field}: {len(text)} characters; at most {limits.text} are taken", field=field)
    return text


def _stops(value: Any, limits: Limits) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    plain = isinstance(texts, list) and all(isinstance(text, str) and 0 < len(text) <= 200 for text in texts)
    if not plain or len(texts) > limits.stops:
        raise Refused(400, f"stop: it is neither a text nor a list of up to {limits.stops} texts", field="stop")
    return tuple(texts)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + " ..."
