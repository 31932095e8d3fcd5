"""What answers for the roles of one model, whether on servers, in this process or behind the Batch API."""

import contextlib
from collections.abc import Mapping
from typing import Any, Protocol

from interp.client.requests import Abilities, Reply, Request


class Holder(Protocol):
    """The promise that all keep who answer requests: what `Client` asks, and nothing more.

    A subclass may leave as it is what stands here.
    """

    where: str = ""
    """What tells its answers from those of another model; of one in this process, known once it is loaded."""
    keeps: bool = True
    """Whether its answers are worth storing."""
    in_waves: bool = False
    """Whether requests are better handed over all at once (`answer_all`) than one by one."""
    waiting: int
    """How many requests to have waiting, that it is never idle."""
    turns: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
    """Held by whoever asks until the answer is stored."""

    async def check(self, role: str) -> None:
        """Returns if a role can be asked, without loading a model; else raises ConfigError in one line."""

    async def load(self, role: str) -> Abilities:
        """Returns what a role can ask; ConfigError in one line if the model cannot be had."""
        ...

    async def answer(self, request: Request, abilities: Abilities) -> Reply:
        """Returns the reply to a request, its cost counted; Stopped if no more calls are to be made."""
        ...

    async def answer_all(self, role: str, asked: dict[str, Request], abilities: Abilities) -> dict[str, Reply]:
        """Returns a reply for every key of a wave, all final ones stored."""
        return {key: await self.answer(request, abilities) for key, request in asked.items()}

    def read(self, request: Request, abilities: Abilities, raw: Mapping[str, Any]) -> Reply:
        """Returns the reply that an answer amounts to which was stored as it came, before its question was asked."""
        raise AssertionError("batches alone store answers as they come")

    def halt(self) -> None:
        """Has everything that waits, and all that comes, end with Stopped."""

    async def close(self) -> None:
        """Ends what it has begun."""
