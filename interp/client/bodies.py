"""From a request to what is sent: the same JSON whether it goes out live or in a batch file."""

import json
from dataclasses import replace
from typing import Any

from interp.client.requests import Abilities, Chat, Embed, LogProb, Request

CHAT, COMPLETIONS, EMBEDDINGS = "/chat/completions", "/completions", "/embeddings"

SHORT = 16
"""Tokens of an answer of which only the existence is of interest."""
_FOLLOW = "Answer with JSON alone, without any other text. It must follow this JSON schema:\n"


def payload(request: Request, model: str, abilities: Abilities) -> tuple[str, dict[str, Any]]:
    """Returns (path below the base URL, JSON body)."""
    if isinstance(request, Embed):
        return EMBEDDINGS, {"model": model, "input": list(request.texts)}
    if isinstance(request, LogProb):  # one token more than is wanted: servers take 0 for no limit, or refuse it
        top = abilities.prompt_top if request.choices else 1
        return COMPLETIONS, {"model": model, "prompt": request.text, "max_tokens": 1, "echo": True, "logprobs": top}
    limit = 1 if request.choices else request.max_tokens + abilities.thinking_tokens
    body: dict[str, Any] = {"model": model, "messages": messages(request, abilities), abilities.limit_name: limit}
    if abilities.temperature:
        body["temperature"] = request.temperature
    if request.choices:
        body |= {"logprobs": True, "top_logprobs": abilities.top}
    if request.schema:
        body |= _format(json.loads(request.schema), abilities.structured)
    return CHAT, body | json.loads(abilities.quiet or "{}")


def least_body(path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Returns a body like this one that asks next to nothing."""
    optional = ("response_format", "logprobs", "top_logprobs", "echo")
    plain = {name: value for name, value in body.items() if name not in optional}
    if path == EMBEDDINGS:
        return plain | {"input": ["hello"]}
    plain |= {name: min(SHORT, plain[name]) for name in ("max_tokens", "max_completion_tokens") if name in plain}
    if path == COMPLETIONS:
        return plain | {"prompt": "hello"}
    return plain | {"messages": [{"role": "user", "content": "Say hello."}]}


def messages(request: Chat, abilities: Abilities) -> list[dict[str, str]]:
    """Returns the conversation as a server takes it; a schema is told where it is not enforced."""
    turns = list(request.messages)
    if request.schema and abilities.structured in ("json_object", "plain"):
        role, content = turns[-1]
        turns[-1] = (role, f"{content}\n\n{_FOLLOW}{request.schema}")
    if not abilities.system:
        turns = merged(turns)
    return [{"role": role, "content": content} for role, content in turns]


def merged(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns a conversation whose system messages lead its first user message."""
    system = "\n\n".join(content for role, content in turns if role == "system")
    rest = [turn for turn in turns if turn[0] != "system"]
    if system and rest and rest[0][0] == "user":
        rest[0] = ("user", f"{system}\n\n{rest[0][1]}")
    elif system:
        rest.insert(0, ("user", system))
    return rest


def repair(request: Chat, answer: str, problem: str) -> Chat:
    """Returns the question asked once more, with the answer and what is wrong with it."""
    complaint = f"That answer cannot be used: {problem}. Answer the question again, with valid JSON alone."
    return replace(request, messages=(*request.messages, ("assistant", answer or "(nothing)"), ("user", complaint)))


def _format(schema: dict[str, Any], structured: str) -> dict[str, Any]:
    """Returns the field by which an answer is bound to be JSON, of this schema if that can be asked."""
    if structured == "json_schema":
        named = {"name": "answer", "strict": True, "schema": schema}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    if structured == "json_object_schema":  # as llama.cpp takes it
        return {"response_format": {"type": "json_object", "schema": schema}}
    return {"response_format": {"type": "json_object"}} if structured == "json_object" else {}
