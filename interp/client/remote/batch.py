"""OpenAI's Batch API: a wave of questions as a file, answered within a day at half the price.

    questions -> JSONL files (<= 50,000 lines, <= 200 MB) -> batches -> output and error files -> the cache

A line's `custom_id` is the question's cache key, and answers are matched by it alone: order is not promised, and lines
may be missing. What is missing because a batch expired or was cancelled, or because of an error that may pass, goes
into a next batch, three times at most; what was refused for good is a reply like any other.

Nothing is submitted twice. A batch's id is stored, with its keys, once it is known; every batch carries the id of the
cache file as metadata, so that one whose id was lost in a crash is found in the server's list, and its keys in its own
input file. The same call after a crash adopts whatever is open; what such a batch answers beyond that call is stored as
it came, for when it is asked. Until a batch has ended, its worst case is set aside from the budget, over crashes too.

There is no real Batch API to test against here: the tests use a double built from the published schema.
"""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from interp.client.bodies import EMBEDDINGS, payload
from interp.client.cache import Cache
from interp.client.config import EndpointConfig
from interp.client.ledger import Ledger, Usage, worst_case
from interp.client.remote.batch_json import Batch, batch_of, entries, name_of, page_of, parsed
from interp.client.remote.failures import Outcome, outcome_of_body, outcome_of_exception, outcome_of_status, scrub
from interp.client.remote.http import Endpoint, usage_of
from interp.client.remote.limiter import LONGEST_RETRY_AFTER_S, backoff
from interp.client.requests import FINAL, Abilities, Reply, Request
from interp.client.shapes import count, listed, record, told
from sae.base.progress import Watch

MAX_LINES, MAX_BYTES = 50_000, 200 * 2**20
MAX_ROUNDS = 3
"""How often a question is submitted."""
FILE_S = 600.0
"""Time for a file to go up or down."""
LISTED_DAYS = 8
"""How far back the server's list is searched: a batch lives a day."""
ENDED = ("completed", "failed", "expired", "cancelled")
_TAG, _ROLE = "sae-interp", "role"
_NOTHING = Usage(0, 0)

log = logging.getLogger(__name__)


@dataclass
class _Line:
    """A question on its way."""

    request: Request
    path: str
    body: dict[str, Any]
    worst: Usage
    rounds: int = 0
    reply: Reply | None = None
    reserved: bool = False

    @property
    def size(self) -> int:
        """Returns the inputs that count against a file's limit of lines."""
        return len(self.body["input"]) if self.path == EMBEDDINGS else 1


