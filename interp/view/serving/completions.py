"""OpenAI's protocol: completions and chat completions of the language model as it is, or with latents edited.

Answers, streams, log-probabilities, usage and errors have the form of https://platform.openai.com/docs/api-reference;
"steer" stands in each answer beside that: the edits that were made. `echo` with `logprobs` tells the log-probabilities
of a prompt under the edited model, by which lm-eval's local-completions scores continuations.
"""

import json
import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from interp.view.serving.asked import Asked, asked
from interp.view.serving.guards import client_of
from interp.view.serving.refusing import Refused, told
from interp.view.serving.served import Served, Wrote, body_of
from interp.view.serving.turns import Turns
from sae.lm.generation import Step

KINDS = {400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
CODES = {401: "invalid_api_key", 404: "model_not_found", 429: "rate_limit_exceeded"}


def as_error(refused: Refused) -> dict[str, Any]:
    """Returns an error as the protocol has it."""
    kind = KINDS.get(refused.status, "invalid_request_error" if refused.status < 500 else "server_error")
    kind = "rate_limit_error" if refused.status == 429 else kind
    return {"message": str(refused), "type": kind, "param": refused.field, "code": CODES.get(refused.status)}


@dataclass
class Answer:
    """One choice as it is written."""

    text: list[str] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    finish: str = "length"
    tokens: int = 0

    def add(self, wrote: Wrote) -> None:
        """Takes what was written next."""
        step = wrote.step
        self.text.append(step.text)
        self.steps.append(step)
        self.finish = step.end or self.finish
        self.tokens += not step.prompt


class Completions:
    """The endpoints of one model."""

    def __init__(self, served: Served, turns: Turns) -> None:
        self.served, self.turns = served, turns
        self.since = int(time.time())

    async def models(self, request: Request) -> Response:
        """Answers GET v1/models, and v1/models/NAME."""
        one = {"id": self.served.name, "object": "model", "created": self.since, "owned_by": "sae-interp"}
        name = request.path_params.get("name")
        if name not in (None, self.served.name):
            raise Refused(404, f"model: only {self.served.name} is served here", field="model")
        return JSONResponse({"object": "list", "data": [one]} if name is None else one)

    async def completions(self, request: Request) -> Response:
        """Answers POST v1/completions."""
        return await self._answer(request, chat=False)

    async def chat(self, request: Request) -> Response:
        """Answers POST v1/chat/completions."""
        return await self._answer(request, chat=True)

    async def _answer(self, request: Request, chat: bool) -> Response:
        served = self.served
        wanted = asked(await body_of(request), chat, served.name, served.d_sae, served.limits)
        pieces = self.turns.pieces(served.written(wanted), (client_of(request.scope), "v1"))
        begun = await anext(pieces)  # what is refused once the prompt is read has a status of its own
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": f"{'chat.completion' if chat else 'text_completion'}{'.chunk' * (chat and wanted.stream)}",
            "created": int(time.time()),
            "model": served.name,
            "steer": ", ".join(map(str, wanted.edits)) or None,
        }
        if wanted.stream:
            stream = self._stream(wanted, head, begun.tokens, pieces)
            return StreamingResponse(stream, media_type="text/event-stream")
        answers = [Answer() for _ in range(len(wanted.prompts) * wanted.n)]
        async for piece in pieces:
            answers[piece.answer].add(piece)
        choices = [self._choice(wanted, number, answer) for number, answer in enumerate(answers)]
        written = sum(answer.tokens for answer in answers)
        return JSONResponse({**head, "choices": choices, "usage": _usage(begun.tokens, written)})

    async def _stream(
        self, wanted: Asked, head: dict[str, Any], tokens: int, pieces: AsyncIterator[Any]
    ) -> AsyncIterator[str]:
        head |= {"usage": None} if wanted.usage else {}
        answers = [Answer() for _ in range(len(wanted.prompts) * wanted.n)]
        offsets, written, going = [0] * len(answers), 0, set(range(len(answers)))
        try:
            if wanted.chat:
                for number in range(len(answers)):
                    yield _event(
                        {**head, "choices": [_delta(number, {"role": "assistant", "content": ""}, None, None)]}
                    )
            async for piece in pieces:
                one = Answer()
                one.add(piece)
                written += one.tokens
                text = piece.step.text
                shown = bool(text) or wanted.logprobs
                logprobs = self._logprobs(wanted, one, offsets[piece.answer]) if wanted.logprobs else None
                offsets[piece.answer] += len(text)
                finish = piece.step.end or None
                going -= {piece.answer} if finish else set()
                if wanted.chat:
                    if shown:
                        delta = {"content": text}
                        yield _event({**head, "choices": [_delta(piece.answer, delta, logprobs, None)]})
                    if finish:
                        yield _event({**head, "choices": [_delta(piece.answer, {}, None, finish)]})
                elif shown or finish:
                    choice = {"index": piece.answer, "text": text, "logprobs": logprobs, "finish_reason": finish}
                    yield _event({**head, "choices": [choice]})
            for number in sorted(going):  # no token was asked for
                end = {"index": number, "text": "", "logprobs": None, "finish_reason": "length"}
                yield _event({**head, "choices": [_delta(number, {}, None, "length") if wanted.chat else end]})
            if wanted.usage:
                yield _event({**head, "choices": [], "usage": _usage(tokens, written)})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _event({"error": as_error(told(error, self.served.places))})

    def _choice(self, wanted: Asked, number: int, answer: Answer) -> dict[str, Any]:
        text, logprobs = "".join(answer.text), self._logprobs(wanted, answer, 0) if wanted.logprobs else None
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {
            "index": number,
            **(said if wanted.chat else {"text": text}),
            "logprobs": logprobs,
            "finish_reason": answer.finish,
        }

    def _logprobs(self, wanted: Asked, answer: Answer, offset: int) -> dict[str, Any]:
        """Returns the log-probabilities of tokens as either protocol has them."""
        if wanted.chat:
            return {"content": [self._told(one) for one in answer.steps], "refusal": None}
        found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for one in answer.steps:
            likely = {self.served.piece(token): value for token, value in reversed(one.top)}
            if one.logprob is not None:
                likely = {**likely, self.served.piece(one.token): one.logprob}
            found["tokens"].append(self.served.piece(one.token))
            found["token_logprobs"].append(one.logprob)
            found["top_logprobs"].append(likely if one.logprob is not None and wanted.top else None)
            found["text_offset"].append(offset)
            offset += len(one.text)
        return found

    def _told(self, one: Step) -> dict[str, Any]:
        top = [self._token(token, value) for token, value in one.top]
        return {**self._token(one.token, one.logprob), "top_logprobs": top}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.served.piece(token)
        whole = "\N{REPLACEMENT CHARACTER}" not in text
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}


def _delta(number: int, delta: dict[str, str], logprobs: Any, finish: str | None) -> dict[str, Any]:
    return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _usage(tokens: int, written: int) -> dict[str, int]:
    return {"prompt_tokens": tokens, "completion_tokens": written, "total_tokens": tokens + written}


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, allow_nan=False)}\n\n"
