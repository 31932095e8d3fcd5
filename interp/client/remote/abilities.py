"""Finding out what a server does: each way of asking is proved by its answer, never believed.

Servers drop fields in silence (`transformers serve` ignores response_format and logprobs), answer a field that they do
not know with an error of their own (llama-cpp-python: 500), or return log-probabilities that belong to the token before
(llama-cpp-python's echo, where the model has no token of its own before a text). So a schema counts as enforced where a
question that begs for something else is answered by the schema, log-probabilities where they come back, and those of a
prompt where a text that repeats itself is found likely.

Errors that say no are findings; those that say nothing (no connection, too many requests, a refused key) are
ConfigErrors. They come when a role is first asked: `Client.check` has them come before any long work starts.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any

from interp.client import answers
from interp.client.bodies import SHORT, payload
from interp.client.remote.failures import Outcome
from interp.client.requests import ROOM_FOR_THOUGHT, Abilities, Chat, Embed, LogProb
from sae.base.errors import ConfigError

Send = Callable[[str, dict[str, Any]], Awaitable[Outcome]]

PROBE_TRIES = 3
FINDINGS = (400, 404, 405, 413, 415, 422, 500, 501)
"""Statuses that tell of the question: the server runs, and does not do this."""
QUIET = ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"})
"""What keeps a model from thinking: vLLM's, SGLang's and llama.cpp's way, and OpenAI's."""
_HELLO = {"type": "object", "properties": {"word": {"type": "string", "enum": ["goodbye"]}}, "required": ["word"]}
_GOODBYE = json.dumps({**_HELLO, "additionalProperties": False})
_ECHO = "The keys are 7, 4, 9, 2, 8, 1, 3. " * 4
LEAST_ECHO = -1.5
"""Nats a token in the second half of that text; a misplaced log-probability is far below."""


class Prober:
    """Asks one server a dozen small questions on behalf of one role."""

    def __init__(self, role: str, model: str, send: Send, where: str, thinking_tokens: int) -> None:
        self.role, self.model, self.send, self.where, self.room = role, model, send, where, thinking_tokens

    async def find(self) -> Abilities:
        """Returns what the role can be asked; ConfigError where the server cannot be had at all."""
        found = Abilities()
        if self.role == "encoder":
            await self._must(*payload(Embed(self.role, ("hello",)), self.model, found))
            return found
        if self.role == "reader":  # perhaps a base model, which holds no conversation
            return await self._prompt_logprobs(found)
        found = await self._manner(found)
        found = replace(found, system=await self._takes_system(found))
        found = await self._choices(found)
        found = replace(found, structured=await self._structured(found))
        return await self._prompt_logprobs(found) if self.role == "judge" else found

    async def _manner(self, found: Abilities) -> Abilities:
        """How the length is limited, whether a temperature is taken, and whether the model thinks."""
        manners = [
            replace(found, limit_name=name, temperature=temperature)
            for temperature in (True, False)
            for name in ("max_tokens", "max_completion_tokens")
        ]
        working = None
        refusal = Outcome()
        for manner in manners:
            outcome = await self._ask(*self._count(manner))
            if outcome.body is None:
                refusal = refusal if refusal.detail else outcome
                continue
            working = working or (manner, outcome.body)
            if _is_limited(outcome.body):
                working = (manner, outcome.body)
                break
        if working is None:
            raise self._error(refusal)
        manner, body = working
        if not _thinks(body):
            return manner
        for quiet in QUIET if self.room == 0 else ():
            quieter = replace(manner, quiet=json.dumps(quiet))
            outcome = await self._ask(*self._count(quieter))
            if outcome.body is not None and not _thinks(outcome.body):
                return quieter
        return replace(manner, thinking_tokens=self.room or ROOM_FOR_THOUGHT)

    def _count(self, manner: Abilities) -> tuple[str, dict[str, Any]]:
        path, body = payload(self._chat("Count from 1 to 100.", max_tokens=SHORT), self.model, manner)
        return path, body

    async def _takes_system(self, found: Abilities) -> bool:
        turns = (("system", "You are helpful."), ("user", "Say hello."))
        chat = Chat(self.role, turns, max_tokens=SHORT)
        return (await self._ask(*payload(chat, self.model, found))).body is not None

    async def _choices(self, found: Abilities) -> Abilities:
        """Whether log-probabilities come back with the first token; what a thinking model says first is no answer."""
        chat = self._chat("Is fire hot? Answer with one word, yes or no.", choices=("yes", "no"))
        for top in (20, 5) if not found.thinking_tokens else ():
            asked = replace(found, choices=True, top=top)
            outcome = await self._ask(*payload(chat, self.model, asked))
            if outcome.body is not None:
                return asked if answers.read(chat, asked, outcome.body).ok else found
        return found

    async def _structured(self, found: Abilities) -> str:
        """The first rung that binds an answer which would otherwise be another."""
        question = "Say the word hello. Write it as plain text, without JSON."
        for rung in ("json_schema", "json_object_schema", "json_object"):
            schema = _GOODBYE if rung != "json_object" else '{"type": "object"}'
            chat = self._chat(question, max_tokens=64, schema=schema)
            path, body = payload(chat, self.model, replace(found, structured=rung))
            body["messages"] = [{"role": "user", "content": question}]  # the schema must not be told here
            outcome = await self._ask(path, body)
            if outcome.body is None:
                continue
            text = str((outcome.body["choices"][0].get("message") or {}).get("content") or "")
            text = answers.thought(text, found.thinking_tokens > 0) or ""
            if rung == "json_object" and text.lstrip().startswith("{"):
                return rung
            if rung != "json_object" and answers.structured(chat, text).ok:
                return rung
        return "plain"

    async def _prompt_logprobs(self, found: Abilities) -> Abilities:
        half = len(_ECHO) // 2
        asked = LogProb(self.role, _ECHO, ((half, len(_ECHO)),))
        for top in (20, 5, 1):
            tried = replace(found, prompt_logprobs=True, prompt_top=top)
            path, body = payload(asked, self.model, tried)
            outcome = await self._ask(path, {**body, "logprobs": top})
            if outcome.body is None:
                continue
            reply = answers.read(asked, tried, outcome.body)
            aligned = reply.ok and reply.counts[0] > 0 and reply.logprobs[0][0] / reply.counts[0] > LEAST_ECHO
            return tried if aligned else found
        return found

    def _chat(self, question: str, **asked: Any) -> Chat:
        return Chat(self.role, (("user", question),), **{"max_tokens": 1, **asked})

    async def _ask(self, path: str, body: dict[str, Any]) -> Outcome:
        """Returns an answer, or a refusal that is a finding."""
        outcome = await self.send(path, body)
        if outcome.body is None and (outcome.stop or outcome.status not in FINDINGS):
            raise self._error(outcome)
        return outcome

    async def _must(self, path: str, body: dict[str, Any]) -> None:
        outcome = await self.send(path, body)
        if outcome.body is None:
            raise self._error(outcome)

    def _error(self, outcome: Outcome) -> ConfigError:
        if outcome.failure == "budget":
            return ConfigError(f"budget_usd: {outcome.detail}")
        hint = "; do its addresses end in /v1?" if outcome.status in (200, 404, 405) else ""
        return ConfigError(
            f"{self.role}: the model {self.model!r} at {self.where} does not answer ({outcome.detail}){hint}"
        )


def _is_limited(body: dict[str, Any]) -> bool:
    """Returns whether an answer kept to the limit, which some servers ignore under a name that they do not know."""
    used = answers.usage(body)
    return body["choices"][0].get("finish_reason") == "length" or (used is not None and 0 < used[1] <= SHORT)


def _thinks(body: dict[str, Any]) -> bool:
    message = body["choices"][0].get("message") or {}
    details = (body.get("usage") or {}).get("completion_tokens_details") or {}
    opened = str(message.get("content") or "").lstrip().startswith("<think")
    hidden = any(message.get(name) for name in ("reasoning_content", "reasoning"))
    return opened or hidden or bool(details.get("reasoning_tokens"))
