"""Finding out what a server does: each way of asking is proved by its answer, never believed.

Servers drop fields in silence (`transformers serve` ignores response_format and logprobs), answer a field that they do
not know with an error of their own (llama-cpp-python: 500), or return log-probabilities that belong to the token before
(llama-cpp-python's echo, where the model has no token of its own before a text). So a schema counts as enforced where a
question that begs for something else is answered by the schema, log-probabilities where they come back, and those of a
prompt where a text that repeats itself is found likely.

Once a plain question was answered, an error that says no to another is a finding, whatever its status: the field is not
taken. So is any other error that stays while plain questions are answered. What says nothing (no connection, too many
requests, a refused key) is a ConfigError. They come when a role is first asked: `Client.check` has them come before any
long work starts.

What a probe does not find overrules nothing that was set: a model with room to think has it, though it began a short
answer without a sign of thinking.
"""

import json
from collections.abc import Awaitable, Callable
from dataclasses import replace
from itertools import product
from typing import Any
from urllib.parse import urlsplit

from interp.client import answers
from interp.client.bodies import CHAT, COMPLETIONS, EMBEDDINGS, SHORT, least_body, payload
from interp.client.remote.failures import Outcome
from interp.client.requests import ROOM_FOR_THOUGHT, Abilities, Chat, Embed, LogProb
from interp.client.said import said_in, shows_thought, thought
from interp.client.shapes import first, record
from sae.base.errors import ConfigError

Send = Callable[[str, dict[str, Any]], Awaitable[Outcome]]

PROBE_TRIES = 3
PASSING = (401, 402, 408, 409, 425, 429)
"""Statuses of errors that tell nothing of the question, though they begin with 4."""
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
        self.plain: tuple[str, dict[str, Any]] | None = None

    async def find(self) -> Abilities:
        """Returns what the role can be asked; ConfigError where the server cannot be had at all."""
        found = Abilities()
        if self.role == "encoder":
            asked = Embed(self.role, ("hello", "good day"))
            outcome = await self.send(*payload(asked, self.model, found))
            if outcome.body is not None:
                outcome = replace(outcome, detail=answers.read(asked, found, outcome.body).detail)
            if outcome.detail:
                raise self._error(outcome)
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
        answered: list[tuple[Abilities, dict[str, Any]]] = []
        refusal = Outcome()
        for temperature, name in product((True, False), ("max_tokens", "max_completion_tokens")):
            if answered and (answered[0][0].temperature != temperature or _is_limited(answered[-1][1])):
                break  # a temperature that is taken is not given up for a limit that is ignored
            manner = replace(found, limit_name=name, temperature=temperature)
            outcome = await self._ask(*self._count(manner))
            if outcome.body is not None:
                answered.append((manner, outcome.body))
            elif not refusal.detail:
                refusal = outcome
        if not answered:
            raise self._error(refusal)
        manner, body = next((pair for pair in answered if _is_limited(pair[1])), answered[0])
        manner = replace(manner, ends=answers.ends(body))
        path, asked = self._count(manner)
        self.plain = path, least_body(path, asked)
        self.thinks = _thinks(body)
        for quiet in QUIET if self.thinks and self.room == 0 else ():
            quieter = replace(manner, quiet=json.dumps(quiet))
            outcome = await self._ask(*self._count(quieter))
            if outcome.body is not None and not _thinks(outcome.body):
                self.thinks = False
                return quieter
        return replace(manner, thinking_tokens=self.room or (ROOM_FOR_THOUGHT if self.thinks else 0))

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
        for top in (20, 5) if not self.thinks else ():
            asked = replace(found, choices=True, top=top)
            outcome = await self._ask(*payload(chat, self.model, asked))
            if outcome.body is not None:
                reply = answers.read(chat, asked, outcome.body)
                at_once = not found.thinking_tokens or sum(reply.probabilities.values()) >= 0.5
                return asked if reply.ok and at_once else found
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
            text = said_in(first(outcome.body["choices"]).get("message")).text
            text = thought(text, found.thinking_tokens > 0) or ""
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
        if self.plain is None:  # nothing was answered so far: is it the field that is refused, the path, or the key?
            path, body = payload(asked, self.model, found)
            outcome = await self.send(path, least_body(path, body))
            absent = _says_no(outcome) and (await self.send(*self._count(found))).body is not None
            if outcome.body is None and not absent:
                raise self._error(outcome)
        return found

    def _chat(self, question: str, **asked: Any) -> Chat:
        return Chat(self.role, (("user", question),), **{"max_tokens": 1, **asked})

    async def _ask(self, path: str, body: dict[str, Any]) -> Outcome:
        """Returns an answer, or a refusal that is a finding."""
        outcome = await self.send(path, body)
        if _may_pass(outcome) and self.plain and (await self.send(*self.plain)).body is not None:
            outcome = await self.send(path, body)  # the server is well, so it is this question
            if _may_pass(outcome):
                return outcome
        if outcome.body is None and not _says_no(outcome):
            raise self._error(outcome)
        return outcome

    def _error(self, outcome: Outcome) -> ConfigError:
        if outcome.failure == "budget":
            return ConfigError(f"budget_usd: {outcome.detail}")
        heard = outcome.status and outcome.status not in PASSING
        hint = next(filter(None, map(_lacking, self.where.split())), "") if heard else ""
        return ConfigError(
            f"{self.role}: the model {self.model!r} at {self.where} does not answer ({outcome.detail}){hint}"
        )


def _lacking(address: str) -> str:
    """Returns what an address that somebody answers at may want; "" where nothing is seen."""
    path = urlsplit(address).path
    if not path:
        return f"; most servers want {address}/v1"
    ending = next((name for name in (CHAT, COMPLETIONS, EMBEDDINGS) if path.endswith(name)), "")
    if ending:
        return f"; an address ends before {ending}, which is added to it"
    if "/deployments/" in path and "api-version=" not in address:
        return f"; Azure wants the version of its protocol too: {address}?api-version=..."
    return ""


def _says_no(outcome: Outcome) -> bool:
    """Returns whether an error tells of the question: the server runs, and does not do this."""
    if outcome.stop and not outcome.doubtful:
        return False
    return outcome.status in (500, 501) or (400 <= outcome.status < 500 and outcome.status not in PASSING)


def _may_pass(outcome: Outcome) -> bool:
    """Returns whether an error may tell of the server alone, and not because too much was asked of it."""
    return outcome.again and outcome.failure != "rate_limit" and not _says_no(outcome)


def _is_limited(body: dict[str, Any]) -> bool:
    """Returns whether an answer kept to the limit, which some servers ignore under a name that they do not know."""
    used = answers.usage(body)
    return answers.is_cut(body) or (used is not None and 0 < used[1] <= SHORT)


def _thinks(body: dict[str, Any]) -> bool:
    """Returns whether an answer shows that the model thinks: what it thought, or nothing where it had no room."""
    said = said_in(first(body["choices"]).get("message"))
    details = record(record(body.get("usage")).get("completion_tokens_details"))
    silent = answers.is_cut(body) and not said.text.strip()
    return shows_thought(said) or silent or bool(details.get("reasoning_tokens"))
