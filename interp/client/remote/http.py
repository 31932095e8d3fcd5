"""A model behind OpenAI-compatible servers: how a request is sent, tried again and given up.

The openai package does the sending (connections, headers, keys); tries and pauses are ours, so that limiter, ledger and
quota rules see every single one. An answer's text is parsed here and not by the package, whose models cost more time
than all the rest.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from interp.client import answers
from interp.client.bodies import EMBEDDINGS, least_body, payload
from interp.client.cache import Cache
from interp.client.config import EndpointConfig
from interp.client.holder import Holder
from interp.client.ledger import Ledger, Usage, guessed_usage, worst_case
from interp.client.remote import truncation
from interp.client.remote.abilities import PROBE_TRIES, Prober
from interp.client.remote.connection import Proxy, connect, custom_headers
from interp.client.remote.failures import Outcome, outcome_of_exception, outcome_of_text, scrub
from interp.client.remote.limiter import Closed, Limiter, backoff
from interp.client.requests import RETRYABLE, Abilities, Reply, Request
from interp.client.said import said_in
from interp.client.shapes import first
from sae.base.errors import Stopped
from sae.base.progress import Watch

REST_S = 10.0
"""An address that cannot be reached is left out for so long, if there are others."""
NOT_HERE = (401, 404, 405, 501)
"""Statuses by which one of several addresses shows that it is not what the others are. It is as good as out of reach:
always free, as it answers at once, it would be sent most of the questions."""
STOPPED, NO_MORE = "stopped", "no more calls were made"

log = logging.getLogger(__name__)


class Endpoint(Holder):
    """One model on one or several servers; all roles that name it share it."""

    def __init__(self, config: EndpointConfig, ledger: Ledger, cache: Cache, watch: Watch) -> None:
        self.config, self.ledger, self.cache, self.watch = config, ledger, cache, watch
        self.limiter = Limiter(config.max_concurrency)
        self.turns, self.waiting = asyncio.Semaphore(config.max_concurrency), 2 * config.max_concurrency
        self._doubt = asyncio.Lock()
        self.addresses = config.addresses()
        self.where = " ".join(sorted(address.shown for address in self.addresses))
        self._connections: list[tuple[Any, Proxy | None]] = []
        self._busy = [0] * len(self.addresses)
        self._rested = [0.0] * len(self.addresses)

    async def check(self, role: str) -> None:
        """Returns if the key is set and the server says what a role can ask; else raises ConfigError in one line."""
        self.clients()
        await self.load(role)

    async def load(self, role: str) -> Abilities:
        """Returns what a role can ask: found out once, then remembered in the cache. ConfigError if nobody answers."""
        fact = f"abilities {self.where} {self.config.model} {role} {self.config.thinking_tokens}"
        known, room = self.cache.fact(fact), self.config.thinking_tokens
        if known is not None and (not room or known.get("thinking_tokens") == room):
            return Abilities(**known)

        async def send(path: str, body: dict[str, Any]) -> Outcome:
            outcome, _ = await self.send(role, path, body, PROBE_TRIES)
            await self.cache.keep({}, self.ledger.unsaved())
            return outcome

        found = await Prober(role, self.config.model, send, self.where, room).find()
        log.info("%s: %s at %s: %s", role, self.config.model, self.where, found)
        await self.cache.note({fact: asdict(found)})
        return found

    async def answer(self, request: Request, abilities: Abilities) -> Reply:
        """Returns the reply to a request, or why there is none; Stopped if no more calls are to be made."""
        path, body = payload(request, self.config.model, abilities)
        judged = partial(self.judged, request, abilities)
        return self.reply(request, abilities, *await self.send(request.role, path, body, self.config.max_tries, judged))

    def judged(self, request: Request, abilities: Abilities, outcome: Outcome) -> Outcome:
        """Returns an outcome, as a server error if its answer is none to this request by the server's doing."""
        reply = Reply() if outcome.body is None else answers.read(request, abilities, outcome.body)
        if reply.failure not in RETRYABLE:
            return outcome
        detail = scrub(reply.detail, self.secrets())
        return replace(outcome, body=None, failure=reply.failure, detail=detail, again=True)

    def reply(self, request: Request, abilities: Abilities, outcome: Outcome, used: Usage) -> Reply:
        """Returns the reply that an outcome amounts to, without what must not be shown."""
        if outcome.body is None:
            reply = Reply(failure=outcome.failure, detail=outcome.detail, given_up=outcome.given_up)
        else:
            reply = answers.read(request, abilities, outcome.body)
            problem = truncation.cut(request, outcome.body)
            reply = Reply(failure="bad_request", detail=problem) if problem else reply
        detail = scrub(reply.detail, self.secrets())
        return replace(reply, detail=detail, tokens_in=used.tokens_in, tokens_out=used.tokens_out)

    def read(self, request: Request, abilities: Abilities, raw: Mapping[str, Any]) -> Reply:
        """Returns the reply that an answer amounts to which a batch gave before its question was asked."""
        outcome = Outcome(**{name: value for name, value in raw.items() if name != "tokens"})
        return replace(self.reply(request, abilities, outcome, Usage(*raw["tokens"])), cached=True)

    async def send(
        self,
        role: str,
        path: str,
        body: dict[str, Any],
        tries: int,
        judged: Callable[[Outcome], Outcome] | None = None,
    ) -> tuple[Outcome, Usage]:
        """Returns what comes of a body after at most so many tries, and the tokens of the last one.

        `judged` says whether an answer is one; without it, the body is a probe's.
        """
        worst, answered, probing = worst_case(body), 0, judged is None
        outcome, used = Outcome(), Usage(0, 0)
        for attempt in range(tries):
            if attempt:
                await self.limiter.rest(backoff(attempt))
            try:
                started = await self.limiter.enter()
            except Closed as closed:
                if closed.failure == STOPPED:
                    raise Stopped(NO_MORE) from None
                return Outcome(failure=closed.failure, detail=closed.detail, given_up=True), Usage(0, 0)
            try:
                self.watch.poll(NO_MORE)
                if not self.ledger.reserve(role, worst):
                    return Outcome(failure="budget", detail=self.ledger.refusal()), Usage(0, 0)
                used = worst  # should this task be cancelled: what was sent may be charged
                try:
                    outcome, used = await self._once(path, body, worst, probing)
                finally:
                    self.ledger.settle(role, worst, used)
                outcome = judged(outcome) if judged else outcome
                self._learn(outcome, started, probing)
            finally:
                self.limiter.leave()
            if not outcome.again:
                break
            if attempt == 0:
                answered = self.limiter.answered
        if probing:
            return outcome, used
        if outcome.again and self.limiter.answered == answered:  # nobody was answered meanwhile
            await self.limiter.rest(max(backoff(tries), outcome.wait_s or 0.0))
            self.watch.poll(NO_MORE)
        elif outcome.again or not outcome.doubtful:
            return outcome, used
        return outcome.settled(await self._is_down(role, path, body, outcome)), used

    def halt(self) -> None:
        """Has everything that waits, and all that comes, end with Stopped."""
        self.limiter.close(STOPPED, "")

    def clients(self) -> list[Any]:
        """Returns an openai client for each address, made at first use; ConfigError as `connect` raises it."""
        if not self._connections:
            self._connections = [connect(self.config, address) for address in self.addresses]
        return [client for client, _ in self._connections]

    def secrets(self) -> list[str]:
        """Returns what must not be shown: the key, and what goes out in headers, queries and to proxies."""
        found = [os.environ.get(name, "") for name in (self.config.api_key_env, "HF_TOKEN")]
        found += custom_headers().values()
        found += [secret for address in self.addresses for secret in address.secrets]
        found += [secret for _, proxy in self._connections if proxy for secret in proxy.secrets]
        return sorted(filter(None, found), key=len, reverse=True)

    async def close(self) -> None:
        """Closes all connections."""
        for client in self.clients() if self._connections else ():
            await client.close()

    async def _is_down(self, role: str, path: str, body: dict[str, Any], outcome: Outcome) -> bool:
        """Returns whether the server answers nobody, rather than just not this question: a small one tells.

        A question that breaks its server, or that a firewall keeps from it, is to be noted as failed, or it would end
        every run that comes to it; one that is refused with all others, as once the account is empty, has not failed.
        """
        async with self._doubt:
            small = least_body(path, body)
            worst = worst_case(small)
            if self.limiter.closed or not self.ledger.reserve(role, worst):
                return self.limiter.closed or outcome.stop
            started, used = asyncio.get_running_loop().time(), worst
            try:
                said, used = await self._once(path, small, worst)
            finally:
                self.ledger.settle(role, worst, used)
            self._learn(said, started, probing=True)
            if said.stop:
                self.limiter.close(said.failure, said.detail)
            elif said.body is None and (said.again or outcome.doubtful):
                self.limiter.down(outcome.settled(of_all=True).failure, outcome.detail)
            return said.body is None and (said.again or said.stop or outcome.doubtful)

    async def _once(
        self, path: str, body: dict[str, Any], worst: Usage, probing: bool = False
    ) -> tuple[Outcome, Usage]:
        """Sends a body once; returns the outcome and what it used, the worst case if that cannot be known."""
        clients, place = self.clients(), self._place()
        self._busy[place] += 1
        try:
            async with asyncio.timeout(self.config.timeout_s):  # the package's own clock starts anew at every byte
                text = await clients[place].post(path, cast_to=str, body=body)
            outcome = outcome_of_text(text, path, self.secrets())
        except Exception as error:
            outcome, text = outcome_of_exception(error, self.secrets()), ""
        finally:
            self._busy[place] -= 1
        now = asyncio.get_running_loop().time()
        others = any(at <= now for at in self._rested[:place] + self._rested[place + 1 :])
        if others and outcome.status in NOT_HERE and not probing:
            outcome = replace(outcome, failure="connection", again=True, stop=False)
        if outcome.failure == "connection":
            if len(self.addresses) > 1 and not self._rested[place]:
                log.warning("%s is left out (%s)", self.addresses[place].shown, outcome.detail)
            self._rested[place] = now + REST_S
        if outcome.body is None:
            proxy = self._connections[place][1]
            if proxy:  # which may be the one that said so
                outcome = replace(outcome, detail=f"{outcome.detail}, by way of {proxy.shown}")
            return outcome, worst if outcome.paid else Usage(0, 0)
        return outcome, usage_of(outcome.body, path, worst.tokens_in)

    def _place(self) -> int:
        """Returns the address with the fewest requests under way, among those that can be reached."""
        now = asyncio.get_running_loop().time()
        return min(range(len(self.addresses)), key=lambda place: (self._rested[place] > now, self._busy[place]))

    def _learn(self, outcome: Outcome, started: float, probing: bool) -> None:
        if outcome.stop and not outcome.doubtful:
            self.limiter.close(outcome.failure, outcome.detail)
        elif outcome.failure in ("rate_limit", "timeout", "server_error") and outcome.again:
            if not probing or outcome.wait_s is not None or outcome.failure == "rate_limit":
                self.limiter.overloaded(started, outcome.wait_s, pause=outcome.failure == "rate_limit")
        elif outcome.failure != "connection":
            self.limiter.succeeded()


def usage_of(body: Any, path: str, bytes_in: int) -> Usage:
    """Returns the tokens of a call: what the server says, or else a guess."""
    told = answers.usage(body)
    if told is not None:
        return Usage(*told)
    if path == EMBEDDINGS:
        return guessed_usage(bytes_in, 0)
    choice = first(body["choices"])
    said = said_in(choice.get("message") or {"content": choice.get("text")})
    return guessed_usage(bytes_in, len(said.text) + len(said.thinking))
