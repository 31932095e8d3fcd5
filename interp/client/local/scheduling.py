"""A Hugging Face model in this process: judge, reader, explainer or encoder without any server.

Requests queue up for one thread, which takes all that it finds waiting and answers it batch by batch: what begins alike
goes together (`interp.client.local.prefix`), answers that must be written go with others of the same limit.
"""

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from interp.client.config import EndpointConfig
from interp.client.holder import Holder
from interp.client.ledger import Ledger
from interp.client.local import prefix
from interp.client.local.model import Model, Prompt, Ready, Spans, Texts, error_of_role
from interp.client.requests import Abilities, Reply, Request
from sae.base.errors import ConfigError, Stopped
from sae.base.progress import Watch
from sae.lm.files import load_config
from sae.lm.models import LanguageModel

WAITING = 2048
"""Requests that may wait for the model: the more, the better they can be sorted into batches."""
LINGER_S = 0.003
"""How long the thread waits for more questions once it has one: they come in flocks."""


@dataclass(eq=False)
class _Asked:
    request: Request
    answer: Callable[[Reply | BaseException], None]


Batch = list[tuple[_Asked, Ready]]


class Shared(Protocol):
    """A model that others run too: whoever holds the lock may."""

    lock: threading.RLock

    @property
    def lm(self) -> LanguageModel:
        """Returns the model."""
        ...


class LocalModel(Holder):
    """One model, its thread and its queue. Nothing is loaded before `load`, and never what is there already."""

    waiting = WAITING

    def __init__(self, config: EndpointConfig, ledger: Ledger, watch: Watch, shared: Shared | None = None) -> None:
        self.config, self.ledger, self.watch, self._shared = config, ledger, watch, shared
        self._turn = shared.lock if shared else contextlib.nullcontext()
        self._queue: queue.SimpleQueue[_Asked | None] = queue.SimpleQueue()
        self._model: Model | None = None
        self._lock, self._ending = threading.Lock(), False
        self._thread = threading.Thread(target=self._work, name="local model", daemon=True)

    async def check(self, role: str) -> None:
        """Raises ConfigError, naming the role's field, if there is no such model; loads nothing but its settings."""
        try:
            await asyncio.to_thread(load_config, self.config.model)
        except ConfigError as error:
            raise error_of_role(error, role) from error

    async def load(self, role: str) -> Abilities:
        """Returns what the model can be asked, loading it first; ConfigError in one line if it cannot be had."""
        await asyncio.to_thread(self._load, role)
        return self.model.abilities

    @property
    def model(self) -> Model:
        """Returns the model, once it is loaded."""
        assert self._model is not None, "load() comes first"
        return self._model

    async def answer(self, request: Request, abilities: Abilities) -> Reply:
        """Returns the reply; Stopped if no more are to be made."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Reply] = loop.create_future()

        def tell(result: Reply | BaseException) -> None:
            if not future.done():
                future.set_exception(result) if isinstance(result, BaseException) else future.set_result(result)

        def answer(result: Reply | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended: nobody waits
                loop.call_soon_threadsafe(tell, result)

        self._queue.put(_Asked(request, answer))
        reply = await future
        self.ledger.count_local(request.role, reply.tokens_in, reply.tokens_out)
        return reply

    async def close(self) -> None:
        """Ends the thread after the batch that it is at; what waits ends with Stopped."""
        if self._thread.is_alive():
            self._ending = True
            self._queue.put(None)
            await asyncio.to_thread(self._thread.join)

    def _load(self, role: str) -> None:
        with self._lock:
            if self._model is None:
                self._model = Model(self.config, role, self._shared.lm if self._shared else None)
                self.where = self._model.where
                self._thread.start()

    def _work(self) -> None:
        ended = False
        while not ended:
            waiting = [self._queue.get()]
            time.sleep(LINGER_S)
            while not self._queue.empty():
                waiting.append(self._queue.get())
            ended = None in waiting
            for batch in self._batches([asked for asked in waiting if asked is not None]):
                self._run(batch)

    def _batches(self, waiting: list[_Asked]) -> list[Batch]:
        """Returns the questions in batches, each with what it needs prepared; those that cannot be asked are told."""
        texts: list[tuple[_Asked, Spans]] = []
        prompts: dict[int, list[tuple[_Asked, Prompt]]] = {}
        batches: list[Batch] = []
        for asked in waiting:
            try:
                ready = self.model.prepared(asked.request)
            except Exception as error:  # whoever asked is told; the thread goes on
                asked.answer(error)
                continue
            if isinstance(ready, Spans):
                texts.append((asked, ready))
            elif isinstance(ready, Prompt):
                prompts.setdefault(ready.limit, []).append((asked, ready))
            elif isinstance(ready, Texts):
                batches.append([(asked, ready)])
            else:
                asked.answer(ready)
        for group in prefix.groups([ready.text for _, ready in texts], self.model.budget):
            batches.append([texts[number] for number in group])
        for limit, asked_so in prompts.items():
            asked_so.sort(key=lambda pair: len(pair[1].ids))
            while asked_so:
                rows = max(1, self.model.budget // (len(asked_so[-1][1].ids) + limit))
                batches.append([*asked_so[-rows:]])
                del asked_so[-rows:]
        return batches

    def _run(self, batch: Batch) -> None:
        """Answers a batch; one that does not fit into memory is halved."""
        if self._ending or self.watch.should_stop():
            for asked, _ in batch:
                asked.answer(Stopped("no more calls were made"))
            return
        try:
            with self._turn:
                replies = self.model.replies([(asked.request, ready) for asked, ready in batch])
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) > 1:
                self._run(batch[: len(batch) // 2])
                self._run(batch[len(batch) // 2 :])
            else:
                batch[0][0].answer(Reply(failure="server_error", detail="out of memory"))
            return
        except Exception as error:  # whoever asked is told; the thread goes on
            for asked, _ in batch:
                asked.answer(error)
            return
        for (asked, _), reply in zip(batch, replies, strict=True):
            asked.answer(reply)
