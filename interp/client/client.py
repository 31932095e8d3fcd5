"""Client: asks the models behind the roles, each question once, within the budget.

    request -> cache? -> under way? -> budget -> server, this process or batch -> cache -> reply

`Client.ask` never raises for what a server does: the reply says it. Every final answer is on disk before it is handed
on, the same question asked twice at once is one call, and no call goes out that could break the budget. Keys are read
from the environment when a call goes out and stand nowhere else; what servers say is scrubbed of them.
"""

import asyncio
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from interp.client import bodies
from interp.client.cache import Cache
from interp.client.config import EndpointConfig
from interp.client.holder import Holder
from interp.client.ledger import Ledger, Usage
from interp.client.requests import FINAL, ROLES, Abilities, Chat, Reply, Request, cache_key
from sae.base.errors import ConfigError, Stopped
from sae.base.progress import UNWATCHED, Watch
from sae.base.settings import choose

if TYPE_CHECKING:
    from interp.client.local.scheduling import Shared

STOP_EVERY_S = 0.2


class Client:
    """Asks the models behind the roles; an async context manager.

    Args:
        endpoints: by role, of ROLES; a role without a model cannot be asked.
        cache: file of the answers so far.
        budget_usd: what all roles together may spend, with what stands in the cache file as spent before: the budget is
            one of the file, however many commands work with it (with --shard, each shard has its own). None for no
            limit.
        watch: once it says to stop no call goes out any more, and whoever asks gets Stopped.
        poll_s: how often the state of batches is looked at.
        retry_failed: whether questions whose stored answer is a failure (a refusal, an answer that does not parse) are
            asked once more; the new answer then stands in its place.
        shared: models that are loaded already, by name, for roles via local.
    """

    def __init__(
        self,
        endpoints: Mapping[str, EndpointConfig],
        cache: Path,
        budget_usd: float | None = None,
        watch: Watch = UNWATCHED,
        poll_s: float = 60.0,
        retry_failed: bool = False,
        shared: "Mapping[str, Shared] | None" = None,
    ) -> None:
        for role, config in endpoints.items():
            choose("role", role, ROLES)
            config.validate(role)
        self.endpoints, self.ledger = dict(endpoints), Ledger(endpoints, budget_usd)
        self._path, self._watch, self._poll_s, self._retry_failed = cache, watch, poll_s, retry_failed
        self._shared = dict(shared or {})
        self._holders: dict[EndpointConfig, Holder] = {}
        self._abilities: dict[str, Abilities] = {}
        self._probing: dict[str, asyncio.Lock] = {role: asyncio.Lock() for role in endpoints}
        self._flights: dict[str, asyncio.Task[Reply]] = {}
        self._retried: set[str] = set()
        self._halting: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Client":
        self._cache = Cache(self._path)
        self.ledger.start_from(self._cache.spent())
        for batch in self._cache.facts("batch ").values():
            if batch["open"]:
                self.ledger.hold(batch["role"], Usage(*batch["worst"]))
        if self._watch is not UNWATCHED:
            self._halting.append(asyncio.create_task(self._halt_when_stopped()))
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._flights.values(), *self._halting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for holder in self._holders.values():
            await holder.close()
        try:
            await self._keep({})  # what calls cost that brought no answer
        finally:
            self._cache.close()

    def has(self, role: str) -> bool:
        """Returns whether there is a model for a role."""
        return bool(self.endpoints.get(role, EndpointConfig()).model)

    async def abilities(self, role: str) -> Abilities:
        """Returns what a role's model can be asked: found out once, then remembered in the cache.

        ConfigError if the role has no model, or its server does not answer at all.
        """
        if role in self._abilities:
            return self._abilities[role]
        self._must_have(role)
        async with self._probing[role]:
            if role not in self._abilities:
                self._abilities[role] = await self._holder(role).load(role)
        return self._abilities[role]

    async def check(self, roles: Iterable[str]) -> None:
        """Returns if these roles can be asked; else raises ConfigError in one line. For before any long work.

        Keys must be set, and models in this process be there (none is loaded). A server is asked what it can do, and
        must answer; what is found out is stored, and whoever finds it there asks no server. That the prices which a
        budget needs are known is seen to when a client is made.
        """
        for role in roles:
            self._must_have(role)
            await self._holder(role).check(role)

    async def ask(self, request: Request) -> Reply:
        """Returns the reply to a request, or one that says why there is none.

        An answer that does not follow its schema is sent back once, with what is wrong with it. Raises ConfigError as
        `abilities` does, and Stopped.
        """
        reply = await self._ask(request)
        if reply.failure == "parse" and isinstance(request, Chat):
            again = await self._ask(bodies.repair(request, reply.text, reply.detail))
            tokens_in, tokens_out = reply.tokens_in + again.tokens_in, reply.tokens_out + again.tokens_out
            cached = reply.cached and again.cached
            reply = replace(again, tokens_in=tokens_in, tokens_out=tokens_out, cached=cached)
        if not reply.ok:
            self.ledger.missing(request.role, reply.failure)
        return reply

    async def ask_all(
        self, requests: Sequence[Request], heard: Callable[[Request, Reply], None] = lambda request, reply: None
    ) -> list[Reply]:
        """Returns the replies to a wave of requests, in their order; roles via batch get batches.

        Each reply is told to `heard` as soon as it is there.
        Raises Stopped, once calls under way have been answered and stored, if it was asked to stop.
        """
        replies: list[Reply | None] = [None] * len(requests)
        live: list[int] = []
        waves: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            (waves.setdefault(request.role, []) if self._holder(request.role).in_waves else live).append(number)
        numbers = iter(live)

        def take(number: int, reply: Reply) -> None:
            replies[number] = reply
            heard(requests[number], reply)

        async def work(numbers: Iterator[int]) -> None:
            for number in numbers:
                take(number, await self.ask(requests[number]))

        async def follow(role: str, numbers: list[int]) -> None:
            answers = await self._ask_wave(role, [requests[number] for number in numbers])
            for number, reply in zip(numbers, answers, strict=True):
                take(number, reply)

        used = {self._holder(role) for role in {requests[number].role for number in live}}
        workers = [work(numbers) for _ in range(min(len(live), sum(holder.waiting for holder in used)))]
        followers = [follow(role, numbers) for role, numbers in waves.items()]
        done = await asyncio.gather(*workers, *followers, return_exceptions=True)
        errors = [error for error in done if isinstance(error, BaseException)]
        for error in sorted(errors, key=lambda error: isinstance(error, Stopped)):
            raise error
        return [reply for reply in replies if reply is not None]

    def _must_have(self, role: str) -> None:
        if not self.has(role):
            raise ConfigError(f"{role}.model: not set, but needed; name a model, or leave out what asks it")

    def _holder(self, role: str) -> Holder:
        """Returns what answers for a role; roles of equal configs share it."""
        config = self.endpoints.get(role, EndpointConfig())
        if config not in self._holders:
            self._holders[config] = self._made(config)
        return self._holders[config]

    def _made(self, config: EndpointConfig) -> Holder:
        """Returns the holder that serves a config."""
        if config.via == "local":
            from interp.client.local.scheduling import LocalModel
            from interp.client.local.words import NAME, WordEncoder

            if config.model == NAME:
                return WordEncoder(self.ledger)
            return LocalModel(config, self.ledger, self._watch, self._shared.get(config.model))
        if config.via == "batch":
            from interp.client.remote.batch import Batches

            return Batches(config, self.ledger, self._cache, self._watch, self._poll_s)
        from interp.client.remote.http import Endpoint

        return Endpoint(config, self.ledger, self._cache, self._watch)

    async def _ask(self, request: Request) -> Reply:
        """Returns the stored reply, that of the same question under way, or one that is fetched now."""
        abilities = await self.abilities(request.role)
        lacking = abilities.lacking(request)
        if lacking:
            return Reply(failure="unsupported", detail=f"{self.endpoints[request.role].model} {lacking}")
        name = self._key(request, abilities)
        stored = None if name in self._flights else await self._stored(name, request, abilities)
        if stored is None and name not in self._flights:
            task = asyncio.create_task(self._fetch(name, request, abilities))
            self._flights[name] = task
            task.add_done_callback(lambda task: self._landed(name, task))
            return await asyncio.shield(task)  # others may wait for it too
        if stored is None:
            stored = replace(await asyncio.shield(self._flights[name]), cached=True)
        self.ledger.accounts[request.role].cached += 1
        return stored

    async def _fetch(self, name: str, request: Request, abilities: Abilities) -> Reply:
        holder = self._holder(request.role)
        async with holder.turns:  # a kill loses no more answers than calls may be out
            reply = await holder.answer(request, abilities)
            await self._keep({name: reply} if holder.keeps else {})
        return reply

    async def _stored(self, name: str, request: Request, abilities: Abilities) -> Reply | None:
        """Returns the stored reply to a question, made now of what a batch answered to it before it was asked.

        None where there is none, and of a failure that is to be tried again for the first time.
        """
        raw, reply = self._cache.raw(name), self._cache.reply(name)  # in this order: the one becomes the other
        if raw is not None and reply is None:
            reply = self._holder(request.role).read(request, abilities, raw)
            await self._cache.keep({name: reply}, raw={name: None})
        if reply is not None and not reply.ok and not self._is_final(request, reply):
            return None
        if reply is None or reply.ok or not self._retry_failed or name in self._retried:
            return reply
        if reply.failure == "parse" and isinstance(request, Chat):
            repaired = self._cache.reply(self._key(bodies.repair(request, reply.text, reply.detail), abilities))
            if repaired is not None and repaired.ok:
                return reply
        self._retried.add(name)
        return None

    @staticmethod
    def _is_final(request: Request, reply: Reply) -> bool:
        """Returns whether a failure is one of the question; earlier versions took some of a server's for such."""
        return reply.failure in FINAL and (reply.failure != "parse" or isinstance(request, Chat))

    async def _keep(self, replies: Mapping[str, Reply]) -> None:
        """Stores replies with what has been spent."""
        await self._cache.keep(replies, self.ledger.unsaved())

    async def _ask_wave(self, role: str, requests: Sequence[Request]) -> list[Reply]:
        """Returns the replies to a wave through the Batch API; there is no second try for what does not parse."""
        abilities = await self.abilities(role)
        names = [self._key(request, abilities) for request in requests]
        found: dict[str, Reply] = {}
        asked = dict(zip(names, requests, strict=True))
        for name in list(asked):
            stored = await self._stored(name, asked[name], abilities)
            if stored is not None:
                found[name] = stored
                del asked[name]
        self.ledger.accounts[role].cached += len(requests) - len(asked)
        if asked:
            found |= await self._holder(role).answer_all(role, asked, abilities)
        replies = [found[name] for name in names]
        for reply in replies:
            if not reply.ok:
                self.ledger.missing(role, reply.failure)
        return replies

    def _key(self, request: Request, abilities: Abilities) -> str:
        return cache_key(request, self.endpoints[request.role].model, self._holder(request.role).where, abilities)

    def _landed(self, name: str, task: "asyncio.Task[Reply]") -> None:
        self._flights.pop(name, None)
        if not task.cancelled():
            task.exception()  # seen, should nobody wait any more

    async def _halt_when_stopped(self) -> None:
        while not self._watch.should_stop():
            await asyncio.sleep(STOP_EVERY_S)
        for holder in self._holders.values():
            holder.halt()