class _Failed(Exception):
    """A call for a file or a batch that was given up."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome


class Batches(Endpoint):
    """One model behind the Batch API: an endpoint that is asked in waves."""

    in_waves = True

    def __init__(self, config: EndpointConfig, ledger: Ledger, cache: Cache, watch: Watch, poll_s: float) -> None:
        super().__init__(config, ledger, cache, watch)
        self.poll_s, self._found = poll_s, False

    async def answer_all(self, role: str, asked: dict[str, Request], abilities: Abilities) -> dict[str, Reply]:
        """Returns a reply for every key, all final ones stored; Stopped if a signal came while batches are open."""
        model, lines = self.config.model, {}
        for key, request in asked.items():
            path, body = payload(request, model, abilities)
            lines[key] = _Line(request, path, body, worst_case(body))
        try:
            await self._follow(role, lines, abilities)
        except _Failed as failed:
            outcome = replace(failed.outcome, given_up=True)
            for line in lines.values():
                line.reply = line.reply or self.reply(line.request, abilities, outcome, _NOTHING)
        finally:
            for line in lines.values():
                self._release(role, line)
        return {key: line.reply or Reply(failure="expired") for key, line in lines.items()}

    async def _follow(self, role: str, lines: dict[str, _Line], abilities: Abilities) -> None:
        """Submits, waits and collects until every line has a reply."""
        submitted = await self._adopted(role, lines)
        cautious = False  # one batch at a time
        while True:
            under_way = {key for keys in submitted.values() for key in keys}
            waiting = {key: line for key, line in lines.items() if line.reply is None and key not in under_way}
            if waiting and not (cautious and submitted):
                for part in self._parts(role, waiting):
                    submitted |= await self._submit(role, part)
                    if cautious:
                        break
            if not submitted:
                return
            await self._nap(len(submitted))
            full = None
            for name in list(submitted):
                batch = await self._call(lambda api, name=name: api.batches.with_raw_response.retrieve(name), batch_of)
                log.info("batch %s: %s, %s", name, batch.status, batch.counts)
                if batch.status not in ENDED:
                    continue
                keys = submitted.pop(name)
                if batch.status == "failed" and batch.full:
                    full = batch
                    for key in keys & lines.keys():
                        lines[key].rounds -= 1
                await self._collect(role, replace(batch, id=name), lines, abilities)
            if full is not None and cautious:
                raise _Failed(Outcome(failure="quota", detail=scrub(full.told, self.secrets())))
            cautious = cautious or full is not None

    def _parts(self, role: str, waiting: dict[str, _Line]) -> Iterator[dict[str, _Line]]:
        """Yields what goes into one file: lines of one kind, within the limits; those beyond the budget get a reply."""
        ledger = self.ledger
        by_path: dict[str, dict[str, _Line]] = {}
        for key, line in sorted(waiting.items()):
            line.reserved = line.reserved or ledger.reserve(role, line.worst)
            if line.reserved:
                by_path.setdefault(line.path, {})[key] = line
            else:
                line.reply = Reply(failure="budget", detail=ledger.refusal())
        for chosen in by_path.values():
            part: dict[str, _Line] = {}
            inputs = written = 0
            for key, line in chosen.items():
                size = len(_written(key, line))
                if part and (inputs + line.size > MAX_LINES or written + size > MAX_BYTES):
                    yield part
                    part, inputs, written = {}, 0, 0
                part[key] = line
                inputs, written = inputs + line.size, written + size
            if part:
                yield part

    async def _submit(self, role: str, part: dict[str, _Line]) -> dict[str, set[str]]:
        """Returns {batch id: keys} of a file that is under way and will be found again."""
        text = b"".join(_written(key, line) for key, line in part.items())
        sent = ("wave.jsonl", text)
        file = await self._call(lambda api: api.files.with_raw_response.create(file=sent, purpose="batch"), name_of)
        path = "/v1" + next(iter(part.values())).path
        metadata = {_TAG: self.cache.id, _ROLE: role}

        def create(api: Any) -> Any:
            return api.batches.with_raw_response.create(
                input_file_id=file, endpoint=path, completion_window="24h", metadata=metadata
            )

        async def lost() -> Batch | None:
            return next((found for found in await self._listed() if found.input == file), None)

        batch = await self._call(create, batch_of, lost)
        for line in part.values():
            self._release(role, line)  # from here on it is set aside as part of the batch
            line.rounds += 1
        await self._note(batch.id, role, {key: line.worst for key, line in part.items()})
        return {batch.id: set(part)}

    async def _note(self, batch: str, role: str, sent: dict[str, Usage]) -> None:
        """Stores that a batch is open, and sets aside what it may cost."""
        worst = [sum(used.tokens_in for used in sent.values()), sum(used.tokens_out for used in sent.values())]
        self.ledger.hold(role, Usage(worst[0], worst[1]))
        await self.cache.note({f"batch {batch}": {"keys": list(sent), "open": True, "role": role, "worst": worst}})

    def _release(self, role: str, line: _Line) -> None:
        if line.reserved:
            self.ledger.release(role, line.worst)
        line.reserved = False

    async def _adopted(self, role: str, lines: dict[str, _Line]) -> dict[str, set[str]]:
        """Returns {batch id: keys} of earlier batches that may answer some of the lines."""
        if not self._found:
            known = self.cache.facts("batch ")
            for batch in await self._listed():
                if batch.input and f"batch {batch.id}" not in known:
                    sent = entries(await self._content(batch.input))
                    worst = {entry["custom_id"]: _worst(record(entry.get("body"))) for entry in sent}
                    await self._note(batch.id, told(batch.metadata.get(_ROLE, role)), worst)
            self._found = True
        stored = self.cache.facts("batch ")
        open_ones = {name.removeprefix("batch "): set(fact["keys"]) for name, fact in stored.items() if fact["open"]}
        return {name: keys for name, keys in open_ones.items() if not lines.keys().isdisjoint(keys)}

    async def _collect(self, role: str, batch: Batch, lines: dict[str, _Line], abilities: Abilities) -> None:
        """Gives a reply to every line that an ended batch answers for good; stores these and all it answers besides."""
        name = f"batch {batch.id}"
        fact = self.cache.fact(name)
        known = (lines[key].path for key in fact["keys"] if key in lines)
        path = next(known, batch.endpoint.removeprefix("/v1"))
        worst, outcomes = Usage(*fact["worst"]), dict[str, Outcome]()
        for file in batch.outputs:
            for entry in entries(await self._content(file)):
                key, outcome = entry["custom_id"], self._outcome(entry, path)
                if key not in outcomes or (outcome.body is not None and outcomes[key].body is None):
                    outcomes[key] = outcome
        if any(outcome.body is not None for outcome in outcomes.values()):  # then the key is good: it is the question
            outcomes = {key: one.settled(of_all=False) if one.stop else one for key, one in outcomes.items()}
        lost = Outcome(failure="expired", detail=f"batch {batch.status}", again=True)
        if batch.status == "failed" and not batch.full:
            lost = Outcome(failure="server_error", detail=scrub(batch.told, self.secrets()))
        replies: dict[str, Reply] = {}
        raw: dict[str, Any] = {}
        for key in fact["keys"]:
            outcome, line, used = outcomes.get(key, lost), lines.get(key), _NOTHING
            if outcome.body is not None:
                bytes_in = line.worst.tokens_in if line else worst.tokens_in // len(fact["keys"])
                used = usage_of(outcome.body, path, bytes_in)
            self.ledger.settle(role, _NOTHING, used)
            if line is not None:
                outcome = self.judged(line.request, abilities, outcome)
            if line is None and (outcome.body is not None or outcome.failure in FINAL):
                tokens = [used.tokens_in, used.tokens_out]
                raw[key] = {name: value for name, value in vars(outcome).items() if value} | {"tokens": tokens}
            elif line is not None and (not outcome.again or line.rounds >= MAX_ROUNDS):
                line.reply = replies[key] = self.reply(line.request, abilities, outcome, used)
        self.ledger.release(role, worst)
        closed = {name: {"keys": [], "open": False}}
        await self.cache.keep(replies, self.ledger.unsaved(), closed, raw)

    def _outcome(self, entry: dict[str, Any], path: str) -> Outcome:
        """Returns what a line of an output or error file says."""
        response, secrets = record(entry.get("response")), self.secrets()
        status, body, error = count(response.get("status_code")), response.get("body"), entry.get("error")
        if status == 200 and not error:
            return outcome_of_body(body, path, secrets)
        if status and status != 200:
            return outcome_of_status(status, told(body), {}, secrets)
        return Outcome(failure="expired", detail=scrub(told(error), secrets), again=True)

    async def _listed(self) -> list[Batch]:
        """Returns this cache's batches of the last days, as the server lists them."""
        found: dict[str, Batch] = {}
        more: dict[str, str] = {}
        while True:
            page = await self._call(lambda api, at=more: api.batches.with_raw_response.list(limit=100, **at), page_of)
            new = {batch.id: batch for batch in map(batch_of, page["data"]) if batch and batch.id not in found}
            found |= new
            if not new or page.get("has_more") is False:
                break
            more = {"after": list(new)[-1]}
        oldest = time.time() - LISTED_DAYS * 86_400
        return [b for b in found.values() if b.created_at >= oldest and b.metadata.get(_TAG) == self.cache.id]

    async def _content(self, file: str) -> bytes:
        return await self._call(lambda api: api.files.with_raw_response.content(file))

    async def _call(
        self,
        call: Callable[[Any], Any],
        read: Callable[[Any], Any] | None = None,
        lost: Callable[[], Any] | None = None,
    ) -> Any:
        """Returns what a call of the openai package gives, tried again as often as a question would be.

        Args:
            call: what is done with the client: returns the bare answer.
            read: makes something of its JSON, None of what is not what was wanted; without it the bytes are returned.
            lost: of a call that must not be done twice: returns what it made, where its answer was lost on the way.
        """
        outcome, config = Outcome(), self.config
        for attempt in range(config.max_tries):
            if attempt:
                await asyncio.sleep(max(backoff(attempt), min(outcome.wait_s or 0.0, LONGEST_RETRY_AFTER_S)))
            try:
                async with asyncio.timeout(max(config.timeout_s, FILE_S)):
                    raw = (await call(self.clients()[0])).content
            except Exception as error:
                outcome = outcome_of_exception(error, self.secrets())
            else:
                made = raw if read is None else read(parsed(raw))
                if made is not None:
                    return made
                said = f"the server's answer cannot be used: {raw[:1000].decode(errors='replace')}"
                outcome = Outcome(failure="server_error", detail=scrub(said, self.secrets()), again=True)
            made = await lost() if lost is not None and (outcome.paid or outcome.again) else None
            if made is not None:
                return made
            if not outcome.again:
                break
        raise _Failed(outcome)

    async def _nap(self, count: int) -> None:
        end = time.monotonic() + self.poll_s
        while True:
            self.watch.poll(f"{count} batches stay open; the same command collects them")
            left = end - time.monotonic()
            if left <= 0:
                return
            await asyncio.sleep(min(left, 0.2))


def _worst(body: dict[str, Any]) -> Usage:
    """Returns the worst case of a body that the server gives back."""
    limits = {name: count(body[name]) or 0 for name in ("max_tokens", "max_completion_tokens") if name in body}
    return worst_case({**body, **limits, "messages": listed(body.get("messages"))})


def _written(key: str, line: _Line) -> bytes:
    """Returns a question as a line of an input file."""
    entry = {"custom_id": key, "method": "POST", "url": f"/v1{line.path}", "body": line.body}
    return json.dumps(entry).encode() + b"\n"
