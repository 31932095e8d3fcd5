"""What the page asks: about the run, prompts, one latent on a text, search, steering, notes."""

import asyncio
import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from interp.view.explained import ExplainedRun
from interp.view.firing.prompting import prompt as fires_on
from interp.view.notes import KEEP, Outdated
from interp.view.serving.asked import checked_text, edits_of
from interp.view.serving.guards import client_of
from interp.view.serving.refusing import Refused, told
from interp.view.serving.served import Served, body_of
from interp.view.serving.turns import Steps, Turns
from sae.base.version import version
from sae.base.visible import visible
from sae.evaluation.activations import activations
from sae.pages.marks import runs
from sae.steering.steer import Piece, streamed

FIELDS = {
    "prompt": ("text", "chat", "run"),
    "test": ("latent", "text", "chat", "run"),
    "search": ("query", "by", "limit", "run"),
    "steer": ("prompt", "edits", "kl", "new_tokens", "chat", "temperature", "top_p", "seed", "run"),
    "notes": ("latent", "bookmark", "label", "was", "run"),
}
WAYS = ("words", "meaning")
FOUND = 50
NEW_TOKENS = 40


class Panels:
    """The endpoints of the page."""

    def __init__(self, served: Served, run: ExplainedRun, turns: Turns) -> None:
        self.served, self.run, self.turns = served, run, turns
        spec, limits = served.coder.spec, served.limits
        why = {"steer": served.unsteerable} if served.unsteerable else {}
        can = dict.fromkeys(("prompt", "test", "search", "meaning", "steer", "notes"), True)
        self._about = {
            "model": visible(served.name),
            "coder": visible(run.run_dir.resolve().parent.name),
            "run": visible(run.run_dir.name),
            "d_sae": served.d_sae,
            "site": visible(", ".join(site.name for site in spec.reads)),
            "chat": served.chats,
            "can": {**can, **{name: False for name in why}},
            "why": why,
            "encoder": visible(run.searcher.encoder),
            "latents": len(run),
            "limits": {
                "text": limits.text,
                "tokens": served.context,
                "new_tokens": limits.new_tokens,
                "edits": limits.edits,
                "label": limits.label,
            },
            "version": version(),
        }

    async def about(self, request: Request) -> Response:
        """Answers GET api/about."""
        return JSONResponse(self._about)

    async def prompt(self, request: Request) -> Response:
        """Answers POST api/prompt: which latents fire where on a text."""
        data = await self._asked(request, "prompt")
        text, chat = self._text(data, "text")

        def steps() -> Steps:
            served = self.served
            served.ids(text, 0, chat)
            found = fires_on(served.coder, served.lm, text, self.run, chat=chat)
            yield found.to_json() | {"model": visible(served.name)}

        return JSONResponse(await self._one(request, steps()))

    async def test(self, request: Request) -> Response:
        """Answers POST api/test: where one latent fires on a text."""
        data = await self._asked(request, "test")
        latent, (text, chat) = self._latent(data), self._text(data, "text")

        def steps() -> Steps:
            served = self.served
            served.ids(text, 0, chat)
            said = [{"role": "user", "content": text}] if chat else text
            found = activations(served.lm, served.coder, said)
            values = (found.of(latent) * found.mask)[0].tolist()
            place = max(range(len(values)), key=lambda i: abs(values[i]))
            told = [(visible(piece), value) for piece, value in runs(found.strings[0], values)]
            yield {"latent": latent, "runs": told, "values": values, "largest": values[place], "position": place}

        return JSONResponse(await self._one(request, steps()))

    async def search(self, request: Request) -> Response:
        """Answers POST api/search: latents by their labels."""
        data = await self._asked(request, "search")
        query, by, limits = data.get("query"), data.get("by", WAYS[0]), self.served.limits
        if by not in WAYS:
            raise Refused(400, f"by: it is none of {', '.join(WAYS)}")
        if not isinstance(query, str) or not query.strip() or len(query) > limits.query:
            raise Refused(400, f"query: it is no text of 1 to {limits.query} characters")
        limit = data.get("limit", FOUND)
        if type(limit) is not int or not 0 < limit <= 1000:
            raise Refused(400, "limit: it is no whole number from 1 to 1000")

        def steps() -> Steps:
            found = self.run.search(query, by, limit)
            yield {"found": [{"run": 0, **one.to_json()} for one in found], "by": by}

        return JSONResponse(await self._one(request, steps()))

    async def steer(self, request: Request) -> Response:
        """Answers POST api/steer: both continuations as they are written, a JSON object on each line."""
        data, served = await self._asked(request, "steer"), self.served
        if served.unsteerable:
            raise Refused(400, served.unsteerable)
        prompt, chat = self._text(data, "prompt")
        edits = edits_of(data.get("edits"), served.d_sae, served.limits, "edits")
        new_tokens = self._number(data, "new_tokens", 1, served.limits.new_tokens, NEW_TOKENS, whole=True)
        options = {
            "kl": self._number(data, "kl", 0, 100, None),
            "temperature": self._number(data, "temperature", 0, 2, 0.0),
            "top_p": self._number(data, "top_p", 0, 1, 1.0),
            "seed": self._number(data, "seed", -(2**63), 2**63 - 1, 0, whole=True),
        }

        def steps() -> Steps:
            served.ids(prompt, new_tokens, chat)
            how = {"new_tokens": new_tokens, "largest": served.largest(edits), "chat": chat, **options}
            for piece in streamed(served.steering, prompt, edits, **how):
                if piece is None:
                    yield None
                elif isinstance(piece, Piece):
                    yield {"side": piece.side, "text": visible(piece.text)}
                else:
                    done = piece.to_json() | {"model": visible(served.name)}
                    yield {"done": {**done, **{name: visible(done[name]) for name in ("prompt", "plain", "steered")}}}

        async def lines(first: Any, pieces: AsyncIterator[Any]) -> AsyncIterator[str]:
            yield json.dumps(first) + "\n"
            try:
                async for piece in pieces:
                    yield json.dumps(piece, allow_nan=False) + "\n"
            except Exception as error:
                yield json.dumps({"error": str(told(error, served.places))}) + "\n"

        pieces = self.turns.pieces(steps(), (client_of(request.scope), "page"))
        first = await anext(pieces)  # what is refused before has a status of its own
        return StreamingResponse(lines(first, pieces), media_type="application/x-ndjson")

    async def notes(self, request: Request) -> Response:
        """Answers GET api/notes."""
        return JSONResponse({"notes": self.run.notes.to_json()})

    async def note(self, request: Request) -> Response:
        """Answers POST api/notes: keeps a bookmark or an edited label."""
        data, notes = await self._asked(request, "notes"), self.run.notes
        latent = self._latent(data)
        changes = {name: data.get(name, KEEP) for name in ("bookmark", "label", "was")}
        try:
            await asyncio.to_thread(partial(notes.change, latent, **changes))
        except Outdated as error:
            return JSONResponse({"error": str(error), "notes": notes.to_json()}, 409)
        return JSONResponse({"notes": notes.to_json()})

    async def _one(self, request: Request, steps: Steps) -> Any:
        return await self.turns.one(steps, (client_of(request.scope), "page"))

    async def _asked(self, request: Request, name: str) -> dict[str, Any]:
        """Returns the fields of a request; Refused if there are others, or it is about another run."""
        data = await body_of(request)
        if not isinstance(data, dict):
            raise Refused(400, "the request is no JSON object")
        for field in data:
            if field not in FIELDS[name]:
                raise Refused(400, f"{visible(field)[:60]}: no such field; there are {', '.join(FIELDS[name])}")
        if data.get("run", 0) != 0:
            raise Refused(400, "run: there is one, number 0")
        return data

    def _latent(self, data: dict[str, Any]) -> int:
        latent, last = data.get("latent"), self.served.d_sae - 1
        if type(latent) is not int or not 0 <= latent <= last:
            raise Refused(400, f"latent: it is no whole number from 0 to {last}")
        return latent

    def _text(self, data: dict[str, Any], field: str) -> tuple[str, bool]:
        """Returns a text, and whether it is what a user says in a chat."""
        text, chat = checked_text(field, data.get(field), self.served.limits), data.get("chat", False)
        if not isinstance(chat, bool | None):
            raise Refused(400, "chat: it is neither true nor false")
        if not text:
            raise Refused(400, f"{field}: it is empty")
        return text, bool(chat)

    def _number(
        self, data: dict[str, Any], field: str, least: float, most: float, default: Any, whole: bool = False
    ) -> Any:
        value = data.get(field)
        kinds = int if whole else int | float
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
            raise Refused(400, f"{field}: it is no {'whole ' * whole}number from {least} to {most}")
        return value
