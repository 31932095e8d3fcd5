"""Metrics to a tracker, if asked: wandb or trackio."""

import importlib
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from threading import Thread
from typing import Any

from sae.base.errors import ConfigError
from sae.base.progress import Aside

CALLS_WAITING = 10_000  # of a tracker that does not keep up
FINISH_S = 60.0


class Tracker:
    """Sends metrics to wandb or trackio, which take the same calls; "none" sends nothing.

    They are made in a thread of their own: whatever becomes of them, it neither ends the run nor holds it up. Only one
    that cannot begin is refused, with ConfigError.
    """

    def __init__(self, name: str, project: str, run: str, config: dict[str, Any]) -> None:
        self.module: Any = None
        self.aside = Aside(f"log.tracker: {name}", "the run goes on, its figures are in metrics.jsonl")
        self._calls: queue.Queue[tuple[Future[Any], Callable[[], Any]]] = queue.Queue(CALLS_WAITING)
        self._made: deque[Future[Any]] = deque()
        if name == "none":
            return
        Thread(target=self._work, name="tracker", daemon=True).start()
        try:
            self.module = importlib.import_module(name)
            self._send(partial(self.module.init, project=project, name=run, config=config)).result()
        except Exception as error:  # not logged in, no network, a package that does not fit: known before any long work
            if isinstance(error, ModuleNotFoundError) and error.name == name:
                raise ConfigError(f"log.tracker: {name} is not installed; pip install 'sae-interp[{name}]'") from error
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConfigError(f"log.tracker: {name} cannot begin ({reason}); log.tracker: none does without") from error

    def log(self, values: dict[str, float], step: int) -> None:
        """Sends one line of metrics."""
        if self.module is not None:
            while self._made and self._made[0].done():
                with self.aside:
                    self._made.popleft().result()
            with self.aside:
                self._made.append(self._send(partial(self.module.log, values, step=step)))

    def finish(self) -> None:
        """Ends the tracker's run, waiting a minute at most for what is on its way."""
        if self.module is None:
            return
        with self.aside:
            self._made.append(self._send(self.module.finish))
        end = time.monotonic() + FINISH_S
        for call in self._made:
            with self.aside:
                try:
                    call.result(max(0.0, end - time.monotonic()))
                except TimeoutError as error:
                    raise TimeoutError(f"still at it after {FINISH_S:g} s") from error

    def _send(self, call: Callable[[], Any]) -> "Future[Any]":
        future: Future[Any] = Future()
        self._calls.put_nowait((future, call))
        return future

    def _work(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # an exit too is for the thread that asked
                future.set_exception(error)
